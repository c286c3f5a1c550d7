"""The treecode's tree for Gaussian kernels: distances as logits, and nodes that know how far their points reach (derived).

A sum of kernels Σ wᵢ exp(−‖y − xᵢ‖²/2) is softmax attention's denominator: the product of (y, y², 1) and
(xᵢ, −½ … −½, ln wᵢ − ‖xᵢ‖²/2) is ln wᵢ − ‖y − xᵢ‖²/2. Such logits fall as squares in every direction, so that those within
a wide node are far from normal: the tree of `kdecore.methods.key_tree`, which takes them so, errs by a third and more. Here
the points of a node are taken as normal instead, of mean m and variances s along the coordinates. Their mean kernel is
Π_t (1 + s_t)^-½ exp(−(y_t − m_t)² / 2(1 + s_t)), whose logarithm is linear in (y, y², 1) again: the node's key. No node
weighs more than its points could, however wide. What opens a node is half the sum of its variances, for all queries alike.
"""

from kdecore.arrays.gradients import without_gradient
from kdecore.arrays.memory import contiguous
from kdecore.arrays.namespace import Array, Namespace, host
from kdecore.arrays.rows import take_along_rows
from kdecore.core.problem import Problem
from kdecore.core.tree import bounds, depth, leaves
from kdecore.kernels.balanced_view.contract import View
from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.kernels.open_tree.contract import ALONG
from kdecore.kernels.open_tree.reference import frozen, reached
from kdecore.methods.base import Plan
from kdecore.methods.key_tree import DEEPER, KeyTree, similar_together
from kdecore.methods.view import DIRECTIONS, LEAF_SIZE


def gaussian_queries(xp: Namespace, y: Array) -> Array:
    """Return queries (…, n, 2d + 1) for points y (…, n, d), in bandwidths."""
    return xp.concat([y, y * y, xp.ones_like(y[..., :1])], axis=-1)


def gaussian_keys(xp: Namespace, x: Array, log_weight: Array) -> Array:
    """Return keys (…, n, 2d + 1) for points x (…, n, d), in bandwidths, and the logarithms of their weights (…, n)."""
    height = log_weight - 0.5 * xp.sum(x * x, axis=-1)
    return xp.concat([x, xp.full_like(x, -0.5), height[..., None]], axis=-1)


def build(problem: Problem, plan: Plan, moment: Array) -> KeyTree:
    """Build the tree over a problem's keys, which `gaussian_keys` made, at a scale of 1.

    Points are put in order by their first `DIRECTIONS` coordinates, which are to be the leading ones. Nodes have the mean of
    their weights and the weighted mean of their values; where their points lie is taken to have nothing to do with weights.

    Parameters
    ----------
    problem, plan
        As `kdecore.methods.key_tree.build` takes them.
    moment
        `query_moment` of queries that `gaussian_queries` made.

    Returns
    -------
    KeyTree
        In O(G n_k (d + p log n_k)), with p = `DIRECTIONS`. Its first-order term is 0.
    """
    xp, kernels = problem.xp, plan.kernels
    k, v = without_gradient(problem.k), without_gradient(problem.v)
    d = (problem.d - 1) // 2
    p = min(DIRECTIONS, d)
    x = contiguous(k[:, :, :d])
    log_weight = k[:, :, -1:] + 0.5 * xp.sum(x * x, axis=-1, keepdims=True)
    largest = xp.max(log_weight, axis=1, keepdims=True)
    weight = xp.exp(log_weight - largest)
    sizes, low, high = kernels["value_sizes"].function(xp, v)
    order = similar_together(problem, plan, contiguous(x[:, :, :p]), leaves(problem.n_k, LEAF_SIZE), 0)
    view = view_of(problem, p)
    weighted = xp.concat([v * weight, weight], axis=-1)
    nodes: TreeNodes = kernels["node_summaries"].function(xp, k, weighted, x, sizes, order, LEAF_SIZE, view.half_norm)
    count = int(nodes.spread.shape[1])
    half = 0.5 * xp.sum(nodes.variances, axis=-1)
    # Too small to be seen beside the largest, but not 0.
    mean_weight = xp.maximum(nodes.values[:, :count, -2:-1], xp.full_like(largest, xp.finfo(v.dtype).smallest_normal))
    keys = mean_kernels(xp, nodes.keys[:, :count, :d], nodes.variances, xp.log(mean_weight) + largest)
    # What nodes are listed with for their half variances is taken back.
    keys[:, :, -1] -= frozen(xp, half, reached(log_counts(xp, problem.n_k, half)))
    values = xp.concat([nodes.values[:, :count, :-2] / mean_weight, take_along_rows(xp, v, order)], axis=1)
    # The last coordinate of every query is 1. Without spread, the values' last column, there is no first-order term.
    along = xp.concat(
        [xp.zeros((*half.shape, p), dtype=half.dtype, device=half.device), half[..., None] * (2 / ALONG)], axis=-1
    )
    nodes = nodes._replace(
        keys=xp.concat([keys, nodes.keys[:, count:, :]], axis=1),
        values=xp.concat([values, xp.zeros_like(values[:, :, :1])], axis=-1),
        variances=along,
    )
    _, sizes = kernels["scaled_nodes"].function(xp, nodes, moment, view.queries, view.half_norm, problem.scale, DEEPER)
    return KeyTree(view, order, nodes, xp.zeros_like(half), sizes, (low, high))


def view_of(problem: Problem, p: int) -> View:
    """Return a view that sees the first p coordinates of queries, and as the last the 1 that is in all."""
    xp, groups, width = problem.xp, problem.groups, problem.d
    like = {"dtype": problem.k.dtype, "device": problem.device}
    directions = xp.zeros((width, p + 1), **like)
    directions[:p, :p] = xp.eye(p, **like)
    directions[width - 1, p] = 1.0
    directions = xp.broadcast_to(directions, (groups, width, p + 1))
    return View(directions, directions, xp.zeros((groups, 1, p + 1), **like), xp.ones((groups,), **like))


def mean_kernels(xp: Namespace, mean: Array, variance: Array, log_weight: Array) -> Array:
    """Return keys (…, 2d + 1) whose logits are logarithms of mean kernels over normal points, and of a weight (…, 1)."""
    sharp = 1.0 / (1.0 + variance)
    height = log_weight - 0.5 * xp.sum(mean * mean * sharp + xp.log1p(variance), axis=-1, keepdims=True)
    return xp.concat([mean * sharp, -0.5 * sharp, height], axis=-1)


def log_counts(xp: Namespace, n: int, like: Array) -> Array:
    """Return the logarithm of how many of n points each node has: (1, N), of a dtype and device as ``like`` has."""
    counts = host.concat([host.diff(bounds(n, level)) for level in range(depth(n, LEAF_SIZE) + 1)])
    return xp.asarray(host.log(counts), dtype=like.dtype, device=like.device)[None, :]
