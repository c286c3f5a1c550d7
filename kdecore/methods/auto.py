"""``method="auto"``: the treecode where that is expected to be worth its error, exact attention elsewhere.

On the CPU by costs (`kdecore.methods.costs`), on other devices by what was measured on such a card
(`kdecore.methods.devices`).
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from kdecore.arrays.backend import backend_of
from kdecore.arrays.errors import OptionError
from kdecore.arrays.namespace import on_accelerator
from kdecore.core.options import DEFAULT_BUDGET, Exact, Options, set_integers
from kdecore.core.problem import Problem
from kdecore.core.selection import Selection
from kdecore.kernels.registry import Choice
from kdecore.kernels.site import Site
from kdecore.methods import devices, exact, treecode
from kdecore.methods.base import Method, Plan
from kdecore.methods.choices import choices
from kdecore.methods.costs import Sizes
from kdecore.methods.sortlsh import SortLSH
from kdecore.methods.treecode import Treecode

WORTHWHILE = 1.3
"""An estimate has to be expected so many times as fast as exact: an error for no gain helps nobody."""


@dataclass(frozen=True)
class Auto(Options):
    """A budget, for whatever method it will be."""

    name: ClassVar[str] = "auto"

    num_keys: int | None = None

    def __post_init__(self) -> None:
        set_integers(self, num_keys=1)

    @property
    def budget(self) -> int | None:
        """Keys evaluated per query; None where not resolved."""
        return self.num_keys

    def resolve(self, budget: int | None) -> Self:
        """Return these options with a budget."""
        if budget is not None and self.num_keys not in (None, budget):
            raise OptionError(f"budget must be None or num_keys = {self.num_keys}, got {budget}")
        return replace(self, num_keys=self.num_keys or budget or DEFAULT_BUDGET)

    def with_budget(self, budget: int) -> Self:
        """Return these options for another budget."""
        return replace(self, num_keys=budget)


def select(problem: Problem, plan: Plan) -> Selection:
    """Select nothing: plans are of the method chosen."""
    raise NotImplementedError


def adapted(problem: Problem, options: Auto, site: Site, kernels: str) -> tuple[Options, str]:
    """Return the options of the method chosen, and why it."""
    budget = options.budget or DEFAULT_BUDGET
    if problem.mask is not None:
        return Exact(), "auto: a mask that is no interval may hide whatever an estimate rests on"
    if budget >= problem.most_seen:
        return Exact(), f"auto: a budget of {budget} covers all {problem.most_seen} keys"
    if on_accelerator(problem.q):
        return adapted_to_card(problem, budget, site, kernels)
    ratio = exact_over_treecode(problem, budget)
    expected = f"treecode is expected to be {ratio:.2g} × as fast as exact, where an estimate has to be {WORTHWHILE} ×"
    if ratio < WORTHWHILE:
        return Exact(), f"auto: {expected}"
    if (found := tree_opener(problem, site, kernels, budget)).target == "array-api":
        # Many small steps for each round of opening: slower than exact for long.
        return SortLSH().resolve(budget), f"auto: {expected}, but no kernel opens trees here ({found.reason})"
    return treecode.adapted(problem, Treecode().resolve(budget), site, kernels)[0], f"auto: {expected}"


def adapted_to_card(problem: Problem, budget: int, site: Site, kernels: str) -> tuple[Options, str]:
    """Return the options of the method chosen on a device, and why it: exact where no such call was measured there.

    Nothing waits for the device. That gradients are recorded changes nothing: backward passes choose the same again.
    """
    name = backend_of(problem.q).card(site.device)
    beside = [] if problem.visible is None else ["restricted keys"]
    if reason := devices.unmeasured(name, problem, beside, tree_opener(problem, site, kernels, budget).target):
        return Exact(), f"auto: {reason}"
    ratio = devices.exact_over_treecode(name, problem, budget)
    reason = (
        f"auto: measured on {name} ({devices.CARDS[name].code}): treecode is expected to be {ratio:.2g} × as fast as "
        f"PyTorch's attention, where an estimate has to be {WORTHWHILE} ×"
    )
    if ratio < WORTHWHILE:
        return Exact(), reason
    return treecode.adapted(problem, Treecode().resolve(budget), site, kernels)[0], reason


def exact_over_treecode(problem: Problem | Sizes, budget: int) -> float:
    """Return how many times as long as the treecode's of a budget exact attention is expected to take."""
    return exact.METHOD.cost(problem, Exact()).total / treecode.METHOD.cost(problem, Treecode().resolve(budget)).total


def tree_opener(problem: Problem, site: Site, kernels: str, budget: int = DEFAULT_BUDGET) -> Choice:
    """Return what opens trees for the treecode as it is where nothing but the budget is said."""
    options = Treecode().resolve(budget).at(on_accelerator(problem.q), problem.n_q)
    return choices(problem, options, site, kernels)["open_tree"]


METHOD = Method(Auto, select, adapted=adapted)
