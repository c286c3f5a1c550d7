"""Hashing-based estimator (Charikar & Siminelakis 2017) with Euclidean hashing.

One table gives Z = k(x, q) |B(q)| / p(x, q) for x uniform in the query's bucket B(q), 0 if that is empty: unbiased for
Σᵢ k(xᵢ, q), with relative variance of the order μ^(−1/2) where uniform sampling has μ^(−1). Levels and hash widths after
Siminelakis, Rong, Bailis, Charikar & Levis (2019).

Departures (derived):

- p(r) ≈ exp(−REACH t r/√2), about the cube root of the paper's, so that buckets are larger, and a few points are
  drawn from each, evenly spread from a random start, all where there are no more. The mean is the same, and the
  same accuracy takes an order of magnitude fewer tables for about as many kernel evaluations (measured).
- As many projections as make that law hold up to the level's radius, a third of the paper's.
- A query is answered when its estimate reaches μ̃/2 **and** the spread between tables bears out the accuracy: several times
  cheaper than the worst-case bound. So the guarantee is measured, not proved.
"""

import math
from dataclasses import dataclass

from kdecore.arrays.memory import from_host
from kdecore.arrays.namespace import Array, Namespace
from kdecore.arrays.random import normal, uniform
from kdecore.kde.collision import log_collision_probability
from kdecore.kde.moments import (
    Moments,
    combine,
    dense_moments,
    empty_moments,
    finite,
    lifted_points,
    lifted_queries,
    log_first,
    logit_moments,
)
from kdecore.kde.primitive import Answer, Level, normal_quantile, split_heads
from kdecore.kde.problem import Accuracy, GaussianForm
from kdecore.kde.report import LevelReport

FIRST_TABLES = 64
"""Tables of the densest level."""
FIRST_DRAWS = 2
"""Most points drawn from one bucket at the densest level: most variance lies between tables, not within a bucket."""
DENSITY_STEP = 4.0
"""Factor between the densities of two levels; tables and draws each go up by its fourth root, their product as μ̃^(−1/2)."""
LOOKS = 2.0
"""δ is divided by this, because the levels look several times and table estimates are skewed (measured, tests)."""
MARGIN = 0.5
"""A level answers estimates down to this share of its density."""
REFERENCE_EPS = 0.3
"""ε for which these numbers of tables are meant; smaller ones take more, as 1/ε²."""
REACH = 0.35
"""−log p over −log k at the level's radius."""
TABLES_PER_BLOCK = 8
"""Tables hashed with one matrix product."""
_MIX = -7046029254386353131
"""Odd 64-bit multiplier that folds a point's cell numbers into one integer."""
_LOW_BITS = 2**35 - 1


@dataclass(frozen=True)
class Hash:
    """Parameters of one level's tables.

    Attributes
    ----------
    level
        The level.
    width
        w, cell width.
    projections
        k, projections of one table.
    draws
        Most points drawn from one bucket.
    """

    level: Level
    width: float
    projections: int
    draws: int


