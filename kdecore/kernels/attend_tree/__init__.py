"""Attention of blocks of queries to what opening a tree over the keys gives, in one pass."""

from kdecore.kernels.attend_tree import cpu, reference

__all__ = ["cpu", "reference"]
