"""Treecode: near and important keys one by one, the others through the means of tree nodes (beyond the paper; derived).

1. Queries and keys are each ordered by a balanced tree of similar rows; consecutive queries form a block.
2. For each block the tree over the keys is opened where its closed nodes are estimated to err most, until the list is full.
3. A closed node is one key: the mean key, at log-weight ln(count) + spread, with the mean value. The keys of an open leaf
   are listed one by one, and exact.
4. In self-attention (as many queries as keys) the block's own positions are exact too, and taken out of the nodes that hold
   them: out of their counts; taking them out of the means too errs no less (bench/NOTES.md).

Rows are compared by what the other side sees of them, in few coordinates whose products add up to nearly the whole logit
(`key_view`). Nothing is random; the estimate is biased, by what nodes hide.
"""

from dataclasses import dataclass

from kdecore.inputs import Problem
from kdecore.namespaces import Array, Namespace, invert_permutation, take_along_rows, without_gradient
from kdecore.options import Treecode
from kdecore.planning import Plan
from kdecore.selection import Selection, equal_blocks

MOMENT_ROWS = 4096
"""Rows, evenly spaced, that second moments are taken from, at least."""
OWN_SHARE = 4
"""Own positions are listed where they take at most this part of the budget."""


def select(problem: Problem, plan: Plan) -> Selection:
    """Select for each block of queries a list of tree nodes and single keys.

    Returns
    -------
    Selection
        ``budget`` slots a block, with the means of nodes and the keys in the tree's order as keys and values.
        O(G ((n_q + n_k) (d p + p log n) + n_q · budget · d + d³)), with p = `Treecode.DIRECTIONS`.
    """
    options = plan.options
    assert isinstance(options, Treecode)
    assert options.budget is not None
    xp, kernels = problem.xp, plan.kernels
    q, k, v = (without_gradient(x) for x in (problem.q, problem.k, problem.v))
    view = key_view(xp, q, k, problem.scale)
    query_coordinates, key_coordinates = finite(xp, q @ view.queries), finite(xp, k @ view.keys - view.centre)

    query_order = kernels["tree_order"].function(xp, query_coordinates, options.block_size)
    blocks = equal_blocks(xp, query_order, options.block_size)
    key_order = kernels["tree_order"].function(xp, key_coordinates, Treecode.LEAF_SIZE)
    norms = kernels["row_norms"].function(xp, v)
    top = xp.max(norms, axis=1, keepdims=True)
    sizes = xp.astype(norms / xp.where(top > 0, top, 1.0), k.dtype)
    nodes = kernels["node_summaries"].function(
        xp, problem.k, problem.v, key_coordinates, sizes, key_order, Treecode.LEAF_SIZE
    )
    rows = int(blocks.index.shape[2])
    own = None
    if problem.n_q == problem.n_k and rows * OWN_SHARE <= options.budget:
        own = xp.sort(take_along_rows(xp, invert_permutation(xp, key_order), blocks.index), axis=-1)
    key_index, log_weight = kernels["open_tree"].function(
        xp,
        q,
        problem.scale,
        query_coordinates,
        blocks.index,
        *(without_gradient(x) for x in (nodes.keys, nodes.spread, nodes.variances, nodes.sizes)),
        own,
        options.budget,
    )
    return Selection(blocks, key_index, log_weight, keys=nodes.keys, values=nodes.values)


@dataclass(frozen=True)
class KeyView:
    """How queries and keys see each other.

    Attributes
    ----------
    queries, keys
        (G, d, p): what turns queries and keys into coordinates; the sum of the products of coordinates is nearly the logit.
    centre
        (G, 1, p): coordinates of the mean key.
    """

    queries: Array
    keys: Array
    centre: Array


def key_view(xp: Namespace, q: Array, k: Array, scale: float) -> KeyView:
    """Find coordinates for queries q (G, n_q, d) and keys k (G, n_k, d).

    A key k is seen as C^(1/4) k, where C is the second moment of the queries times scale: half way between the Euclidean
    distance (power 0) and the mean squared difference of logits (power 1/2); it errs least of the powers tried
    (bench/NOTES.md). Coordinates lie along the leading principal directions of the keys so seen, so that the products of
    those of C^(-1/4) q with them hold as much of the logits as p numbers can. O(G (d³ + `MOMENT_ROWS` · d²)).
    """
    queries, keys = sample(xp, q) * scale, sample(xp, k)
    centre = xp.mean(keys, axis=1, keepdims=True)
    eigenvalues, axes = xp.linalg.eigh(second_moment(xp, queries))
    largest = eigenvalues[:, -1:]
    eigenvalues = xp.where(largest > 0, xp.maximum(eigenvalues, 1e-6 * largest), 1.0)
    metric, inverse = ((axes * (eigenvalues**power)[:, None, :]) @ xp.matrix_transpose(axes) for power in (0.25, -0.25))
    _, directions = xp.linalg.eigh(metric @ second_moment(xp, keys - centre) @ metric)
    leading = directions[:, :, -min(Treecode.DIRECTIONS, int(k.shape[2])) :]
    # Libraries differ in the signs of eigenvectors, which would turn the order round.
    leading = xp.where(xp.sum(leading**3, axis=1, keepdims=True) < 0, -leading, leading)
    of_queries, of_keys = xp.astype(inverse @ leading * scale, k.dtype), xp.astype(metric @ leading, k.dtype)
    return KeyView(of_queries, of_keys, xp.astype(centre, k.dtype) @ of_keys)


def sample(xp: Namespace, rows: Array) -> Array:
    """Return at least `MOMENT_ROWS` rows or all, evenly spaced, in float64, with 0 for numbers that are not finite."""
    return xp.astype(finite(xp, rows[:, :: max(1, int(rows.shape[1]) // MOMENT_ROWS), :]), xp.float64)


def second_moment(xp: Namespace, rows: Array) -> Array:
    """Return the mean of x xᵀ over rows (G, n, d): (G, d, d)."""
    return xp.matrix_transpose(rows) @ rows / int(rows.shape[1])


def finite(xp: Namespace, rows: Array) -> Array:
    """Return rows with 0 for numbers that are not finite: an order needs numbers that can be compared."""
    return xp.where(xp.isfinite(rows), rows, 0.0)
