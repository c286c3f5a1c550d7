"""How queries that see intervals of the keys are cut, level by level, and how levels share the budget."""

from typing import NamedTuple

from kdecore.core.chunks import cut, inner_keys, remainder
from kdecore.core.key_ranges import KeyRanges
from kdecore.core.options import DEFAULT_BUDGET, Exact, Options
from kdecore.core.problem import Problem

EXACT_CHUNK = 512
"""Queries in a chunk of exact attention, no more than the keys that they see."""
LEAST_CHUNK = 32
"""But so many at least; and a tile of so many is evaluated in halves."""
TILE_SHARE = 4
"""A tile has at most one in so many of the budget's keys."""
LEVEL_BITS = 2
"""A level cuts into 2**2 chunks, for approximate methods: of fewer there are too many levels to share the budget, of more
too few queries to find similar ones among (bench/NOTES.md)."""
LEVEL_RATIO = 1.5
"""A level has so many times the budget of the next one, whose queries see fewer keys."""
LARGEST_FACTOR, ROUGHLY = 4.0, 0.05
"""Budgets of levels are scaled by so much at most, and not where they are as good as right."""
COMMON_SHARE = 0.25
"""Keys that all queries see are evaluated by themselves where they are this part of what a query sees in the mean."""


class Step(NamedTuple):
    """How a problem whose queries see intervals of its keys is cut (`kdecore.engine.hierarchy`).

    Attributes
    ----------
    level
        Queries and keys are cut into 2**level chunks.
    budget
        Keys per query for what a chunk sees as a whole.
    """

    level: int
    budget: int


def steps(problem: Problem, options: Options) -> tuple[Step, ...]:
    """Return how a problem whose queries see intervals of its keys is cut, and cut again; () for one tile, and any other.

    Tiles of at most a quarter of the budget are exact, after their own halves, where one sees all of the other; the rest of
    the budget is for the levels. Only T − 1 of T chunks of causal attention have keys that all of their queries see:
    these get so much more, that the mean is the budget.
    """
    visible = problem.visible
    if visible is None or problem.mask is not None:
        return ()
    # Of grouped heads, queries at one position see the same keys.
    n_q = problem.n_q // problem.repeats
    if isinstance(options, Exact):
        rows = min(EXACT_CHUNK, max(LEAST_CHUNK, visible.pairs // problem.n_q))
        return (Step((-(-n_q // rows) - 1).bit_length(), 0),)
    budget = options.budget or DEFAULT_BUDGET
    levels, tile_rows = levels_and_tile(problem, visible, budget)
    if not levels:
        return ()
    weights = [LEVEL_RATIO**-i for i in range(len(levels))]
    rest = max(0, budget - tile_rows) / sum(weights)
    seeing = [1.0 - 0.5**level if level else 1.0 for level in levels]
    budgets = [max(1, int(rest * weight / share)) for weight, share in zip(weights, seeing, strict=True)]
    halves = [Step(1, tile_rows)] if tile_rows >= LEAST_CHUNK else []
    found = (*(Step(level, number) for level, number in zip(levels, budgets, strict=True)), *halves)
    # Windows leave more or less to the levels than causal attention does.
    of_levels = slots_of_levels(visible, problem.n_k, found)
    chosen, exact = sum(of_levels[: len(levels)]), sum(of_levels[len(levels) :])
    factor = min(LARGEST_FACTOR, max(0.0, problem.n_q * budget - exact) / max(1, chosen))
    if abs(factor - 1.0) > ROUGHLY:
        found = (*(Step(level, max(1, int(number * factor))) for level, number in found[: len(levels)]), *halves)
    return found


def levels_and_tile(problem: Problem, visible: KeyRanges, budget: int) -> tuple[list[int], int]:
    """Return the levels of an approximate method, each cutting into 2**level chunks, and the queries of a tile."""
    n_q = problem.n_q // problem.repeats
    tile = max(8, budget // TILE_SHARE)
    bits = (-(-n_q // tile) - 1).bit_length()
    count = -(-bits // LEVEL_BITS)
    levels = [(bits * (i + 1)) // count - (bits * i) // count for i in reversed(range(count))]
    first, end = visible.inner
    if end - first > COMMON_SHARE * visible.pairs / problem.n_q:
        levels = [0, *levels]
    return levels, -(-n_q >> bits)


def slots_of_levels(visible: KeyRanges, n_k: int, levels: tuple[Step, ...]) -> list[int]:
    """Return how many slots each level evaluates for all queries, and at the end tiles, as `engine.hierarchy` cuts."""
    known: dict[tuple[int, int, bytes, bytes], list[int]] = {}

    def count(visible: KeyRanges, n_k: int, depth: int) -> list[int]:
        kind = depth, n_k, visible.first.tobytes(), visible.end.tobytes()
        if kind in known:
            return known[kind]
        slots = [0] * (len(levels) + 1)
        if depth == len(levels):
            low, high = visible.outer
            slots[depth] = len(visible.first) * (high - low)
        else:
            level, budget = levels[depth]
            for queries in cut(len(visible.first), 1 << level):
                seen = visible.rows(slice(*queries))
                _, (first, end) = inner_keys(seen, n_k, level)
                slots[depth] += (queries[1] - queries[0]) * min(end - first, budget)
                rest = remainder(queries, seen, (first, end))
                if rest.visible.pairs:
                    left = sum(b - a for a, b in rest.keys)
                    slots = [x + y for x, y in zip(slots, count(rest.visible, left, depth + 1), strict=True)]
        known[kind] = slots
        return slots

    return count(visible, n_k, 0)
