"""Numbers that are not finite, kept apart from estimates, and doing what they do to exact attention.

A query that holds one has a row of NaN, if it sees a key. Keys and values are met one by one by every query that sees them:
estimates would spread them to others, or miss them. A logit that is NaN or +∞ makes a row NaN, a key at −∞ counts for
nothing, and a value that isn't finite makes its column ±∞ or NaN in every row that sees it, however small its weight.

On accelerators nothing is read to find out, which would wait for the device: there such a key or value makes NaN of all
queries of its group that see a key, those that don't see this one among them.
"""

import math
from dataclasses import replace
from functools import partial, reduce

from kdecore.arrays.gradients import without_gradient
from kdecore.arrays.memory import quiet, to_host
from kdecore.arrays.namespace import Array, Namespace, host, on_accelerator
from kdecore.arrays.rows import TILE_ELEMENTS, spans
from kdecore.core.problem import Problem
from kdecore.core.state import AttentionState, merge_states, softmax_part
from kdecore.engine.attend import mask_bias
from kdecore.kernels.finite_rows.reference import finite_rows
from kdecore.kernels.registry import choose
from kdecore.methods.base import Plan
from kdecore.methods.choices import site_of


def surely_finite(xp: Namespace, array: Array) -> bool:
    """Return whether all numbers are finite; False where so many large ones only add up to infinity. One reading."""
    with quiet():
        return math.isfinite(float(xp.sum(without_gradient(array))))


def not_finite_keys(problem: Problem) -> Array | None:
    """Return which keys, or their values, hold a number that is not finite, NumPy bool (G, n_k); None for none.

    None on accelerators too, where a look would wait for the device: see `spoilt_by_keys`.
    """
    xp = problem.xp
    if on_accelerator(problem.k):
        return None
    if surely_finite(xp, problem.k) and surely_finite(xp, problem.v):
        return None
    k, v = without_gradient(problem.k), without_gradient(problem.v)
    bad = to_host(~(xp.all(xp.isfinite(k), axis=-1) & xp.all(xp.isfinite(v), axis=-1)))
    return bad if bool(host.any(bad)) else None


def finite_queries(problem: Problem, target: str) -> tuple[Problem, Array | None]:
    """Return a problem with 0 for queries that are not finite, and which are, bool (G, n_q); None for all.

    On accelerators by the kernel that ``target``, `kdecore.attention`'s ``kernels``, means.
    """
    xp = problem.xp
    if on_accelerator(problem.q):
        q, finite = choose("finite_rows", site_of(problem), target).function(xp, problem.q)
    elif surely_finite(xp, problem.q):
        return problem, None
    else:
        q, finite = finite_rows(xp, problem.q)
    return replace(problem, q=q), finite


def spoilt(problem: Problem, part: AttentionState, finite: Array | None, target: str, like: Array) -> AttentionState:
    """Return a result that is NaN for queries (G, n_q) which are not ``finite`` and see a key, and where lse is NaN.

    With ``out`` of the dtype of ``like``, but where all queries are known to be finite; by the kernel that ``target`` means.
    """
    if finite is None:
        return part
    spoil = choose("spoil_rows", site_of(problem), target).function
    found: AttentionState = spoil(problem.xp, part, finite, like)
    return found


def spoilt_by_keys(problem: Problem, plan: Plan, part: AttentionState) -> AttentionState:
    """Return a result whose lse, on accelerators, is NaN for groups that have a key or value which isn't finite.

    `spoilt` does the same to ``out`` in the end, together with what queries spoil.
    """
    if not on_accelerator(problem.k):
        return part
    return AttentionState(part.out, plan.kernels["spoil_groups"].function(problem.xp, part.lse, problem.k, problem.v))


def not_finite_part(problem: Problem) -> AttentionState:
    """Return attention to such keys: out (G, n_q, d_v), lse (G, n_q). O(G n_q n_k (d + d_v)) for so many of them."""
    xp, groups = problem.xp, problem.groups
    keys_step = min(problem.n_k, 1024)
    rows_step = max(1, TILE_ELEMENTS // (groups * keys_step))
    with quiet():
        rows = [
            reduce(partial(merge_not_finite, xp), [tile(problem, row, key) for key in spans(problem.n_k, keys_step)])
            for row in spans(problem.n_q, rows_step)
        ]
    return AttentionState(xp.concat([part.out for part in rows], axis=1), xp.concat([part.lse for part in rows], axis=1))


def merge_not_finite(xp: Namespace, a: AttentionState, b: AttentionState) -> AttentionState:
    """Merge parts whose results may be infinite: a weight is positive, however small, and leaves them so."""
    with quiet():
        part = merge_states(xp, a, b)
        # ∞ of both signs, or with NaN, is NaN.
        both = xp.where(xp.isfinite(a.out), 0.0, a.out) + xp.where(xp.isfinite(b.out), 0.0, b.out)
        return AttentionState(xp.where((both == 0) | xp.isnan(part.lse)[..., None], part.out, both), part.lse)


def tile(problem: Problem, row: slice, key: slice) -> AttentionState:
    """Return the same for some queries and some keys."""
    xp = problem.xp
    k, v = problem.k[:, key, :], problem.v[:, key, :]
    logits = (problem.q[:, row, :] * problem.scale) @ xp.matrix_transpose(k)
    bias = hidden(problem, row, key)
    seen = bias > -xp.inf
    logits = xp.where(seen, logits + bias, -xp.inf)
    lost = xp.any(seen & (xp.isnan(logits) | (logits == xp.inf)), axis=-1)
    logits = xp.where(xp.isfinite(logits), logits, -xp.inf)
    part = softmax_part(xp, logits, xp.where(xp.isfinite(v), v, 0.0))
    counted = xp.astype(logits > -xp.inf, v.dtype)

    def reached(which: Array) -> Array:
        return counted @ xp.astype(which, v.dtype) > 0

    nan, above, below = reached(xp.isnan(v)), reached(v == xp.inf), reached(v == -xp.inf)
    out = xp.where(above, xp.inf, xp.where(below, -xp.inf, part.out))
    out = xp.where(nan | (above & below) | lost[..., None], xp.nan, out)
    return AttentionState(out, xp.where(lost, xp.nan, part.lse))


def hidden(problem: Problem, row: slice, key: slice) -> Array:
    """Return what intervals and mask add to the logits of some queries and keys: (1 or G, rows, keys)."""
    xp, device = problem.xp, problem.device
    if problem.mask is not None:
        rows, keys = (xp.arange(part.start, part.stop, dtype=xp.int64, device=device) for part in (row, key))
        spread = (problem.groups, 1)
        index = (xp.broadcast_to(x, (*spread, x.shape[0])) for x in (rows, keys))
        return mask_bias(problem, *index)[:, 0, ...]
    if problem.visible is None:
        return xp.zeros((1, row.stop - row.start, key.stop - key.start), dtype=problem.dtype, device=device)
    bias = problem.visible.rows(row).bias(key.start, key.stop)
    return xp.asarray(bias, dtype=problem.dtype, device=device)
