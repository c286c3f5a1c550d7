"""`pick_threshold` in Numba for the CPU: some blocks go down the tree side by side, a level at a time, a block a task."""

from functools import partial

import numpy as np

from kdecore.arrays.memory import from_host_like
from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.tree import BlockQueries, Tree, depth_of
from kdecore.kernels.attend_blocks.cpu import round_up
from kdecore.kernels.open_tree.contract import STEP
from kdecore.kernels.pick_threshold.contract import ABOVE
from kdecore.kernels.runtime.descent import LOWEST, host_queries, host_tree, load_block, memory, weigh_level
from kdecore.kernels.runtime.jit import kernel
from kdecore.kernels.runtime.simd import TILE_ROWS, VECTOR_BYTES, copy_rows
from kdecore.kernels.runtime.threads import fair_chunk, run_tasks


def pick_threshold(
    xp: Namespace,
    queries: BlockQueries,
    tree: Tree,
    budget: int,
    most: int,
    start: tuple[int, int, int],
) -> Array:
    """Follow `kdecore.kernels.pick_threshold.contract.PickThreshold`."""
    given, nodes, n = host_queries(queries), host_tree(tree), tree.n
    dtype, (groups, blocks, b), (level, first, end) = given.q.dtype, given.index.shape, start
    count, last = groups * blocks, depth_of(tree.nodes)
    filled, width = round_up(b, VECTOR_BYTES // dtype.itemsize), round_up(most, TILE_ROWS) + TILE_ROWS
    held = np.full(count, end - first, np.int64)
    current, bounds = np.zeros((count, width), np.int64), np.full((count, width), np.inf)
    current[:, : end - first] = np.arange(first, end)
    sums = np.full((count, filled), LOWEST, dtype), np.zeros((count, filled), dtype), np.zeros((count, filled, width), dtype)
    state = held, current, bounds, *sums
    limit, room, gains, errors = 0.0, (budget - (end - first)) * count, np.empty(0, np.int64), np.empty(0)
    chunk = fair_chunk(count, count)
    while True:
        step = STEP - (last - level) % STEP
        run_tasks(partial(weigh, given, nodes, level, state), count, chunk=chunk)
        met = np.arange(width) < held[:, None]
        leaf = current[met]
        more = (
            (((leaf + 1) * n) >> level) - ((leaf * n) >> level) - 1 if level == last else np.full(len(leaf), (1 << step) - 1)
        )
        errors, gains = np.concatenate([errors, bounds[met]]), np.concatenate([gains, more])
        limit = max(limit, cut(errors, gains, room))
        # What more nodes are found for only raises the limit: others need not be looked at again.
        errors, gains = errors[errors > limit], gains[errors > limit]
        if level == last:
            return from_host_like(xp, np.asarray(limit**0.25 * ABOVE, dtype), queries.q)
        run_tasks(partial(part, state, limit, step, most), count, chunk=chunk)
        level += step


def cut(errors: Array, gains: Array, room: int) -> float:
    """Return the first of the errors, the largest first, that there is no room for; 0 where there is for all."""
    order = np.argsort(-errors)
    place = int(np.searchsorted(np.cumsum(gains[order]), room, side="right"))
    return float(errors[order[place]]) if place < len(order) else 0.0


@kernel()
def weigh(queries, tree, level, state, first, last):
    """Write bounds of a level's nodes, in fourth powers, and their weights, for blocks first … last − 1."""
    held, current, bounds, tops, closed_totals, weights = state
    q, (blocks, b) = queries.q, queries.index.shape[1:]
    filled, width = tops.shape[1], current.shape[1]
    work, flat_weights = memory(filled, q.shape[2], tree.variances.shape[2], width, q), weights.reshape(-1)
    flat_current, flat_tops, flat_totals = current.reshape(-1), tops.reshape(-1), closed_totals.reshape(-1)
    lanes = VECTOR_BYTES // q.itemsize
    for task in range(first, last):
        load_block(queries, task, work)
        m = held[task]
        copy_rows(flat_current, task * width, work.current, 0, m)
        copy_rows(flat_tops, task * filled, work.tops, 0, filled)
        copy_rows(flat_totals, task * filled, work.closed_totals, 0, filled)
        weigh_level(tree, task // blocks, level, m, b, queries.apart, work)
        copy_rows(work.tops, 0, flat_tops, task * filled, filled)
        copy_rows(work.closed_totals, 0, flat_totals, task * filled, filled)
        for lane in range(0, filled, lanes):
            copy_rows(work.weights, lane * width, flat_weights, (task * filled + lane) * width, m * lanes)
        for c in range(m):
            square = np.float64(work.sigma[c]) * work.sigma[c]
            error = work.error[c] * square * square
            bounds[task, c] = min(bounds[task, c], error if error > 0 else 0.0)


@kernel()
def part(state, limit, step, most, first, last):
    """Replace the nodes of some blocks whose bounds are above the limit by their descendants, and close the others."""
    held, current, bounds, _, closed_totals, weights = state
    filled, width = weights.shape[1:]
    lanes, flat_weights, flat_totals = VECTOR_BYTES // weights.itemsize, weights.reshape(-1), closed_totals.reshape(-1)
    for task in range(first, last):
        m, found = held[task], 0
        below, above = np.empty(m << step, np.int64), np.empty(m << step, np.float64)
        for c in range(m):
            if bounds[task, c] > limit and found + (1 << step) <= most:
                for j in range(1 << step):
                    below[found], above[found] = (current[task, c] << step) + j, bounds[task, c]
                    found += 1
            else:
                for lane in range(0, filled, lanes):
                    source, target = np.uintp((task * filled + lane) * width + c * lanes), np.uintp(task * filled + lane)
                    for i in range(np.uintp(lanes)):
                        flat_totals[target + i] += flat_weights[source + i]
        held[task] = found
        for c in range(found):
            current[task, c], bounds[task, c] = below[c], above[c]
