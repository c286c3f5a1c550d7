"""`attend`: the one engine, Selection → AttentionState, through the kernels that the plan chose."""

from collections.abc import Callable
from typing import TypeAlias

from kdecore.arrays.gradients import gradient_mode, without_gradient
from kdecore.arrays.memory import contiguous
from kdecore.arrays.namespace import Array, Namespace
from kdecore.arrays.rows import spans, take_along_rows
from kdecore.core.problem import Problem
from kdecore.core.selection import Blocks, Opening, Selected, Selection, Slots, changed, slots_evaluated, slots_of
from kdecore.core.state import AttentionState, merge_states
from kdecore.core.tree import BlockQueries
from kdecore.methods.base import Plan
from kdecore.methods.memory import MASK_TILE

Watch: TypeAlias = Callable[[Slots], object]
"""Told how many slots each Selection that was evaluated had."""


def attend(
    problem: Problem, plan: Plan, selection: Selected, before: AttentionState | None = None, watch: Watch | None = None
) -> AttentionState:
    """Evaluate a Selection, and merge the result with ``before``, whose memory it may take.

    Returns
    -------
    AttentionState
        out (G, n_q, d_v) and lse (G, n_q) in the accumulation dtype and in the order of the queries.
    """
    xp = problem.xp
    if isinstance(selection, Opening):
        part, counts = attend_opening(problem, plan, selection, before)
        if watch is not None:
            watch(slots_of(xp, counts, selection.blocks, selection.own))
        return part
    if selection.blocks is None or selection.key_index is None:
        if watch is not None:
            watch(Slots(problem.groups * problem.n_q * problem.n_k, problem.n_k))
        part = attend_all(problem, plan)
        return part if before is None else merge_states(xp, before, part)
    if problem.mask is not None and any(x is not None for x in (selection.keys, selection.log_normaliser, selection.own)):
        raise ValueError(f"under a mask {plan.method} may select the problem's keys alone, without denominators or own keys")
    if watch is not None:
        watch(slots_evaluated(xp, selection))
    merged = selection.slope is None and selection.log_normaliser is None and selection.own is None
    part = attend_lists(problem, plan, selection, before if merged else None)
    return part if before is None or merged else merge_states(xp, before, part)


def attend_all(problem: Problem, plan: Plan) -> AttentionState:
    """Evaluate all keys."""
    if problem.mask is not None:
        return attend_masked(problem, plan)
    dense = plan.kernels.get("attend_dense", plan.exact).function
    part: AttentionState = dense(problem.xp, problem.q, problem.k, problem.v, problem.scale)
    return part


def attend_opening(
    problem: Problem, plan: Plan, opening: Opening, before: AttentionState | None
) -> tuple[AttentionState, Array]:
    """Evaluate what a tree opened down to a threshold gives; return that and the lengths of lists (G, B)."""
    first = opening.first_query
    end = first + int(opening.coordinates.shape[1])
    whole = (first, end) == (0, problem.n_q)

    def own_rows(rows: Array) -> Array:
        return rows if whole else contiguous(rows[:, first:end, ...])

    part, counts = plan.kernels["attend_tree"].function(
        problem.xp,
        BlockQueries(own_rows(problem.q), problem.scale, opening.coordinates, opening.blocks.index, opening.apart),
        opening.tree,
        opening.values,
        opening.threshold,
        opening.most,
        opening.start,
        opening.own,
        opening.slope,
        opening.limits,
        None if before is None else AttentionState(own_rows(before.out), own_rows(before.lse)),
    )
    if not whole:
        assert before is not None
        part = AttentionState(
            *(_put_rows(problem.xp, *pair, first) for pair in ((before.out, part.out), (before.lse, part.lse)))
        )
    return part, counts


def _put_rows(xp: Namespace, rows: Array, some: Array, first: int) -> Array:
    """Return rows (G, n, …) with some others in the place of those from the first on."""
    return xp.concat([rows[:, :first, ...], some, rows[:, first + int(some.shape[1]) :, ...]], axis=1)


