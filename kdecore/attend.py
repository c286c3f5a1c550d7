"""`attend`: the one engine, Selection → Part, through the kernels that the plan chose."""

from kdecore.inputs import Problem
from kdecore.merge import Part
from kdecore.namespaces import Array
from kdecore.planning import Plan
from kdecore.selection import Selection


def attend(problem: Problem, plan: Plan, selection: Selection) -> Part:
    """Evaluate a Selection.

    Returns
    -------
    Part
        out (G, n_q, d_v) and lse (G, n_q) in the accumulation dtype and in the order of the queries.
    """
    xp = problem.xp
    if selection.blocks is None or selection.key_index is None:
        part: Part = plan.kernels["attend_dense"].function(xp, problem.q, problem.k, problem.v, problem.scale)
        return part

    keys = problem.k if selection.keys is None else selection.keys
    values = problem.v if selection.values is None else selection.values

    def flat(array: Array) -> Array:
        return xp.reshape(array, (array.shape[0] * array.shape[1], *array.shape[2:]))

    def global_index(index: Array, n: int) -> Array:
        if problem.groups == 1:
            return flat(index)
        offset = xp.arange(problem.groups, dtype=xp.int64, device=problem.device) * n
        return flat(index + xp.reshape(offset, (-1, *(1,) * (index.ndim - 1))))

    part = plan.kernels["attend_blocks"].function(
        xp,
        flat(problem.q),
        flat(keys),
        flat(values),
        global_index(selection.blocks.index, problem.n_q),
        global_index(selection.key_index, keys.shape[1]),
        flat(selection.log_weight),
        problem.scale,
    )
    lead = (problem.groups, problem.n_q)
    out, lse = xp.reshape(part.out, (*lead, int(values.shape[2]))), xp.reshape(part.lse, lead)
    if selection.slope is not None:
        change = plan.kernels["project_rows"].function(xp, problem.q, selection.slope * problem.scale)
        change *= out[:, :, -1:]
        change += out[:, :, :-1]
        out = change
    if selection.log_normaliser is None:
        return Part(out, lse)
    return Part(out * xp.exp(lse - selection.log_normaliser)[..., None], selection.log_normaliser)
