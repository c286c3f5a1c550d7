"""Sampling: uniform without replacement, or by weight, with empirical Bernstein stopping.

Relative variance of one uniform draw is at most 1/μ (Zandieh et al. 2023, after Charikar & Siminelakis 2017), so a level
of density μ̃ needs O(1/(ε² μ̃)) draws. That bound is loose where no kernel value is near 1. So a query is answered when its
own empirical Bernstein bound (Maurer & Pontil 2009; stopping after Mnih, Szepesvári & Audibert 2008) is below ε, with
the range taken from a per-query upper bound on the largest term (derived): never later than the density rule but for
constants. The published bound is for independent draws and one look: the finite-population factor used without replacement
is derived, and δ is not divided among levels.
"""

import math
from dataclasses import dataclass

from kdecore.arrays.namespace import Array, Namespace
from kdecore.arrays.random import uniform
from kdecore.kde.clusters import cluster, segment_max
from kdecore.kde.moments import (
    Moments,
    combine,
    dense_moments,
    finite,
    lifted_points,
    lifted_queries,
    log_first,
)
from kdecore.kde.primitive import Answer, Level, exp_capped, split_heads
from kdecore.kde.problem import Accuracy, GaussianForm
from kdecore.kde.report import LevelReport

BOUND_CLUSTERS = 32
"""Clusters of the upper bound on a query's largest term."""


@dataclass(frozen=True)
class UniformCarry:
    """Per query: moments over the draws so far, log of the head's sum and of the bound on one draw's term."""

    drawn: Moments
    log_head: Array
    log_range: Array

    def take(self, xp: Namespace, rows: Array) -> "UniformCarry":
        """Return the carry of some of the queries."""
        return UniformCarry(self.drawn.take(xp, rows), xp.take(self.log_head, rows), xp.take(self.log_range, rows))


@dataclass(frozen=True)
class Uniform:
    """Sums over a growing prefix of one random order of the body, shared by all queries.

    Attributes
    ----------
    form, accuracy
        The problem, and what is asked for.
    head
        (h, d + 1) lifted points evaluated for every query.
    drawn
        (N, d + 1) lifted points in the order drawn, minus log of N × their probability: the body in random order, or N
        draws with replacement.
    replacement
        Whether with replacement.
    queries
        (m, d + 1), lifted.
    centre, radius, ceiling, tallest
        (C, d), (C,), (C,), (C,): what bounds the terms of each cluster of the body.
    """

    form: GaussianForm
    accuracy: Accuracy
    head: Array
    drawn: Array
    replacement: bool
    queries: Array
    centre: Array
    radius: Array
    ceiling: Array
    tallest: Array
    name: str = "uniform"

    @property
    def setup_evaluations(self) -> float:
        """Two assignments to the bound's clusters."""
        return 2.0 * self.form.n * int(self.centre.shape[0])

    def level(self, index: int, pending: int, last: LevelReport | None) -> Level | None:
        """Return a level of twice the last one's draws; the last one without replacement draws all, and is exact."""
        total = int(self.drawn.shape[0])
        samples = draws_at(self.accuracy, index)
        if index and draws_at(self.accuracy, index - 1) >= total:
            return None
        if self.replacement and 2 * samples > total:
            return None
        return Level(index, min(1.0, density_of(self.accuracy, samples)), min(samples, total))

    def preprocess(self, level: Level) -> tuple[Level, Array]:
        """Return the draws that are new at this level."""
        start = draws_at(self.accuracy, level.index - 1) if level.index else 0
        return level, self.drawn[start : level.samples, :]

    def query(self, structure: tuple[Level, Array], rows: Array, carry: UniformCarry | None) -> Answer:
        """Answer the queries whose Bernstein bound is below ε."""
        xp = self.form.xp
        level, fresh = structure
        queries = xp.take(self.queries, rows, axis=0)
        evaluations = float(fresh.shape[0])
        found = dense_moments(xp, queries, fresh, squares=True)
        if carry is None:
            log_head = log_first(xp, dense_moments(xp, queries, self.head))
            log_range = self._log_range(queries)
            evaluations += float(self.head.shape[0]) + int(self.centre.shape[0])
        else:
            found = combine(xp, carry.drawn, found)
            log_head, log_range = carry.log_head, carry.log_range
        total = int(self.drawn.shape[0])
        log_sum, answered = bernstein(
            xp, found, float(level.samples), float(total), log_head, log_range, self.accuracy, self.replacement
        )
        return Answer(
            log_sum,
            answered,
            evaluations * int(rows.shape[0]),
            UniformCarry(found, log_head, log_range),
            level.index + 1,
        )

    def foresee(self, rows: Array, logits: Array) -> Array:
        """Return the evaluations (s,) that queries ``rows`` will take, from their exact logits (s, n)."""
        xp = self.form.xp
        queries = xp.take(self.queries, rows, axis=0)
        top = xp.max(logits, axis=1)
        terms = xp.exp(logits - top[:, None])
        widest = exp_capped(xp, self._log_range(queries) - top)
        draws = draws_needed(xp, terms, xp.sum(terms, axis=1), float(self.form.n), widest, self.accuracy)
        return draws + float(self.head.shape[0]) + float(self.centre.shape[0])

    def _log_range(self, queries: Array) -> Array:
        """Bound the largest logit of each query: by Cauchy–Schwarz, and by the distance to each cluster's ball."""
        xp = self.form.xp
        y = queries[:, :-1]
        square = xp.sum(y * y, axis=1)[:, None]
        inner = y @ xp.matrix_transpose(self.centre)
        linear = inner + xp.sqrt(square) * self.radius + self.ceiling
        apart = square - 2.0 * inner + xp.sum(self.centre * self.centre, axis=1)
        gap = xp.sqrt(xp.maximum(apart, xp.zeros_like(apart))) - self.radius
        gap = xp.maximum(gap, xp.zeros_like(gap))
        return xp.max(xp.minimum(linear, self.tallest + 0.5 * square - 0.5 * gap * gap), axis=1)


