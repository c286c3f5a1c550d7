"""`pick_threshold` in Triton for NVIDIA devices: a launch for each level, a program for each block of the pilot.

A launch finds the threshold in the counts of the levels before, opens the nodes of the last one that are above it, weighs
what takes their places, and counts their bounds. On paper: 64 blocks are half of a device's multiprocessors, each of which
weighs some hundred nodes a level three times, 20 µs; six levels, and a launch for the last threshold.
"""

import math

import torch
import triton
import triton.language as tl

from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.tree import BlockQueries, Tree, depth_of
from kdecore.kernels.open_tree.contract import STEP
from kdecore.kernels.open_tree.triton import (
    BELOW,
    LEVELS,
    LOWEST,
    MOST_REGISTERS,
    bounds_of,
    compiled_for,
    estimate,
    load_block,
    ratios_of,
    stored,
    sum_level,
    weigh,
)
from kdecore.kernels.pick_threshold import contract
from kdecore.kernels.runtime.grids import flat_grid

STEPS, BINS, ABOVE = (tl.constexpr(x) for x in (contract.STEPS, contract.BINS, contract.ABOVE))
LOWER_OCTAVES = tl.constexpr(contract.OCTAVES - contract.TOP_OCTAVE)


@triton.jit
def find_threshold(gains, levels, room):
    """Return where the first bin ends, from the largest on, that there is no room for; 0 if there is for all."""
    # A tensor comes first: the interpreter makes no tensor of a constant less one.
    place = tl.arange(0, BINS) * -1 + (BINS - 1)
    total = tl.zeros([BINS], tl.int32)
    for number in range(levels):
        total += tl.load(gains + (place + number * BINS).to(tl.int64))
    fitting = tl.sum((tl.cumsum(total, 0) <= room).to(tl.int32), 0)
    return tl.where(fitting < BINS, tl.exp2((fitting * -1 + BINS).to(tl.float32) / STEPS - LOWER_OCTAVES), 0.0)


@triton.jit
def count_bounds(gains, first, bound, gain, there):
    """Add what nodes take more, opened, to the bins of their bounds, of which the least is the first one."""
    place = tl.floor((tl.log2(bound) + LOWER_OCTAVES) * STEPS)
    number = tl.minimum(tl.maximum(place, 0.0), BINS - 1).to(tl.int32)
    tl.atomic_add(gains + (first + number).to(tl.int64), gain, mask=there, sem="relaxed")


