"""`open_tree` in Numba CUDA: a thread block opens the tree for one block of queries after another; one launch.

What is listed, and its logits for every query of the block, lie in global memory that the thread block uses again for its
next block of queries, so that they stay in cache. A round

1. sums the weights of all that is listed, for each query;
2. estimates the errors of what is new, or of everything;
3. ranks those that err most, of the octaves that they lie in, by counting, which spares sorting;
4. opens the worst, and weighs their children by register tiles of 4 queries × 4 children.

On paper, 16 heads of 131,072 queries, d = 64, p = 16, budget 512, blocks of 16, 31 rounds: some thousand nodes are weighed
for each of 131,072 blocks, 0.34 TFLOP of float32, 6 ms at 60 TFLOP/s, and 256 KB of their means and variances read, 34 GB
through L2, 6 ms at 5.5 TB/s. Sums read the list twice a round, 0.5 MB a block, 66 GB through the first-level caches. Two
thread blocks on a multiprocessor hide little of the waiting. That is more than all other steps together (0.8 ms of
attention), and the first thing to measure: blocks of 64 queries would read a quarter. Tensor cores are not used.
"""

import math
from typing import Any

import numpy as np
from numba import cuda

from kdecore.kernels.cuda_jit import CudaKernel, cuda_kernel, for_each_reader, launch
from kdecore.kernels.open_tree.contract import GROWTH, REFRESH
from kdecore.namespaces import Array, Namespace, dtype_name

THREADS = 128
SIDE = 4
"""Queries, and children, that a thread weighs."""
QUADS = 4
"""Groups of `SIDE` queries that are weighed at once."""
CHILDREN = THREADS // QUADS * SIDE
"""Children that are weighed at once."""
LANES = 16
"""Queries whose weights are summed at once."""
PARTS = THREADS // LANES
"""Threads that sum the weights of a query."""
DEPTH = 16
"""Columns of a tile."""
PITCH = DEPTH + 1
BINS = 256
"""Octaves of float32 numbers, and 0."""
RESIDENT = 264
"""Thread blocks at once: two on each of 132 multiprocessors, as many as their registers allow. Their memory, 10 MB for a
budget of 512 and blocks of 16, stays in L2."""
STATE = 5
"""Numbers that all threads share: places and slots taken, keys of opened leaves beside the first ones, inner nodes opened in
the last round, leaves opened so far."""
TINY = {"THREADS": 8, "QUADS": 2, "CHILDREN": 16, "LANES": 4, "PARTS": 2, "DEPTH": 2, "PITCH": 3, "RESIDENT": 3, "BINS": 16}
"""What tests in the simulator put in their place."""


