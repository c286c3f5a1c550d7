"""Measure methods against exact attention: time, error and memory on one case. Used by `kdecore compare` and by bench/."""

import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from kdecore.accuracy.metrics import Errors, errors
from kdecore.accuracy.search import check_tolerance
from kdecore.api.attention import attention
from kdecore.api.report import Report
from kdecore.arrays.backend import Backend, backend_named, unusable
from kdecore.arrays.errors import OptionError, ShapeError
from kdecore.arrays.namespace import Array, host
from kdecore.arrays.random import check_seed, uniform
from kdecore.arrays.scalars import integer_at_least, one_of
from kdecore.compare.baselines import WITHOUT_BUDGET, baseline, known_methods
from kdecore.compare.cases import Case
from kdecore.compare.machine import peak_memory
from kdecore.compare.rows import SDPA, Row, WorstRow, find_worst_rows
from kdecore.compare.timing import time_calls
from kdecore.core.problem import Problem, canonicalise
from kdecore.methods import METHODS

EXACT_LIMIT = 2**28
"""Most query-key pairs on which exact attention is computed unless asked for: n = 16,384 in one group, a few seconds."""
FEWEST_ROWS = 64
TIMED_ROWS = 1024
"""Fewest queries per group that the baseline is timed on, or all: scaling up fewer would multiply fixed costs."""
ROWS_STREAM = 2**31
"""Random stream of the sampled query rows."""


@dataclass(frozen=True)
class _Subject:
    """What one `Row` measures.

    ``call(seed)`` returns the output, ``describe(seed, certified)`` also a report, with a certificate if asked; or None,
    and then ``ran`` says what runs. ``rows`` are the queries that the output is for, None for all.
    """

    method: str
    budget: int | None
    rtol: float | None
    call: Callable[[int], Array]
    describe: Callable[[int, bool], tuple[Array, Report | None]]
    rows: Array | None = None
    ran: str = ""

    def __str__(self) -> str:
        if self.rtol is not None:
            return f"{self.method}, rtol {self.rtol:g}"
        return self.method if self.budget is None else f"{self.method}, budget {self.budget}"


Progress = Callable[[int, int, str], None]
"""Called as (steps done, steps in all, what comes next)."""


