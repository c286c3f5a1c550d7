"""Results: each subproblem of a call evaluated, put together again, and compared with exact rows."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from kdecore.accuracy.certificate import Certificate, certify, exact_rows
from kdecore.accuracy.search import SearchStep, search
from kdecore.arrays.errors import MemoryLimitError
from kdecore.arrays.namespace import Array, Namespace, host
from kdecore.arrays.rows import invert_permutation
from kdecore.core.options import Exact, Options
from kdecore.core.problem import Problem
from kdecore.core.selection import Slots
from kdecore.core.state import AttentionState
from kdecore.engine.hierarchy import evaluate, nothing
from kdecore.engine.nonfinite import finite_queries, merge_not_finite, not_finite_part, spoilt, spoilt_by_keys
from kdecore.engine.restrictions import Restrictions
from kdecore.engine.split import Subproblem, in_halves, subproblems
from kdecore.methods.base import Plan, expected_cost
from kdecore.methods.choices import item_bytes
from kdecore.methods.memory import FEWEST_QUERIES
from kdecore.methods.plan import make_plan


@dataclass(frozen=True)
class Result:
    """What came of a subproblem.

    Attributes
    ----------
    subproblem
        Which groups and queries.
    plan
        What was done.
    part
        The result, without keys that are not finite.
    slots
        How many slots of each Selection counted.
    certificate, rounds
        Of a search for a tolerance.
    """

    subproblem: Subproblem
    plan: Plan
    part: AttentionState
    slots: Sequence[Slots]
    certificate: Certificate | None = None
    rounds: tuple[SearchStep, ...] = ()


def held_bytes(problem: Problem, restrictions: Restrictions, whole: list[Subproblem]) -> int:
    """Return what a look at the mask, the results of several shares and their own arrays take beside each of them."""
    mask = restrictions.mask
    looked_at = 0 if mask is None else 4 * int(mask.values.shape[1]) * int(mask.values.shape[2])
    if len(whole) == 1:
        return looked_at
    rows = [(one.problem.n_q, one.problem.n_k, one.problem.groups) for one in whole if one.problem is not None]
    own = sum(groups * (n_q * problem.d + n_k * (problem.d + problem.d_v)) for n_q, n_k, groups in rows)
    return looked_at + item_bytes(problem) * (own + 3 * problem.groups * problem.n_q * (problem.d_v + 1))


def run(
    subproblem: Subproblem, plan_for: Callable[..., Plan], limit: float, *, count: bool, held: int = 0
) -> Iterator[Result]:
    """Evaluate a subproblem as planned, in parts where its temporaries would take more than ``limit`` bytes.

    Parameters
    ----------
    subproblem, plan_for
        What, and how: a problem and ``limit=`` → plan.
    limit
        In bytes.
    count
        Whether to count slots, for a report.
    held
        What other subproblems take, in bytes.

    Raises
    ------
    MemoryLimitError
        One group and few queries take more.
    """
    problem = subproblem.problem
    assert problem is not None
    plan = plan_for(problem, limit=limit - held)
    plan = replace(plan, temporary_bytes=plan.temporary_bytes + held, piece=piece_of(subproblem))
    if plan.temporary_bytes <= limit:
        slots: list[Slots] = []
        part = evaluate(problem, plan, slots.append if count else None)
        yield Result(subproblem, plan, spoilt_by_keys(problem, plan, part), slots)
        return
    if len(subproblem.groups) == 1 and problem.n_q <= FEWEST_QUERIES:
        raise too_small(limit, plan)
    if held == 0:
        # Results of parts, and what they are put together in.
        held = 3 * item_bytes(problem) * problem.groups * problem.n_q * (problem.d_v + 1)
    for half in in_halves(subproblem):
        yield from run(half, plan_for, limit, count=count, held=held)


def piece_of(subproblem: Subproblem) -> tuple[int, ...]:
    """Return the path that tells a subproblem from others of a call, which draw other numbers; () for the first."""
    place = (subproblem.groups[0] if subproblem.groups else 0, subproblem.queries[0])
    return () if place == (0, 0) else place


def run_all(problem: Problem, restrictions: Restrictions, options: Options, settings: dict[str, Any]) -> AttentionState:
    """Evaluate a problem whose keys are restricted, the numbers that are not finite among them."""
    problem, finite = finite_queries(problem.standing_at(restrictions.diagonal), settings["kernels"])
    plan_for: Callable[..., Plan] = partial(make_plan, method=options, **settings)
    results: list[Result] = []
    for one in subproblems(problem, restrictions):
        if one.problem is None:
            results.append(unseen(problem, one, settings))
        else:
            results += run(one, plan_for, math.inf, count=False)
    part = assembled(problem, results, finite=False)
    return spoilt(problem, part, finite, settings["kernels"], part.out)


def find(
    subproblem: Subproblem, settings: dict[str, Any], tried: Options | None, rtol: float, norm: str, limit: float
) -> Iterator[Result]:
    """Evaluate a subproblem to a tolerance (`kdecore.accuracy.search.search`), by what takes no more than ``limit`` bytes.

    In parts where even exact attention would take more, each of which keeps the tolerance.
    """
    assert subproblem.problem is not None

    def plan_for(problem: Problem, **options: Any) -> Plan:
        return replace(make_plan(problem, **options, **settings), piece=piece_of(subproblem))

    exact = plan_for(subproblem.problem, method=Exact())
    if exact.temporary_bytes <= limit:
        found = search(subproblem.problem, plan_for, exact, tried, rtol, norm, limit)
        part = spoilt_by_keys(subproblem.problem, exact, found.part)
        yield Result(subproblem, found.plan, part, found.slots, found.certificate, found.rounds)
        return
    if len(subproblem.groups) == 1 and subproblem.problem.n_q <= FEWEST_QUERIES:
        raise too_small(limit, exact)
    for half in in_halves(subproblem):
        yield from find(half, settings, tried, rtol, norm, limit)


def too_small(limit: float, plan: Plan) -> MemoryLimitError:
    """Say how much a call needs at least."""
    return MemoryLimitError(
        f"max_memory must be at least {plan.temporary_bytes} bytes here ({plan.method}, one group of few queries), "
        f"got {limit:.0f}"
    )


def unseen(problem: Problem, subproblem: Subproblem, settings: dict[str, Any]) -> Result:
    """Return the result of a subproblem that sees no key."""
    plan = make_plan(problem, method=Exact(), **settings)
    part = nothing(replace(problem, q=problem.q[: len(subproblem.groups), ...]))
    return Result(subproblem, replace(plan, reason="no query sees a key"), part, [])


def assembled(problem: Problem, results: list[Result], *, finite: bool) -> AttentionState:
    """Put the results of all shares together; with the keys that are not finite unless ``finite``."""
    xp = problem.xp
    parts = [one.part if finite or one.subproblem.apart is None else with_not_finite(xp, one) for one in results]
    if len(parts) == 1:
        return parts[0]
    groups = [group for one in results for group in one.subproblem.groups]
    if groups == list(range(problem.groups)) and all(one.subproblem.queries == (0, problem.n_q) for one in results):
        return AttentionState(
            xp.concat([part.out for part in parts], axis=0), xp.concat([part.lse for part in parts], axis=0)
        )
    rows = [
        host.asarray(one.subproblem.groups, dtype=host.int64)[:, None] * problem.n_q + host.arange(*one.subproblem.queries)
        for one in results
    ]
    return AttentionState(
        *(in_order(xp, rows, arrays, problem) for arrays in zip(*((p.out, p.lse) for p in parts), strict=True))
    )


def with_not_finite(xp: Namespace, result: Result) -> AttentionState:
    """Return a result with the keys that are not finite."""
    assert result.subproblem.apart is not None
    return merge_not_finite(xp, result.part, not_finite_part(result.subproblem.apart))


def in_order(xp: Namespace, rows: list[Array], arrays: tuple[Array, ...], problem: Problem) -> Array:
    """Put rows, numbered through all groups, in their order: (G, n_q, …)."""
    order = host.concat([host.reshape(x, (-1,)) for x in rows])
    flat = xp.concat([xp.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:])) for x in arrays], axis=0)
    place = invert_permutation(xp, xp.asarray(order, device=problem.device)[None, :])[0, :]
    return xp.reshape(xp.take(flat, place, axis=0), (problem.groups, problem.n_q, *flat.shape[1:]))


def certify_all(
    problem: Problem, whole: list[Subproblem], results: list[Result], share: float, seed: int
) -> tuple[Certificate | None, float]:
    """Compare some rows of a call with exact attention; return what was found, and the seconds it took.

    Parameters
    ----------
    problem
        The call.
    whole
        Its shares, uncut.
    results
        What came of them.
    share
        Exact rows may take this part of the expected cost.
    seed
        Of the choice of rows.
    """
    xp = problem.xp
    approximate = [one for one in results if one.plan.method != "exact"]
    if not approximate or problem.d_v == 0:
        return None, 0.0
    started = time.perf_counter()
    # Shares whose keys nobody sees cost nothing.
    costs = [(one.subproblem.problem, one.plan.options) for one in results if one.subproblem.problem is not None]
    cost = sum(expected_cost(some, options).total for some, options in costs)
    row_cost = sum(expected_cost(some, Exact()).total for some, _ in costs) / problem.n_q
    out = assembled(problem, results, finite=True).out
    plans = {group: one.plan for one in results for group in one.subproblem.groups}

    def exact(rows: Array) -> Array:
        parts = [
            subproblem_exact_rows(problem, one, take_groups(xp, rows, one.groups), plans[one.groups[0]]) for one in whole
        ]
        order = host.argsort(host.asarray([group for one in whole for group in one.groups]))
        return take_groups(xp, xp.concat(parts, axis=0), order)

    return certify(problem, out, exact, cost, row_cost, share, seed), time.perf_counter() - started


def take_groups(xp: Namespace, rows: Array, groups: Sequence[int]) -> Array:
    """Return some groups of (G, …)."""
    return xp.take(rows, xp.asarray(groups, dtype=xp.int64, device=rows.device), axis=0)


def subproblem_exact_rows(problem: Problem, subproblem: Subproblem, rows: Array, plan: Plan) -> Array:
    """Return exact attention of the queries ``rows`` (…, m) of a subproblem's groups, by its kernels: (…, m, d_v)."""
    if subproblem.problem is None:
        return problem.xp.zeros((*rows.shape, problem.d_v), dtype=problem.dtype, device=problem.device)
    return exact_rows(subproblem.problem, plan, rows)
