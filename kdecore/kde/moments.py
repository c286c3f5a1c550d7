"""Sums and sums of squares of exponentials in log space, over tiles of a query × point matrix."""

from dataclasses import dataclass

from kdecore.arrays.namespace import Array, Namespace
from kdecore.arrays.rows import TILE_ELEMENTS, spans
from kdecore.kde.problem import GaussianForm

POINTS_PER_TILE = 2048


@dataclass(frozen=True)
class Moments:
    """Running moments of exp(logit) over the points seen, for each of s queries.

    Attributes
    ----------
    top
        (s,), the largest logit, natural log; −inf where nothing was seen.
    first
        (s,), Σ exp(logit − top).
    second
        (s,), Σ exp(logit − top)².
    """

    top: Array
    first: Array
    second: Array

    def take(self, xp: Namespace, rows: Array) -> "Moments":
        """Return the moments of some of the queries."""
        return Moments(*(xp.take(a, rows, axis=0) for a in (self.top, self.first, self.second)))


def combine(xp: Namespace, a: Moments, b: Moments) -> Moments:
    """Return the moments over the union of two disjoint sets of points."""
    top = xp.maximum(a.top, b.top)
    level = finite(xp, top)
    scale_a, scale_b = xp.exp(a.top - level), xp.exp(b.top - level)
    return Moments(top, a.first * scale_a + b.first * scale_b, a.second * scale_a**2 + b.second * scale_b**2)


def finite(xp: Namespace, top: Array) -> Array:
    """Return ``top`` with −inf replaced by 0, so that −inf − top is −inf and not NaN."""
    return xp.where(xp.isinf(top) & (top < 0), xp.zeros_like(top), top)


def logit_moments(xp: Namespace, logits: Array, squares: bool) -> Moments:
    """Return the moments of each row of logits (s, k), **overwriting** them; ``second`` is 0 unless ``squares``."""
    top = xp.max(logits, axis=1)
    logits -= finite(xp, top)[:, None]
    terms = xp.exp(logits)
    first = xp.sum(terms, axis=1)
    return Moments(top, first, xp.vecdot(terms, terms) if squares else xp.zeros_like(first))


def lifted_points(form: GaussianForm) -> Array:
    """Return (n, d + 1) rows [x, height − ‖x‖²/2], whose product with [y, 1] is the logit plus ‖y‖²/2."""
    xp = form.xp
    return xp.concat([form.x, (form.height - 0.5 * xp.sum(form.x * form.x, axis=1))[:, None]], axis=1)


def lifted_queries(form: GaussianForm) -> Array:
    """Return (m, d + 1) rows [y, 1]."""
    xp = form.xp
    return xp.concat([form.y, xp.ones((form.m, 1), dtype=form.y.dtype, device=form.device)], axis=1)


def dense_moments(xp: Namespace, queries: Array, points: Array, *, squares: bool = False) -> Moments:
    """Return the moments of exp(queries @ pointsᵀ) along each row, tile by tile.

    Parameters
    ----------
    xp
        Array namespace.
    queries, points
        (s, c) and (k, c), lifted.
    squares
        Whether second moments are wanted.

    Returns
    -------
    Moments
        Of s queries. O(s k c) time, O(tile) temporaries.
    """
    size = min(POINTS_PER_TILE, max(1, int(points.shape[0])))
    parts = []
    for rows in spans(int(queries.shape[0]), max(1, TILE_ELEMENTS // size)):
        tile = queries[rows, :]
        total = None
        for columns in spans(int(points.shape[0]), size):
            found = logit_moments(xp, tile @ xp.matrix_transpose(points[columns, :]), squares)
            total = found if total is None else combine(xp, total, found)
        parts.append(total if total is not None else empty_moments(xp, tile[:, 0]))
    return concat_moments(xp, parts) if parts else empty_moments(xp, queries[:, 0])


def empty_moments(xp: Namespace, like: Array) -> Moments:
    """Return the moments of nothing for as many queries as ``like`` (s,) has entries."""
    zero = xp.zeros_like(like)
    return Moments(xp.full_like(like, -float("inf")), zero, zero)


def concat_moments(xp: Namespace, parts: list[Moments]) -> Moments:
    """Join the moments of different queries."""
    return Moments(*(xp.concat([getattr(part, name) for part in parts]) for name in ("top", "first", "second")))


def log_first(xp: Namespace, moments: Moments) -> Array:
    """Return log Σ exp(logit) for each query; −inf where nothing was seen."""
    seen = moments.first > 0
    return xp.where(seen, moments.top + xp.log(xp.where(seen, moments.first, 1.0)), moments.top)
