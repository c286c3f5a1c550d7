"""Second moments of evenly spaced rows."""

from kdecore.kernels.second_moment import cpu, reference

__all__ = ["cpu", "reference"]
