"""The error above which nodes of a tree over the keys are opened, for lists of a given mean length."""

from kdecore.kernels.pick_threshold import cpu, reference

__all__ = ["cpu", "reference"]