def attend_lists(problem: Problem, plan: Plan, selection: Selection, before: AttentionState | None) -> AttentionState:
    """Evaluate each block's list; ``before`` as in `attend`, where nothing is to be done to the result of the lists."""
    xp = problem.xp
    assert selection.blocks is not None
    assert selection.key_index is not None
    keys = problem.k if selection.keys is None else selection.keys
    values = problem.v if selection.values is None else selection.values

    def flat(array: Array) -> Array:
        return xp.reshape(array, (array.shape[0] * array.shape[1], *array.shape[2:]))

    bias = selection.bias
    if problem.mask is not None:
        bias = flat(mask_bias(problem, selection.blocks.index, selection.key_index))
    more = {} if bias is None else {"bias": bias}
    if before is not None:
        more["before"] = AttentionState(flat(before.out), flat(before.lse))
    part = plan.kernels["attend_blocks"].function(
        xp,
        xp.astype(flat(problem.q), keys.dtype, copy=False),
        flat(keys),
        flat(values),
        *(flat(x) for x in (selection.blocks.index, selection.key_index, selection.log_weight)),
        problem.scale,
        groups=problem.groups,
        whole=(selection.blocks.starts[0], selection.blocks.starts[-1]) == (0, problem.n_q),
        **more,
    )
    lead = (problem.groups, problem.n_q)
    out, lse = xp.reshape(part.out, (*lead, int(values.shape[2]))), xp.reshape(part.lse, lead)
    if selection.slope is not None:
        change = changed(xp, problem.q, selection, plan.kernels["project_rows"].function, problem.scale)
        change *= out[:, :, -1:]
        change += out[:, :, :-1]
        out = change
    if selection.limits is not None:
        low, high = (x[:, None, :] for x in selection.limits)
        held = xp.minimum(xp.maximum(out, low), high)
        # The gradient is that of a result that nothing holds: where values are all alike, rounding passes the limits.
        out = out + without_gradient(held - out) if gradient_mode(out) else held
    part = AttentionState(out, lse)
    if selection.own is not None:
        part = merge_states(xp, part, own_part(problem, selection.own))
    if selection.log_normaliser is not None:
        part = AttentionState(out * xp.exp(lse - selection.log_normaliser)[..., None], selection.log_normaliser)
    return part


def own_part(problem: Problem, own: Array) -> AttentionState:
    """Return attention of each query to the one key ``own`` (G, n_q), −1 for none."""
    xp, index = problem.xp, problem.xp.maximum(own, problem.xp.zeros_like(own))
    q, k, v = (
        xp.astype(x, problem.dtype, copy=False)
        for x in (problem.q, *(take_along_rows(xp, x, index) for x in (problem.k, problem.v)))
    )
    logits = xp.sum(q * k, axis=-1) * problem.scale
    return AttentionState(xp.where((own < 0)[..., None], 0.0, v), xp.where(own < 0, -xp.inf, logits))


def mask_bias(problem: Problem, rows: Array, keys: Array) -> Array:
    """Return what the mask, and intervals beside it, add to logits of rows (G, B, b) and keys (G, B, s): (G, B, b, s)."""
    xp = problem.xp
    assert problem.mask is not None
    bias = problem.mask.bias(xp, rows, keys, problem.dtype)
    if problem.visible is None:
        return bias
    first, end = (
        xp.reshape(xp.take(xp.asarray(x, device=problem.device), xp.reshape(rows, (-1,))), rows.shape)[..., None]
        for x in (problem.visible.first, problem.visible.end)
    )
    key = keys[:, :, None, :]
    return xp.where((key >= first) & (key < end), bias, -xp.inf)


def attend_masked(problem: Problem, plan: Plan) -> AttentionState:
    """Evaluate all keys under a mask, a few queries at a time, so that their mask is as small as a tile."""
    xp, groups, n_k = problem.xp, problem.groups, problem.n_k
    every = xp.broadcast_to(xp.arange(n_k, dtype=xp.int64, device=problem.device), (groups, 1, n_k))
    weight = xp.zeros((groups, 1, n_k), dtype=problem.dtype, device=problem.device)
    parts = []
    for part in spans(problem.n_q, max(1, MASK_TILE // (groups * n_k))):
        index = xp.arange(part.start, part.stop, dtype=xp.int64, device=problem.device)
        rows = xp.broadcast_to(index, (groups, 1, part.stop - part.start))
        bias = mask_bias(problem, rows, every)
        local = Blocks(rows - part.start, (0, part.stop - part.start))
        selection = Selection(local, every, weight, bias=xp.reshape(bias, (groups, -1, n_k)))
        parts.append(attend(problem.rows(part.start, part.stop), plan, selection))
    return AttentionState(xp.concat([one.out for one in parts], axis=1), xp.concat([one.lse for one in parts], axis=1))
