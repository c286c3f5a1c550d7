"""`rank_codes` in the array API."""

from kdecore.arrays.memory import contiguous
from kdecore.arrays.namespace import Array, Namespace
from kdecore.arrays.rows import searchsorted_rows, take_along_rows
from kdecore.kernels.rank_codes.contract import RATIO, SAMPLE


def rank_codes(xp: Namespace, x: Array, bits: int, in_order: int = 0) -> Array:
    """Follow `kdecore.kernels.rank_codes.contract.RankCodes`."""
    groups, n, p = x.shape
    x = xp.where(xp.isfinite(x), x, 0.0)
    count = min(SAMPLE, n)
    place = xp.arange(count, dtype=xp.int64, device=x.device) * n // count
    sample = xp.take(x, place, axis=1)
    variance = xp.var(sample, axis=1)
    by_column = contiguous(xp.reshape(xp.matrix_transpose(x), (groups * p, n)))
    ascending = contiguous(xp.reshape(xp.matrix_transpose(xp.sort(sample, axis=1)), (groups * p, count)))
    ranks = xp.reshape(searchsorted_rows(xp, ascending, by_column, side="right"), (groups, p, n))
    given = xp.zeros((groups, p), dtype=xp.int64, device=x.device)
    code = xp.zeros((groups, n), dtype=xp.int64, device=x.device)
    for _ in range(bits - in_order):
        widest = xp.argmax(variance, axis=1)[:, None]
        chosen = widest == xp.arange(p, dtype=widest.dtype, device=x.device)[None, :]
        variance = xp.where(chosen, variance / RATIO, variance)
        given = given + xp.astype(chosen, xp.int64)
        cell = (take_along_rows(xp, ranks, widest)[:, 0, :] << take_along_rows(xp, given, widest)) // (count + 1)
        code = (code << 1) | ((cell ^ (cell >> 1)) & 1)
    shift = 1
    while shift < bits - in_order:
        code = code ^ (code >> shift)
        shift *= 2
    position = xp.arange(n, dtype=xp.int64, device=x.device)
    node = (((position + 1) << in_order) - 1) // n
    return xp.astype((node[None, :] << (bits - in_order)) | code, xp.int32)
