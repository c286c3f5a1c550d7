"""Outcomes: each share of a call evaluated, put together again, and compared with exact rows."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from kdecore.certificate import Certificate, certify, exact_rows
from kdecore.errors import MemoryLimitError
from kdecore.evaluate import evaluate, nothing
from kdecore.inputs import Problem
from kdecore.merge import Part
from kdecore.namespaces import Array, Namespace, host, invert_permutation
from kdecore.nonfinite import finite_queries, merge_not_finite, not_finite_part, spoilt, spoilt_by_keys
from kdecore.options import Exact, Options
from kdecore.planning import FEWEST_QUERIES, Plan, expected_cost, item_bytes, make_plan
from kdecore.selection import Slots
from kdecore.shares import Restrictions, Share, in_halves, shares
from kdecore.tolerance import Round, search


@dataclass(frozen=True)
class Outcome:
    """What came of a share.

    Attributes
    ----------
    share
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

    share: Share
    plan: Plan
    part: Part
    slots: Sequence[Slots]
    certificate: Certificate | None = None
    rounds: tuple[Round, ...] = ()


def held_bytes(problem: Problem, restrictions: Restrictions, whole: list[Share]) -> int:
    """Return what a look at the mask, the results of several shares and their own arrays take beside each of them."""
    mask = restrictions.mask
    looked_at = 0 if mask is None else 4 * int(mask.values.shape[1]) * int(mask.values.shape[2])
    if len(whole) == 1:
        return looked_at
    rows = [(one.problem.n_q, one.problem.n_k, one.problem.groups) for one in whole if one.problem is not None]
    own = sum(groups * (n_q * problem.d + n_k * (problem.d + problem.d_v)) for n_q, n_k, groups in rows)
    return looked_at + item_bytes(problem) * (own + 3 * problem.groups * problem.n_q * (problem.d_v + 1))


def run(share: Share, plan_for: Callable[..., Plan], limit: float, *, count: bool, held: int = 0) -> Iterator[Outcome]:
    """Evaluate a share as planned, in parts where its temporaries would take more than ``limit`` bytes.

    Parameters
    ----------
    share, plan_for
        What, and how: a problem and ``limit=`` → plan.
    limit
        In bytes.
    count
        Whether to count slots, for a report.
    held
        What other shares take, in bytes.

    Raises
    ------
    MemoryLimitError
        One group and few queries take more.
    """
    assert share.problem is not None
    plan = plan_for(share.problem, limit=limit - held)
    # Other groups and queries of a call draw other numbers.
    place = (share.groups[0] if share.groups else 0, share.queries[0])
    plan = replace(plan, temporary_bytes=plan.temporary_bytes + held, piece=() if place == (0, 0) else place)
    if plan.temporary_bytes <= limit:
        slots: list[Slots] = []
        part = evaluate(share.problem, plan, slots.append if count else None)
        yield Outcome(share, plan, spoilt_by_keys(share.problem, plan, part), slots)
        return
    if len(share.groups) == 1 and share.problem.n_q <= FEWEST_QUERIES:
        raise too_small(limit, plan)
    if held == 0:
        # Results of parts, and what they are put together in.
        held = 3 * item_bytes(share.problem) * share.problem.groups * share.problem.n_q * (share.problem.d_v + 1)
    for half in in_halves(share):
        yield from run(half, plan_for, limit, count=count, held=held)


def run_all(problem: Problem, restrictions: Restrictions, options: Options, settings: dict[str, Any]) -> Part:
    """Evaluate a problem whose keys are restricted, the numbers that are not finite among them."""
    problem, finite = finite_queries(problem.standing_at(restrictions.diagonal), settings["kernels"])
    plan_for: Callable[..., Plan] = partial(make_plan, method=options, **settings)
    outcomes: list[Outcome] = []
    for one in shares(problem, restrictions):
        if one.problem is None:
            outcomes.append(unseen(problem, one, settings))
        else:
            outcomes += run(one, plan_for, math.inf, count=False)
    return spoilt(problem.xp, assembled(problem, outcomes, finite=False), finite)


def find(
    share: Share, settings: dict[str, Any], tried: Options | None, rtol: float, norm: str, limit: float
) -> Iterator[Outcome]:
    """Evaluate a share to a tolerance (`kdecore.tolerance.search`), by what takes no more than ``limit`` bytes.

    In parts where even exact attention would take more, each of which keeps the tolerance.
    """
    assert share.problem is not None
    plan_for: Callable[..., Plan] = partial(make_plan, **settings)
    exact = plan_for(share.problem, method=Exact())
    if exact.temporary_bytes <= limit:
        found = search(share.problem, plan_for, exact, tried, rtol, norm, limit)
        part = spoilt_by_keys(share.problem, exact, found.part)
        yield Outcome(share, found.plan, part, found.slots, found.certificate, found.rounds)
        return
    if len(share.groups) == 1 and share.problem.n_q <= FEWEST_QUERIES:
        raise too_small(limit, exact)
    for half in in_halves(share):
        yield from find(half, settings, tried, rtol, norm, limit)