@dataclass(frozen=True)
class HashingBased:
    """Tables are built one after the other while a level is queried, each used once: memory stays O(n).

    Attributes
    ----------
    form, accuracy
        The problem, and what is asked for.
    head
        (h, d + 1) lifted points evaluated for every query.
    body
        (N, d + 1) lifted points that are hashed.
    mapped
        (N, d + 1), the same points with Algorithm 2's extra coordinate.
    log_top
        Largest height in the body, natural log.
    seed, stream
        Randomness.
    """

    form: GaussianForm
    accuracy: Accuracy
    head: Array
    body: Array
    mapped: Array
    queries: Array
    log_top: float
    seed: int
    stream: int
    name: str = "hbe"
    setup_evaluations: float = 0.0

    def level(self, index: int, pending: int, last: LevelReport | None) -> Level | None:
        """Return the level, or None where a query would cost more than exact evaluation, or μ̃ < 1/n.

        Building tables is left out, since it is shared by all queries: `kdecore.kde.auto` weighs it.
        """
        growth = DENSITY_STEP ** (0.25 * index)
        tables = round(FIRST_TABLES * growth * max(1.0, REFERENCE_EPS / self.accuracy.eps) ** 2)
        density = DENSITY_STEP ** -(index + 1)
        total = int(self.body.shape[0])
        # A bucket holds about √μ̃ of the points, and at most so many are drawn.
        expected = tables * min(FIRST_DRAWS * growth, 1.0 + total * density**REACH)
        if last is not None:
            grown = DENSITY_STEP ** (0.5 * (index - last.index))
            expected = min(expected, grown * last.evaluations / last.asked)
        # Below 1/n not even one point of kernel value 1 is left, and √(1/μ̃) tables find nothing.
        if expected >= total or density * total < 1.0:
            return None
        return Level(index, density, tables)

    def preprocess(self, level: Level) -> Hash:
        """Choose the hash: k = ⌈t²⌉ projections and w so that p(r) ≈ exp(−REACH t r/√2), t = √ln(1/μ̃)."""
        square = math.log(1.0 / level.density)
        projections = math.ceil(square)
        # p(r) ≈ exp(−k √(2/π) r/w) for r below w.
        width = projections * math.sqrt(2.0 / math.pi) * math.sqrt(2.0 / square) / REACH
        return Hash(level, width, projections, round(FIRST_DRAWS * DENSITY_STEP ** (0.25 * level.index)))

    def query(self, structure: Hash, rows: Array, carry: None) -> Answer:
        """Answer the queries that reach μ̃ and whose tables agree."""
        xp, level = self.form.xp, structure.level
        queries = xp.take(self.queries, rows, axis=0)
        count = int(rows.shape[0])
        log_head = log_first(xp, dense_moments(xp, queries, self.head))
        evaluations = float(self.head.shape[0]) * count
        groups = group_count(self.accuracy.delta)
        totals = [empty_moments(xp, log_head) for _ in range(groups)]
        for block in range(-(-level.samples // TABLES_PER_BLOCK)):
            tables = min(TABLES_PER_BLOCK, level.samples - block * TABLES_PER_BLOCK)
            stream = self.stream + (level.index * 2**12 + block) * 4
            found, spent = self._block(structure, queries, tables, stream)
            evaluations += spent
            for table, moments in enumerate(found):
                group = (block * TABLES_PER_BLOCK + table) % groups
                totals[group] = combine(xp, totals[group], moments)
        sizes = [len(range(group, level.samples, groups)) for group in range(groups)]
        log_sum, error = summarise(xp, totals, sizes, log_head, self.accuracy.delta)
        half = 0.5 * xp.sum(queries[:, :-1] ** 2, axis=1)
        # The level's own density, less a margin: sparser ones, whose heavy points few tables hold, it must not answer.
        floor = half + self.log_top + math.log(level.density * MARGIN * int(self.body.shape[0]))
        answered = (error <= self.accuracy.eps) & (log_sum >= floor)
        return Answer(log_sum, answered, evaluations, None, self._next(level, log_sum - floor, answered))

    def _next(self, level: Level, above: Array, answered: Array) -> int:
        """Return the level that the densest eighth of the queries left over asks for."""
        xp = self.form.xp
        left = above[xp.nonzero(~answered)[0]] if int(xp.count_nonzero(~answered)) else above[:0]
        if int(left.shape[0]) == 0:
            return level.index + 1
        ordered = xp.sort(xp.where(xp.isfinite(left), left, 0.0), descending=True)
        gap = -float(ordered[int(left.shape[0]) // 8])
        return level.index + max(1, int(gap / math.log(DENSITY_STEP)))

    def _block(self, structure: Hash, queries: Array, tables: int, stream: int) -> tuple[list[Moments], float]:
        """Build some tables and query each once → one term per table and query, and evaluations spent."""
        xp, k = self.form.xp, structure.projections
        d = int(self.mapped.shape[1])
        dtype, device = self.form.x.dtype, self.form.device
        planes = from_host(xp, normal(self.seed, stream, (d, tables * k)) / structure.width, dtype=dtype, device=device)
        shift = xp.astype(uniform(xp, self.seed, stream + 1, tables * k, device=device), dtype)
        starts = uniform(xp, self.seed, stream + 2, tables * int(queries.shape[0]), device=device)
        starts = xp.reshape(starts, (tables, -1))
        # A query's extra coordinate is 0.
        cells_x = xp.floor(self.mapped @ planes + shift)
        cells_y = xp.floor(queries[:, :-1] @ planes[:-1, :] + shift)
        found, spent = [], 0.0
        for table in range(tables):
            columns = slice(table * k, (table + 1) * k)
            moments, cost = self._table(
                structure,
                queries,
                fold(xp, cells_x[:, columns]),
                fold(xp, cells_y[:, columns]),
                starts[table, :],
            )
            found.append(moments)
            spent += cost
        return found, spent

    def _table(self, structure: Hash, queries: Array, codes: Array, asked: Array, start: Array) -> tuple[Moments, float]:
        """Estimate the body's sum from one table."""
        xp = self.form.xp
        order = xp.argsort(codes, stable=True)
        ascending = xp.take(codes, order)
        first = xp.astype(xp.searchsorted(ascending, asked, side="left"), xp.int64)
        size = xp.astype(xp.searchsorted(ascending, asked, side="right"), xp.int64) - first
        drawn = min(structure.draws, int(xp.max(size)))
        if drawn == 0:
            return empty_moments(xp, queries[:, 0]), 0.0
        step = xp.arange(drawn, dtype=xp.int64, device=self.form.device)[None, :]
        width = xp.astype(size, xp.float64)
        spread = xp.astype((start[:, None] + xp.astype(step, xp.float64)) * (width / drawn)[:, None], xp.int64)
        place = first[:, None] + xp.where((size <= drawn)[:, None], step, xp.minimum(spread, size[:, None] - 1))
        used = step < size[:, None]
        owner, slot = xp.nonzero(used)
        points = xp.take(self.body, xp.take(order, xp.take(xp.reshape(place, (-1,)), owner * drawn + slot)), axis=0)
        logit = xp.vecdot(points, xp.take(queries, owner, axis=0))
        half = 0.5 * (xp.sum(queries * queries, axis=1) - 1.0) + self.log_top
        log_kernel = xp.minimum(logit - xp.take(half, owner), xp.zeros_like(logit))
        ratio = xp.sqrt(-2.0 * log_kernel) / structure.width
        term = logit - log_collision_probability(xp, ratio, structure.projections)
        # Back to one row a query: the j-th used slot holds the j-th term.
        cell = xp.cumulative_sum(xp.astype(xp.reshape(used, (-1,)), xp.int64)) - 1
        dense = xp.take(term, xp.maximum(cell, xp.zeros_like(cell)))
        dense = xp.where(used, xp.reshape(dense, used.shape), -math.inf)
        gain = xp.log(xp.maximum(width / drawn, xp.ones_like(width)))
        value = log_first(xp, logit_moments(xp, dense, squares=False)) + xp.astype(gain, term.dtype)
        one = xp.astype(size > 0, value.dtype)
        return Moments(value, one, one), float(term.shape[0])


def fold(xp: Namespace, cells: Array) -> Array:
    """Fold cell numbers (n, k), whole floats, into one int64 code a row.

    Two different rows get the same code with probability about 2⁻⁶⁴ a pair, which is the only bias of the estimator.
    """
    whole = xp.astype(cells, xp.int64)
    code = whole[:, 0]
    for column in range(1, int(whole.shape[1])):
        code = code * _MIX + whole[:, column]
        # The shift keeps the sign, so its copies are masked off: else x and ~x would get one code.
        code = code ^ ((code >> 29) & _LOW_BITS)
    return code


def group_count(delta: float) -> int:
    """Return the number of means of which the median is taken: 1 (the plain mean) down to δ = 0.01.

    A plain mean needs RelVar/(δ ε²) terms by Chebyshev, a median of g means at least about 8 ln(1/δ) RelVar/ε²: less only
    for small δ (derived). So few groups as here only guard against single outliers: they carry no proof of δ. The mean is
    unbiased, the median of skewed means is not quite.
    """
    return 1 if delta >= 0.01 else 3 if delta >= 1e-3 else 5


def summarise(
    xp: Namespace, totals: list[Moments], sizes: list[int], log_certain: Array, delta: float
) -> tuple[Array, Array]:
    """Add what is certain to the median of group means → log of the sum, and its relative error at confidence 1 − δ.

    The error is the normal quantile times the standard error between all tables, with n − 1 degrees of freedom (first
    Cornish–Fisher term).
    """
    everything = totals[0]
    for more in totals[1:]:
        everything = combine(xp, everything, more)
    level = finite(xp, xp.maximum(everything.top, log_certain))
    means = xp.stack(
        [
            t.first * xp.where(t.first > 0, xp.exp(finite(xp, t.top) - level), xp.zeros_like(t.first)) / size
            for t, size in zip(totals, sizes, strict=True)
        ]
    )
    value = xp.sort(means, axis=0)[len(totals) // 2, :] + xp.exp(log_certain - level)
    count = sum(sizes)
    scale = xp.where(everything.first > 0, xp.exp(finite(xp, everything.top) - level), xp.zeros_like(level))
    mean = everything.first * scale / count
    variance = xp.maximum(everything.second * scale**2 / count - mean**2, xp.zeros_like(mean)) * count / (count - 1)
    quantile = normal_quantile(1.0 - 0.5 * delta / LOOKS)
    quantile *= 1.0 + (quantile**2 + 1.0) / (4.0 * (count - 1))
    if len(totals) > 1:
        quantile *= math.sqrt(math.pi / 2.0)
    positive = value > 0
    safe = xp.where(positive, value, 1.0)
    error = xp.where(positive, quantile * xp.sqrt(variance / count) / safe, math.inf)
    return xp.where(positive, level + xp.log(safe), -math.inf), error


def make_hashing_based(form: GaussianForm, accuracy: Accuracy, seed: int, stream: int) -> HashingBased:
    """Return the primitive for one problem; uses random streams from ``stream`` on. O(n (d + log n))."""
    xp = form.xp
    split = split_heads(form, form.height)
    points = lifted_points(form)
    height = xp.take(form.height, split.body)
    top = xp.max(height)
    extra = xp.sqrt(2.0 * (top - height))[:, None]
    return HashingBased(
        form=form,
        accuracy=accuracy,
        head=xp.take(points, split.head, axis=0),
        body=xp.take(points, split.body, axis=0),
        mapped=xp.concat([xp.take(form.x, split.body, axis=0), extra], axis=1),
        queries=lifted_queries(form),
        log_top=float(top),
        seed=seed,
        stream=stream,
    )
