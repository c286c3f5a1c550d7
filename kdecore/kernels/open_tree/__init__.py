"""For every block of queries, the nodes of a tree over the keys that stand for all keys."""

from kdecore.kernels.open_tree import cpu, reference

__all__ = ["cpu", "reference"]
