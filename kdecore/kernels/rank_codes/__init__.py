"""Codes that put rows which are alike next to each other, in one sort."""

from kdecore.kernels.rank_codes import reference

__all__ = ["reference"]
