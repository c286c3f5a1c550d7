"""`attend`: the one engine, Selection → Part, through the kernels that the plan chose."""

from kdecore.inputs import Problem
from kdecore.merge import Part, merge
from kdecore.namespaces import Array, spans
from kdecore.planning import MASK_TILE, Plan
from kdecore.selection import Blocks, Selection


def attend(problem: Problem, plan: Plan, selection: Selection, before: Part | None = None) -> Part:
    """Evaluate a Selection, and merge the result with ``before``, whose memory it may take.

    Returns
    -------
    Part
        out (G, n_q, d_v) and lse (G, n_q) in the accumulation dtype and in the order of the queries.
    """
    xp = problem.xp
    if selection.blocks is None or selection.key_index is None:
        part: Part
        if problem.mask is not None:
            part = attend_masked(problem, plan)
        else:
            part = plan.kernels["attend_dense"].function(xp, problem.q, problem.k, problem.v, problem.scale)
        return part if before is None else merge(xp, before, part)

    keys = problem.k if selection.keys is None else selection.keys
    values = problem.v if selection.values is None else selection.values

    def flat(array: Array) -> Array:
        return xp.reshape(array, (array.shape[0] * array.shape[1], *array.shape[2:]))

    def global_index(index: Array, n: int) -> Array:
        if problem.groups == 1:
            return flat(index)
        offset = xp.arange(problem.groups, dtype=xp.int64, device=problem.device) * n
        return flat(index + xp.reshape(offset, (-1, *(1,) * (index.ndim - 1))))

    bias = selection.bias
    if problem.mask is not None:
        bias = flat(mask_bias(problem, selection.blocks.index, selection.key_index))
    more = {} if bias is None else {"bias": bias}
    changes = selection.slope is not None or selection.log_normaliser is not None
    if before is not None and not changes:
        more["before"] = Part(flat(before.out), flat(before.lse))
    part = plan.kernels["attend_blocks"].function(
        xp,
        xp.astype(flat(problem.q), keys.dtype, copy=False),
        flat(keys),
        flat(values),
        global_index(selection.blocks.index, problem.n_q),
        global_index(selection.key_index, keys.shape[1]),
        flat(selection.log_weight),
        problem.scale,
        **more,
    )
    lead = (problem.groups, problem.n_q)
    out, lse = xp.reshape(part.out, (*lead, int(values.shape[2]))), xp.reshape(part.lse, lead)
    if selection.slope is not None:
        change = plan.kernels["project_rows"].function(xp, problem.q, selection.slope * problem.scale)
        change *= out[:, :, -1:]
        change += out[:, :, :-1]
        out = change
    part = Part(out, lse)
    if selection.log_normaliser is not None:
        part = Part(out * xp.exp(lse - selection.log_normaliser)[..., None], selection.log_normaliser)
    return part if before is None or not changes else merge(xp, before, part)


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


def attend_masked(problem: Problem, plan: Plan) -> Part:
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
    return Part(xp.concat([one.out for one in parts], axis=1), xp.concat([one.lse for one in parts], axis=1))
