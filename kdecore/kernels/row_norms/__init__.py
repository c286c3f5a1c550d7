"""Norms of values, for sampling weights."""

from kdecore.kernels.row_norms import cpu, reference

__all__ = ["cpu", "reference"]
