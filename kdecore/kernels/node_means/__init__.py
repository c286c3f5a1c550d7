"""Mean and spread of the rows in every node of a tree."""

from kdecore.kernels.node_means import cpu, reference

__all__ = ["cpu", "reference"]
