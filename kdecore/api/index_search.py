"""What an answer of an index is off by, and ``rtol=``: budgets are doubled until one is certified."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from kdecore.accuracy.certificate import FEWEST_ROWS, Certificate, certify, estimate_errors, stratified
from kdecore.accuracy.search import SearchStep
from kdecore.accuracy.trial import CERTIFIED_STREAM, PILOT_STREAM
from kdecore.api.segments import Segment
from kdecore.arrays.gradients import without_gradient
from kdecore.arrays.memory import to_host
from kdecore.arrays.namespace import Array, host
from kdecore.arrays.rows import take_along_rows
from kdecore.core.problem import Problem
from kdecore.core.selection import Slots
from kdecore.core.state import AttentionState
from kdecore.methods.base import Plan, expected_cost
from kdecore.methods.costs import exact_row_cost

CERTIFIED_SHARE = 20
"""One in so many queries is compared to certify a budget, but `FEWEST_ROWS` at least."""


class IndexResult(NamedTuple):
    """Attention of queries to all keys of an index.

    Attributes
    ----------
    part
        The result.
    plans
        What was done with each segment.
    slots
        How many slots counted in each.
    estimated
        (1, m) int64: the queries of an only group that are not evaluated exactly; None for all, of any groups.
    """

    part: AttentionState
    plans: list[Plan]
    slots: list[Slots]
    estimated: Array | None = None


class Sampled(NamedTuple):
    """What errors are measured on: the queries that were estimated, so that no exact row is wasted on one that has none.

    Attributes
    ----------
    problem, out
        Only these, and their results.
    frobenius, spectral
        Norms of their results over those of all: an error relative to the one, so many times, is relative to the other.
    """

    problem: Problem
    out: Array
    frobenius: float = 1.0
    spectral: float = 1.0


def sampled(problem: Problem, found: IndexResult) -> Sampled:
    """Return what errors are measured on. Where only some were estimated, O(n_q d_v min(n_q, d_v))."""
    xp, out, rows = problem.xp, without_gradient(found.part.out), found.estimated
    # So few are all compared.
    if rows is None or problem.n_q <= FEWEST_ROWS:
        return Sampled(problem, out)
    some = take_along_rows(xp, out, rows)

    def share(norm: Callable[[Array], Array]) -> float:
        whole = float(norm(out[0]))
        return float(norm(some[0])) / whole if whole > 0 else 1.0

    return Sampled(
        problem.with_queries(rows), some, share(xp.linalg.matrix_norm), share(partial(xp.linalg.matrix_norm, ord=2))
    )


def costs(problem: Problem, segments: Sequence[Segment], plans: list[Plan]) -> tuple[float, float]:
    """Return what evaluating all queries is expected to take as planned, and one exact row of each group."""
    sizes = [replace(segment.problem, q=problem.q, repeats=problem.repeats) for segment in segments]
    planned = sum(expected_cost(some, plan.options).evaluate for some, plan in zip(sizes, plans, strict=True))
    return planned, sum(exact_row_cost(some) * some.groups for some in sizes)


def certify_index(
    problem: Problem,
    segments: Sequence[Segment],
    found: IndexResult,
    exact_rows: Callable[[Problem, Array], Array],
    share: float,
    seed: int,
) -> tuple[Certificate | None, float]:
    """Compare some rows with exact attention; return what was found, None where all was exact, and the seconds."""
    of = sampled(problem, found)
    if all(plan.method == "exact" for plan in found.plans) or problem.d_v == 0 or of.problem.n_q == 0:
        return None, 0.0
    started, (cost, row_cost) = time.perf_counter(), costs(problem, segments, found.plans)
    bound = certify(of.problem, of.out, partial(exact_rows, of.problem), cost, row_cost, share, seed)
    return bound.times(of.frobenius, of.spectral), time.perf_counter() - started


def doubled(
    problem: Problem,
    first: int,
    n_k: int,
    attend: Callable[[int | None], IndexResult],
    exact_rows: Callable[[Problem, Array], Array],
    costs: Callable[[list[Plan]], tuple[float, float]],
    seed: int,
    rtol: float,
    norm: str,
) -> tuple[IndexResult, Certificate | None, tuple[SearchStep, ...]]:
    """Return attention within a tolerance, and what it rests on.

    As `kdecore.accuracy.search`, but all queries are evaluated with each budget: they take little, trees being there.

    Parameters
    ----------
    problem
        The queries.
    first
        Budget that is tried first, of ``n_k`` keys.
    attend, exact_rows
        What evaluates all queries with a budget, exactly for None; and some of them exactly.
    costs
        What that is expected to take as planned, and one exact row.
    seed, rtol, norm
        As in `kdecore.attention`.
    """
    xp, n_q = problem.xp, problem.n_q
    rounds: list[SearchStep] = []
    spent, exact_cost = 0.0, 0.0
    samples: dict[str, tuple[Array, Array]] = {}
    certified = max(FEWEST_ROWS, n_q // CERTIFIED_SHARE)
    numbers = {"pilot": (FEWEST_ROWS, PILOT_STREAM), "certified": (certified, CERTIFIED_STREAM)}

    def compare(of: Sampled, kind: str) -> Certificate:
        # Which queries are estimated may change with the budget, and the sample with them.
        if kind not in samples or of.problem is not problem:
            count, stream = numbers[kind]
            places = stratified(xp, problem.groups, min(count, of.problem.n_q), seed, stream, problem.device)
            rows = xp.astype(places * of.problem.n_q, xp.int64)
            samples[kind] = rows, exact_rows(of.problem, rows)
        rows, exact = samples[kind]
        shape = (problem.groups, int(rows.shape[1]), 1, int(exact.shape[2]))
        some = take_along_rows(xp, of.out, rows)
        bound = estimate_errors(host.reshape(to_host(some), shape), host.reshape(to_host(exact), shape), of.problem.n_q)
        return bound.times(of.frobenius, of.spectral)

    budget = first
    while n_q > 2 * FEWEST_ROWS and 2 * budget < n_k and problem.groups * problem.d_v > 0:
        found = attend(budget)
        if (of := sampled(problem, found)).problem.n_q == 0:
            break
        cost, row_cost = costs(found.plans)
        spent, exact_cost = spent + cost, row_cost * n_q
        for kind in numbers:
            bound = compare(of, kind)
            error, upper = float(getattr(bound, norm)), bound.upper(norm)
            rounds.append(SearchStep("treecode", budget, kind, bound.rows, error, upper, spent / exact_cost))
            if upper > rtol:
                break
        else:
            return found, bound, tuple(rounds)
        budget *= 2
    return attend(None), None, tuple(rounds)
