"""How keys differ from means together with their values, over keys drawn for each of some blocks."""

from kdecore.kernels.gap_moments import cpu, reference

__all__ = ["cpu", "reference"]
