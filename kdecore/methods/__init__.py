"""Methods: each turns a problem and its plan into a Selection."""

from collections.abc import Callable
from typing import Any, NamedTuple

from kdecore.inputs import Problem
from kdecore.methods import exact, hyper, kdeformer, sortlsh, treecode
from kdecore.namespaces import Array
from kdecore.planning import Plan
from kdecore.selection import Selection

SELECT: dict[str, Callable[[Problem, Plan], Selection]] = {
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
    """

    prepare: Callable[[Problem, Plan], Any]
    select: Callable[[Problem, Plan, Any], Selection]
    restrict: Callable[[Problem, Any, Array], tuple[Problem, Any, Array]] | None = None


STAGES = {
    "sortlsh": Stages(sortlsh.prepare, sortlsh.block_and_sample),
    "hyper": Stages(hyper.prepare, sortlsh.block_and_sample),
    "treecode": Stages(treecode.prepare, treecode.open_for, treecode.restrict),
}
"""Method name → its steps."""
