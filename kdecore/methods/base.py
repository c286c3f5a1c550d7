"""`Method`: all that the library knows of a way to choose keys, and the `Plan` that it is given.

Every method's record stands in its file; `register` adds one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from kdecore.arrays.errors import OptionError
from kdecore.arrays.namespace import Array
from kdecore.arrays.random import piece_seed
from kdecore.core.chunks import ChunkRange, Features
from kdecore.core.options import Options
from kdecore.core.problem import Problem
from kdecore.core.selection import Selected
from kdecore.kernels.registry import Choice
from kdecore.kernels.site import Largest, Site
from kdecore.methods.costs import Cost, Sizes, exact_cost
from kdecore.methods.levels import Step


@dataclass(frozen=True)
class Plan:
    """A resolved call: integers and names only.

    Attributes
    ----------
    options
        Options object of the method that will run, every field set.
    reason
        Why this method.
    seed
        In [0, 2**64).
    kernels
        Kernel name → implementation chosen.
    exact
        Implementation of attend_dense for what is evaluated exactly beside the method.
    threads
        Threads of the Numba kernels.
    temporary_bytes
        Upper bound of temporaries above inputs and results.
    steps
        How a problem whose queries see intervals of its keys is cut; else ().
    piece
        Path to the piece of the call that this plans, so that each draws random numbers of its own.
    """

    options: Options
    reason: str
    seed: int
    kernels: dict[str, Choice]
    exact: Choice
    threads: int
    temporary_bytes: int
    steps: tuple[Step, ...] = ()
    piece: tuple[int, ...] = ()

    @property
    def method(self) -> str:
        """Name of the method that will run."""
        return self.options.name

    def part(self, *numbers: int) -> "Plan":
        """Return the plan of a piece of this piece."""
        return replace(self, piece=(*self.piece, *numbers))

    @property
    def draw_seed(self) -> int:
        """Seed of what this piece of the call draws: for each piece another."""
        return piece_seed(self.seed, self.piece)


class Stages(NamedTuple):
    """A method in two steps, so that several budgets, or parts of the queries, share the first.

    Attributes
    ----------
    prepare
        (problem, plan) → what no budget changes.
    select
        (problem, plan, prepared) → Selection.
    restrict
        (problem, prepared, numbers (G, C)) → problem and prepared for C blocks of queries, chosen by numbers in [0, 1), as
        they are among all others, and their queries (G, C, b); None where evaluating all queries takes hardly longer.
    rows
        (problem, options as they were asked for) → queries of such a block, at most.
    calibrated
        (problem, plan, prepared) → prepared, with what a budget needs for any of the queries; None where that is nothing.
    """

    prepare: Callable[[Problem, Plan], Any]
    select: Callable[[Problem, Plan, Any], Selected]
    restrict: Callable[[Problem, Any, Array], tuple[Problem, Any, Array]] | None = None
    rows: Callable[[Problem, Any], int] | None = None
    calibrated: Callable[[Problem, Plan, Any], Any] | None = None


class Chunked(NamedTuple):
    """A method on 2**level equal chunks of queries, each of which sees some of 2**level equal chunks of the keys.

    Attributes
    ----------
    describe
        (problem, plan) → what is found out about all rows once, to be cut and stacked with them.
    prepare
        (problem, plan, level, described) → what is built once for all chunks of a level.
    select
        (problem, plan, prepared, level, number, keys) → Selection for one chunk of queries.
    lists_chunks
        Whether lists begin with the chunks seen, and so need room for them.
    """

    describe: Callable[[Problem, Plan], Features]
    prepare: Callable[[Problem, Plan, int, Features], Any]
    select: Callable[[Problem, Plan, Any, int, int, ChunkRange], Selected]
    lists_chunks: bool


@dataclass(frozen=True)
class Priors:
    """What ``rtol=`` knows of a method before it tries it.

    Attributes
    ----------
    budget_fields
        Options that set a budget, which the search has to be left to choose.
    first_budget, easy_error
        Where a search begins, and the error there on easy data; smaller tolerances begin with larger budgets.
    decay
        Power of the budget that errors fall with.
    thinned
        Whether as many keys of every so many-th row err about as much, so that a pilot needs no others.
    suits
        (options) → whether these are searched.
    """

    budget_fields: tuple[str, ...]
    first_budget: int
    easy_error: float
    decay: float
    thinned: bool = False
    suits: Callable[[Any], bool] = lambda options: True


def as_asked(problem: Problem, options: Options, site: Site, kernels: str) -> tuple[Options, str]:
    """Return the options as they are, and why."""
    return options, "asked for by name"


def as_planned(problem: Problem, options: Any, kernel: str, chosen: dict[str, Choice], largest: Largest) -> Largest:
    """Return a problem's sizes, which a kernel is given as they are."""
    return largest