def bernstein(
    xp: Namespace,
    drawn: Moments,
    samples: Array | float,
    total: Array | float,
    log_certain: Array,
    log_range: Array,
    accuracy: Accuracy,
    replacement: bool,
) -> tuple[Array, Array]:
    """Estimate certain + total · mean, and say where its empirical Bernstein error bound is below ε.

    With probability 1 − δ, |mean − true| ≤ √(2 v ln(3/δ)/M) + 3 R ln(3/δ)/M for M draws of variance v in [0, R] (Audibert,
    Munos & Szepesvári 2009, Theorem 1). Without replacement v is multiplied by 1 − M/total (exact for the variance of the
    mean; derived for the bound), and M = total leaves no error.

    Parameters
    ----------
    xp
        Array namespace.
    drawn
        Moments of the terms drawn, (s,).
    samples, total
        M and the number of terms they stand for; numbers or (s,).
    log_certain
        (s,), natural log of what is known exactly.
    log_range
        (s,), natural log of R.
    accuracy
        ε and δ.
    replacement
        Whether the draws are independent.

    Returns
    -------
    log_sum, answered
        (s,) natural log, (s,) bool.
    """
    level = finite(xp, xp.maximum(drawn.top, log_certain))
    scale = xp.exp(finite(xp, drawn.top) - level)
    scale = xp.where(drawn.first > 0, scale, xp.zeros_like(scale))
    mean = drawn.first * scale / samples
    square = drawn.second * scale**2 / samples
    variance = xp.maximum(square - mean**2, xp.zeros_like(mean))
    left = 1.0 if replacement else (1.0 - samples / total)
    certain = xp.exp(log_certain - level)
    value = certain + mean * total
    constant = math.log(3.0 / accuracy.delta)
    widest = exp_capped(xp, log_range - level)
    error = total * (xp.sqrt(2.0 * variance * left * constant / samples) + 3.0 * widest * left * constant / samples)
    positive = value > 0
    log_sum = xp.where(positive, level + xp.log(xp.where(positive, value, 1.0)), -math.inf)
    return log_sum, error <= accuracy.eps * value


def draws_needed(
    xp: Namespace, terms: Array, total: Array, count: Array | float, widest: Array, accuracy: Accuracy
) -> Array:
    """Return the draws at which the Bernstein bound will hold, from the exact terms to be drawn from.

    Parameters
    ----------
    xp
        Array namespace.
    terms
        (s, k) the terms, 0 where they are not drawn from.
    total
        (s,) the whole sum, to whose share ε the error is held.
    count
        Number of terms drawn from; a number or (s,).
    widest
        (s,) the range in the bound.
    accuracy
        ε and δ.

    Returns
    -------
    Array
        (s,) draws of the first level that will do; ``count`` where none does.
    """
    mean = xp.sum(terms, axis=1) / count
    variance = xp.vecdot(terms, terms) / count - mean**2
    variance = xp.maximum(variance, xp.zeros_like(variance))
    constant = math.log(3.0 / accuracy.delta)
    draws = xp.zeros_like(total) + count
    levels = 0
    while draws_at(accuracy, levels) < int(terms.shape[1]):
        levels += 1
    for samples in (draws_at(accuracy, index) for index in reversed(range(levels))):
        left = 1.0 - samples / (xp.zeros_like(total) + count)
        left = xp.maximum(left, xp.zeros_like(left))
        error = count * (xp.sqrt(2.0 * variance * left * constant / samples) + 3.0 * widest * left * constant / samples)
        draws = xp.where(error <= accuracy.eps * total, xp.minimum(draws, xp.full_like(draws, float(samples))), draws)
    return draws


