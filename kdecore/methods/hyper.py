"""HyperAttention (Han, Jayaram, Karbasi, Mirrokni, Woodruff, Zandieh 2023): sortlsh with uniform sampling."""

from kdecore.inputs import Problem
from kdecore.methods.sortlsh import Prepared, block_and_sample, hash_and_sort
from kdecore.planning import Plan
from kdecore.selection import Selection


def select(problem: Problem, plan: Plan) -> Selection:
    """Select each block's own stretch of keys, and a uniform sample of the others."""
    return block_and_sample(problem, plan, prepare(problem, plan))


def prepare(problem: Problem, plan: Plan) -> Prepared:
    """Hash and sort."""
    xp = problem.xp
    weights = xp.ones((problem.groups, problem.n_k), dtype=xp.float64, device=problem.device)
    return hash_and_sort(problem, plan, weights)
