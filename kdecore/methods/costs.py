"""What methods are expected to take, in units of one dimension of one float32 key, evaluated for one query."""

from dataclasses import dataclass
from typing import NamedTuple

from kdecore.arrays.namespace import ACCUMULATION
from kdecore.core.key_ranges import KeyRanges
from kdecore.core.options import Options
from kdecore.core.problem import Problem
from kdecore.methods.levels import levels_and_tile

# Fitted to times on two cores (bench/NOTES.md).
EXP_DIMENSIONS = 20
"""What exp and the sums cost, as so many dimensions more."""


@dataclass(frozen=True)
class CostModel:
    """What an approximate method takes.

    Attributes
    ----------
    listed_key, opened_node
        A slot of a list: for each dimension of its key, exp's among them; and whatever the dimension.
    row_dimension, row
        Ordering and summarising a row: for each dimension, and whatever the dimension.
    group
        Moments of a group, for each pair of dimensions.
    call
        What it takes more than exact however little there is to do.
    """

    listed_key: float
    opened_node: float
    row_dimension: float
    row: float
    group: float
    call: float


@dataclass(frozen=True)
class Cost:
    """What a call is expected to take.

    Attributes
    ----------
    prepare
        What no budget changes.
    evaluate
        For all queries, with the budget.
    """

    prepare: float
    evaluate: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.prepare + self.evaluate


class Sizes(NamedTuple):
    """What of a problem costs follow from, where every query sees all keys; as in `Problem`."""

    groups: int
    n_q: int
    n_k: int
    d: int
    d_v: int
    input_dtype: str
    visible: KeyRanges | None = None


def exact_row_cost(problem: Problem | Sizes) -> float:
    """Return what exact attention of one query is expected to take."""
    return _element_cost(problem) * problem.n_k * (problem.d + problem.d_v + EXP_DIMENSIONS)


def exact_cost(problem: Problem | Sizes, options: Options) -> Cost:
    """Return what exact attention is expected to take."""
    visible = problem.visible
    seen = 1.0 if visible is None else visible.pairs / (problem.n_q * problem.n_k)
    return Cost(0.0, problem.groups * problem.n_q * exact_row_cost(problem) * seen)


def modelled_cost(model: CostModel, problem: Problem | Sizes, options: Options) -> Cost:
    """Return what a method is expected to take by its model; without a budget that of exact attention."""
    visible, budget = problem.visible, options.budget
    if budget is None:
        return exact_cost(problem, options)
    # Each level orders all rows again.
    times = 1 if isinstance(problem, Sizes) or visible is None else len(levels_and_tile(problem, visible, budget)[0])
    size = _element_cost(problem)
    key = size * (problem.d + problem.d_v + EXP_DIMENSIONS)
    row = size * (problem.d + problem.d_v) * model.row_dimension + model.row
    return Cost(
        prepare=times * (problem.groups * ((problem.n_q + problem.n_k) * row + model.group * problem.d**2) + model.call),
        evaluate=problem.groups * problem.n_q * budget * (key * model.listed_key + model.opened_node),
    )


def _element_cost(problem: Problem | Sizes) -> float:
    return 2.0 if ACCUMULATION[problem.input_dtype] == "float64" else 1.0
