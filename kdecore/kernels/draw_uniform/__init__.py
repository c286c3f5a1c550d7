"""Random numbers in [0, 1) from counters."""

from kdecore.kernels.draw_uniform import reference

__all__ = ["reference"]
