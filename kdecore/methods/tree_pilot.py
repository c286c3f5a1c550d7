"""How far the treecode opens trees, and what closed nodes leave out: found with the pilot."""

from dataclasses import replace

from kdecore.arrays.gradients import without_gradient
from kdecore.arrays.memory import contiguous
from kdecore.arrays.namespace import Array, on_accelerator
from kdecore.core.problem import Problem
from kdecore.core.tree import BlockQueries, Tree
from kdecore.kernels.open_tree.contract import first_nodes
from kdecore.kernels.registry import Choice
from kdecore.methods.base import Plan
from kdecore.methods.first_order import first_order
from kdecore.methods.key_tree import summaries
from kdecore.methods.tree_queries import Calibration, PreparedTree

PILOT_GROUPS = 32
"""Of more groups that are chunks of rows every so many-th has a pilot, so that there are no more, and none a matrix
(bench/NOTES.md)."""
WIDEST, FEWEST_NODES = 2, 64
"""A block of the pilot has at most so many times the budget's nodes in a level, or so many."""
LONGEST, LONGEST_EVALUATED = 4, 2
"""A list of the treecode has at most so many times the budget's slots; fewer where all that there may be are evaluated."""


def asking(problem: Problem, plan: Plan, prepared: PreparedTree, index: Array) -> BlockQueries:
    """Return blocks of a problem's queries as kernels take them: taken apart where no tree made them alike."""
    apart = "tree_order" not in plan.kernels
    return BlockQueries(without_gradient(problem.q), problem.scale, prepared.coordinates, index, apart)


def calibrated(problem: Problem, plan: Plan, prepared: PreparedTree) -> PreparedTree:
    """Return the same with what the pilot finds for a plan's budget, so that any of its blocks can be opened."""
    return replace(prepared, calibration=calibrate(problem, plan, prepared))


def calibrate(problem: Problem, plan: Plan, prepared: PreparedTree) -> Calibration:
    """Find out with the pilot how far to open trees, and what their closed nodes leave out.

    Of many chunks of rows, each of few blocks, the pilot would be nearly all: some of them say how far, and what is left out
    stays so.
    """
    if prepared.seen[0] > 0 and problem.groups > PILOT_GROUPS:
        return threshold_of_some(problem, plan, prepared, -(-problem.groups // PILOT_GROUPS))
    found, key_index, share = open_pilot(problem, plan, prepared)
    # Without values there is nothing that a matrix could lead to.
    if "gap_moments" not in plan.kernels or problem.d_v == 0:
        return found
    # From lists, queries would have to be gathered in the order of blocks for matrices of their own: not on accelerators.
    each_block = "attend_tree" in plan.kernels or not on_accelerator(problem.q)
    multiply, shrink = (plan.kernels[name].function for name in ("gap_moments", "shrink_matrices"))
    slope = first_order(problem.xp, prepared.keys.nodes, key_index, share, multiply, shrink, each_block)
    return found._replace(slope=slope)


def open_pilot(problem: Problem, plan: Plan, prepared: PreparedTree) -> tuple[Calibration, Array, Array]:
    """Find the threshold at which lists are as long as the budget in the mean; return it, and the pilot's lists.

    Returns
    -------
    calibration
        Without first-order matrices.
    key_index, share
        (G, C, s) of the pilot's C blocks, as `kdecore.kernels.open_tree` returns them.
    """
    found = threshold_of_some(problem, plan, prepared, 1)
    assert prepared.pilot is not None
    given = problem.xp, asking(problem, plan, prepared, prepared.pilot), summaries(prepared.keys)
    key_index, _, share, _ = plan.kernels["open_tree"].function(*given, *found[:3])
    return found, key_index, share


def threshold_of_some(problem: Problem, plan: Plan, prepared: PreparedTree, step: int) -> Calibration:
    """Find the threshold at which lists are as long as the budget in the mean, with the pilot of every ``step``-th group."""
    tree, kernels = summaries(prepared.keys), plan.kernels
    assert prepared.pilot is not None
    assert plan.options.budget is not None
    budget = plan.options.budget - (prepared.own is not None and plan.options.budget > 1)
    start = first_nodes(budget, tree.nodes, *prepared.seen)
    most = max(start[2] - start[1], longest_list(kernels, budget, problem.n_k))
    q, scale, coordinates, index, apart = asking(problem, plan, prepared, prepared.pilot)
    q, coordinates, index = (contiguous(x[::step, ...]) for x in (q, coordinates, index))
    queries, some = BlockQueries(q, scale, coordinates, index, apart), Tree(*(contiguous(x[::step, ...]) for x in tree))
    widest = max(WIDEST * budget, FEWEST_NODES)
    threshold = kernels["pick_threshold"].function(problem.xp, queries, some, budget, widest, start)
    return Calibration(threshold, most, start)


def longest_list(kernels: dict[str, Choice], budget: int, n_k: int) -> int:
    """Return how long a list of the treecode may be."""
    every = kernels["open_tree"].computed_by == "numba-cuda"
    return min(n_k, (LONGEST_EVALUATED if every else LONGEST) * budget)
