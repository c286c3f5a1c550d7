"""Order in which similar rows lie next to each other: a balanced tree of median splits."""

from kdecore.kernels.tree_order import cpu, reference

__all__ = ["cpu", "reference"]
