"""Order of rows by bucket."""

from kdecore.kernels.bucket_order import cpu, reference

__all__ = ["cpu", "reference"]