@triton.jit
def open_above(
    queries, squares, half_norm, keys, spread, variances, current, bounds, following, above, limit, before, step, m, most,
    top, closed, n, factor, key_stride,
    D: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr, DIRECTIONS: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """Open the nodes of a level whose bounds are above a limit; return how many take their places, and closed sums."""
    found = 0 * m
    for begin in range(0, m, NODES):
        at = begin + tl.arange(0, NODES)
        there = at < m
        place = tl.load(current + at, mask=there, other=0)
        bound = tl.load(bounds + at, mask=there, other=0.0)
        children = tl.where(there & (bound > limit), 1 << step, 0)
        below = found + tl.cumsum(children, 0) - children
        children = tl.where(below + children <= most, children, 0)
        logits, _, _, _, _ = weigh(
            queries, squares, half_norm, keys, spread, variances, before, place, there, n, factor, key_stride,
            D, COLUMNS, P, DIRECTIONS,
        )  # fmt: skip
        closed += tl.sum(tl.where((there & (children == 0))[None, :], tl.exp2(logits - top[:, None]), 0.0), 1)
        for j in tl.static_range(BELOW):
            tl.store(following + below + j, (place << step) + j, mask=children > j)
            tl.store(above + below + j, bound, mask=children > j)
        found += tl.sum(children, 0)
    return found, closed


@triton.jit(do_not_specialize=["blocks", "rows", "n_q", "n", "nodes", "first", "used", "before", "level", "last", "levels",
                               "room", "most", "width"])  # fmt: skip
def meet_level(
    q, coordinates, query_index, keys, spread, variances, sizes, current, bounds, following, above, lengths, tops, sums,
    gains, factor, scale, blocks, rows, n_q, n, nodes, first, used, before, level, last, levels, room, most, width,
    key_stride,
    FIRST: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr, DIRECTIONS: tl.constexpr,
    ROWS: tl.constexpr, NODES: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Open the nodes of the level ``before``, unless this is the FIRST, and weigh and count those of ``level``.

    ``levels`` have been counted so far. Logits are in units of log 2: ``factor`` is scale / ln 2.
    """
    block = tl.program_id(0).to(tl.int64)
    group = block // blocks
    keys, spread, sizes = keys + group * (nodes + n) * key_stride, spread + group * nodes, sizes + group * nodes
    variances, row = variances + group * nodes * P, block * ROWS + tl.arange(0, ROWS)
    current, bounds, following, above = (
        current + block * width, bounds + block * width, following + block * width, above + block * width
    )  # fmt: skip
    queries, own_squares, half_norms, counts = load_block(
        q, coordinates, query_index, block, group, scale, rows, n_q, D, COLUMNS, P, DIRECTIONS, ROWS, keys.dtype.element_ty
    )
    squares, half_norm = tl.sum(own_squares, 0) / rows, tl.sum(half_norms, 0) / rows
    ratios = ratios_of(half_norms, half_norm, APART)
    top, closed, m = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32), used
    if FIRST:
        for begin in range(0, used, NODES):
            at = begin + tl.arange(0, NODES)
            tl.store(following + at, first + at, mask=at < used)
            tl.store(above + at, tl.full([NODES], float("inf"), tl.float32), mask=at < used)
    else:
        limit = find_threshold(gains, levels, room)
        top, closed = tl.load(tops + row), tl.load(sums + row)
        m, closed = open_above(
            queries, squares, half_norm, keys, spread, variances, current, bounds, following, above, limit, before,
            level - before, tl.load(lengths + block), most, top, closed, n, factor, key_stride,
            D, COLUMNS, P, DIRECTIONS, NODES,
        )  # fmt: skip
    tl.debug_barrier()
    top, closed, total = sum_level(
        queries, squares, half_norm, keys, spread, variances, following, level, m, top, closed, n, factor, key_stride,
        D, COLUMNS, P, DIRECTIONS, NODES,
    )  # fmt: skip
    for begin in range(0, m, NODES):
        at = begin + tl.arange(0, NODES)
        there = at < m
        place = tl.load(following + at, mask=there, other=0)
        _, error, _ = estimate(
            queries, squares, half_norm, own_squares, half_norms, ratios, counts, keys, spread, variances, sizes, level,
            place, there, top, total, n, factor, key_stride, D, COLUMNS, P, DIRECTIONS, APART,
        )  # fmt: skip
        bound = tl.minimum(error, tl.load(above + at, mask=there, other=0.0))
        tl.store(above + at, bound, mask=there)
        start, end = bounds_of(place, level, n)
        step = tl.where(level == last, 0, LEVELS - (last - level) % LEVELS)
        gain = tl.where(level == last, (end - start).to(tl.int32), 1 << step) - 1
        count_bounds(gains, levels * BINS, bound, gain, there)
    tl.store(tops + row, top)
    tl.store(sums + row, closed)
    tl.store(lengths + block, m)


@triton.jit(do_not_specialize=["levels", "room"])
def last_threshold(gains, found, levels, room):
    """Write the threshold of all levels."""
    tl.store(found, find_threshold(gains, levels, room) * ABOVE)


def pick_threshold(
    xp: Namespace,
    queries: BlockQueries,
    tree: Tree,
    budget: int,
    most: int,
    start: tuple[int, int, int],
) -> Array:
    """Follow `kdecore.kernels.pick_threshold.contract.PickThreshold`, within `triton_limit` of `open_tree`."""
    queries, tree = stored(queries, tree)
    q, scale, coordinates, index, _ = queries
    groups, blocks, rows = index.shape
    (level, first, end), last, count = start, depth_of(tree.nodes), groups * blocks
    room, width, known = (budget - (end - first)) * count, max(most, end - first), compiled_for(queries, tree)
    # Few programs run, with all registers that there are.
    known |= {"maxnreg": MOST_REGISTERS}
    padded = triton.next_power_of_2(max(16, rows))
    levels = (level, *range(level + STEP - (last - level) % STEP, last + 1, STEP)) if level < last else (level,)
    with torch.cuda.device_of(q):
        some, others = (
            tuple(torch.empty((count, width), dtype=x, device=q.device) for x in (torch.int32, torch.float32))
            for _ in range(2)
        )
        lengths = torch.empty((count,), dtype=torch.int32, device=q.device)
        tops, sums = (torch.empty((count, padded), dtype=torch.float32, device=q.device) for _ in range(2))
        gains = torch.zeros((len(levels), contract.BINS), dtype=torch.int32, device=q.device)
        for number, here in enumerate(levels):
            meet_level[flat_grid("meet_level", count)](
                q, coordinates, index, *tree, *some, *others, lengths, tops, sums, gains,
                scale * math.log2(math.e), scale, blocks, rows, int(q.shape[1]), tree.n, tree.nodes, first, end - first,
                levels[max(0, number - 1)], here, last, number, room, most, width, tree.keys.stride(1),
                FIRST=number == 0, **known,
            )  # fmt: skip
            some, others = others, some
        found = torch.empty((), dtype=torch.float32, device=q.device)
        last_threshold[flat_grid("last_threshold", 1)](gains, found, len(levels), room)
    return found
