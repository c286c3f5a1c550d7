"""Attention of blocks of queries to lists of keys."""

from kdecore.kernels.attend_blocks import cpu, reference

__all__ = ["cpu", "reference"]
