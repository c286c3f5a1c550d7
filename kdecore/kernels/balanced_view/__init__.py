"""Coordinates in which queries and keys have one diagonal second moment."""

from kdecore.kernels.balanced_view import cpu, reference

__all__ = ["cpu", "reference"]
