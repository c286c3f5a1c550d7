"""Mean products of the columns of many rows."""

from kdecore.kernels.cross_moment import cpu, reference

__all__ = ["cpu", "reference"]
