"""How much memory a plan takes at most, from sizes alone."""

from kdecore.arrays.namespace import host, on_accelerator
from kdecore.arrays.rows import TILE_ELEMENTS
from kdecore.core.options import Exact, Options
from kdecore.core.problem import Problem
from kdecore.kernels.registry import Choice
from kdecore.methods.base import METHODS
from kdecore.methods.choices import item_bytes, sizes_of
from kdecore.methods.levels import Step

FEWEST_QUERIES = 64
"""So few queries of one group aren't cut for want of memory."""
TILE_BIAS = 2**22
"""Numbers of a tile's mask, at most."""
MASK_TILE = 2 * TILE_ELEMENTS
"""Logits that a mask is applied to at a time where all keys are evaluated, at most."""


def temporary_bytes(
    problem: Problem, options: Options, cuts: tuple[Step, ...], kernels: dict[str, Choice], threads: int
) -> int:
    """Bound the temporaries from above: copied inputs, the Selection while it is made, and what the kernels work in."""
    size, method = item_bytes(problem), METHODS[options.name]
    rows_q, rows_k = problem.groups * problem.n_q, problem.groups * problem.n_k
    sizes = {"q": rows_q * problem.d, "k": rows_k * problem.d, "v": rows_k * problem.d_v}
    total = size * sum(sizes[name] for name in problem.copied)
    if on_accelerator(problem.q):
        total += _unread_bytes(problem, kernels, size)
    if problem.visible is not None or problem.mask is not None:
        total += _restricted_bytes(problem, options, cuts, kernels, size)
    if method.temporary_bytes is None:
        budget = max((step.budget for step in cuts), default=options.budget or problem.n_k)
        return total + lists_bytes(problem, options.with_budget(budget), kernels, threads, rows=1)
    return total + method.temporary_bytes(problem, options, cuts, kernels, threads)


def lists_bytes(problem: Problem, options: Options, kernels: dict[str, Choice], threads: int, rows: int) -> int:
    """Bound what lists of a budget's keys take while they are made and evaluated, of blocks of so many rows."""
    size, slots = item_bytes(problem), min(options.budget or problem.n_k, problem.n_k)
    rows_q, rows_k = problem.groups * problem.n_q, problem.groups * problem.n_k
    blocks = problem.groups * -(-problem.n_q // rows)
    # Positions, indices, probabilities and log-weights, each once as it is made and once as it is passed on.
    total = blocks * slots * (7 * 8 + 2 * size)
    # Codes, order, sampling weights, their sums and logarithms, guide, norms; projections of one side at a time.
    total += (rows_q + rows_k) * 6 * 8 + rows_k * 8 * 8 + norm_bytes(problem, kernels)
    if "attend_blocks" not in kernels or kernels["attend_blocks"].computed_by == "array-api":
        rows = min(problem.n_q, rows)
        tile = max(TILE_ELEMENTS, slots * max(problem.d, problem.d_v))
        return total + size * 7 * tile + size * (rows_q + blocks * rows) * (problem.d_v + 1)
    return total + threads * workspace_bytes(problem)


def _unread_bytes(problem: Problem, kernels: dict[str, Choice], size: int) -> int:
    """Bound what it takes to treat numbers that are not finite without reading any: queries, and results, once more."""
    rows_q, rows_k = problem.groups * problem.n_q, problem.groups * problem.n_k
    stored = sizes_of(problem).item_bytes
    total = stored * rows_q * problem.d + 2 * size * rows_q * (problem.d_v + 1)
    if kernels["finite_rows"].computed_by == "array-api":
        # Absolute values, and what is said of each number.
        total += (stored + 3) * max(rows_q * problem.d, rows_k * problem.d, rows_k * problem.d_v)
    return total


def _restricted_bytes(
    problem: Problem, options: Options, levels: tuple[Step, ...], kernels: dict[str, Choice], size: int
) -> int:
    """Bound what intervals and masks take: rows stacked again for each level, results merged, lists kept, and biases."""
    rows_q, rows_k = problem.groups * problem.n_q, problem.groups * problem.n_k
    width = problem.d + problem.d_v
    visible = problem.visible
    if problem.mask is not None or visible is None:
        tile = min(MASK_TILE, problem.groups * problem.n_q * problem.n_k)
        listed = (
            0
            if isinstance(options, Exact)
            else METHODS[options.name].longest_list(kernels, min(options.budget or problem.n_k, problem.n_k), problem.n_k)
        )
        return max(tile, problem.n_q * problem.groups * listed) * (3 * 8 + 3 * size) + size * rows_q * (problem.d_v + 1)
    cuts = 1 << sum(step.level for step in levels)
    alike = problem.n_q == problem.n_k and problem.n_q % cuts == 0 and int(host.max(visible.first)) == 0
    # Chunks that are alike and cover everything are stacked without a copy.
    rows = -(-problem.n_q // cuts)
    # What is left to a level: about the keys at the queries' positions, at either side of a window.
    sides = 3 if int(host.max(visible.first)) > 0 else 1
    left = min(rows_k, 2 * rows_q) * sides
    copies = 0 if alike else len(levels) * size * (rows_q * (problem.d + 2 * problem.d_v + 2) + left * width)
    if levels and levels[0].level == 0 and not isinstance(options, Exact):
        copies += size * rows_k * width
    tile = rows if alike else 4 * rows + sides * rows
    bias = 3 * 8 * min(TILE_BIAS, rows * min(problem.n_k, tile))
    lists = 2 * 8 * rows_q * (1 + len(levels)) + 4 * 8 * (rows_q + rows_k)
    return copies + bias + lists + size * 2 * rows_q * (problem.d_v + 1)


def norm_bytes(problem: Problem, kernels: dict[str, Choice]) -> int:
    """Bound what norms of values take in the array API: these in float64, relative to the largest, and their squares."""
    found = kernels.get("value_sizes") or kernels.get("row_norms")
    by_array_api = found is not None and found.computed_by == "array-api"
    return 4 * 8 * problem.groups * problem.n_k * problem.d_v if by_array_api else 0


def workspace_bytes(problem: Problem) -> int:
    """Return what a thread of the Numba attention kernel works in: a chunk of keys and values, and a task's queries."""
    rows, slots, size = 256, 640, item_bytes(problem)
    return size * slots * (problem.d + problem.d_v + 32) + rows * (size * problem.d + 8 * (problem.d_v + 8))
