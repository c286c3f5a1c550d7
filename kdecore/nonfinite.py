"""Keys and values that are not finite: met one by one by every query that sees them, apart from all others.

Estimates would spread them to queries that don't see them, or miss them where they should spoil the result. Apart from the
rest, they do what they do to exact attention: a logit that is NaN or +∞ makes a row NaN, a key at −∞ counts for nothing, and
a value that isn't finite makes its column ±∞ or NaN in every row that sees it.
"""

from functools import partial, reduce

from kdecore.attend import mask_bias
from kdecore.inputs import Problem
from kdecore.merge import Part, merge, softmax_part
from kdecore.namespaces import TILE_ELEMENTS, Array, quiet, spans


def not_finite_part(problem: Problem) -> Part:
    """Return attention to such keys: out (G, n_q, d_v), lse (G, n_q). O(G n_q n_k (d + d_v)) for so many of them."""
    xp, groups = problem.xp, problem.groups
    keys_step = min(problem.n_k, 1024)
    rows_step = max(1, TILE_ELEMENTS // (groups * keys_step))
    with quiet():
        rows = [
            reduce(partial(merge, xp), [tile(problem, row, key) for key in spans(problem.n_k, keys_step)])
            for row in spans(problem.n_q, rows_step)
        ]
    return Part(xp.concat([part.out for part in rows], axis=1), xp.concat([part.lse for part in rows], axis=1))


def tile(problem: Problem, row: slice, key: slice) -> Part:
    """Return the same for some queries and some keys."""
    xp = problem.xp
    k, v = problem.k[:, key, :], problem.v[:, key, :]
    logits = (problem.q[:, row, :] * problem.scale) @ xp.matrix_transpose(k)
    bias = hidden(problem, row, key)
    seen = bias > -xp.inf
    logits = xp.where(seen, logits + bias, -xp.inf)
    spoilt = xp.any(seen & (xp.isnan(logits) | (logits == xp.inf)), axis=-1)
    logits = xp.where(xp.isfinite(logits), logits, -xp.inf)
    part = softmax_part(xp, logits, xp.where(xp.isfinite(v), v, 0.0))
    counted = xp.astype(logits > -xp.inf, v.dtype)

    def reached(which: Array) -> Array:
        return counted @ xp.astype(which, v.dtype) > 0

    nan, above, below = reached(xp.isnan(v)), reached(v == xp.inf), reached(v == -xp.inf)
    out = xp.where(above, xp.inf, xp.where(below, -xp.inf, part.out))
    out = xp.where(nan | (above & below) | spoilt[..., None], xp.nan, out)
    return Part(out, xp.where(spoilt, xp.nan, part.lse))


def hidden(problem: Problem, row: slice, key: slice) -> Array:
    """Return what intervals and mask add to the logits of some queries and keys: (1 or G, rows, keys)."""
    xp, device = problem.xp, problem.device
    rows, keys = (xp.arange(part.start, part.stop, dtype=xp.int64, device=device) for part in (row, key))
    if problem.mask is not None:
        spread = (problem.groups, 1)
        index = (xp.broadcast_to(x, (*spread, x.shape[0])) for x in (rows, keys))
        return mask_bias(problem, *index)[:, 0, ...]
    bias = xp.zeros((rows.shape[0], keys.shape[0]), dtype=problem.q.dtype, device=device)
    if problem.visible is not None:
        first, end = (xp.asarray(x[row], device=device)[:, None] for x in (problem.visible.first, problem.visible.end))
        bias = xp.where((keys >= first) & (keys < end), bias, -xp.inf)
    return bias[None, ...]
