"""The treecode on accelerators, whose kernels open trees in sweeps, a list of one length for each block of queries.

Blocks list the keys of their queries' own one by one, which are taken out of the nodes that hold them: out of their counts.
The first-order term's matrix is that of all leaves alike.
"""

from kdecore.inputs import Problem
from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.kernels.open_sweeps.contract import START_SHARE
from kdecore.kernels.open_tree.contract import first_nodes
from kdecore.methods.first_order import certain
from kdecore.methods.view import sampled_leaves, within_leaves
from kdecore.namespaces import (
    Array,
    Namespace,
    cross_moment,
    from_host,
    host,
    invert_permutation,
    take_along_rows,
    without_gradient,
)
from kdecore.planning import Plan
from kdecore.selection import Blocks
from kdecore.stretches import Span

DAMPING = 0.75
"""Of the first-order term; 0.7 to 0.85 err least on a vision transformer, 1 on all words (bench/NOTES.md)."""
OWN_SHARE = 4
"""Own positions are listed where they take at most this part of the budget."""


def open_in_sweeps(
    problem: Problem,
    plan: Plan,
    coordinates: Array,
    blocks: Blocks,
    nodes: TreeNodes,
    own: Array | None,
    seen: tuple[int, int, int],
) -> tuple[Array, Array]:
    """Return rows and log-weights of each block's list, (G, B, budget), of nodes first … end − 1 of a level, ``seen``."""
    xp, budget = problem.xp, plan.options.budget
    assert budget is not None
    if own is not None and int(own.shape[2]) * OWN_SHARE > budget:
        own = None
    own_count = 0 if own is None else int(own.shape[2])
    key_index, log_weight = plan.kernels["open_sweeps"].function(
        xp,
        without_gradient(problem.q),
        problem.scale,
        coordinates,
        blocks.index,
        *(without_gradient(x) for x in (nodes.keys, nodes.spread, nodes.variances, nodes.sizes)),
        own,
        budget,
        first_nodes(budget - own_count, int(nodes.spread.shape[1]), *seen, START_SHARE),
    )
    return key_index, log_weight


def own_positions(problem: Problem, blocks: Blocks, order: Array, queries: Span, seen: Span) -> Array | None:
    """Return the places of each block's own keys in ``order`` (G, n_k), int64 (G, B, b), ascending; None for none.

    Blocks hold queries of ``queries`` only, and the keys ``seen`` are looked at only.
    """
    if problem.own is None:
        return None
    own = problem.own[:, slice(*queries)]
    there = (seen[0] <= own) & (own < seen[1])
    if not bool(host.any(there)):
        return None
    xp, keys = problem.xp, own_on_device(problem, own, there, queries, seen)
    keys = xp.broadcast_to(keys, (problem.groups, own.shape[1]))
    mine = take_along_rows(xp, keys, blocks.index - queries[0])
    return xp.sort(take_along_rows(xp, invert_permutation(xp, order), mine), axis=-1)


def own_on_device(problem: Problem, own: Array, there: Array, queries: Span, seen: Span) -> Array:
    """Return ``own`` (1|G, n) where ``there``, as an array of the problem's library; any of the keys ``seen`` elsewhere.

    A query that has no own key among these may have any of them, which does no harm. Own keys that follow one another are
    counted on the device: a CUDA graph takes no copy from the host.
    """
    xp, position = problem.xp, host.arange(*queries, dtype=host.int64) // problem.repeats
    offset = int(own[there][0] - host.broadcast_to(position, own.shape)[there][0])
    if host.array_equal(own[there], host.broadcast_to(position + offset, own.shape)[there]):
        counted = xp.arange(*queries, dtype=xp.int64, device=problem.device) // problem.repeats
        return xp.clip(counted + offset, seen[0], seen[1] - 1)[None, :]
    return from_host(xp, host.where(there, own, seen[0]), dtype=None, device=problem.device)


def first_order_of_leaves(xp: Namespace, nodes: TreeNodes, n: int) -> Array:
    """Return `DAMPING` times what the mean value of a node of unit spread gains for each unit of a query (derived).

    A node's mean value leaves out that keys of larger logits weigh more: to first order its values' mean under attention is
    v̄ + Cov_h(v, k) q. All nodes are taken to have covariances of one shape, that within leaves, in proportion to their
    spread; the attention's mean spread comes with the values. `DAMPING` since nodes open along the directions that matter
    most, which leaves less of them within; and less of what may be chance.
    Returns (G, d, d_v), in O(G `kdecore.methods.view.MOMENT_ROWS` d d_v).
    """
    dtype, d, d_v = nodes.spread.dtype, int(nodes.keys.shape[2]), int(nodes.values.shape[2]) - 1
    sampled = sampled_leaves(xp, n, nodes.keys.device)
    keys, values = (within_leaves(xp, x, width, sampled, dtype) for x, width in ((nodes.keys, d), (nodes.values, d_v)))
    rows = int(keys.shape[1])
    size, value_size = (xp.sum(x * x, axis=(1, 2), keepdims=True) / rows for x in (keys, values))
    # Of rows that have nothing to do with each other, this much is left by chance.
    surely = certain(xp, cross_moment(xp, keys, values), size * value_size / rows)
    return surely * (DAMPING / xp.where(size > 0, size, 1.0))
