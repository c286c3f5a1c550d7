"""Which stretch of keys in hash order each block of queries meets."""

from kdecore.kernels.bucket_windows import reference

__all__ = ["reference"]
