"""HyperAttention (Han, Jayaram, Karbasi, Mirrokni, Woodruff, Zandieh 2023): sortlsh with uniform sampling."""

from kdecore.inputs import Problem
from kdecore.methods.sortlsh import Prepared, block_and_sample, hashed, sort_described
from kdecore.planning import Plan
from kdecore.selection import Selection
from kdecore.stretches import Described


def select(problem: Problem, plan: Plan) -> Selection:
    """Select each block's own stretch of keys, and a uniform sample of the others."""
    return block_and_sample(problem, plan, prepare(problem, plan))


def prepare(problem: Problem, plan: Plan) -> Prepared:
    """Hash and sort."""
    return sort_described(problem, plan, 0, describe(problem, plan))


def describe(problem: Problem, plan: Plan) -> Described:
    """Hash, and weigh all keys alike."""
    xp = problem.xp
    return hashed(problem, plan, xp.ones((problem.groups, problem.n_k), dtype=xp.float64, device=problem.device))