def density_of(accuracy: Accuracy, samples: int) -> float:
    """Return the density at which so many uniform draws suffice by Chernoff's bound, (2 + 2ε/3) ln(2/δ)/(ε² M)."""
    return (2.0 + 2.0 * accuracy.eps / 3.0) * math.log(2.0 / accuracy.delta) / (accuracy.eps**2 * samples)


def draws_at(accuracy: Accuracy, index: int) -> int:
    """Return the draws of a level: the fewest that any Bernstein bound allows, doubled each time."""
    fewest = 3.0 * math.log(3.0 / accuracy.delta) / accuracy.eps
    return int(2 ** (math.ceil(math.log2(fewest)) + index))


def random_order(form: GaussianForm, body: Array, seed: int, stream: int) -> tuple[Array, Array | None]:
    """Draw the body's order, and natural logs of N × probability, or None where that is 1.

    Without weights: a random permutation. With weights: N draws with replacement, half of them uniform and half in
    proportion to the weights, so that the variance is at most twice the better one's (derived). O(n log n).
    """
    xp = form.xp
    total = int(body.shape[0])
    numbers = uniform(xp, seed, stream, total, device=form.device)
    if form.log_weight is None:
        return xp.take(body, xp.argsort(numbers, stable=True)), None
    weight = xp.astype(xp.take(form.log_weight, body), xp.float64)
    weight = xp.exp(weight - xp.max(weight))
    probability = 0.5 / total + 0.5 * weight / xp.sum(weight)
    cumulative = xp.cumulative_sum(probability)
    place = xp.searchsorted(cumulative, numbers * cumulative[-1], side="right")
    place = xp.astype(xp.clip(place, 0, total - 1), xp.int64)
    log_ratio = xp.log(xp.take(probability, place) * total)
    return xp.take(body, place), xp.astype(log_ratio, form.x.dtype)


def make_uniform(form: GaussianForm, accuracy: Accuracy, seed: int, stream: int) -> Uniform:
    """Return the sampling primitive for one problem; uses random stream ``stream``. O(n (d + log n))."""
    xp = form.xp
    points = lifted_points(form)
    norms = xp.sqrt(xp.sum(form.x * form.x, axis=1))
    typical = float(xp.sqrt(xp.mean(xp.sum(form.y * form.y, axis=1)))) if form.m else 0.0
    split = split_heads(form, points[:, -1] + norms * typical)
    order, log_ratio = random_order(form, split.body, seed, stream)
    drawn = xp.take(points, order, axis=0)
    height = xp.take(form.height, order)
    if log_ratio is not None:
        drawn = xp.concat([drawn[:, :-1], drawn[:, -1:] - log_ratio[:, None]], axis=1)
        height = height - log_ratio
        # Draws repeat, so the bound must also cover points that were not drawn.
        everything = xp.take(points, split.body, axis=0)
        weight = xp.astype(xp.take(form.log_weight, split.body), xp.float64)
        weight = xp.exp(weight - xp.max(weight))
        ratio = xp.astype(xp.log(0.5 + 0.5 * weight * int(weight.shape[0]) / xp.sum(weight)), form.x.dtype)
        bias, tall, x = everything[:, -1] - ratio, xp.take(form.height, split.body) - ratio, everything[:, :-1]
    else:
        bias, tall, x = drawn[:, -1], height, drawn[:, :-1]
    groups = cluster(xp, x, x[: min(BOUND_CLUSTERS, int(x.shape[0])), :])
    away = x - xp.take(groups.centre, groups.label, axis=0)
    return Uniform(
        form=form,
        accuracy=accuracy,
        head=xp.take(points, split.head, axis=0),
        drawn=drawn,
        replacement=log_ratio is not None,
        queries=lifted_queries(form),
        centre=groups.centre,
        radius=segment_max(xp, groups, xp.sqrt(xp.sum(away * away, axis=1))),
        ceiling=segment_max(xp, groups, bias),
        tallest=segment_max(xp, groups, tall),
    )
