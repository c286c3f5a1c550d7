"""Sign-LSH bucket of every row, as its rank in Gray order."""

from kdecore.kernels.hash_codes import cpu, reference

__all__ = ["cpu", "reference"]
