"""Coordinates in which queries and keys have one diagonal second moment."""

from kdecore.kernels.balanced_view import reference

__all__ = ["reference"]