def open_tree(
    xp: Namespace,
    q: Array,
    scale: float,
    coordinates: Array,
    query_index: Array,
    keys: Array,
    spread: Array,
    variances: Array,
    sizes: Array,
    own: Array | None,
    slots: int,
    start: tuple[int, int, int],
) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.open_tree.contract.OpenTree`."""
    groups, blocks, rows = query_index.shape
    d, p, device = int(q.shape[2]), int(coordinates.shape[2]), q.device
    if own is None:
        own = xp.empty((groups, blocks, 0), dtype=xp.int64, device=device)
    wanted = slots - int(own.shape[2])
    resident = min(RESIDENT, groups * blocks)
    numbers = xp.empty((resident, (wanted + d + p + 2) * rows + wanted), dtype=coordinates.dtype, device=device)
    places = xp.empty((resident, 5 * wanted), dtype=xp.int32, device=device)
    key_index = xp.empty((groups, blocks, slots), dtype=xp.int64, device=device)
    log_weight = xp.empty((groups, blocks, slots), dtype=coordinates.dtype, device=device)
    given = q, coordinates, query_index, keys, spread, variances, sizes, own
    # A number of the arrays' dtype: a Python float would be computed with in float64.
    factor = np.dtype(dtype_name(coordinates)).type(scale)
    launch(open_blocks(q), resident, THREADS, *given, factor, *start, numbers, places, key_index, log_weight)
    return key_index, log_weight


@cuda.jit(device=True)
def level_of(node):
    """Return the level of a node."""
    level = 0
    while (2 << level) - 1 <= node:
        level += 1
    return level


@cuda.jit(device=True)
def bounds_of(node, n):
    """Return where a node's keys begin and end."""
    level = level_of(node)
    i = node + 1 - (1 << level)
    return (i * n) >> level, ((i + 1) * n) >> level


@cuda.jit(device=True)
def frozen(half_variance, log_count):
    """Return ln of the mean of exp over so many normal numbers, as the contract has it."""
    if half_variance > log_count:
        root = math.sqrt(half_variance * log_count)
        return root + root - log_count
    return half_variance


@cuda.jit(device=True)
def add_products(found, by, rows, of_rows, nodes, group, node, fresh, begin, count, tile):
    """Add to a thread's tile the products of some of its block's numbers ``by`` with rows of nodes, from ``begin`` on."""
    thread, d = cuda.threadIdx.x, nodes.shape[2]
    child, zero = thread // QUADS * SIDE, tile.dtype.type(0.0)
    for column in range(0, d, DEPTH):
        width = min(DEPTH, d - column)
        for i in range(thread, CHILDREN * DEPTH, THREADS):
            c, t = i // DEPTH, i % DEPTH
            inside = begin + c < count and t < width
            tile[c, t] = nodes[group, node[fresh[begin + c]], column + t] if inside else zero
        cuda.syncthreads()
        for t in range(width):
            for a in range(SIDE):
                one = by[(column + t) * rows + of_rows[a]]
                for b in range(SIDE):
                    found[a, b] += one * tile[child + b, t]
        cuda.syncthreads()


@cuda.jit(device=True)
def weigh(group, keys, variances, queries, squares, rows, node, fresh, count, logits):
    """Write the logits of the nodes at ``count`` fresh places, for every query."""
    thread = cuda.threadIdx.x
    n = keys.shape[1] - variances.shape[1]
    number, zero = logits.dtype.type, logits.dtype.type(0.0)
    tile = cuda.shared.array((CHILDREN, PITCH), logits.dtype)
    found = cuda.local.array((SIDE, SIDE), logits.dtype)
    of_rows = cuda.local.array(SIDE, np.int32)
    child = thread // QUADS * SIDE
    for begin in range(0, count, CHILDREN):
        for row in range(thread % QUADS * SIDE, rows + thread % QUADS * SIDE, QUADS * SIDE):
            for a in range(SIDE):
                of_rows[a] = min(row + a, rows - 1)
                for b in range(SIDE):
                    found[a, b] = zero
            add_products(found, squares, rows, of_rows, variances, group, node, fresh, begin, count, tile)
            # What spreads add comes first, and to it the products of queries and means.
            for b in range(SIDE):
                if begin + child + b < count:
                    start, end = bounds_of(node[fresh[begin + child + b]], n)
                    log_count = math.log(number(end - start))
                    for a in range(SIDE):
                        found[a, b] = frozen(found[a, b], log_count) + log_count
            add_products(found, queries, rows, of_rows, keys, group, node, fresh, begin, count, tile)
            for b in range(SIDE):
                if begin + child + b < count:
                    place = fresh[begin + child + b]
                    for a in range(SIDE):
                        if row + a < rows:
                            logits[place * rows + row + a] = found[a, b]
    cuda.syncthreads()


@cuda.jit(device=True)
def sum_weights(logits, used, rows, tops, totals):
    """Write each query's largest logit, and the sum of exp of all beside it."""
    thread = cuda.threadIdx.x
    lane, part = thread % LANES, thread // LANES
    partial = cuda.shared.array((PARTS, LANES), logits.dtype)
    for first in range(0, rows, LANES):
        row = first + lane
        top, total = logits.dtype.type(-np.inf), logits.dtype.type(0.0)
        if row < rows:
            for place in range(part, used, PARTS):
                top = max(top, logits[place * rows + row])
        partial[part, lane] = top
        cuda.syncthreads()
        for other in range(PARTS):
            top = max(top, partial[other, lane])
        cuda.syncthreads()
        if row < rows:
            for place in range(part, used, PARTS):
                total += math.exp(logits[place * rows + row] - top)
        partial[part, lane] = total
        cuda.syncthreads()
        if part == 0 and row < rows:
            for other in range(1, PARTS):
                total += partial[other, lane]
            tops[row], totals[row] = top, total
        cuda.syncthreads()


@cuda.jit(device=True)
def estimate_errors(group, variances, sizes, squares, rows, n, node, fresh, count, everything, logits, tops, totals, error):
    """Write the errors of closed nodes, those at ``count`` places or at so many fresh ones."""
    thread = cuda.threadIdx.x
    lane, part = thread % LANES, thread // LANES
    number, zero = logits.dtype.type, logits.dtype.type(0.0)
    partial = cuda.shared.array((PARTS, LANES), logits.dtype)
    for first in range(0, count, PARTS):
        place, h = 0, -1
        if first + part < count:
            place = first + part if everything else fresh[first + part]
            h = node[place]
        total = zero
        if h >= 0:
            start, end = bounds_of(h, n)
            log_count, size = math.log(number(end - start)), sizes[group, h]
            for row in range(lane, rows, LANES):
                spread = zero
                for t in range(variances.shape[2]):
                    spread += squares[t * rows + row] * variances[group, h, t]
                share = math.exp(logits[place * rows + row] - tops[row]) / totals[row]
                share *= frozen(spread, log_count) * size
                share *= share
                total += share * share
        partial[part, lane] = total
        cuda.syncthreads()
        if lane == 0 and h >= 0:
            for other in range(1, LANES):
                total += partial[part, other]
            error[place] = total if total > 0 else zero
        cuda.syncthreads()


@cuda.jit(device=True)
def bin_of(error):
    """Return the octave of an error as a bin, in ascending order; 0 has one of its own."""
    if error > 0:
        octave = np.float32(error).view(np.int32) >> 23
        return 1 + (octave if octave < BINS - 2 else BINS - 2)
    return 0


@cuda.jit(device=True)
def sum_before(counts, mine):
    """Return what the threads before this one count, and what all do."""
    thread, before, total = cuda.threadIdx.x, 0, 0
    counts[thread] = mine
    cuda.syncthreads()
    for other in range(THREADS):
        before += counts[other] if other < thread else 0
        total += counts[other]
    cuda.syncthreads()
    return before, total


@cuda.jit(device=True)
def rank_worst(error, used, step, chosen, rivals):
    """Write the places of the ``step`` largest errors, the largest first; those below 0 don't count.

    Only those in the octave of the last one taken, or above, are ranked by counting. Errors of 0 are taken as they come.
    """
    thread = cuda.threadIdx.x
    bins = cuda.shared.array(BINS, np.int32)
    counts = cuda.shared.array(THREADS, np.int32)
    limit = cuda.shared.array(1, np.int32)
    for i in range(thread, BINS, THREADS):
        bins[i] = 0
    if thread == 0:
        limit[0] = 0
    cuda.syncthreads()
    for place in range(thread, used, THREADS):
        if error[place] >= 0:
            cuda.atomic.add(bins, bin_of(error[place]), 1)
    cuda.syncthreads()
    run = BINS // THREADS
    top, mine = BINS - 1 - thread * run, 0
    for i in range(run):
        mine += bins[top - i]
    above, _ = sum_before(counts, mine)
    for i in range(run):
        if above < step <= above + bins[top - i]:
            limit[0] = top - i
        above += bins[top - i]
    cuda.syncthreads()
    lowest = max(limit[0], 1)
    mine = 0
    for place in range(thread, used, THREADS):
        mine += error[place] >= 0 and bin_of(error[place]) >= lowest
    at, found = sum_before(counts, mine)
    mine = 0
    for place in range(thread, used, THREADS):
        if error[place] >= 0 and bin_of(error[place]) >= lowest:
            rivals[at] = place
            at += 1
        else:
            mine += error[place] == 0
    at, _ = sum_before(counts, mine)
    at += found
    if found < step:
        for place in range(thread, used, THREADS):
            if error[place] == 0:
                if at < step:
                    chosen[at] = place
                at += 1
    for i in range(thread, found, THREADS):
        place, before = rivals[i], 0
        own = error[place]
        for j in range(found):
            other = rivals[j]
            before += error[other] > own or (error[other] == own and other < place)
        if before < step:
            chosen[before] = place
    cuda.syncthreads()


@cuda.jit(device=True)
def open_chosen(found, used, wanted, n, first_leaf, node, chosen, error, extra, fresh, moves, state):
    """Open the chosen nodes for which there is room, in their order.

    Moves say of each what becomes of it: the place of its second child; −1 for nothing; −2 − e for a leaf whose keys but the
    first come e places after all nodes.
    """
    thread = cuda.threadIdx.x
    for c in range(thread, found, THREADS):
        h = node[chosen[c]]
        moves[c] = 0
        if h >= first_leaf:
            start, end = bounds_of(h, n)
            moves[c] = end - start
    cuda.syncthreads()
    if thread == 0:
        taken, extras, inner, leaves = state[1], state[2], 0, 0
        for c in range(found):
            held = moves[c]
            more = held - 1 if held > 0 else 1
            if taken + more > wanted:
                moves[c] = -1
            elif held > 0:
                moves[c] = -2 - extras
                extras += more
                leaves += 1
                taken += more
            else:
                moves[c] = used + inner
                inner += 1
                taken += more
        state[0], state[1], state[2], state[3] = used + inner, taken, extras, inner
        state[4] += leaves
    cuda.syncthreads()
    for c in range(thread, found, THREADS):
        move, place = moves[c], chosen[c]
        h = node[place]
        if move >= 0:
            node[place], node[move] = 2 * h + 1, 2 * h + 2
            fresh[2 * (move - used)], fresh[2 * (move - used) + 1] = place, move
        elif move < -1:
            # Its weight stays; it is closed no more.
            node[place], error[place], extra[place] = -1 - h, error.dtype.type(-1.0), -2 - move
    cuda.syncthreads()


@cuda.jit(device=True)
def is_own(own, group, block, position):
    """Return whether a block lists a position by itself."""
    found = False
    for i in range(own.shape[2]):
        found = found or own[group, block, i] == position
    return found


@cuda.jit(device=True)
def list_all(group, block, spread, own, half_norm, n, node, extra, used, key_index, log_weight):
    """Write a block's list: own keys, then what each place holds, then the other keys of opened leaves."""
    thread = cuda.threadIdx.x
    number, zero, nothing = spread.dtype.type, spread.dtype.type(0.0), spread.dtype.type(-np.inf)
    nodes, count_own = spread.shape[1], own.shape[2]
    for slot in range(thread, key_index.shape[2], THREADS):
        key_index[group, block, slot], log_weight[group, block, slot] = 0, nothing
    cuda.syncthreads()
    for i in range(thread, count_own, THREADS):
        again = i > 0 and own[group, block, i] == own[group, block, i - 1]
        key_index[group, block, i] = nodes + own[group, block, i]
        log_weight[group, block, i] = nothing if again else zero
    for place in range(thread, used, THREADS):
        h = node[place]
        start, end = bounds_of(h if h >= 0 else -1 - h, n)
        if h >= 0:
            count = end - start
            for i in range(count_own):
                position = own[group, block, i]
                again = i > 0 and position == own[group, block, i - 1]
                count -= start <= position < end and not again
            if count > 0:
                log_count = math.log(number(count))
                more = frozen(spread[group, h] * half_norm, log_count) if end - start > 1 else zero
                key_index[group, block, count_own + place] = h
                log_weight[group, block, count_own + place] = log_count + more
        else:
            for j in range(start, end):
                slot = count_own + (place if j == start else used + extra[place] + j - start - 1)
                key_index[group, block, slot] = nodes + j
                log_weight[group, block, slot] = nothing if is_own(own, group, block, j) else zero
    cuda.syncthreads()


@for_each_reader
def open_blocks(stored: str, read: Any) -> CudaKernel:
    """Make the kernel."""
    two, three, integers = "number[:, ::1]", "number[:, :, ::1]", "int64[:, :, ::1]"

    @cuda.jit(device=True)
    def load_queries(q, coordinates, query_index, group, block, scale, queries, squares, norms):
        """Write a block's scaled queries, half the squares of their coordinates, and the queries' squared norms."""
        rows, d, p = query_index.shape[2], q.shape[2], coordinates.shape[2]
        number, zero = queries.dtype.type, queries.dtype.type(0.0)
        for r in range(cuda.threadIdx.x, rows, THREADS):
            row = query_index[group, block, r]
            finite, norm = True, zero
            for t in range(d):
                finite = finite and abs(read(q[group, row, t])) < np.inf
            for t in range(d):
                found = read(q[group, row, t]) * scale if finite else zero
                queries[t * rows + r] = found
                norm += found * found
            norms[r] = norm
            for t in range(p):
                square = coordinates[group, row, t] * coordinates[group, row, t]
                squares[t * rows + r] = number(0.5) * square if square < np.inf else zero
        cuda.syncthreads()

    @cuda_kernel(
        f"stored[:, :, ::1], {three}, {integers}, {three}, {two}, {three}, {two}, {integers}, number, int64, int64, int64, "
        f"{two}, int32[:, ::1], {integers}, {three}",
        THREADS,
        stored,
    )
    def open_blocks(
        q, coordinates, query_index, keys, spread, variances, sizes, own, scale, level, first, end, numbers, places,
        key_index, log_weight,
    ):  # fmt: skip
        """Open the tree for every so many blocks of queries."""
        thread, resident = cuda.threadIdx.x, cuda.blockIdx.x
        groups, blocks, rows = query_index.shape
        d, p, nodes = q.shape[2], coordinates.shape[2], variances.shape[1]
        n, wanted = keys.shape[1] - nodes, key_index.shape[2] - own.shape[2]
        number = numbers.dtype.type
        at = wanted * rows
        logits, queries = numbers[resident, :at], numbers[resident, at : at + d * rows]
        at += d * rows
        squares, tops = numbers[resident, at : at + p * rows], numbers[resident, at + p * rows : at + (p + 1) * rows]
        at += (p + 1) * rows
        totals, error = numbers[resident, at : at + rows], numbers[resident, at + rows :]
        node, chosen, extra = (
            places[resident, :wanted],
            places[resident, wanted : 2 * wanted],
            places[resident, 2 * wanted :],
        )
        fresh, moves = extra[wanted:], extra[2 * wanted :]
        state = cuda.shared.array(STATE, np.int32)
        for task in range(resident, groups * blocks, cuda.gridDim.x):
            group, block = task // blocks, task % blocks
            load_queries(q, coordinates, query_index, group, block, scale, queries, squares, tops)
            half_norm = number(0.0)
            for r in range(rows):
                half_norm += tops[r]
            half_norm *= number(0.5) / number(rows * d)
            used = end - first
            for j in range(thread, used, THREADS):
                node[j], fresh[j] = (1 << level) - 1 + first + j, j
            if thread == 0:
                state[0], state[1], state[2], state[3], state[4] = used, used, 0, 0, 0
            cuda.syncthreads()
            count, opened, refreshed = used, used, 0
            weigh(group, keys, variances, queries, squares, rows, node, fresh, count, logits)
            while opened < wanted:
                sum_weights(logits, used, rows, tops, totals)
                everything = opened >= REFRESH * refreshed
                if everything:
                    refreshed, count = opened, used
                estimate_errors(
                    group, variances, sizes, squares, rows, n, node, fresh, count, everything, logits, tops, totals, error
                )
                step = min(max(1, opened // GROWTH), wanted - opened)
                opened += step
                rank_worst(error, used, step, chosen, moves)
                before, closed = state[1], used - state[4]
                open_chosen(min(step, closed), used, wanted, n, nodes // 2, node, chosen, error, extra, fresh, moves, state)
                used, count = state[0], 2 * state[3]
                if state[1] == before:
                    break
                weigh(group, keys, variances, queries, squares, rows, node, fresh, count, logits)
            list_all(group, block, spread, own, half_norm, n, node, extra, used, key_index, log_weight)

    return open_blocks
