"""``rtol=``: the cheapest budget whose error stays below what the user names, by the certificate's upper limit (derived).

1. A *pilot* estimates the error at a budget from few queries. The treecode's has every `STRIDE`-th query and key alone: with
   as many nodes it errs about as much there, for a fraction of the work. The next budget follows from it.
2. Where exact attention is expected to be cheaper than all that is left to do, the result is exact: little was lost.
3. What no budget changes is prepared, for all rows. A budget is *certified* on some queries. Where the upper limit is at
   most the tolerance, all queries are evaluated; if not, a larger budget is tried.

So no choice of method or budget was made with the queries that the certificate is made of, but for being refused by it.
Exact rows are evaluated once for each set of queries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kdecore.attend import attend
from kdecore.certificate import FEWEST_ROWS, Certificate, estimate_errors, exact_rows, stratified
from kdecore.errors import OptionError
from kdecore.evaluate import evaluate
from kdecore.inputs import Problem
from kdecore.merge import Part
from kdecore.methods import STAGES
from kdecore.namespaces import (
    Array,
    Namespace,
    contiguous,
    host,
    on_accelerator,
    take_along_rows,
    to_float,
    to_host,
    without_gradient,
)
from kdecore.options import METHODS, Exact, Options, SortLSH, Treecode, one_of
from kdecore.planning import Plan, exact_row_cost, expected_cost, site_of, tree_opener
from kdecore.selection import Slots
from kdecore.visibility import normal

NORMS = ("frobenius", "spectral")
FIRST_BUDGET = {"sortlsh": 128, "hyper": 128, "treecode": 96}
EASY_ERROR = {"sortlsh": 0.6, "hyper": 0.6, "treecode": 0.005}
"""Error with the first budget, of samples on a vision transformer, of treecode on easy data (bench/NOTES.md).

Smaller tolerances begin with larger budgets.
"""
DECAY, LEAST_DECAY = {"sortlsh": 0.5, "hyper": 0.5, "treecode": 0.8}, 0.25
"""Errors fall with this power of the budget, or less as is observed: samples' by theory, treecode's as measured."""
BUDGET_FIELDS = {
    "sortlsh": ("block_size", "num_samples"),
    "hyper": ("block_size", "num_samples"),
    "treecode": ("num_slots",),
}
"""Options that set a budget."""
MOST_REFUSED = 3
"""Budgets that are refused a certificate, at most, before the result is exact."""
LEAST_GROWTH, FARTHEST = 1.25, 2
"""A budget that was refused grows so many times at least; none is foretold from one so many times smaller, if avoidable."""
STRIDE, FEWEST_THINNED, MOST_THINNED = 4, 1024, 32768
"""A pilot of the treecode has every so many-th row, or more, but no fewer rows; where there are many, it has so many."""
THINNED_SHARE, WHOLE_SHARE, FURTHER = 0.16, 0.25, 1.4
"""Part of exact attention's expected cost that may go into a first pilot: of thinned rows, and of all, which the result may
use; and so many times as much into all."""
ROUND_COST = 1.5e8
"""What a round takes however few queries there are, in the units of `kdecore.planning`."""
TRIED_ROWS, TRIED_SHARE = 1024, 0.125
"""Queries that are compared to certify a budget, in all groups together; and of a group's blocks, at most this part."""
FEWEST_CLUSTERS = 16
"""Of these queries, at least: of few clusters limits are wide."""
PILOT_PART = 4
"""A pilot compares one in so many of them."""
ROWS_OF_A_CLUSTER = 4
"""Queries of a block that are compared: to find a block's list takes longer than exact attention of a few queries."""
BUDGET_STEP, LEAST_BUDGET, MOST_BUDGET = 16, 32, 2**40
"""Budgets are multiples of the first, and not less or more than the others."""
PILOT_STREAM, CERTIFIED_STREAM, MEMBERS_STREAMS = 7, 8, 2
"""Random streams of the blocks tried; from each, how far that of their queries is."""


