"""Methods: each turns a problem and its plan into a Selection."""

from collections.abc import Callable

from kdecore.inputs import Problem
from kdecore.methods import exact, hyper, kdeformer, sortlsh, treecode
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