def as_many(kernels: dict[str, Choice], budget: int, n_k: int) -> int:
    """Return the budget, which no list is longer than."""
    return min(budget, n_k)


@dataclass(frozen=True)
class Method:
    """A way to choose keys.

    Attributes
    ----------
    options
        Class of its options, whose ``name`` is the method's.
    select
        (problem, plan) → Selection, of a problem whose queries see all keys, or whose mask is applied afterwards: then
        of the problem's own keys, without denominators and own keys. Rows may record gradients, which keys are chosen
        without (`without_gradient`), and are of half precision on accelerators. Log-weights are constants.
    temporary_bytes
        (problem, options, cuts, kernels, threads) → what it takes at most beside copied inputs and what restrictions take;
        None for that of a list for each query.
    cost
        (problem or `Sizes`, options) → `Cost`: what a certificate may take is a part of it. Exact attention's if not said.
    adapted
        (problem, options, site, kernels) → options as they suit the problem, every field set, and the reason for the report.
    largest
        (problem, options, kernel, kernels chosen before it, the problem's sizes) → the largest sizes of what it is given; to
        be said where Selections have keys or values of their own.
    longest_list
        (kernels, budget, n_k) → slots of a list, at most.
    stages
        Its two steps; None for `select` alone.
    chunked
        How it selects from chunks of restricted keys; None where it is given these alone.
    priors
        None for a method that ``rtol=`` doesn't try.
    """

    options: type[Options]
    select: Callable[[Problem, Plan], Selected]
    temporary_bytes: Callable[[Problem, Any, tuple[Step, ...], dict[str, Choice], int], int] | None = None
    cost: Callable[[Problem | Sizes, Any], Cost] = exact_cost
    adapted: Callable[[Problem, Any, Site, str], tuple[Options, str]] = as_asked
    largest: Callable[[Problem, Any, str, dict[str, Choice], Largest], Largest] = as_planned
    longest_list: Callable[[dict[str, Choice], int, int], int] = as_many
    stages: Stages | None = None
    chunked: Chunked | None = None
    priors: Priors | None = None

    @property
    def name(self) -> str:
        """What users call it."""
        return self.options.name

    @property
    def staged(self) -> Stages:
        """Its two steps, the first of which does nothing where it has but one."""
        return self.stages or Stages(lambda problem, plan: None, lambda problem, plan, prepared: self.select(problem, plan))


METHODS: dict[str, Method] = {}
"""Name → method, in the order that users are told of."""


def register(method: Method) -> Method:
    """Let users name a method, and give its options; return it.

    Raises
    ------
    OptionError
        Another one has the name, or blocks of queries are restricted to that nobody says the size of.
    """
    if method.stages is not None and (method.stages.restrict is None) is not (method.stages.rows is None):
        raise OptionError("stages must say rows where they say restrict")
    if METHODS.setdefault(method.name, method) is not method:
        raise OptionError(f"a method named {method.name!r} is there already")
    return method


def expected_cost(problem: Problem | Sizes, options: Options) -> Cost:
    """Return what options are expected to take."""
    return METHODS[options.name].cost(problem, options)
