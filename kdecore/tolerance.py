"""``rtol=``: the cheapest method and budget whose error stays below what the user names, by the certificate's upper limit.

Methods are tried on few queries before any is run on all (derived):

1. A method that is tried for the first time is prepared: everything that no budget changes, which later rounds reuse.
2. A *pilot* estimates the error at a budget from few queries; the next budget follows from it, at least `LEAST_GROWTH`
   times as large. Each round goes to the method that is expected to end cheapest.
3. A budget whose pilot is well below the tolerance is *certified* on more queries, drawn anew. Where the upper limit is at
   most the tolerance, all queries are evaluated.
4. Where exact attention is expected to be cheaper than what is left to do, or another round would take the search beyond
   `SEARCH_SHARE` of its cost, the result is exact.

So no choice of method or budget was made with the queries that the certificate is made of, but for being refused by it.
Exact rows are evaluated once for each set of queries.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdecore.attend import attend
from kdecore.certificate import FEWEST_ROWS, Certificate, estimate_errors, exact_rows, stratified
from kdecore.errors import OptionError
from kdecore.evaluate import evaluate
from kdecore.inputs import Problem
from kdecore.merge import Part
from kdecore.methods import STAGES
from kdecore.namespaces import Array, host, on_accelerator, take_along_rows, to_float, to_host
from kdecore.options import METHODS, Exact, Options, SortLSH, Treecode, one_of
from kdecore.planning import Plan, exact_row_cost, expected_cost, site_of, tree_opener
from kdecore.selection import Slots

NORMS = ("frobenius", "spectral")
CANDIDATES: tuple[Options, ...] = (SortLSH(), Treecode())
"""What ``"auto"`` chooses from; hyper errs and takes about as much as sortlsh."""
FIRST_BUDGET = {"sortlsh": 128, "hyper": 128, "treecode": 96}
EASY_ERROR = {"sortlsh": 0.6, "hyper": 0.6, "treecode": 0.005}
"""Error with the first budget, of samples on a vision transformer, of treecode on easy data (bench/NOTES.md).

