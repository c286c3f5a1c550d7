"""`hash_codes` in the array API."""

from kdecore.arrays.namespace import Array, Namespace


def hash_codes(xp: Namespace, q: Array, k: Array, planes: Array) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.hash_codes.contract.HashCodes`."""
    return hash_rows(xp, q, planes), hash_rows(xp, k, planes)


def hash_rows(xp: Namespace, x: Array, planes: Array) -> Array:
    """Return the buckets of rows (G, n, d)."""
    bits = int(planes.shape[1])
    projected = xp.astype(x, planes.dtype, copy=False) @ planes
    # Subtracting the mean of the projections is projecting the centred rows, without a centred copy of x.
    finite = xp.isfinite(projected)
    count = xp.sum(xp.astype(finite, xp.float64), axis=1, keepdims=True)
    total = xp.sum(xp.where(finite, projected, 0.0), axis=1, keepdims=True, dtype=xp.float64)
    signs = projected > xp.astype(total / xp.where(count > 0, count, 1.0), planes.dtype)
    integer = xp.int16 if bits <= 15 else xp.int32
    code = xp.zeros(x.shape[:2], dtype=integer, device=x.device)
    for bit in range(bits):
        code = (code << 1) | xp.astype(signs[..., bit], integer)
    shift = 1
    while shift < bits:
        code = code ^ (code >> shift)
        shift *= 2
    return code
