"""Treecode: near and important keys one by one, the others through the means of tree nodes (beyond the paper; derived).

1. Queries and keys are each ordered by a balanced tree of similar rows; consecutive queries form a block.
2. For each block the tree over the keys is opened where its closed nodes are estimated to err most, until the list is full.
3. A closed node is one key: the mean key, at log-weight ln(count) + spread, with the mean value. Single keys are exact.
4. In self-attention (as many queries as keys) the block's own positions are exact too, and taken out of the nodes that hold
   them: out of their counts; taking them out of the means too errs no less (bench/NOTES.md).

Keys are compared by what queries see of them: a key k stands as C^(1/4) k, where C is the second moment of the queries:
half way between the Euclidean distance (power 0) and the mean squared difference of logits (power 1/2). It errs least of the
powers tried (bench/NOTES.md). Nothing is random; the estimate is biased, by what nodes hide.
"""

from dataclasses import dataclass

from kdecore.inputs import Problem
from kdecore.namespaces import Array, Namespace, invert_permutation, take_along_rows, without_gradient
from kdecore.options import Treecode
from kdecore.planning import Plan
from kdecore.selection import Selection, equal_blocks
from kdecore.tree import inner_nodes

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
        O(G ((n_q + n_k) (d log n + d²) + n_q · budget · d)).
    """
    options = plan.options
    assert isinstance(options, Treecode)
    assert options.budget is not None
    xp, kernels = problem.xp, plan.kernels
    q = finite(xp, without_gradient(problem.q)) * problem.scale
    k = finite(xp, without_gradient(problem.k))
    k = k - xp.mean(k, axis=1, keepdims=True)
    view = key_view(xp, q, k)

    query_order = kernels["tree_order"].function(xp, q - xp.mean(q, axis=1, keepdims=True), options.block_size)
    blocks = equal_blocks(xp, query_order, options.block_size)
    key_order = kernels["tree_order"].function(xp, k @ view.metric, 1)

    node_means = kernels["node_means"].function
    keys, spread = node_means(xp, problem.k, key_order)
    values, _ = node_means(xp, problem.v, key_order)
    along = k @ view.keys
    norms = kernels["row_norms"].function(xp, without_gradient(problem.v))
    scale = xp.mean(norms, axis=1, keepdims=True)
    norms = xp.astype(norms / xp.where(scale > 0, scale, 1.0), k.dtype)
    moments, _ = node_means(xp, xp.concat([along, along * along, norms[:, :, None]], axis=-1), key_order)
    inner, p = inner_nodes(problem.n_k), int(along.shape[2])
    mean, square, importance = moments[:, :inner, :p], moments[:, :inner, p : 2 * p], moments[:, :inner, 2 * p]
    variances = square - mean * mean

    rows = int(blocks.index.shape[2])
    own = None
    if problem.n_q == problem.n_k and rows * OWN_SHARE <= options.budget:
        position = invert_permutation(xp, key_order)
        own = xp.sort(take_along_rows(xp, position, blocks.index), axis=-1)
    key_index, log_weight = kernels["open_tree"].function(
        xp,
        q,
        blocks.index,
        (q @ view.queries) ** 2,
        without_gradient(keys),
        0.5 * xp.where(variances > 0, variances, 0.0),
        without_gradient(spread) * (0.5 / problem.d),
        importance,
        own,
        options.budget,
    )
    return Selection(blocks, key_index, log_weight, keys=keys, values=values)


@dataclass(frozen=True)
class KeyView:
    """How queries see keys.

    Attributes
    ----------
    metric
        (G, d, d): keys times this lie as far from each other as they differ to the queries.
    keys, queries
        (G, d, p): what turns keys and queries into coordinates along the p leading principal directions of the keys so
        seen; the sum of the products of coordinates is the part of the logit along them.
    """

    metric: Array
    keys: Array
    queries: Array


def key_view(xp: Namespace, q: Array, k: Array) -> KeyView:
    """Find the view of centred keys k (G, n_k, d) by scaled queries q (G, n_q, d). O(G (d³ + `MOMENT_ROWS` · d²))."""
    eigenvalues, axes = xp.linalg.eigh(second_moment(xp, q))
    largest = eigenvalues[:, -1:]
    eigenvalues = xp.where(largest > 0, xp.maximum(eigenvalues, 1e-6 * largest), 1.0)
    metric, inverse = ((axes * (eigenvalues**power)[:, None, :]) @ xp.matrix_transpose(axes) for power in (0.25, -0.25))
    _, directions = xp.linalg.eigh(metric @ second_moment(xp, k) @ metric)
    leading = directions[:, :, -min(Treecode.DIRECTIONS, int(k.shape[2])) :]
    return KeyView(*(xp.astype(x, k.dtype) for x in (metric, metric @ leading, inverse @ leading)))


def second_moment(xp: Namespace, rows: Array) -> Array:
    """Return the mean of x xᵀ over at least `MOMENT_ROWS` rows or all, float64 (G, d, d)."""
    rows = rows[:, :: max(1, int(rows.shape[1]) // MOMENT_ROWS), :]
    return xp.astype(xp.matrix_transpose(rows) @ rows, xp.float64) / rows.shape[1]


def finite(xp: Namespace, rows: Array) -> Array:
    """Return rows with 0 for numbers that are not finite: an order needs numbers that can be compared."""
    return xp.where(xp.isfinite(rows), rows, 0.0)