Smaller tolerances begin with larger budgets: where samples would need many keys, the treecode is tried first.
"""
DECAY = {"sortlsh": 0.5, "hyper": 0.5, "treecode": 0.8}
"""Errors fall with this power of the budget, at least about so fast: samples' by theory, treecode's as measured."""
BUDGET_FIELDS = {
    "sortlsh": ("block_size", "num_samples"),
    "hyper": ("block_size", "num_samples"),
    "treecode": ("num_slots",),
}
"""Options that set a budget."""
LEAST_GROWTH = 1.25
MARGIN = 1.3
"""A certificate's upper limit is about so many times the estimate."""
SEARCH_SHARE = 0.25
"""Part of exact attention's expected cost that may go into rounds."""
ROUND_COST = 1.5e8
"""What a round takes however few queries there are, in the units of `kdecore.planning`."""
TRIED_ROWS, TRIED_SHARE = 1024, 0.05
"""Queries that are compared to certify a budget, in all groups together; and of a group's blocks, at most this part."""
PILOT_PART = 4
"""A pilot compares one in so many of them."""
ROWS_OF_A_CLUSTER = 4
"""Queries of a block that are compared: to find a block's list takes longer than exact attention of a few queries."""
BUDGET_STEP = 16
"""Budgets are multiples of this."""
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
        Expected cost of the search so far, as a part of exact attention's.
    """

    method: str
    budget: int
    step: str
    rows: int
    error: float
    upper: float
    spent: float

    def __str__(self) -> str:
        return f"{self.step} {self.method} {self.budget}: error {self.error:.2g}, at most {self.upper:.2g}"


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


def to_try(method: str | Options, budget: int | None, problem: Problem, target: str) -> list[Options]:
    """Return `candidates`; where no kernel of ``target`` opens trees, ``"auto"`` tries none of these.

    Array operations take longer than exact for long. ``target`` is `kdecore.attention`'s ``kernels``.
    """
    found = candidates(method, budget)
    if method == "auto" and tree_opener(problem, site_of(problem), target).target == "array-api":
        return [options for options in found if not isinstance(options, Treecode)]
    return found


def candidates(method: str | Options, budget: int | None) -> list[Options]:
    """Return the options of the methods that ``method`` allows besides exact, or raise `OptionError`."""
    if budget is not None:
        raise OptionError(f"budget must be None with rtol, which chooses it, got {budget!r}")
    if method == "auto":
        return list(CANDIDATES)
    options = METHODS[method]() if isinstance(method, str) else method
    if isinstance(options, Exact):
        return []
    fields = BUDGET_FIELDS.get(options.name, ())
    sampled = isinstance(options, Treecode) and options.far_field != "mean"
    if not fields or sampled or any(getattr(options, name) is not None for name in fields):
        names = ", ".join(("auto", "exact", *STAGES))
        raise OptionError(
            f"method must be one of {names} with rtol, its budget open and no far_field sampled, got {method!r}"
        )
    return [options]


def search(
    problem: Problem,
    plan_for: Callable[..., Plan],
    exact_plan: Plan,
    tried: Sequence[Options],
    rtol: float,
    norm: str,
    limit: float = math.inf,
) -> Found:
    """Find the cheapest method and budget that meet a tolerance.

    Parameters
    ----------
    problem
        Canonical inputs.
    plan_for
        Turns ``method=`` into a plan.
    exact_plan
        The plan of exact attention.
    tried
        Options of the methods to choose from besides exact, their budgets open.
    rtol, norm
        Relative error, and the norm that it is measured in.
    limit
        Planned temporaries, at most, in bytes.

    Returns
    -------
    Found
        The result. Expected to cost at most 1 + `SEARCH_SHARE` times exact attention, search included.
    """
    exact = expected_cost(problem, Exact()).total
    trials = [Trial(problem, plan_for, options) for options in tried if problem.groups * problem.n_q * problem.d_v]
    for trial in trials:
        trial.grow(EASY_ERROR[trial.method] / rtol)
    rounds: list[Round] = []
    spent = 0.0
    reason = "exact is expected to be cheaper than any search"
    while trials := [trial for trial in trials if trial.fits(limit) and spent + trial.step <= SEARCH_SHARE * exact]:
        trial = min(trials, key=lambda trial: trial.rest)
        spent += trial.step
        kind = "certified" if trial.promising else "pilot"
        found = trial.measure()
        error, upper = float(getattr(found, norm)), found.upper(norm)
        rounds.append(Round(trial.method, trial.budget, kind, found.rows, error, upper, spent / exact))
        if kind == "certified" and upper <= rtol:
            why = f"rtol {rtol:g}: the cheapest found whose {norm} error is certified"
            return Found(replace(trial.plan, reason=why), *trial.evaluate(), found, tuple(rounds))
        trial.learn(upper if kind == "certified" else MARGIN * error, rtol)
        reason = "exact is expected to be cheaper than what would meet it"
    plan = replace(exact_plan, reason=f"rtol {rtol:g}: {reason}")
    slots: list[Slots] = []
    part = evaluate(problem, plan, slots.append)
    return Found(plan, slots, part, None, tuple(rounds))


@dataclass(frozen=True)
class Sample:
    """Queries that are compared with exact attention, in clusters of r that share a block.

    Attributes
    ----------
    problem, prepared
        All queries, or those of some blocks alone, which cost less to evaluate.
    place
        (G, C · r) int64: the queries compared, among these.
    exact
        (G, C, r, d_v) NumPy array: exact attention of them.
    """

    problem: Problem
    prepared: Any
    place: Array
    exact: Array


class Trial:
    """A method that is tried: the budget to try next, and what its rounds share.

    Attributes
    ----------
    method
        Its name.
    budget
        Keys per query to try next.
    promising
        Whether that is to be certified, since its pilot was good.
    """

    def __init__(self, problem: Problem, plan_for: Callable[..., Plan], options: Options) -> None:
        self.method = options.name
        self.budget = FIRST_BUDGET[self.method]
        self.promising = False
        self._problem, self._plan_for, self._options = problem, plan_for, options
        # Of what sees intervals, or is masked, no part stands for the whole.
        self._in_pieces = problem.visible is not None or problem.mask is not None
        self._stages = STAGES[self.method]
        self._restricts = self._stages.restrict is not None and not self._in_pieces
        self._prepared: Any = None
        self._plan: Plan | None = None
        self._samples: dict[bool, Sample] = {}
        self._evaluated: tuple[int, list[Slots], Part] | None = None
        b = 1
        if isinstance(options, Treecode) and self._restricts:
            b = options.at(on_accelerator(problem.q), problem.n_q).rows
        self._population = -(-problem.n_q // b)
        self._rows = min(ROWS_OF_A_CLUSTER, problem.n_q // self._population)

    @property
    def plan(self) -> Plan:
        """The plan for all queries with this budget."""
        if self._plan is None or self._plan.options.budget != self.budget:
            self._plan = self._plan_for(method=self._options.resolve(self.budget))
        return self._plan

    @property
    def rest(self) -> float:
        """Expected cost of evaluating all queries with this budget; infinite where that would be most keys."""
        if 2 * self.budget > self._problem.n_k:
            return math.inf
        if self._evaluated is not None and self._evaluated[0] == self.budget:
            return 0.0
        cost = expected_cost(self._problem, self._options.resolve(self.budget))
        return cost.evaluate + (cost.prepare if self._prepared is None or self._in_pieces else 0.0)

    @property
    def step(self) -> float:
        """Expected cost of the next round."""
        clusters, step = self._clusters(), self.rest + ROUND_COST
        if self._restricts:
            evaluate = expected_cost(self._problem, self._options.resolve(self.budget)).evaluate
            step += evaluate * (clusters / self._population - 1.0)
        if self.promising not in self._samples:
            step += self._problem.groups * clusters * self._rows * exact_row_cost(self._problem)
        return step

    def _clusters(self) -> int:
        """Return how many clusters of queries the next round compares in each group."""
        fewest = FEWEST_ROWS // self._rows
        wanted = min(TRIED_ROWS // (self._problem.groups * self._rows), int(TRIED_SHARE * self._population))
        return min(self._population, max(fewest, wanted if self.promising else wanted // PILOT_PART))

    def fits(self, limit: float) -> bool:
        """Return whether this budget is cheaper than exact attention, and its temporaries are within the limit."""
        return self.rest < expected_cost(self._problem, Exact()).total and self.plan.temporary_bytes <= limit

    def evaluate(self) -> tuple[list[Slots], Part]:
        """Evaluate all queries with this budget; return `Found.slots` and the result."""
        if self._evaluated is None or self._evaluated[0] != self.budget:
            plan = self.plan
            slots: list[Slots] = []
            watch = slots.append
            if self._in_pieces:
                part = evaluate(self._problem, plan, watch)
            else:
                selection = self._stages.select(self._problem, plan, self._prepared)
                part = attend(self._problem, plan, selection, watch=watch)
            self._evaluated = self.budget, slots, part
        return self._evaluated[1:]

    def measure(self) -> Certificate:
        """Estimate the error at this budget from the pilot's queries, or, where promising, from others."""
        plan = self.plan
        if self._prepared is None and not self._in_pieces:
            self._prepared = self._stages.prepare(self._problem, plan)
        if self.promising not in self._samples:
            self._samples[self.promising] = self._draw(plan, CERTIFIED_STREAM if self.promising else PILOT_STREAM)
        sample = self._samples[self.promising]
        if not self._restricts:
            out = self.evaluate()[1].out
        else:
            out = attend(sample.problem, plan, self._stages.select(sample.problem, plan, sample.prepared)).out
        found = to_host(take_along_rows(sample.problem.xp, out, sample.place))
        return estimate_errors(host.reshape(found, sample.exact.shape), sample.exact, self._problem.n_q)

    def _draw(self, plan: Plan, stream: int) -> Sample:
        problem, count, r = self._problem, self._clusters(), self._rows
        xp, groups, device = problem.xp, problem.groups, problem.device
        numbers = stratified(xp, groups, count, plan.seed, stream, device)
        some, prepared = problem, self._prepared
        if self._stages.restrict is None or not self._restricts:
            place = queries = xp.astype(numbers * problem.n_q, xp.int64)
        else:
            some, prepared, rows = self._stages.restrict(problem, prepared, numbers)
            # Members of each block, evenly spaced from one at random; the last row of a short block is no member.
            shortest = problem.n_q // self._population
            numbers = stratified(xp, groups, count, plan.seed, stream + MEMBERS_STREAMS, device)
            start = xp.astype((numbers * count % 1.0) * shortest, xp.int64)[:, :, None]
            step = xp.arange(r, dtype=xp.int64, device=device)[None, None, :] * (shortest // r)
            first = xp.arange(count, dtype=xp.int64, device=device)[None, :, None] * int(rows.shape[2])
            place = xp.reshape(first + (start + step) % shortest, (groups, -1))
            queries = take_along_rows(xp, xp.reshape(rows, (groups, -1)), place)
        exact = host.reshape(to_host(exact_rows(problem, plan, queries)), (groups, count, r, problem.d_v))
        return Sample(some, prepared, place, exact)

    def learn(self, bound: float, rtol: float) -> None:
        """Certify this budget next where its error is about bounded so, or try a larger one."""
        self.promising = bound <= rtol
        if not self.promising:
            self.grow(max(bound / rtol, LEAST_GROWTH ** DECAY[self.method]))

    def grow(self, excess: float) -> None:
        """Try a budget with which the error is expected to be so many times smaller, or the same if that is less than 1."""
        growth = max(1.0, excess) ** (1.0 / DECAY[self.method]) if excess < math.inf else math.inf
        enough = min(self.budget * growth, float(self._problem.n_k))
        self.budget = max(self.budget, -(-int(enough) // BUDGET_STEP) * BUDGET_STEP)