@dataclass(frozen=True)
class Round:
    """One round of the search.

    Attributes
    ----------
    method, budget
        What was tried.
    step
        ``"pilot"`` or ``"certified"``.
    rows
        Queries in each group that were compared with exact attention.
    error, upper
        Estimate and upper limit of the error in the norm asked for.
    spent
        Expected cost of the search so far, as a part of exact attention's; what was prepared for the result included.
    stride
        Every so many-th query and key was there.
    """

    method: str
    budget: int
    step: str
    rows: int
    error: float
    upper: float
    spent: float
    stride: int = 1

    def __str__(self) -> str:
        part = "" if self.stride == 1 else f" on 1/{self.stride} of the rows"
        return f"{self.step} {self.method} {self.budget}{part}: error {self.error:.2g}, at most {self.upper:.2g}"


@dataclass(frozen=True)
class Found:
    """What the search found.

    Attributes
    ----------
    plan
        What was run on all queries.
    slots
        How many slots of each Selection counted.
    part
        Its result.
    certificate
        What the choice rests on; None for exact.
    rounds
        How it was found.
    """

    plan: Plan
    slots: list[Slots]
    part: Part
    certificate: Certificate | None
    rounds: tuple[Round, ...]


def check_tolerance(rtol: object, norm: str) -> None:
    """Raise `OptionError` unless ``rtol`` is a positive finite number or None, and ``norm`` is known."""
    if rtol is not None and not 0.0 < to_float(rtol) < math.inf:
        raise OptionError(f"rtol must be a positive finite number or None, got {rtol!r}")
    one_of(NORMS, "rtol_norm", norm)


def to_try(method: str | Options, budget: int | None, problem: Problem, target: str) -> Options | None:
    """Return `candidate`; of ``"auto"`` sortlsh where no kernel of ``target`` opens trees.

    Array operations take longer than exact for long. Where both are fast, sortlsh needs so many more keys for the same error
    that it is cheaper for tolerances of 0.3 and more only (bench/NOTES.md): ask for it by name there.
    """
    found = candidate(method, budget)
    if method == "auto" and tree_opener(problem, site_of(problem), target).target == "array-api":
        return SortLSH()
    return found


def candidate(method: str | Options, budget: int | None) -> Options | None:
    """Return the options of what is tried besides exact, its budget open, None for nothing; or raise `OptionError`."""
    if budget is not None:
        raise OptionError(f"budget must be None with rtol, which chooses it, got {budget!r}")
    options = Treecode() if method == "auto" else METHODS[method]() if isinstance(method, str) else method
    if isinstance(options, Exact):
        return None
    fields = BUDGET_FIELDS.get(options.name, ())
    sampled = isinstance(options, Treecode) and options.far_field != "mean"
    if not fields or sampled or any(getattr(options, name) is not None for name in fields):
        names = ", ".join(("auto", "exact", *STAGES))
        raise OptionError(
            f"method must be one of {names} with rtol, its budget open and no far_field sampled, got {method!r}"
        )
    return options


def search(
    problem: Problem,
    plan_for: Callable[..., Plan],
    exact_plan: Plan,
    tried: Options | None,
    rtol: float,
    norm: str,
    limit: float = math.inf,
) -> Found:
    """Find the smallest budget that meets a tolerance.

    Parameters
    ----------
    problem
        Canonical inputs.
    plan_for
        Turns a problem and ``method=`` into a plan.
    exact_plan
        The plan of exact attention.
    tried
        What to try besides exact, its budget open; None for nothing.
    rtol, norm
        Relative error, and the norm that it is measured in.
    limit
        Planned temporaries, at most, in bytes.

    Returns
    -------
    Found
        The result. A first pilot is expected to cost at most `THINNED_SHARE` of exact attention, or `WHOLE_SHARE`, all of
        them `FURTHER` times as much. Whatever is done was expected to end, the result included, within 1 + that share of
        exact attention's cost; after `MOST_REFUSED` budgets that were refused the result is exact.
    """
    rounds: list[Round] = []
    if tried is not None and problem.groups * problem.n_q * problem.d_v:
        found = try_budgets(problem, plan_for, tried, rtol, norm, limit, rounds)
        if found is not None:
            return found
    reason = "what would meet it" if rounds else "any search"
    plan = replace(exact_plan, reason=f"rtol {rtol:g}: exact is expected to be cheaper than {reason}")
    slots: list[Slots] = []
    part = evaluate(problem, plan, slots.append)
    return Found(plan, slots, part, None, tuple(rounds))


