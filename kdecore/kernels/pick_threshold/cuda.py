"""`pick_threshold` in Numba CUDA: blocks go down the tree side by side, a launch a level, a thread block a block of queries.

A launch

1. finds the threshold from what earlier launches have counted, in every thread block by itself: sums of integers are alike;
2. opens nodes of the level before, and adds weights of those that stay closed to each query's sum;
3. weighs the new nodes, as `kdecore.kernels.open_tree.cuda` does, and counts the slots that they would take by their bounds.

Each level has counts of its own, so that none are read while threads add to them. A last launch finds the result.

On paper, up to 264 blocks of 64 queries, d = 64, 512 slots in float32, on an H100, take what each of the 125 turns of
`open_tree` takes for 32,768 blocks, some 0.1 ms, and 7 launches. A thread block reads up to 6 levels of 2,048 counts, 49 kB,
to find a threshold.
"""

import math
from typing import Any

import numpy as np
from numba import cuda

from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.tree import BlockQueries, Tree, depth_of
from kdecore.kernels.open_tree import cuda as opening
from kdecore.kernels.open_tree.contract import STEP
from kdecore.kernels.open_tree.cuda import (
    BLOCK,
    bounds_of,
    close_nodes,
    empty_like,
    first_nodes,
    flat_arguments,
    for_queries,
    loader,
    open_nodes,
    share_of,
    shared_memory,
    sum_before,
    weigh,
)
from kdecore.kernels.pick_threshold.contract import ABOVE, BINS, OCTAVES, STEPS, TOP_OCTAVE
from kdecore.kernels.runtime.cuda_jit import CudaKernel, cuda_kernel, for_each_reader, launch

LEAST_BOUND, LARGEST_BOUND = 2.0 ** (TOP_OCTAVE - OCTAVES), 2.0**TOP_OCTAVE
TINY: dict[str, int] = {}
"""Sizes are those of `kdecore.kernels.open_tree.cuda`."""


def pick_threshold(
    xp: Namespace,
    queries: BlockQueries,
    tree: Tree,
    budget: int,
    most: int,
    start: tuple[int, int, int],
) -> Array:
    """Follow `kdecore.kernels.pick_threshold.contract.PickThreshold`."""
    (groups, blocks, rows), last, (level, first, end) = queries.index.shape, depth_of(tree.nodes), start
    count, like = groups * blocks, queries.coordinates
    resident, room = min(opening.RESIDENT, count), (budget - (end - first)) * count
    levels = [level, *range(level + STEP - (last - level) % STEP, last + 1, STEP)]
    # Two levels in turn: nodes, numbered as the tree's, and their bounds.
    node = xp.empty((count, 2, most), dtype=xp.int32, device=like.device)
    held = xp.empty((count,), dtype=xp.int32, device=like.device)
    counted = xp.zeros((len(levels), BINS), dtype=xp.int32, device=like.device)
    shapes = (count, 2, most), (count, rows), (count, 2, most, rows), (resident, rows), (resident, 3, most), (1,)
    bounds, closed, logits, sums, numbers, result = empty_like(xp, like, *shapes)
    work = *for_queries(xp, queries, resident), sums, numbers, node, bounds, held, closed, logits, counted
    kernel, given = weigh_level(queries.q), flat_arguments(queries, tree)
    for turn, at in enumerate(levels):
        step = at - levels[max(0, turn - 1)]
        launch(kernel, resident, opening.THREADS, *given, room, most, turn, at, step, first, end, last, *work)
    launch(write_threshold, 1, opening.THREADS, counted, room, result)
    return xp.reshape(result, ())


