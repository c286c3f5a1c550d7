"""Which rows hold only finite numbers, found without waiting for a device."""

from kdecore.kernels.finite_rows import reference

__all__ = ["reference"]
