"""Lists of tree nodes and keys as Selections: with means, with keys drawn from nodes, with own keys, for other queries."""

from dataclasses import replace

from kdecore.arrays.gradients import without_gradient
from kdecore.arrays.memory import contiguous
from kdecore.arrays.namespace import Array, Namespace
from kdecore.arrays.random import SAMPLES_STREAM
from kdecore.arrays.rows import take_along_rows
from kdecore.core.problem import Problem
from kdecore.core.selection import Selected, Selection, in_order_of_queries
from kdecore.core.tree import node_bounds
from kdecore.methods.base import Plan
from kdecore.methods.key_tree import KeyTree
from kdecore.methods.tree_queries import PreparedTree

GOLDEN_RATIO = (5.0**0.5 - 1.0) / 2.0


def for_queries(problem: Problem, keys: KeyTree, selected: Selected) -> Selected:
    """Return what was selected for a problem's queries, which may be longer than those that its tree was built for.

    What the first-order term takes a node's spread for falls with 1 / √(mean ‖q‖²), where the spread is wide for a query's
    logits (`TreeNodes.values`). It was found for other queries: for longer ones the term shrinks so in all nodes.
    O(G n_q d).
    """
    if selected.slope is None:
        return selected
    xp, q, known = problem.xp, without_gradient(problem.q), keys.view.half_norm
    norms = xp.sum(xp.astype(q, problem.dtype, copy=False) ** 2, axis=-1)
    half_norm = xp.mean(norms, axis=-1) * (0.5 * problem.scale**2 / problem.d)
    longer = half_norm > known
    factor = xp.sqrt(xp.where(longer, known, 1.0) / xp.where(longer, half_norm, 1.0))
    return replace(selected, slope=selected.slope * factor[:, None, None, None])


def of_nodes(problem: Problem, keys: KeyTree, selection: Selection) -> Selection:
    """Return a Selection of nodes and keys in the tree's order as one that has these as its keys and values."""
    # float16 might not hold a spread.
    stored = problem.k.dtype if problem.input_dtype == "bfloat16" else problem.dtype
    values = keys.nodes.values if selection.slope is not None else contiguous(keys.nodes.values[:, :, :-1])
    rows = (problem.xp.astype(x, stored, copy=False) for x in (keys.nodes.keys, values))
    return replace(selection, **dict(zip(("keys", "values"), rows, strict=True)))


def unlisted(problem: Problem, prepared: PreparedTree, key_index: Array, log_weight: Array) -> Array:
    """Return each query's own key, int64 (G, n_q), −1 where its block lists it or there is none."""
    xp, own, index = problem.xp, prepared.own, prepared.blocks.index
    assert own is not None
    nodes = int(prepared.keys.unseen.shape[1])
    place = take_along_rows(xp, own, index)
    # Slots that a list does not have are its last, and no key
    ascending = xp.where(log_weight == -xp.inf, nodes + problem.n_k, key_index)
    again = among(xp, ascending, place + nodes, nodes + problem.n_k)
    mine = xp.where(
        again | (place < 0), -1, take_along_rows(xp, prepared.keys.order, xp.maximum(place, xp.zeros_like(place)))
    )
    # Queries in no block have none here.
    return xp.where(own < 0, -1, in_order_of_queries(xp, index, mine, problem.n_q))


def among(xp: Namespace, ascending: Array, wanted: Array, n: int) -> Array:
    """Return which numbers below n, int64 (G, B, r), are among those of their block (G, B, s), ascending: bool (G, B, r)."""
    groups, blocks, slots = ascending.shape
    # Numbered through all blocks they ascend, so that one search finds them.
    first = xp.reshape(xp.arange(groups * blocks, dtype=xp.int64, device=ascending.device), (groups, blocks, 1)) * n
    every = xp.reshape(ascending + first, (-1,))
    slot = xp.clip(xp.searchsorted(every, xp.reshape(wanted + first, (-1,))), 0, groups * blocks * slots - 1)
    return xp.reshape(xp.take(every, slot), wanted.shape) == wanted + first


def drawn(problem: Problem, plan: Plan, prepared: PreparedTree, key_index: Array, log_weight: Array) -> Selection:
    """Replace each closed node of c keys by one of them, drawn with probability 1 / c, at log-weight ln c (derived).

    The larger a node's part of the attention, the further it was opened: these are samples without replacement, one
    from each of many strata of about equal importance. A block's number is uniform in [0, 1); each node's number is its
    block's plus a multiple of the golden ratio, modulo 1, and so uniform too.
    """
    xp, n, blocks = problem.xp, problem.n_k, prepared.blocks
    shape, nodes = (problem.groups, int(blocks.index.shape[1])), int(prepared.keys.nodes.spread.shape[1])
    starts = plan.kernels["draw_uniform"].function(xp, plan.draw_seed, SAMPLES_STREAM, shape, problem.device)
    closed = (key_index < nodes) & (log_weight > -xp.inf)
    node = xp.where(closed, key_index, 0)
    first, end = node_bounds(xp, node, n)
    count = xp.astype(end - first, xp.float64)
    number = starts[:, :, None] + xp.astype(node, xp.float64) * GOLDEN_RATIO
    place = xp.astype((number - xp.floor(number)) * count, xp.int64)
    position = xp.minimum(first + place, end - 1)
    weight = xp.astype(xp.log(count), log_weight.dtype)
    position = xp.where(closed, position, xp.maximum(key_index - nodes, xp.zeros_like(key_index)))
    return Selection(blocks, take_along_rows(xp, prepared.keys.order, position), xp.where(closed, weight, log_weight))
