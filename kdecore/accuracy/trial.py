"""What budgets are tried on: a problem, or some of its rows, of which some queries are compared with exact attention."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kdecore.accuracy.certificate import FEWEST_ROWS, Certificate, estimate_errors, exact_rows, stratified
from kdecore.arrays.gradients import without_gradient
from kdecore.arrays.memory import contiguous, to_host
from kdecore.arrays.namespace import Array, Namespace, host
from kdecore.arrays.rows import take_along_rows
from kdecore.core.key_ranges import normal
from kdecore.core.options import Options
from kdecore.core.problem import Problem
from kdecore.core.selection import Slots
from kdecore.core.state import AttentionState
from kdecore.engine.attend import attend
from kdecore.engine.hierarchy import evaluate
from kdecore.methods import METHODS
from kdecore.methods.base import Plan, expected_cost
from kdecore.methods.costs import exact_row_cost

STRIDE, FEWEST_THINNED, MOST_THINNED = 4, 1024, 32768
"""A pilot of the treecode has every so many-th row, or more, but no fewer rows; where there are many, it has so many."""
ROUND_COST = 1.5e8
"""What a round takes however few queries there are, in the units of `kdecore.methods.costs`."""
TRIED_ROWS, TRIED_SHARE = 1024, 0.125
"""Queries that are compared to certify a budget, in all groups together; and of a group's blocks, at most this part."""
FEWEST_CLUSTERS = 16
"""Of these queries, at least: of few clusters limits are wide."""
PILOT_PART = 4
"""A pilot compares one in so many of them."""
ROWS_OF_A_CLUSTER = 4
"""Queries of a block that are compared: to find a block's list takes longer than exact attention of a few queries."""
PILOT_STREAM, CERTIFIED_STREAM, MEMBERS_STREAMS = 7, 8, 2
"""Random streams of the blocks tried; from each, how far that of their queries is."""