@cuda.jit(device=True)
def threshold_of(counts, counted, levels, room, number):
    """Return where the first bin ends, the largest first, that there is no room for all of, on so many levels; or 0."""
    found = cuda.shared.array(1, np.int32)
    start, stop = share_of(0, BINS)
    mine = 0
    for j in range(start, stop):
        for level in range(levels):
            mine += counted[level, BINS - 1 - j]
    found[0] = BINS
    before = sum_before(counts, mine)[0]
    if before <= room < before + mine:
        place = start
        while before <= room:
            for level in range(levels):
                before += counted[level, BINS - 1 - place]
            place += 1
        found[0] = place - 1
    cuda.syncthreads()
    if found[0] == BINS:
        return number(0.0)
    return number(2.0) ** (number(BINS - found[0]) / number(STEPS) + number(TOP_OCTAVE - OCTAVES))


@cuda.jit(device=True)
def count_bounds(node, errors, bounds, m, inherited, n, leaf, gain, counted):
    """Write the bounds of a level's nodes, and count the slots more that each would take, opened."""
    number = bounds.dtype.type
    for c in range(cuda.threadIdx.x, m, cuda.blockDim.x):
        bound = min(errors[c], bounds[c]) if inherited else errors[c]
        bounds[c], place = bound, 0
        if bound > number(LEAST_BOUND):
            place = int((math.log2(min(bound, number(LARGEST_BOUND))) + number(OCTAVES - TOP_OCTAVE)) * number(STEPS))
        first, last = bounds_of(node[c], n)
        cuda.atomic.add(counted, min(place, BINS - 1), np.int32(last - first - 1 if leaf else gain))


@for_each_reader
def weigh_level(stored: str, read: Any) -> CudaKernel:
    """Make the kernel."""
    load_block, two, three = loader(read), "number[:, ::1]", "number[:, :, ::1]"

    @cuda_kernel(
        f"{BLOCK}, int64, int64, int64, int64, int64, int64, int64, int64, {three}, {three}, {two}, {two}, {three}, "
        f"int32[:, :, ::1], {three}, int32[::1], {two}, number[:, :, :, ::1], int32[:, ::1]",
        opening.THREADS,
        stored,
    )
    def weigh_level(
        q, coordinates, query_index, apart, keys, spread, variances, sizes, scale, room, most, turn, level, step, first,
        end, last, queries, squares, means, sums, numbers, node, bounds, held, closed, logits, counted,
    ):  # fmt: skip
        """Open the level before, but for the first level; weigh this one for every so many blocks, and count its bounds."""
        resident, (groups, blocks, _), tree = cuda.blockIdx.x, query_index.shape, (keys, spread, variances, sizes)
        mine, before, n = turn % 2, (turn + 1) % 2, keys.shape[1] - spread.shape[1]
        number, gain = bounds.dtype.type, (1 << (STEP - (last - level) % STEP)) - 1
        queries, squares, means = queries[resident], squares[resident], means[resident]
        sums, numbers = sums[resident], numbers[resident]
        shared = shared_memory(logits)
        limit = threshold_of(shared[5], counted, turn, room, number)
        for task in range(resident, groups * blocks, cuda.gridDim.x):
            group, block = task // blocks, task % blocks
            nodes, above, m = node[task, mine], bounds[task, mine], end - first
            load_block(q, coordinates, query_index, group, block, scale, queries, squares, means)
            if turn == 0:
                first_nodes(nodes, closed[task], level, first, end)
            else:
                m, parents, errors = held[task], node[task, before], bounds[task, before]
                fits = most >> step
                found = open_nodes(shared[5], parents, errors, limit, 0, m, step, fits, nodes, above, 0)
                close_nodes(shared, logits[task, 0], errors, limit, 0, m, closed[task])
                m = min(found, fits) << step
            if m > 0:
                of_block = queries, squares, means
                weigh(shared, tree, group, *of_block, apart, nodes, 0, m, closed[task], sums, numbers, logits[task])
                count_bounds(nodes, numbers[2], above, m, turn > 0, n, level == last, gain, counted[turn])
            held[task] = m

    return weigh_level


@cuda_kernel("int32[:, ::1], int64, number[::1]", opening.THREADS)
def write_threshold(counted, room, result):
    """Write the threshold that follows from all levels."""
    number = result.dtype.type
    result[0] = threshold_of(shared_memory(result)[5], counted, counted.shape[0], room, number) * number(ABOVE)