@contextmanager
def _without_overflow_warnings() -> Iterator[None]:
    """Drop array libraries' warnings of overflow and NaN, which show as nan in the rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@_without_overflow_warnings()
def measure(
    case: Case,
    methods: Sequence[str],
    budgets: Sequence[int],
    seeds: Sequence[int],
    *,
    rtols: Sequence[float] = (),
    library: str = "numpy",
    repeats: int = 3,
    exact_rows: int | None = None,
    progress: Progress = lambda done, total, label: None,
) -> list[Row]:
    """Measure every method at every budget, and ``"auto"`` at every tolerance, against exact attention.

    Parameters
    ----------
    case
        Inputs.
    methods
        Names in `kdecore.methods.METHODS`, or of `kdecore.compare.baselines`; those `WITHOUT_BUDGET` are measured once.
    budgets
        Keys per query, each at least 1; of those that cover all keys, and so are exact, only the smallest is measured.
    seeds
        Errors are averaged over them; each is timed ``repeats`` times. Certificates are those of the first.
    rtols
        Relative Frobenius errors to ask for.
    library
        Array library to run on: ``"numpy"`` or ``"torch"``, on the CPU.
    repeats
        Timed calls for each seed, after one that is not.
    exact_rows
        Queries per group, drawn at random from the first seed, on which the errors are computed; None for all of them up
        to `EXACT_LIMIT` pairs of query and key. The baseline is timed on these and others, `TIMED_ROWS` at least.
    progress
        Callback.

    Returns
    -------
    list of Row
        The baseline first: PyTorch's scaled_dot_product_attention where installed, else kdecore's exact attention. Errors
        are against exact attention in float64.

    Raises
    ------
    KdecoreError
        Arguments out of range, before anything is measured.
    """
    check_options(methods, budgets, seeds, rtols=rtols, library=library, repeats=repeats, exact_rows=exact_rows)
    problem = check_case(case)
    ours = backend_named(library)
    rows = sample_rows(case, exact_rows, seeds[0])
    some_budgets = _distinct(budgets, problem.n_k)
    runs: list[tuple[str, dict[str, Any]]] = [
        (name, {"budget": budget})
        for name in dict.fromkeys(methods)
        for budget in ([None] if name in WITHOUT_BUDGET else some_budgets)
    ]
    runs += [("auto", {"rtol": rtol}) for rtol in dict.fromkeys(rtols)]
    steps = 1 + (len(runs) + 1) * len(seeds)

    progress(0, steps, "exact in float64")
    exact = reference(case, rows)
    q, k, v = (ours.from_numpy(array) for array in (case.q, case.k, case.v))
    subjects = [_baseline(q, k, v, problem.scale, timing_rows(case, rows, seeds[0]))]
    attend = partial(attention, q, k, v, scale=problem.scale, diagonal=case.diagonal)
    subjects += [
        _estimator(attend, method, **asked) if method in METHODS else _published(method, problem, ours, **asked)
        for method, asked in runs
    ]
    # Seed by seed, so that a busy spell of the machine falls on a few calls of every subject and medians shed it.
    samples: list[list[_Sample]] = [[] for _ in subjects]
    for seed in seeds:
        for subject, own in zip(subjects, samples, strict=True):
            progress(1 + sum(map(len, samples)), steps, f"seed {seed}: {subject}")
            own.append(_sample(subject, seed, not own, repeats, ours, exact, rows))
    progress(steps, steps, "memory")
    results: list[Row] = []
    for subject, own in zip(subjects, samples, strict=True):
        # Memory for some of the queries would say nothing about all of them.
        peak = peak_memory(partial(subject.call, seeds[0])) if subject.rows is None else None
        results.append(_row(subject, own, case, exact, peak, results[0].milliseconds if results else None))
    return results


def check_options(
    methods: Sequence[str],
    budgets: Sequence[int],
    seeds: Sequence[int],
    *,
    rtols: Sequence[float],
    library: str,
    repeats: int,
    exact_rows: int | None,
) -> None:
    """Raise what `measure` raises for any inputs: `OptionError` naming the first argument out of range."""
    for method in methods:
        one_of(known_methods(methods), "method", method)
    for budget in budgets:
        integer_at_least(1, "budget", budget)
    for rtol in rtols:
        check_tolerance(rtol, "frobenius")
    for seed in seeds:
        check_seed(seed)
    integer_at_least(1, "repeats", repeats)
    if exact_rows is not None:
        integer_at_least(1, "exact_rows", exact_rows)
    if not (methods and budgets and seeds):
        raise OptionError("methods, budgets and seeds must each have at least one entry")
    backend_named(library)


def check_case(case: Case) -> Problem:
    """Return the case in canonical form, or raise `KdecoreError`: it doesn't fit together, or there is nothing to compare.

    That is where the output has no elements, or a number is not finite: one makes all errors nan, which are means.
    """
    problem = canonicalise(case.q, case.k, case.v, case.scale)
    if problem.groups * problem.n_q * problem.d_v == 0:
        raise ShapeError(f"the output must have at least one element to compare; got q {case.q.shape}, v {case.v.shape}")
    arrays = {"q": case.q, "k": case.k, "v": case.v}
    counts = {name: int(host.count_nonzero(~host.isfinite(array))) for name, array in arrays.items()}
    if any(counts.values()):
        held = ", ".join(f"{name} holds {count:,} of {arrays[name].size:,}" for name, count in counts.items() if count)
        raise OptionError(f"numbers that are NaN or infinite in {case.name}: {held}; with them every error would be nan")
    return problem


def _distinct(budgets: Sequence[int], n_k: int) -> list[int]:
    """Return the budgets without repetitions, and without all but the smallest of those that cover all keys."""
    enough = min((budget for budget in budgets if budget >= n_k), default=None)
    return [budget for budget in dict.fromkeys(budgets) if budget < n_k or budget == enough]


def sample_rows(case: Case, exact_rows: int | None, seed: int) -> Array | None:
    """Choose the queries on which the errors are computed.

    Returns
    -------
    Array or None
        Ascending int64 NumPy indices, the same for every group; None for all queries.
    """
    if exact_rows is None:
        count = max(FEWEST_ROWS, EXACT_LIMIT // (case.groups * case.n_k))
    else:
        count = integer_at_least(1, "exact_rows", exact_rows)
    return _draw_rows(case.n_q, count, seed)


def timing_rows(case: Case, rows: Array | None, seed: int) -> Array | None:
    """Choose the queries on which the baseline is timed: ``rows`` of `sample_rows` and others, `TIMED_ROWS` at least."""
    return None if rows is None else _draw_rows(case.n_q, max(TIMED_ROWS, len(rows)), seed)


def _draw_rows(n_q: int, count: int, seed: int) -> Array | None:
    """Draw ``count`` queries, ascending, or None for all; with the same seed a smaller draw is part of a larger one."""
    if count >= n_q:
        return None
    return host.sort(host.argsort(uniform(host, seed, ROWS_STREAM, n_q))[:count])


def reference(case: Case, rows: Array | None) -> Array:
    """Return exact attention in float64 for the queries ``rows``, as NumPy (…, len(rows), d_v)."""
    q = case.q if rows is None else case.q[..., rows, :]
    q, k, v = (host.astype(array, host.float64) for array in (q, case.k, case.v))
    return attention(q, k, v, method="exact", scale=case.scale)


def exact_baseline() -> tuple[str, Callable[[Array, Array, Array, float], Array]]:
    """Return what one would otherwise call, as a label and a function of (q, k, v, scale)."""
    if unusable("torch") is None:
        return SDPA, backend_named("torch").exact_attention
    return "exact (kdecore)", lambda q, k, v, scale: attention(q, k, v, method="exact", scale=scale)


def _baseline(q: Array, k: Array, v: Array, scale: float, rows: Array | None) -> _Subject:
    label, function = exact_baseline()
    some_q = q if rows is None else q[..., rows, :]

    def call(seed: int) -> Array:
        return function(some_q, k, v, scale)

    return _Subject(label, None, None, call, lambda seed, certified: (call(seed), None), rows, "exact")


def _published(method: str, problem: Problem, ours: Backend, *, budget: int | None) -> _Subject:
    call = partial(baseline(method, problem, ours), budget or problem.n_k)
    return _Subject(method, budget, None, call, lambda seed, certified: (call(seed), None), None, method)


def _estimator(attend: Callable[..., Any], method: str, *, budget: int | None = None, rtol: float | None = None) -> _Subject:
    call = partial(attend, method=method, budget=budget, rtol=rtol)
    with_report = partial(call, return_report=True)

    def describe(seed: int, certified: bool) -> tuple[Array, Report]:
        result: tuple[Array, Report] = with_report(seed=seed) if certified else with_report(seed=seed, certificate=0.0)
        return result

    return _Subject(method, budget, rtol, lambda seed: call(seed=seed), describe)


@dataclass(frozen=True)
class _Sample:
    """A subject's timings in milliseconds, errors, worst rows and report with one seed."""

    timings: list[float]
    errors: Errors
    worst_rows: tuple[WorstRow, ...]
    report: Report | None