def try_budgets(
    problem: Problem,
    plan_for: Callable[..., Plan],
    options: Options,
    rtol: float,
    norm: str,
    limit: float,
    rounds: list[Round],
) -> Found | None:
    """Do what `search` does with a method, up to where exact attention is expected to be cheaper; note the rounds."""
    method, exact, spent = options.name, expected_cost(problem, Exact()).total, 0.0
    whole = Ground(problem, plan_for, options, 1)
    stride = stride_of(problem, options)
    share = WHOLE_SHARE if stride == 1 else THINNED_SHARE
    ground = whole if stride == 1 else Ground(thinned(problem.without_gradient(), stride), plan_for, options, stride)
    kind, decay = "pilot", DECAY[method]
    wanted = foretold(FIRST_BUDGET[method], max(1.0, EASY_ERROR[method] / rtol), decay)
    # No more than a quarter of thinned keys: of so many the error says little.
    quarter = most = ground.problem.n_k // (4 * BUDGET_STEP) * BUDGET_STEP
    while 4 * wanted <= problem.n_k:
        budget = wanted if ground is whole else min(wanted, most)
        step = ground.step(budget, kind)
        left = ground.left(budget) if ground is whole else expected_cost(problem, options.resolve(wanted)).total
        pilots = share * (FURTHER if rounds else 1.0)
        dear = spent + step + left > (1.0 + share) * exact or (kind == "pilot" and spent + step > pilots * exact)
        refused = sum(one.step == "certified" for one in rounds)
        if dear or refused == MOST_REFUSED or whole.plan(wanted).temporary_bytes > limit:
            return None
        spent += step
        found = ground.measure(budget, kind)
        error, upper = float(getattr(found, norm)), found.upper(norm)
        decay = min(decay, observed_decay(budget, error, rounds[-1] if rounds else None, ground.stride))
        rounds.append(Round(method, budget, kind, found.rows, error, upper, spent / exact, ground.stride))
        if kind == "certified" and upper <= rtol:
            plan = replace(whole.plan(budget), reason=f"rtol {rtol:g}: its {norm} error is certified")
            return Found(plan, *whole.evaluate(budget), found, tuple(rounds))
        excess = upper / rtol
        wanted = foretold(budget, excess, decay)
        if kind == "certified" or (ground is whole and excess > 1.0):
            wanted = max(wanted, foretold(budget, LEAST_GROWTH, 1.0))
        elif ground is whole:
            kind, wanted = "certified", budget
        else:
            most = min(quarter, FARTHEST * budget)
            if wanted <= FARTHEST * budget or budget == quarter:
                ground, kind = whole, "certified"
    return None


def observed_decay(budget: int, error: float, before: Round | None, stride: int) -> float:
    """Return the power of the budget that errors fell with since the round before; ∞ where that says nothing."""
    if before is None or before.stride != stride or before.budget >= budget:
        return math.inf
    if not 0.0 < error < before.error < math.inf:
        return LEAST_DECAY
    return max(LEAST_DECAY, math.log(before.error / error) / math.log(budget / before.budget))


def foretold(budget: int, excess: float, decay: float) -> int:
    """Return the budget with which the error is expected to be ``excess`` times smaller."""
    growth = excess ** (1.0 / decay) if excess < math.inf else math.inf
    return max(LEAST_BUDGET, -(-int(min(budget * growth, MOST_BUDGET)) // BUDGET_STEP) * BUDGET_STEP)


def stride_of(problem: Problem, options: Options) -> int:
    """Return that every so many-th query and key makes a pilot: 1 for all, of methods that err more with more keys."""
    if not isinstance(options, Treecode) or problem.mask is not None:
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


class Ground:
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
        self._stages = STAGES[options.name]
        # Of thinned rows all are evaluated: that takes no longer than to leave some.
        self._restricts = self._stages.restrict is not None and not self._in_pieces and stride == 1
        self._prepared: Any = None
        self._calibrated: tuple[int, Any] | None = None
        self._plan: Plan | None = None
        self._samples: dict[str, Sample] = {}
        self._evaluated: tuple[int, list[Slots], Part] | None = None
        b = 1
        if isinstance(options, Treecode) and self._restricts:
            b = options.at(on_accelerator(problem.q), problem.n_q).rows
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

    def evaluate(self, budget: int) -> tuple[list[Slots], Part]:
        """Evaluate all queries; return `Found.slots` and the result."""
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
