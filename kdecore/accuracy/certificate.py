"""The certificate: how far a result is from exact attention, estimated from exact rows of a random sample of queries.

Everything here is derived, and checked against true errors by `python -m bench.certificates`. The sample is drawn by random
numbers of its own, one query from each of m stretches of equal length, so that no choice of a method depends on it. With
e the errors of the sampled rows and o their exact values:

- Frobenius: √(Σ ‖e‖² / Σ ‖o‖²). Lower limit by bootstrap. Upper limit by bootstrap with a Pareto tail in place of the
  largest sampled rows, as heavy as they and a prior say (`TAIL_INDEX`), so that rows larger than any sampled count.
- Spectral: the largest singular value of the sampled errors is too large by chance, and what one half of the rows have
  along the leading direction of the other half too small. The first, with the largest row not sampled added, bounds it
  from above, the second from below; their geometric mean is the estimate.

What it can't see: rows so rare that the sample has none of their kind, such as one in a thousand that is wrong by its whole
size while the others are right to a percent.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from kdecore.accuracy.metrics import errors
from kdecore.arrays.errors import OptionError
from kdecore.arrays.gradients import without_gradient
from kdecore.arrays.memory import to_host
from kdecore.arrays.namespace import Array, Namespace, host
from kdecore.arrays.random import uniform
from kdecore.arrays.rows import SMALL_PRODUCT, cross_moment, spans, take_along_rows
from kdecore.arrays.scalars import to_float
from kdecore.core.options import Exact
from kdecore.core.problem import Problem
from kdecore.engine.hierarchy import evaluate
from kdecore.engine.split import single
from kdecore.methods.base import Plan
from kdecore.methods.levels import steps

CONFIDENCE = 0.95
FEWEST_ROWS = 32
"""Queries sampled in each group, at least, or all."""
ROWS_STREAM, BOOTSTRAP_STREAM, TAIL_STREAM = 4, 5, 6
"""Random streams of the sampled queries, and, always from the seed 0, of the bootstrap."""
STATISTICS_COST = 2e8
"""What everything but the exact rows takes, in the units of `kdecore.methods.costs`: about two milliseconds."""
FEW_ROWS_PENALTY = 1.3
"""Few exact rows take so many times what as many among all take."""
SMALL_MATRIX = 2**13
"""Numbers of a matrix whose product with a vector NumPy computes on one thread."""
REPLICATES = 400
TAIL_INDEX, TAIL_WEIGHT = 0.75, 4
"""Prior of the tail: the reciprocal of its exponent, and as how many of the largest rows it counts."""
LARGEST_TAIL = 0.95
"""Of the reciprocal exponent; from 1 on there is no mean."""
EXPLICIT_ROWS = 8
"""Largest rows of a tail that are drawn one by one; the others enter by their mean."""
POWER_ITERATIONS = 10
"""Where they do not settle, several directions are about as long, and any will do."""


@dataclass(frozen=True)
class Certificate:
    """Estimated relative errors of a result, as `kdecore.accuracy.metrics` has them: means over the leading dimensions.

    Attributes
    ----------
    rows
        Queries in each group that were evaluated exactly.
    confidence
        Nominal probability that an interval holds the true error, over the random choice of these queries.
    frobenius, spectral
        Estimates of ‖E‖_F / ‖O‖_F and of ‖E‖₂ / ‖O‖₂, with E = result − exact and O = exact.
    frobenius_interval, spectral_interval
        (lower, upper) limits; equal where all queries were evaluated. NaN where a sampled row is not finite.
    """

    rows: int
    confidence: float
    frobenius: float
    frobenius_interval: tuple[float, float]
    spectral: float
    spectral_interval: tuple[float, float]

    def __str__(self) -> str:
        parts = (
            f"{name} {_digits(value)} [{_digits(interval[0])}, {_digits(interval[1])}]"
            for name, value, interval in (
                ("Frobenius", self.frobenius, self.frobenius_interval),
                ("spectral", self.spectral, self.spectral_interval),
            )
        )
        return f"{', '.join(parts)} at {100 * self.confidence:.0f} %"

    def times(self, frobenius: float, spectral: float) -> "Certificate":
        """Return the certificate of these errors relative to something else, so many times."""
        return replace(
            self,
            frobenius=self.frobenius * frobenius,
            frobenius_interval=(self.frobenius_interval[0] * frobenius, self.frobenius_interval[1] * frobenius),
            spectral=self.spectral * spectral,
            spectral_interval=(self.spectral_interval[0] * spectral, self.spectral_interval[1] * spectral),
        )

    def upper(self, norm: str) -> float:
        """Return the upper limit in a norm, ``"frobenius"`` or ``"spectral"``."""
        return float(getattr(self, f"{norm}_interval")[1])


def certify(
    problem: Problem,
    out: Array,
    exact_rows: Callable[[Array], Array],
    cost: float,
    row_cost: float,
    share: float,
    seed: int,
) -> Certificate:
    """Compare some rows of a result with exact attention.

    Parameters
    ----------
    problem
        What was asked, n_q ≥ 1.
    out
        (G, n_q, d_v): the result.
    exact_rows
        (G, m) queries → (G, m, d_v).
    cost
        Expected cost of the call.
    row_cost
        Expected cost of one exact row of each group.
    share
        Exact rows may take this part of it.
    seed
        Of the choice of queries.

    Returns
    -------
    Certificate
        O(G m n_k (d + d_v)) for the m queries of each group that the share pays for, at least `FEWEST_ROWS`, at most n_q.
    """
    m = affordable_rows(problem.n_q, cost, row_cost, share)
    rows = sample_rows(problem.xp, problem.groups, problem.n_q, m, seed, problem.device)
    exact = exact_rows(rows)
    estimate = take_along_rows(problem.xp, without_gradient(out), rows)
    shape = (problem.groups, m, 1, problem.d_v)
    return estimate_errors(host.reshape(to_host(estimate), shape), host.reshape(to_host(exact), shape), problem.n_q)


def affordable_rows(n_q: int, cost: float, row_cost: float, share: float) -> int:
    """Return how many of n_q queries of each group are compared; costs and share as in `certify`."""
    affordable = share * cost - STATISTICS_COST
    return min(n_q, max(FEWEST_ROWS, int(affordable / (FEW_ROWS_PENALTY * row_cost))))


def check_share(share: object) -> float:
    """Return the share as a finite float of at least 0, or raise `OptionError`."""
    number = to_float(share)
    if not 0.0 <= number < math.inf:
        raise OptionError(f"certificate must be a finite number of at least 0, got {share!r}")
    return number


def sample_rows(xp: Namespace, groups: int, n: int, m: int, seed: int, device: object) -> Array:
    """Return one row from each of m ≤ n stretches of nearly equal length, ascending int64 (groups, m)."""
    return xp.astype(stratified(xp, groups, m, seed, ROWS_STREAM, device) * n, xp.int64)


def stratified(xp: Namespace, groups: int, m: int, seed: int, stream: int, device: object) -> Array:
    """Return one uniform number from each of m equal parts of [0, 1): (groups, m) float64."""
    numbers = xp.reshape(uniform(xp, seed, stream, groups * m, device=device), (groups, m))
    # Not so close to the next part that a sum or a product would be rounded into it.
    numbers = numbers * (1.0 - 2.0**-20)
    return (xp.arange(m, dtype=xp.float64, device=device)[None, :] + numbers) / m


def exact_rows(problem: Problem, plan: Plan, rows: Array) -> Array:
    """Return exact attention of the queries ``rows`` (G, m): (G, m, d_v)."""
    xp, problem = problem.xp, problem.without_gradient()
    if problem.visible is None and problem.mask is None:
        some = problem.with_queries(rows)
        out: Array = plan.exact.function(xp, some.q, some.k, some.v, some.scale).out
        return out
    # Queries of different groups see different keys.
    numbers = to_host(rows)
    alone = [single(problem, group, numbers[group]) for group in range(problem.groups)]
    parts = [evaluate(one, replace(plan, options=Exact(), steps=steps(one, Exact()))) for one in alone]
    return xp.concat([part.out for part in parts], axis=0)


def estimate_errors(estimate: Array, exact: Array, queries: int) -> Certificate:
    """Estimate the errors of all rows from those of C ≥ 2 random clusters of r rows in each group.

    Parameters
    ----------
    estimate, exact
        (G, C, r, d_v) NumPy arrays: the sampled rows.
    queries
        Rows there are in a group; where they are C · r, nothing is left to estimate.

    Returns
    -------
    Certificate
        O(G C (r d_v² + `REPLICATES`)).
    """
    groups, clusters, r, d_v = estimate.shape
    estimate, exact = (host.astype(x, host.float64) for x in (estimate, exact))
    rows = clusters * r
    if rows >= queries or not bool(host.all(host.isfinite(estimate) & host.isfinite(exact))):
        shape = (groups, rows, d_v)
        found = errors(host, host.reshape(estimate, shape), host.reshape(exact, shape))
        sure = (found.frobenius, found.spectral)
        return Certificate(rows, CONFIDENCE, sure[0], (sure[0],) * 2, sure[1], (sure[1],) * 2)
    # One factor for each group changes no ratio, and keeps squares from overflow and underflow.
    largest = host.max(host.abs(exact), axis=(1, 2, 3), keepdims=True)
    factor = 1.0 / host.where(largest > 0, largest, 1.0)
    error, exact = (estimate - exact) * factor, exact * factor

    square, size = (host.sum(x * x, axis=(2, 3)) for x in (error, exact))
    along, across, size_along = along_leading_directions(error, exact)
    counts = bootstrap_counts(clusters)
    sums = [resampled(counts, x) for x in (square, size, along, across, size_along)]
    all_squares, largest_unseen = with_pareto_tail(square, sums[0], counts, queries / r)
    shrink = math.sqrt(1.0 - rows / queries)

    def interval(point: float, low: Array, high: Array) -> tuple[float, float]:
        if not 0.0 < point < math.inf:
            return point, point
        # Of small samples the bootstrap is too narrow, by so much for normal errors.
        wider = shrink * (1.0 + 1.21 / clusters) * math.sqrt(clusters / (clusters - 1))
        tail = 50 * (1.0 - CONFIDENCE)
        lower, upper = float(host.percentile(low, tail)), float(host.percentile(high, 100 - tail))
        return min(point, point * (lower / point) ** wider), max(point, point * (upper / point) ** wider)

    def mean_ratio(numerator: Array, denominator: Array) -> Array:
        """Mean over groups, along the first axis."""
        at_zero = host.where(numerator > 0, host.inf, 0.0)
        safe = host.where(denominator > 0, denominator, 1.0)
        return host.mean(host.sqrt(host.where(denominator > 0, numerator / safe, at_zero)), axis=0)

    totals = [host.sum(x, axis=1) for x in (square, size, along, across, size_along)]
    frobenius = float(mean_ratio(totals[0], totals[1]))
    spectral = math.sqrt(float(mean_ratio(totals[2], totals[4])) * float(mean_ratio(totals[3], totals[4])))
    above = host.minimum(sums[2] + largest_unseen, all_squares)
    return Certificate(
        rows,
        CONFIDENCE,
        frobenius,
        interval(frobenius, mean_ratio(sums[0], sums[1]), mean_ratio(all_squares, sums[1])),
        spectral,
        interval(spectral, mean_ratio(sums[3], sums[4]), mean_ratio(above, sums[4])),
    )


def along_leading_directions(error: Array, exact: Array) -> tuple[Array, Array, Array]:
    """Return squares of rows (G, C, r, d) along leading right singular vectors, summed over r: three arrays (G, C).

    Of the errors along that of all clusters, whose sum is too large by chance; of the even clusters along that of the odd
    ones and the other way round, whose sum is too small; and of the exact rows along theirs.
    """
    groups, _, _, d = error.shape

    def moment(rows: Array) -> Array:
        flat = host.reshape(rows, (groups, -1, d))
        return cross_moment(host, flat, flat) * flat.shape[1]

    def squares(rows: Array, direction: Array) -> Array:
        return host.sum(host.sum(rows * direction[:, None, None, :], axis=3) ** 2, axis=2)

    even, odd = error[:, ::2], error[:, 1::2]
    of_even, of_odd = moment(even), moment(odd)
    directions = leading_vectors(host.concat([of_even + of_odd, of_even, of_odd, moment(exact)]))
    of_all, of_even, of_odd, of_exact = (directions[i * groups : (i + 1) * groups] for i in range(4))
    across = host.empty(error.shape[:2])
    across[:, ::2], across[:, 1::2] = squares(even, of_odd), squares(odd, of_even)
    return squares(error, of_all), across, squares(exact, of_exact)


def leading_vectors(moments: Array) -> Array:
    """Return leading eigenvectors of symmetric matrices (N, d, d) ≥ 0 by power iteration: (N, d) of unit length, or 0."""
    # The largest column is not orthogonal to it, unless by a miracle.
    widest = host.argmax(host.linalg.diagonal(moments), axis=1)
    vectors = host.take_along_axis(moments, widest[:, None, None], axis=1)[:, 0, :]
    parts = list(spans(moments.shape[1], max(1, SMALL_MATRIX // moments.shape[1])))
    for _ in range(POWER_ITERATIONS):
        column = unit(vectors)[:, :, None]
        vectors = host.concat([moments[:, part] @ column for part in parts], axis=1)[:, :, 0]
    return unit(vectors)


def unit(vectors: Array) -> Array:
    """Return vectors (N, d) at unit length; 0 stays."""
    length = host.sqrt(host.sum(vectors * vectors, axis=1, keepdims=True))
    return vectors / host.where(length > 0, length, 1.0)


@functools.lru_cache(maxsize=8)
def bootstrap_counts(m: int) -> Array:
    """Return how often each of m clusters is drawn in each of `REPLICATES` times m draws: (`REPLICATES`, m) float64."""
    index = host.astype(uniform(host, 0, BOOTSTRAP_STREAM, REPLICATES * m) * m, host.int64)
    first = host.repeat(host.arange(REPLICATES) * m, m)
    return host.reshape(host.astype(host.bincount(first + index, minlength=REPLICATES * m), host.float64), (REPLICATES, m))


@functools.lru_cache(maxsize=1)
def arrival_times() -> Array:
    """Return `EXPLICIT_ROWS` arrival times of a Poisson process for each replicate: what the largest of many are made of."""
    gaps = -host.log(1.0 - uniform(host, 0, TAIL_STREAM, REPLICATES * EXPLICIT_ROWS))
    return host.cumulative_sum(host.reshape(gaps, (REPLICATES, EXPLICIT_ROWS)), axis=1)


def resampled(counts: Array, values: Array) -> Array:
    """Return the sums of values (G, m) over each replicate's draws: (G, `REPLICATES`)."""
    # The product of one row is one of a matrix and a vector.
    small = SMALL_MATRIX if values.shape[0] == 1 else SMALL_PRODUCT // values.shape[0]
    step = max(1, small // REPLICATES)
    parts = [values[:, part] @ counts[:, part].T for part in spans(values.shape[1], step)]
    return sum(parts[1:], start=parts[0])


def with_pareto_tail(values: Array, sums: Array, counts: Array, population: float) -> tuple[Array, Array]:
    """Let a Pareto tail stand for the largest of the values, as it would be in the whole population (derived).

    The K = √m largest of m sampled values exceed the next one, u, by logarithms whose mean is the tail's index ξ (Hill
    1975); a prior of `TAIL_WEIGHT` such values counts too. The population has N = K · population / m such values: the
    largest are u (N / Γ)^ξ with arrival times Γ of a Poisson process (LePage, Woodroofe, Zinn 1981), and the others
    enter by their mean.

    Parameters
    ----------
    values
        (G, m) ≥ 0.
    sums
        (G, `REPLICATES`): `resampled` of them.
    counts
        (`REPLICATES`, m): `bootstrap_counts`.
    population
        Number of values there are.

    Returns
    -------
    sums
        (G, `REPLICATES`): the same with the tail in place of the largest, in units of a sample of m.
    largest
        (G, 1): median of the largest value of the population, in the same units, that is, times m / population.
    """
    m = values.shape[1]
    k = min(m - 1, max(4, round(math.sqrt(m))))
    order = host.argsort(-values, axis=1)[:, : k + 1]
    top = host.take_along_axis(values, order, axis=1)
    threshold = top[:, k:]
    top = host.where(threshold > 0, top[:, :k], 0.0)
    excess = host.log(host.where(top > 0, top, 1.0) / host.where(threshold > 0, threshold, 1.0))
    drawn = host.transpose(counts[:, order[:, :k]], (1, 0, 2))  # (G, REPLICATES, k)
    number = host.sum(drawn, axis=2)

    def index(logs: Array, count: Array | int) -> Array:
        return host.minimum((logs + TAIL_WEIGHT * TAIL_INDEX) / (count + TAIL_WEIGHT), LARGEST_TAIL)

    xi = index(host.sum(drawn * excess[:, None, :], axis=2), number)
    n = population * k / m
    arrivals = host.minimum(arrival_times(), n)
    one_by_one = host.sum(host.where(arrivals < n, (n / arrivals) ** xi[:, :, None], 0.0), axis=2)
    rest = (n - n**xi * arrivals[:, -1] ** (1.0 - xi)) / (1.0 - xi)
    mean = threshold * (one_by_one + rest) / n
    largest = threshold * (n / math.log(2.0)) ** index(host.sum(excess, axis=1, keepdims=True), k) * m / population
    # A difference that is but rounding may be below 0.
    others = host.maximum(sums - host.sum(drawn * top[:, None, :], axis=2), 0.0)
    return others + number * mean, largest


def _digits(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else str(value)
