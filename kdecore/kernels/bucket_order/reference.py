"""`bucket_order` in the array API."""

from kdecore.arrays.namespace import Array, Namespace


def bucket_order(xp: Namespace, codes: Array, bits: int) -> Array:
    """Follow `kdecore.kernels.bucket_order.contract.BucketOrder`."""
    return xp.astype(xp.argsort(codes, axis=-1, stable=True), xp.int64, copy=False)
