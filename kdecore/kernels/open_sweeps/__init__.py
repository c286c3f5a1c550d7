"""For every block of queries, the nodes of a tree over the keys that stand for all keys, chosen level by level."""

from kdecore.kernels.open_sweeps import reference

__all__ = ["reference"]
