"""HyperAttention (Han, Jayaram, Karbasi, Mirrokni, Woodruff, Zandieh 2023): sortlsh with uniform sampling."""

from kdecore.inputs import Problem
from kdecore.methods.sortlsh import block_and_sample
from kdecore.planning import Plan
from kdecore.selection import Selection


def select(problem: Problem, plan: Plan) -> Selection:
    """Select each block's own stretch of keys, and a uniform sample of the others."""
    xp = problem.xp
    weights = xp.ones((problem.groups, problem.n_k), dtype=xp.float64, device=problem.device)
    return block_and_sample(problem, plan, weights)
