"""Methods: each turns a problem and its plan into a Selection."""

from collections.abc import Callable
from typing import Any, NamedTuple

from kdecore.inputs import Problem
from kdecore.methods import exact, hyper, kdeformer, sortlsh, treecode
from kdecore.namespaces import Array
from kdecore.planning import Plan
from kdecore.selection import Selected
from kdecore.stretches import Described, Stretch

SELECT: dict[str, Callable[[Problem, Plan], Selected]] = {
    "exact": exact.select,
    "sortlsh": sortlsh.select,
    "hyper": hyper.select,
    "kdeformer": kdeformer.select,
    "treecode": treecode.select,
}
"""Method name → function that selects keys."""


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
    calibrated
        (problem, plan, prepared) → prepared, with what a budget needs for any of the queries; None where that is nothing.
    """

    prepare: Callable[[Problem, Plan], Any]
    select: Callable[[Problem, Plan, Any], Selected]
    restrict: Callable[[Problem, Any, Array], tuple[Problem, Any, Array]] | None = None
    calibrated: Callable[[Problem, Plan, Any], Any] | None = None


class Stretches(NamedTuple):
    """A method on 2**level equal stretches of queries, each of which sees some of 2**level equal stretches of the keys.

    Attributes
    ----------
    describe
        (problem, plan) → what is found out about all rows once, to be cut and stacked with them.
    prepare
        (problem, plan, level, described) → what is built once for all stretches of a level.
    select
        (problem, plan, prepared, level, number, keys) → Selection for one stretch of queries.
    lists_stretches
        Whether lists begin with the stretches seen, and so need room for them.
    """

    describe: Callable[[Problem, Plan], Described]
    prepare: Callable[[Problem, Plan, int, Described], Any]
    select: Callable[[Problem, Plan, Any, int, int, Stretch], Selected]
    lists_stretches: bool


STRETCHES = {
    "sortlsh": Stretches(sortlsh.describe, sortlsh.sort_described, sortlsh.select_stretch, False),
    "hyper": Stretches(hyper.describe, sortlsh.sort_described, sortlsh.select_stretch, False),
    "treecode": Stretches(treecode.describe, treecode.prepare_in_order, treecode.select_stretch, True),
}
"""Method name → how it selects from stretches; the others are given the stretches' keys alone."""

STAGES = {
    "sortlsh": Stages(sortlsh.prepare, sortlsh.block_and_sample),
    "hyper": Stages(hyper.prepare, sortlsh.block_and_sample),
    "treecode": Stages(treecode.prepare, treecode.open_for, treecode.restrict, treecode.calibrated),
}
"""Method name → its steps."""