def stride_of(problem: Problem, options: Options) -> int:
    """Return that every so many-th query and key makes a pilot: 1 for all, of methods that err more with more keys."""
    priors = METHODS[options.name].priors
    if priors is None or not priors.thinned or problem.mask is not None:
        return 1
    rows = min(problem.n_q // problem.repeats, problem.n_k)
    return max(1, min(STRIDE, rows // FEWEST_THINNED), rows // MOST_THINNED)


def thinned(problem: Problem, stride: int) -> Problem:
    """Return the problem of every ``stride``-th query and key; queries keep their own keys where these are among them."""
    r = problem.repeats

    def every(xp: Namespace, x: Array) -> Array:
        """Leave some queries of (G, n_q, width), with all heads that share their keys."""
        groups, n_q, width = x.shape
        return xp.reshape(xp.reshape(x, (groups, n_q // r, r, width))[:, ::stride, :, :], (groups, -1, width))

    own, first = None, 0
    if problem.own is not None:
        own = every(host, problem.own[:, :, None])[:, :, 0]
        first = int(host.max(own)) % stride
        kept = (own >= 0) & (own % stride == first)
        own = host.where(kept, (own - first) // stride, -1)
    visible = problem.visible
    if visible is not None:
        # Key j here is key first + j · stride: the first that an interval from x on has is ⌈(x − first) / stride⌉.
        edges = [every(host, x[None, :, None])[0, :, 0] - first for x in (visible.first, visible.end)]
        visible = normal(*(host.maximum(-(-x // stride), 0) for x in edges))
    k, v = (contiguous(x[:, first::stride, :]) for x in (problem.k, problem.v))
    return replace(problem, q=contiguous(every(problem.xp, problem.q)), k=k, v=v, own=own, visible=visible)


@dataclass(frozen=True)
class Sample:
    """Queries that are compared with exact attention, in clusters of r that share a block.

    Attributes
    ----------
    numbers
        (G, C) in [0, 1): which blocks these are (`kdecore.methods.Stages.restrict`), or which queries.
    place
        (G, C · r) int64: the queries compared, among those of these blocks, or among all.
    exact
        (G, C, r, d_v) NumPy array: exact attention of them.
    """

    numbers: Array
    place: Array
    exact: Array


class Trial:
    """A problem that budgets are tried on, and what its rounds share.

    Attributes
    ----------
    problem, stride
        Every ``stride``-th query and key.
    """

    def __init__(self, problem: Problem, plan_for: Callable[..., Plan], options: Options, stride: int) -> None:
        self.problem, self.stride = problem, stride
        self._plan_for, self._options = plan_for, options
        # Of what sees intervals, or is masked, no part stands for the whole.
        self._in_pieces = problem.visible is not None or problem.mask is not None
        self._stages = METHODS[options.name].staged
        # Of thinned rows all are evaluated: that takes no longer than to leave some.
        self._restricts = self._stages.restrict is not None and not self._in_pieces and stride == 1
        self._prepared: Any = None
        self._calibrated: tuple[int, Any] | None = None
        self._plan: Plan | None = None
        self._samples: dict[str, Sample] = {}
        self._evaluated: tuple[int, list[Slots], AttentionState] | None = None
        b = self._stages.rows(problem, options) if self._restricts and self._stages.rows is not None else 1
        self._population = -(-problem.n_q // b)
        self._rows = min(ROWS_OF_A_CLUSTER, problem.n_q // self._population)

    def plan(self, budget: int) -> Plan:
        """Return the plan for all queries."""
        if self._plan is None or self._plan.options.budget != budget:
            self._plan = self._plan_for(self.problem, method=self._options.resolve(budget))
        return self._plan

    def prepared(self, budget: int) -> Any:
        """Return what the method prepares for all queries, with what a budget needs."""
        if self._prepared is None:
            self._prepared = self._stages.prepare(self.problem, self.plan(budget))
        if self._stages.calibrated is None:
            return self._prepared
        if self._calibrated is None or self._calibrated[0] != budget:
            self._calibrated = budget, self._stages.calibrated(self.problem, self.plan(budget), self._prepared)
        return self._calibrated[1]

    def step(self, budget: int, kind: str) -> float:
        """Return the expected cost of measuring the error, with what is prepared for it."""
        cost, clusters = expected_cost(self.problem, self._options.resolve(budget)), self._clusters(kind)
        step = ROUND_COST
        if self._restricts:
            step += cost.evaluate * clusters / self._population
        elif not self._known(budget):
            step += cost.evaluate + (cost.prepare if self._in_pieces else 0.0)
        if self._prepared is None and not self._in_pieces:
            step += cost.prepare
        if kind not in self._samples:
            step += self.problem.groups * clusters * self._rows * exact_row_cost(self.problem)
        return step

    def left(self, budget: int) -> float:
        """Return the expected cost of evaluating all queries once the error has been measured."""
        return expected_cost(self.problem, self._options.resolve(budget)).evaluate if self._restricts else 0.0

    def _known(self, budget: int) -> bool:
        return self._evaluated is not None and self._evaluated[0] == budget

    def _clusters(self, kind: str) -> int:
        """Return how many clusters of queries a round compares in each group."""
        fewest = FEWEST_ROWS if self._rows == 1 else FEWEST_CLUSTERS
        wanted = min(TRIED_ROWS // (self.problem.groups * self._rows), int(TRIED_SHARE * self._population))
        return min(self._population, max(fewest, wanted // PILOT_PART if kind == "pilot" else wanted))

    def evaluate(self, budget: int) -> tuple[list[Slots], AttentionState]:
        """Evaluate all queries; return `SearchResult.slots` and the result."""
        if self._evaluated is None or self._evaluated[0] != budget:
            # Not two results at a time.
            self._evaluated = None
            plan = self.plan(budget)
            slots: list[Slots] = []
            if self._in_pieces:
                part = evaluate(self.problem, plan, slots.append)
            else:
                selection = self._stages.select(self.problem, plan, self.prepared(budget))
                part = attend(self.problem, plan, selection, watch=slots.append)
            self._evaluated = budget, slots, part
        return self._evaluated[1:]

    def measure(self, budget: int, kind: str) -> Certificate:
        """Estimate the error from the queries of a kind of round, ``"pilot"`` or ``"certified"``."""
        plan = self.plan(budget)
        if kind not in self._samples:
            self._samples[kind] = self._draw(budget, kind)
        sample = self._samples[kind]
        if self._restricts:
            assert self._stages.restrict is not None
            some, prepared, _ = self._stages.restrict(self.problem, self.prepared(budget), sample.numbers)
            out = attend(some, plan, self._stages.select(some, plan, prepared)).out
        else:
            out = self.evaluate(budget)[1].out
        found = to_host(take_along_rows(self.problem.xp, without_gradient(out), sample.place))
        return estimate_errors(host.reshape(found, sample.exact.shape), sample.exact, self.problem.n_q)

    def _draw(self, budget: int, kind: str) -> Sample:
        plan, stream = self.plan(budget), CERTIFIED_STREAM if kind == "certified" else PILOT_STREAM
        problem, count, r = self.problem, self._clusters(kind), self._rows
        xp, groups, device = problem.xp, problem.groups, problem.device
        numbers = stratified(xp, groups, count, plan.seed, stream, device)
        if self._stages.restrict is None or not self._restricts:
            place = queries = xp.astype(numbers * problem.n_q, xp.int64)
        else:
            _, _, rows = self._stages.restrict(problem, self.prepared(budget), numbers)
            # Members of each block, evenly spaced from one at random; the last row of a short block is no member.
            shortest = problem.n_q // self._population
            members = stratified(xp, groups, count, plan.seed, stream + MEMBERS_STREAMS, device)
            start = xp.astype((members * count % 1.0) * shortest, xp.int64)[:, :, None]
            step = xp.arange(r, dtype=xp.int64, device=device)[None, None, :] * (shortest // r)
            first = xp.arange(count, dtype=xp.int64, device=device)[None, :, None] * int(rows.shape[2])
            place = xp.reshape(first + (start + step) % shortest, (groups, -1))
            queries = take_along_rows(xp, xp.reshape(rows, (groups, -1)), place)
        exact = host.reshape(to_host(exact_rows(problem, plan, queries)), (groups, count, r, problem.d_v))
        return Sample(numbers, place, exact)
