"""Exact attention: every query attends to every key, in tiles, never an n × n array. O(G n_q n_k (d + d_v))."""

from kdecore.arrays.rows import TILE_ELEMENTS
from kdecore.core.options import Exact
from kdecore.core.problem import Problem
from kdecore.core.selection import Selection
from kdecore.kernels.registry import Choice
from kdecore.methods.base import Method, Plan
from kdecore.methods.choices import item_bytes
from kdecore.methods.levels import Step
from kdecore.methods.memory import workspace_bytes


def select(problem: Problem, plan: Plan) -> Selection:
    """Select all keys."""
    return Selection()


def temporary_bytes(
    problem: Problem, options: Exact, cuts: tuple[Step, ...], kernels: dict[str, Choice], threads: int
) -> int:
    """Bound what tiles take."""
    size, rows = item_bytes(problem), problem.groups * (problem.n_q + problem.n_k)
    total = 0
    if problem.visible is not None and problem.mask is None and kernels["attend_blocks"].computed_by == "array-api":
        # Keys and values are gathered for each chunk.
        total += size * (7 * TILE_ELEMENTS + 3 * problem.n_k * (problem.d + problem.d_v))
    if kernels["attend_dense"].computed_by == "array-api":
        # Logits, shifted logits and weights of a tile; results of two tiles and their merge.
        return total + size * (4 * TILE_ELEMENTS + 6 * min(problem.n_q, 256) * (problem.d + problem.d_v))
    return total + threads * workspace_bytes(problem) + 8 * 2 * rows


METHOD = Method(Exact, select, temporary_bytes=temporary_bytes)