def _sample(
    subject: _Subject, seed: int, certified: bool, repeats: int, ours: Backend, exact: Array, rows: Array | None
) -> _Sample:
    def call() -> None:
        subject.call(seed)
        ours.synchronize()

    seconds, (out, report) = time_calls(call, repeats, untimed=partial(subject.describe, seed, certified))
    estimate = ours.to_numpy(out)
    if rows is not None:
        estimate = estimate[..., rows if subject.rows is None else host.searchsorted(subject.rows, rows), :]
    timings, worst = [1e3 * one for one in seconds], find_worst_rows(estimate, exact, rows)
    return _Sample(timings, errors(host, estimate, exact), worst, report)


def _row(
    subject: _Subject, samples: list[_Sample], case: Case, exact: Array, peak: int | None, baseline: float | None
) -> Row:
    """Sum samples up; ``baseline`` is the baseline's milliseconds, None for the baseline itself."""
    timed_rows = case.n_q if subject.rows is None else len(subject.rows)
    timings = [timing * case.n_q / timed_rows for sample in samples for timing in sample.timings]
    milliseconds = statistics.median(timings)
    mean, std = _mean_and_std([sample.errors for sample in samples])
    reports = [sample.report for sample in samples if sample.report is not None]
    return Row(
        method=subject.method,
        ran=", ".join(dict.fromkeys(report.method for report in reports)) or subject.ran,
        budget=subject.budget,
        rtol=subject.rtol,
        keys_per_query=statistics.fmean([report.keys_per_query for report in reports] or [subject.budget or case.n_k]),
        milliseconds=milliseconds,
        timings=tuple(timings),
        timed_rows=timed_rows,
        speedup=1.0 if baseline is None else baseline / milliseconds,
        errors=mean,
        errors_std=std,
        error_rows=int(exact.shape[-2]),
        peak_bytes=peak,
        kernels={name: choice for report in reports for name, choice in report.kernels.items()},
        certificate=reports[0].certificate if reports else None,
        first_errors=samples[0].errors,
        worst_rows=samples[0].worst_rows,
    )


def _mean_and_std(found: Sequence[Errors]) -> tuple[Errors, Errors]:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def std(values: list[float]) -> float:
        if len(values) < 2:
            return math.nan
        centre = mean(values)
        return math.sqrt(sum((value - centre) * (value - centre) for value in values) / (len(values) - 1))

    columns = [[getattr(one, field) for one in found] for field in ("spectral", "frobenius", "worst_row")]
    return Errors(*map(mean, columns)), Errors(*map(std, columns))
