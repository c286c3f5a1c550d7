"""Exact attention: every query attends to every key, in tiles, never an n × n array. O(G n_q n_k (d + d_v))."""

from kdecore.inputs import Problem
from kdecore.planning import Plan
from kdecore.selection import Selection


def select(problem: Problem, plan: Plan) -> Selection:
    """Select all keys."""
    return Selection()