def too_small(limit: float, plan: Plan) -> MemoryLimitError:
    """Say how much a call needs at least."""
    return MemoryLimitError(
        f"max_memory must be at least {plan.temporary_bytes} bytes here ({plan.method}, one group of few queries), "
        f"got {limit:.0f}"
    )


def unseen(problem: Problem, share: Share, settings: dict[str, Any]) -> Outcome:
    """Return the outcome of a share that sees no key."""
    plan = make_plan(problem, method=Exact(), **settings)
    part = nothing(replace(problem, q=problem.q[: len(share.groups), ...]))
    return Outcome(share, replace(plan, reason="no query sees a key"), part, [])


def assembled(problem: Problem, outcomes: list[Outcome], *, finite: bool) -> Part:
    """Put the results of all shares together; with the keys that are not finite unless ``finite``."""
    xp = problem.xp
    parts = [one.part if finite or one.share.apart is None else with_not_finite(xp, one) for one in outcomes]
    if len(parts) == 1:
        return parts[0]
    groups = [group for one in outcomes for group in one.share.groups]
    if groups == list(range(problem.groups)) and all(one.share.queries == (0, problem.n_q) for one in outcomes):
        return Part(xp.concat([part.out for part in parts], axis=0), xp.concat([part.lse for part in parts], axis=0))
    rows = [
        host.asarray(one.share.groups, dtype=host.int64)[:, None] * problem.n_q + host.arange(*one.share.queries)
        for one in outcomes
    ]
    return Part(*(in_order(xp, rows, arrays, problem) for arrays in zip(*((p.out, p.lse) for p in parts), strict=True)))


def with_not_finite(xp: Namespace, outcome: Outcome) -> Part:
    """Return a result with the keys that are not finite."""
    assert outcome.share.apart is not None
    return merge_not_finite(xp, outcome.part, not_finite_part(outcome.share.apart))


def in_order(xp: Namespace, rows: list[Array], arrays: tuple[Array, ...], problem: Problem) -> Array:
    """Put rows, numbered through all groups, in their order: (G, n_q, …)."""
    order = host.concat([host.reshape(x, (-1,)) for x in rows])
    flat = xp.concat([xp.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:])) for x in arrays], axis=0)
    place = invert_permutation(xp, xp.asarray(order, device=problem.device)[None, :])[0, :]
    return xp.reshape(xp.take(flat, place, axis=0), (problem.groups, problem.n_q, *flat.shape[1:]))


def certify_all(
    problem: Problem, whole: list[Share], outcomes: list[Outcome], share: float, seed: int
) -> tuple[Certificate | None, float]:
    """Compare some rows of a call with exact attention; return what was found, and the seconds it took.

    Parameters
    ----------
    problem
        The call.
    whole
        Its shares, uncut.
    outcomes
        What came of them.
    share
        Exact rows may take this part of the expected cost.
    seed
        Of the choice of rows.
    """
    xp = problem.xp
    approximate = [one for one in outcomes if one.plan.method != "exact"]
    if not approximate or problem.d_v == 0:
        return None, 0.0
    started = time.perf_counter()
    # Shares whose keys nobody sees cost nothing.
    costs = [(one.share.problem, one.plan.options) for one in outcomes if one.share.problem is not None]
    cost = sum(expected_cost(some, options).total for some, options in costs)
    row_cost = sum(expected_cost(some, Exact()).total for some, _ in costs) / problem.n_q
    out = assembled(problem, outcomes, finite=True).out
    plans = {group: one.plan for one in outcomes for group in one.share.groups}

    def exact(rows: Array) -> Array:
        parts = [share_exact_rows(problem, one, take_groups(xp, rows, one.groups), plans[one.groups[0]]) for one in whole]
        order = host.argsort(host.asarray([group for one in whole for group in one.groups]))
        return take_groups(xp, xp.concat(parts, axis=0), order)

    return certify(problem, out, exact, cost, row_cost, share, seed), time.perf_counter() - started


def take_groups(xp: Namespace, rows: Array, groups: Sequence[int]) -> Array:
    """Return some groups of (G, …)."""
    return xp.take(rows, xp.asarray(groups, dtype=xp.int64, device=rows.device), axis=0)


def share_exact_rows(problem: Problem, share: Share, rows: Array, plan: Plan) -> Array:
    """Return exact attention of the queries ``rows`` (…, m) of a share's groups, by its kernels: (…, m, d_v)."""
    if share.problem is None:
        return problem.xp.zeros((*rows.shape, problem.d_v), dtype=problem.dtype, device=problem.device)
    return exact_rows(share.problem, plan, rows)
