"""How queries and keys see each other: in few coordinates whose products add up to nearly the whole logit."""

from collections.abc import Callable

from kdecore.arrays.gradients import without_gradient
from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.problem import Problem
from kdecore.kernels.balanced_view.contract import View
from kdecore.methods.base import Plan

DIRECTIONS = 16
"""Coordinates by which rows are ordered and nodes opened."""
LEAF_SIZE = 4
"""Keys that are listed together, or not at all."""
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
