"""Systematic sampling without replacement, outside each block's own window."""

from kdecore.kernels.draw_indices import cpu, reference

__all__ = ["cpu", "reference"]
