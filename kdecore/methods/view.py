"""How queries and keys see each other: in few coordinates whose products add up to nearly the whole logit."""

from collections.abc import Callable

from kdecore.arrays.gradients import without_gradient
from kdecore.arrays.namespace import Array, Namespace
from kdecore.arrays.rows import take_columns
from kdecore.core.problem import Problem
from kdecore.core.tree import depth, node_count
from kdecore.kernels.balanced_view.contract import View
from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.kernels.open_tree.contract import ALONG
from kdecore.methods.base import Plan

DIRECTIONS = 16
"""Coordinates by which rows are ordered and nodes opened."""
LEAF_SIZE = 4
"""Keys that are listed together, or not at all."""
LEAF_ROWS, FEWEST_LEAF_ROWS = 8192, 64
"""Rows of all groups that spreads within leaves are taken from, and of each group at least; no more than `MOMENT_ROWS` of
one: chunks of causal attention are many groups."""
MOMENT_ROWS = 1024
"""Rows, evenly spaced, that moments are taken from, at least."""


def query_moment(xp: Namespace, q: Array, measure: Callable[..., tuple[Array, Array]]) -> Array:
    """Return the mean of x xᵀ over queries (G, n, d), from some of them where there are many: (G, d, d) float64.

    ``measure`` is the kernel `second_moment`.
    """
    return measure(xp, without_gradient(q), spacing(q), False)[0]


def spacing(rows: Array) -> int:
    """Return how far apart the rows of (G, n, d) are that moments are taken from."""
    return max(1, int(rows.shape[1]) // MOMENT_ROWS)


def balanced_view(problem: Problem, plan: Plan, moment: Array) -> View:
    """Find the coordinates of queries of a second moment (G, d, d), and of a problem's keys, that hold most of the logits.

    They are the leading singular vectors of the matrix of logits with centred keys, the singular values shared evenly:
    queries and keys have the same second moment, a diagonal one (as in balanced truncation, Moore 1981). With C and S the
    second moments of scaled queries and centred keys, the leading eigenvectors of S C are found by orthogonal iteration from
    a fixed start, and balanced within their span (`kdecore.kernels.balanced_view`). Other scalings err more
    (bench/NOTES.md). O(G (d² p + `MOMENT_ROWS` · d²)).
    """
    keys, kernels, p = without_gradient(problem.k), plan.kernels, min(DIRECTIONS, problem.d)
    of_centred, centre = kernels["second_moment"].function(problem.xp, keys, spacing(keys), True)
    found: View = kernels["balanced_view"].function(problem.xp, moment, of_centred, centre, problem.scale, p, keys)
    return found


def unseen_share(problem: Problem, view: View, moment: Array, nodes: TreeNodes, project: Callable[..., Array]) -> Array:
    """Return what spreads have to be multiplied by so that half variances are right in the mean over leaves: (G,) (derived).

    The half variance of a leaf's logits, over queries of second moment C, is the mean of ½ κᵀ C κ over the gaps κ between
    keys and their mean. `open_tree` takes `ALONG` of what coordinates see of it, and the rest in proportion to the spread.
    ``project`` is the kernel `project_rows`. O(G `MOMENT_ROWS` · d²).
    """
    xp, dtype = problem.xp, problem.dtype
    count = max(FEWEST_LEAF_ROWS, min(MOMENT_ROWS, LEAF_ROWS // problem.groups))
    rows = sampled_leaves(xp, problem.n_k, count, problem.device)
    leaf, gaps = rows[1], within_leaves(xp, nodes.keys, problem.d, rows, dtype)
    moment = xp.astype(moment, dtype)
    half = 0.5 * problem.scale**2 / int(gaps.shape[1])
    whole = xp.sum(project(xp, gaps, moment) * gaps, axis=(-2, -1)) * half
    squares = xp.sum((moment @ view.queries) * view.queries, axis=-2)
    along = xp.mean(take_columns(xp, nodes.variances, leaf), axis=1)
    seen = xp.sum(squares * along, axis=-1) * (0.5 * ALONG)
    around = view.half_norm * xp.mean(take_columns(xp, nodes.spread, leaf), axis=1)
    # No more than all of it, if it were as wide along all directions as along one.
    return xp.clip((whole - seen) / xp.where(around > 0, around, 1.0), 0.0, float(problem.d))


def sampled_leaves(xp: Namespace, n: int, rows: int, device: object) -> tuple[slice, Array]:
    """Return at least so many rows of a tree over n keys, by their positions, or all, and their leaves.

    Returns
    -------
    rows
        The positions, evenly spaced, in arrays that begin with the nodes (`TreeNodes.keys`).
    leaf
        int64: the node that each of them lies in.
    """
    count, last = node_count(n, LEAF_SIZE), depth(n, LEAF_SIZE)
    # An odd step meets all places of a leaf.
    step = max(1, n // rows) | 1
    # Position j lies in leaf ⌊((j + 1) 2^last − 1) / n⌋, the node after 2^last − 1 others and as many more.
    first = ((n + 1) << last) - n - 1
    leaf = xp.arange(first, first + (n << last), step << last, dtype=xp.int64, device=device) // n
    return slice(count, None, step), leaf


def within_leaves(xp: Namespace, x: Array, width: int, sampled: tuple[slice, Array], dtype: object) -> Array:
    """Return the first columns of sampled rows (G, N + n, …) less those of the mean of their leaf: (G, m, width)."""
    rows, leaf = sampled
    # Of x itself: where some of its columns are left out, NumPy copies all rows to take a few.
    some, means = x[:, rows, :width], take_columns(xp, x, leaf)[:, :, :width]
    return xp.astype(some, dtype, copy=False) - xp.astype(means, dtype, copy=False)
