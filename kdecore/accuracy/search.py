"""``rtol=``: the cheapest budget whose error stays below what the user names, by the certificate's upper limit (derived).

1. A *pilot* estimates the error at a budget from few queries. The treecode's has every so many-th query and key alone
   (`kdecore.accuracy.trial.STRIDE`): with as many nodes it errs about as much there, for a fraction of the work. The next
   budget follows from it.
2. Where exact attention is expected to be cheaper than all that is left to do, the result is exact: little was lost.
3. What no budget changes is prepared, for all rows. A budget is *certified* on some queries. Where the upper limit is at
   most the tolerance, all queries are evaluated; if not, a larger budget is tried.

So no choice of method or budget was made with the queries that the certificate is made of, but for being refused by it.
Exact rows are evaluated once for each set of queries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from kdecore.accuracy.certificate import Certificate
from kdecore.accuracy.trial import Trial, stride_of, thinned
from kdecore.arrays.errors import OptionError
from kdecore.arrays.scalars import one_of, to_float
from kdecore.core.options import Exact, Options
from kdecore.core.problem import Problem
from kdecore.core.selection import Slots
from kdecore.core.state import AttentionState
from kdecore.engine.hierarchy import evaluate
from kdecore.methods import METHODS
from kdecore.methods.auto import Auto, tree_opener
from kdecore.methods.base import Plan, expected_cost
from kdecore.methods.choices import site_of
from kdecore.methods.sortlsh import SortLSH
from kdecore.methods.treecode import Treecode

NORMS = ("frobenius", "spectral")
LEAST_DECAY = 0.25
"""Errors are taken to fall with this power of the budget at least (`Priors.decay`)."""
MOST_REFUSED = 3
"""Budgets that are refused a certificate, at most, before the result is exact."""
LEAST_GROWTH, FARTHEST = 1.25, 2
"""A budget that was refused grows so many times at least; none is foretold from one so many times smaller, if avoidable."""
THINNED_SHARE, WHOLE_SHARE, FURTHER = 0.16, 0.25, 1.4
"""Part of exact attention's expected cost that may go into a first pilot: of thinned rows, and of all, which the result may
use; and so many times as much into all."""
BUDGET_STEP, LEAST_BUDGET, MOST_BUDGET = 16, 32, 2**40
"""Budgets are multiples of the first, and not less or more than the others."""


@dataclass(frozen=True)
class SearchStep:
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
class SearchResult:
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
    part: AttentionState
    certificate: Certificate | None
    rounds: tuple[SearchStep, ...]


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
    if _is_auto(method) and tree_opener(problem, site_of(problem), target).target == "array-api":
        return SortLSH()
    return found


def _is_auto(method: str | Options) -> bool:
    """Return whether a method is the one that chooses, its budget open."""
    return method in ("auto", Auto())


def candidate(method: str | Options, budget: int | None) -> Options | None:
    """Return the options of what is tried besides exact, its budget open, None for nothing; or raise `OptionError`."""
    if budget is not None:
        raise OptionError(f"budget must be None with rtol, which chooses it, got {budget!r}")
    options = Treecode() if _is_auto(method) else METHODS[method].options() if isinstance(method, str) else method
    if isinstance(options, Exact):
        return None
    priors = METHODS[options.name].priors
    if (
        priors is None
        or not priors.suits(options)
        or any(getattr(options, name) is not None for name in priors.budget_fields)
    ):
        names = ", ".join(("auto", "exact", *(name for name, one in METHODS.items() if one.priors is not None)))
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
) -> SearchResult:
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
    SearchResult
        The result. A first pilot is expected to cost at most `THINNED_SHARE` of exact attention, or `WHOLE_SHARE`, all of
        them `FURTHER` times as much. Whatever is done was expected to end, the result included, within 1 + that share of
        exact attention's cost; after `MOST_REFUSED` budgets that were refused the result is exact.
    """
    rounds: list[SearchStep] = []
    if tried is not None and problem.groups * problem.n_q * problem.d_v:
        found = try_budgets(problem, plan_for, tried, rtol, norm, limit, rounds)
        if found is not None:
            return found
    reason = "what would meet it" if rounds else "any search"
    plan = replace(exact_plan, reason=f"rtol {rtol:g}: exact is expected to be cheaper than {reason}")
    slots: list[Slots] = []
    part = evaluate(problem, plan, slots.append)
    return SearchResult(plan, slots, part, None, tuple(rounds))


def try_budgets(
    problem: Problem,
    plan_for: Callable[..., Plan],
    options: Options,
    rtol: float,
    norm: str,
    limit: float,
    rounds: list[SearchStep],
) -> SearchResult | None:
    """Do what `search` does with a method, up to where exact attention is expected to be cheaper; note the rounds."""
    method, exact, spent = options.name, expected_cost(problem, Exact()).total, 0.0
    priors = METHODS[method].priors
    assert priors is not None
    whole = Trial(problem, plan_for, options, 1)
    stride = stride_of(problem, options)
    share = WHOLE_SHARE if stride == 1 else THINNED_SHARE
    trial = whole if stride == 1 else Trial(thinned(problem.without_gradient(), stride), plan_for, options, stride)
    kind, decay = "pilot", priors.decay
    wanted = foretold(priors.first_budget, max(1.0, priors.easy_error / rtol), decay)
    # No more than a quarter of thinned keys: of so many the error says little.
    quarter = most = trial.problem.n_k // (4 * BUDGET_STEP) * BUDGET_STEP
    while 4 * wanted <= problem.n_k:
        budget = wanted if trial is whole else min(wanted, most)
        step = trial.step(budget, kind)
        left = trial.left(budget) if trial is whole else expected_cost(problem, options.resolve(wanted)).total
        pilots = share * (FURTHER if rounds else 1.0)
        dear = spent + step + left > (1.0 + share) * exact or (kind == "pilot" and spent + step > pilots * exact)
        refused = sum(one.step == "certified" for one in rounds)
        if dear or refused == MOST_REFUSED or whole.plan(wanted).temporary_bytes > limit:
            return None
        spent += step
        found = trial.measure(budget, kind)
        error, upper = float(getattr(found, norm)), found.upper(norm)
        decay = min(decay, observed_decay(budget, error, rounds[-1] if rounds else None, trial.stride))
        rounds.append(SearchStep(method, budget, kind, found.rows, error, upper, spent / exact, trial.stride))
        if kind == "certified" and upper <= rtol:
            plan = replace(whole.plan(budget), reason=f"rtol {rtol:g}: its {norm} error is certified")
            return SearchResult(plan, *whole.evaluate(budget), found, tuple(rounds))
        excess = upper / rtol
        wanted = foretold(budget, excess, decay)
        if kind == "certified" or (trial is whole and excess > 1.0):
            wanted = max(wanted, foretold(budget, LEAST_GROWTH, 1.0))
        elif trial is whole:
            kind, wanted = "certified", budget
        else:
            most = min(quarter, FARTHEST * budget)
            if wanted <= FARTHEST * budget or budget == quarter:
                trial, kind = whole, "certified"
    return None


def observed_decay(budget: int, error: float, before: SearchStep | None, stride: int) -> float:
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
