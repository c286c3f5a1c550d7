"""`evaluate`: a problem and its plan → result. Where queries see intervals of the keys, by rectangles that need no mask.

Queries are cut into chunks, the keys too. What all queries of a chunk see of whole chunks of keys is a problem
without a mask, given to the method. What is left of the keys around it, seen by some of these queries only, is a smaller
problem of the same kind; chunks whose smaller problems are alike become its groups. At the end stand small tiles, exact,
with a mask. The parts are merged by log-sum-exp. For causal attention:

    keys →
    q ▒                     ▒ a smaller problem, cut in the same way
    ↓ █▒                    █ seen by all queries of the chunk: the method chooses among the keys of one row of █
      ██▒
      ███▒
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

from kdecore.arrays.memory import to_host
from kdecore.arrays.namespace import Array, host
from kdecore.arrays.rows import spans
from kdecore.core.chunks import Features, Remainder, Span, cut, inner_keys, put_back, remainder, stacked
from kdecore.core.options import Exact
from kdecore.core.problem import Problem, own_among
from kdecore.core.selection import Opening, Selected, Selection, equal_blocks, shifted, together
from kdecore.core.state import AttentionState
from kdecore.engine.attend import Watch, attend
from kdecore.engine.split import single
from kdecore.methods import METHODS
from kdecore.methods.base import Plan
from kdecore.methods.levels import Step
from kdecore.methods.memory import TILE_BIAS

ROOM = 4
"""A list that begins with chunks has room for so many times more."""


def evaluate(problem: Problem, plan: Plan, watch: Watch | None = None) -> AttentionState:
    """Return attention as planned: out (G, n_q, d_v) and lse (G, n_q), 0 and −inf where a query sees no key."""
    if problem.visible is not None and problem.mask is None:
        method = METHODS[plan.method].chunked
        described = cache(lambda: method.describe(replace(problem, visible=None), plan) if method else Features((), ()))
        return by_chunks(problem, plan, plan.steps, described, nothing(problem), watch)
    part = attend(problem, plan, METHODS[plan.method].select(problem, plan), watch=watch)
    return part if problem.mask is None or plan.method == "exact" else rescued(problem, plan, part, watch)


def rescued(problem: Problem, plan: Plan, part: AttentionState, watch: Watch | None) -> AttentionState:
    """Evaluate exactly the queries whose chosen keys are all hidden by a mask."""
    xp, numbers = problem.xp, host.arange(problem.n_q)
    lost = host.isinf(to_host(part.lse)) & (to_host(part.lse) < 0)
    exact = replace(plan, options=Exact())
    groups = []
    for group in range(problem.groups):
        one = AttentionState(part.out[group : group + 1, ...], part.lse[group : group + 1, ...])
        rows = numbers[lost[group]]
        if len(rows):
            found = attend(single(problem, group, rows), exact, Selection(), watch=watch)
            place = numbers.copy()
            place[rows] = problem.n_q + host.arange(len(rows))
            index = xp.asarray(place, device=problem.device)
            one = AttentionState(
                xp.take(xp.concat([one.out, found.out], axis=1), index, axis=1),
                xp.take(xp.concat([one.lse, found.lse], axis=1), index, axis=1),
            )
        groups.append(one)
    return AttentionState(xp.concat([one.out for one in groups], axis=0), xp.concat([one.lse for one in groups], axis=0))


def by_chunks(
    problem: Problem,
    plan: Plan,
    levels: tuple[Step, ...],
    described: Callable[[], Features],
    before: AttentionState,
    watch: Watch | None,
) -> AttentionState:
    """Evaluate a problem whose queries see intervals of its keys by the first of ``levels``, the rest of it by the others.

    The result is merged with ``before``. Levels whose keys are all evaluated don't ask for what is ``described``.
    """
    xp = problem.xp

    def described_part(queries: list[Span], keys: list[Span], parts: int) -> Callable[[], Features]:
        return cache(lambda: described().stacked(xp, queries, keys, parts))

    if not levels:
        selections: list[Selected] = [*tiles(problem)]
        remainders: list[Remainder] = []
    else:
        selections, remainders = of_level(problem, plan, levels[0], described)
    part = before
    for selection in selections:
        part = attend(problem, plan, selection, part, watch)
    alike: dict[tuple[object, ...], list[Remainder]] = {}
    for one in remainders:
        alike.setdefault(one.kind, []).append(one)
    for number, some in enumerate(alike.values()):
        queries, keys = [one.queries for one in some], [key for one in some for key in one.keys]
        q, out, lse = (stacked(xp, x, queries, len(some)) for x in (problem.q, part.out, part.lse))
        k, v = (stacked(xp, x, keys, len(some)) for x in (problem.k, problem.v))
        found = by_chunks(
            replace(problem, q=q, k=k, v=v, visible=some[0].visible, own=own_of_remainders(problem, some)),
            plan.part(number),
            levels[1:],
            described_part(queries, keys, len(some)),
            AttentionState(out, lse),
            watch,
        )
        part = AttentionState(
            *(put_back(xp, x, changed, queries) for x, changed in ((part.out, found.out), (part.lse, found.lse)))
        )
    return part


def own_of_remainders(problem: Problem, some: list[Remainder]) -> Array | None:
    """Return `Problem.own` of the problem that remainders are stacked to."""
    if problem.own is None:
        return None
    none = host.full((1, 1), -1, dtype=host.int64)
    rows = []
    for rest in some:
        own = own_among(problem.own[:, slice(*rest.queries)], rest.keys)
        rows.append(host.broadcast_to(none if own is None else own, (len(problem.own), rest.queries[1] - rest.queries[0])))
    if len(problem.own) == 1 and all(host.array_equal(row, rows[0]) for row in rows):
        rows = rows[:1]
    elif len(problem.own) == 1:
        rows = [host.broadcast_to(row, (problem.groups, row.shape[1])) for row in rows]
    found = host.reshape(host.stack(rows, axis=1), (-1, rows[0].shape[1]))
    return found if bool(host.any(found >= 0)) else None


def of_level(
    problem: Problem, plan: Plan, step: Step, described: Callable[[], Features]
) -> tuple[list[Selected], list[Remainder]]:
    """Select, for each chunk of queries, from the keys that all of them see; and return what is left."""
    assert problem.visible is not None
    level = step.level
    plan = replace(plan, options=plan.options.with_budget(step.budget))
    budget = plan.options.budget
    method = METHODS[plan.method].chunked
    shared = method is not None and level > 0 and budget is not None
    if method is not None and budget is not None and method.lists_chunks:
        shared = shared and budget >= ROOM << level

    @cache
    def prepared() -> Any:
        assert method is not None
        return method.prepare(replace(problem, visible=None), plan, level, described())

    apart: list[Selected] = []
    chosen: list[Selected] = []
    remainders: list[Remainder] = []
    for number, queries in enumerate(cut(problem.n_q, 1 << level)):
        seen = problem.visible.rows(slice(*queries))
        some, (first, end) = inner_keys(seen, problem.n_k, level)
        piece = plan.part(level, number)
        if first == end:
            pass
        elif plan.method == "exact" or (budget is not None and end - first <= budget):
            apart.append(every_key(problem, queries, (first, end)))
        elif method is not None and shared and some is not None:
            chosen.append(method.select(problem, piece, prepared(), level, number, some))
        else:
            apart.append(of_part(problem, piece, queries, (first, end)))
        rest = remainder(queries, seen, (first, end))
        if rest.visible.pairs:
            remainders.append(rest)
    lists = [one for one in chosen if isinstance(one, Selection)]
    return [*apart, *(one for one in chosen if isinstance(one, Opening)), *together(problem.xp, lists)], remainders


def every_key(problem: Problem, queries: Span, keys: Span) -> Selection:
    """Select all of some keys for some queries."""
    xp, groups = problem.xp, problem.groups
    row, key = (
        xp.broadcast_to(xp.arange(*limits, dtype=xp.int64, device=problem.device), (groups, limits[1] - limits[0]))
        for limits in (queries, keys)
    )
    zero = xp.zeros((1, 1, 1), dtype=problem.dtype, device=problem.device)
    weight = xp.broadcast_to(zero, (groups, 1, keys[1] - keys[0]))
    return Selection(equal_blocks(xp, row, queries[1] - queries[0]), key[:, None, :], weight)


def of_part(problem: Problem, plan: Plan, queries: Span, keys: Span) -> Selected:
    """Select for some queries from some keys as if there were no others."""
    selection = METHODS[plan.method].select(problem.rows(*queries).keys(*keys), plan)
    if selection.blocks is None:
        return every_key(problem, queries, keys)
    return shifted(problem.xp, selection, queries[0], keys[0], problem.n_q)


def tiles(problem: Problem) -> list[Selection]:
    """Select all keys, with a mask where queries see different ones."""
    assert problem.visible is not None
    selections = []
    for part in spans(problem.n_q, max(1, TILE_BIAS // problem.n_k)):
        seen = problem.visible.rows(part)
        first, end = seen.outer
        if first == end:
            continue
        selection = every_key(problem, (part.start, part.stop), (first, end))
        if seen.inner != (first, end):
            bias = problem.xp.asarray(seen.bias(first, end), dtype=problem.dtype, device=problem.device)
            selection = replace(selection, bias=bias)
        selections.append(selection)
    return selections


def nothing(problem: Problem) -> AttentionState:
    """Return the result of queries that see no key."""
    xp = problem.xp
    out = xp.zeros((problem.groups, problem.n_q, problem.d_v), dtype=problem.dtype, device=problem.device)
    return AttentionState(out, xp.full(out.shape[:2], -xp.inf, dtype=out.dtype, device=problem.device))
