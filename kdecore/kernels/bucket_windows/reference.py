"""`bucket_windows` in the array API, in integers throughout."""

from kdecore.arrays.namespace import Array, Namespace
from kdecore.arrays.rows import searchsorted_integers, take_along_rows


def bucket_windows(
    xp: Namespace, query_codes: Array, query_order: Array, key_codes: Array, key_order: Array, blocks: int, size: int
) -> Array:
    """Follow `kdecore.kernels.bucket_windows.contract.BucketWindows`."""
    n_q, n_k = int(query_order.shape[1]), int(key_order.shape[1])
    number = xp.arange(blocks, dtype=xp.int64, device=query_codes.device)
    middle = (number * n_q // blocks + (number + 1) * n_q // blocks) // 2
    queries, keys = take_along_rows(xp, query_codes, query_order), take_along_rows(xp, key_codes, key_order)
    code = xp.take(queries, middle, axis=1)

    def bucket(codes: Array) -> tuple[Array, Array]:
        first = searchsorted_integers(xp, codes, code, side="left")
        return first, searchsorted_integers(xp, codes, code, side="right") - first

    q_first, q_count = bucket(queries)
    k_first, k_count = bucket(keys)
    halves = (2 * (middle - q_first) + 1) * k_count - size * q_count
    return xp.clip(k_first + halves // (2 * q_count), 0, n_k - size)
