"""How queries and keys see each other: in few coordinates whose products add up to nearly the whole logit."""

from collections.abc import Callable
from dataclasses import dataclass

from kdecore.arrays.gradients import without_gradient
from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.problem import Problem
from kdecore.methods.base import Plan

DIRECTIONS = 16
"""Coordinates by which rows are ordered and nodes opened."""
LEAF_SIZE = 4
"""Keys that are listed together, or not at all."""
MOMENT_ROWS = 1024
"""Rows, evenly spaced, that moments are taken from, at least."""


@dataclass(frozen=True)
class View:
    """Coordinates of queries and keys.

    Attributes
    ----------
    queries, keys
        (G, d, p): what turns queries and keys into coordinates.
    centre
        (G, 1, p): coordinates of the mean key.
    half_norm
        (G,): mean ‖scale q‖² / 2d, by which a spread becomes half the variance of a query's logits.
    """

    queries: Array
    keys: Array
    centre: Array
    half_norm: Array


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
    xp, dtype, scale, d = problem.xp, problem.dtype, problem.scale, int(problem.k.shape[2])
    keys, kernels = without_gradient(problem.k), plan.kernels
    of_scaled = moment * scale**2
    half_norm = xp.astype(xp.linalg.trace(of_scaled) * (0.5 / d), dtype)
    of_centred, centre = kernels["second_moment"].function(xp, keys, spacing(keys), True)
    queries, of_keys = kernels["balanced_view"].function(xp, of_scaled, of_centred, min(DIRECTIONS, d))
    of_keys = xp.astype(of_keys, dtype)
    of_centre = kernels["project_rows"].function(xp, xp.astype(centre[:, None, :], dtype), of_keys)
    return View(xp.astype(queries * scale, dtype), of_keys, of_centre, half_norm)
