"""What every node of a tree says of the keys and values in it."""

from kdecore.kernels.node_summaries import cpu, reference

__all__ = ["cpu", "reference"]
