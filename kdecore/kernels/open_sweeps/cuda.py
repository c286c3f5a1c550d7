"""`open_sweeps` in Numba CUDA: a thread block opens the tree for one block of queries after another; one launch.

What is listed, its ranks and its logits for every query of the block lie in global memory that the thread block uses again
for its next block of queries, so that they stay in cache. A sweep

1. weighs what is new by register tiles of 4 queries × 4 nodes, and ranks it;
2. sums the weights of all that is listed, for each query, in one pass, in the first few sweeps;
3. finds the threshold, by halvings of sums over all threads;
4. opens what is above: children go to places that follow from sums over the threads before.

On paper, 131,072 queries of 16 heads in blocks of 64, d = 64, p = 16, 512 slots in float32, on an H100: some 900 nodes, with
those that fill up tiles, are weighed in some 12 sweeps for each of 32,768 blocks, 900 · 64 · 2 (64 + 16) operations,
0.30 TFLOP, 5.0 ms at 60 TFLOP/s; 16 products take 8 loads from shared memory, which allow half of that rate. Means and
variances are 0.29 MB a block, 9.4 GB, 1.7 ms at 5.5 TB/s from L2. Logits are written once and read once in each of the
first sweeps, 1,500 rows of 64 in all, 0.5 MB a block, 17 GB, 3.1 ms. Beside them 4 · 10⁹ exp, 1.1 ms at 16 for each of 132
multiprocessors and cycle, and 110 halvings a block of some 400 cycles, most of them at barriers: 3.1 ms where nothing hides
them. Lists are written once, 0.2 GB, 0.1 ms at 3.0 TB/s. Tensor cores are not used.
"""

import math
from typing import Any

import numpy as np
from numba import cuda

from kdecore.kernels.cuda_jit import CudaKernel, cuda_kernel, for_each_reader, launch
from kdecore.kernels.open_sweeps.contract import (
    GROWTH,
    HALVINGS,
    LARGEST_ERROR,
    LARGEST_SHARE,
    LEAST_SHARE,
    MORE_SWEEPS,
    OCTAVES,
    RESIDENT,
    SUMMED_SWEEPS,
)
from kdecore.namespaces import Array, Namespace, dtype_name

THREADS = 128
SIDE = 4
"""Queries, and nodes, that a thread weighs at once."""
LANES = 16
"""Threads that weigh the same nodes for other queries."""
PARTS = THREADS // LANES
"""Threads that weigh other nodes for the same queries."""
ROWS, NODES = LANES * SIDE, PARTS * SIDE
"""Queries and nodes that are weighed at once."""
DEPTH = 16
"""Columns that are multiplied between two barriers."""
PITCH = DEPTH + 1
ADDERS = 8
"""Threads that add up what all have."""
TO_RANK = GROWTH / 4
TINY = {
    "THREADS": 8, "SIDE": 2, "LANES": 2, "PARTS": 4, "ROWS": 4, "NODES": 8, "DEPTH": 2, "PITCH": 3, "ADDERS": 2,
    "RESIDENT": 3,
}  # fmt: skip
"""What tests in the simulator put in their place."""


def open_sweeps(
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
    """Follow `kdecore.kernels.open_sweeps.contract.OpenSweeps`."""
    groups, blocks, rows = query_index.shape
    d, p, device, dtype = int(q.shape[2]), int(coordinates.shape[2]), q.device, coordinates.dtype
    if own is None:
        own = xp.empty((groups, blocks, 0), dtype=xp.int64, device=device)
    wanted, last = slots - int(own.shape[2]), ((int(spread.shape[1]) + 1) // 2).bit_length() - 1
    sweeps = last - start[0] + 1 + MORE_SWEEPS
    resident = min(RESIDENT, groups * blocks)

    def numbers(*shape: int) -> Array:
        return xp.empty(shape, dtype=dtype, device=device)

    places = xp.empty((resident, 2, wanted), dtype=xp.int32, device=device)
    by_query = numbers(resident, d, rows), numbers(resident, p, rows), numbers(resident, 2, rows)
    by_node = places, numbers(resident, wanted), numbers(resident, wanted, rows)
    key_index = xp.empty((groups, blocks, slots), dtype=xp.int64, device=device)
    log_weight = numbers(groups, blocks, slots)
    nodes = xp.astype(keys, dtype, copy=False), spread, variances, sizes
    # A number of the arrays' dtype: a Python float would be computed with in float64.
    factor = np.dtype(dtype_name(coordinates)).type(scale)
    given = q, coordinates, query_index, *nodes, own, factor, *start, sweeps
    launch(open_blocks(q), resident, THREADS, *given, *by_query, *by_node, key_index, log_weight)
    return key_index, log_weight


@cuda.jit(device=True)
def bounds_of(node, n):
    """Return where a node's keys begin and end."""
    level = 31 - cuda.clz(np.int32(node + 1))
    i = node + 1 - (1 << level)
    return (i * n) >> level, ((i + 1) * n) >> level


@cuda.jit(device=True)
def frozen(half_variance, log_count):
    """Return ln of the mean of exp over so many normal numbers, as the contract of `open_tree` has it."""
    if half_variance > log_count:
        root = math.sqrt(half_variance * log_count)
        return root + root - log_count
    return half_variance


@cuda.jit(device=True)
def largest(partial, mine):
    """Return the largest of what all threads have."""
    partial[cuda.threadIdx.x] = mine
    cuda.syncthreads()
    top = partial[0]
    for other in range(1, THREADS):
        top = max(top, partial[other])
    cuda.syncthreads()
    return top


@cuda.jit(device=True)
def total_of(partial, mine):
    """Return the sum of what all threads have."""
    thread = cuda.threadIdx.x
    partial[thread] = mine
    cuda.syncthreads()
    if thread < ADDERS:
        for other in range(thread + ADDERS, THREADS, ADDERS):
            mine += partial[other]
        partial[thread] = mine
    cuda.syncthreads()
    total = partial[0]
    for other in range(1, ADDERS):
        total += partial[other]
    cuda.syncthreads()
    return total


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
def add_products(found, by, first, numbers, group, of_nodes, row_tile, node_tile):
    """Add to a thread's tile the products of some of its block's numbers ``by``, from a row on, with rows of nodes."""
    thread, d, rows = cuda.threadIdx.x, by.shape[0], by.shape[1]
    lane, part = thread % LANES, thread // LANES
    # A thread fetches numbers of one query, and one column of nodes. Past the last query it is the last again.
    row, column = thread % ROWS, thread % DEPTH
    for begin in range(0, d, DEPTH):
        width = min(DEPTH, d - begin)
        for t in range(thread // ROWS, width, THREADS // ROWS):
            row_tile[t, row] = by[begin + t, min(first + row, rows - 1)]
        if column < width:
            for c in range(thread // DEPTH, NODES, THREADS // DEPTH):
                node_tile[c, column] = numbers[group, of_nodes[c], begin + column]
        cuda.syncthreads()
        for t in range(width):
            for a in range(SIDE):
                for b in range(SIDE):
                    found[a, b] += row_tile[t, lane + a * LANES] * node_tile[part + b * PARTS, t]
        cuda.syncthreads()


@cuda.jit(device=True)
def weigh(group, keys, variances, sizes, queries, squares, lse, n, node, fresh, new, logits, ranks):
    """Write the logits of the nodes at so many ``fresh`` places as are ``new``, for every query, and their ranks."""
    thread, rows = cuda.threadIdx.x, queries.shape[1]
    lane, part = thread % LANES, thread // LANES
    number, zero = logits.dtype.type, logits.dtype.type(0.0)
    row_tile = cuda.shared.array((DEPTH, ROWS), logits.dtype)
    node_tile = cuda.shared.array((NODES, PITCH), logits.dtype)
    partial = cuda.shared.array((NODES, LANES), logits.dtype)
    places = cuda.shared.array(NODES, np.int32)
    of_nodes = cuda.shared.array(NODES, np.int32)
    counts = cuda.shared.array(NODES, logits.dtype)
    found = cuda.local.array((SIDE, SIDE), logits.dtype)
    sigma = cuda.local.array((SIDE, SIDE), logits.dtype)
    for begin in range(0, new, NODES):
        count = min(NODES, new - begin)
        for c in range(thread, NODES, THREADS):
            # Past the last new node it is the last again, so that all tiles are full.
            places[c] = fresh[begin + min(c, count - 1)]
            of_nodes[c] = node[places[c]]
            start, end = bounds_of(of_nodes[c], n)
            counts[c] = number(end - start)
        for b in range(SIDE):
            partial[part + b * PARTS, lane] = zero
        cuda.syncthreads()
        for first in range(0, rows, ROWS):
            for a in range(SIDE):
                for b in range(SIDE):
                    found[a, b] = zero
            add_products(found, squares, first, variances, group, of_nodes, row_tile, node_tile)
            # What spreads add comes first, and to it the products of queries and means.
            for b in range(SIDE):
                log_count = math.log(counts[part + b * PARTS])
                for a in range(SIDE):
                    sigma[a, b] = frozen(found[a, b], log_count)
                    found[a, b] = sigma[a, b] + log_count
            add_products(found, queries, first, keys, group, of_nodes, row_tile, node_tile)
            for b in range(SIDE):
                c = part + b * PARTS
                size = sizes[group, of_nodes[c]]
                for a in range(SIDE):
                    row = first + lane + a * LANES
                    if row < rows and c < count:
                        logits[places[c], row] = found[a, b]
                        above = max(min(found[a, b] - lse[row], number(LARGEST_SHARE)), number(LEAST_SHARE))
                        error = math.exp(above) * sigma[a, b] * size
                        error *= error
                        partial[c, lane] += error * error
        cuda.syncthreads()
        for c in range(thread, count, THREADS):
            total = partial[c, 0]
            for other in range(1, LANES):
                total += partial[c, other]
            ranks[places[c]] = min(total, number(LARGEST_ERROR)) ** number(TO_RANK) / counts[c]
        cuda.syncthreads()


@cuda.jit(device=True)
def sum_weights(logits, used, lse):
    """Write each query's ln of the sum of weights over what is listed."""
    thread, rows = cuda.threadIdx.x, logits.shape[1]
    lane, part = thread % LANES, thread // LANES
    number = logits.dtype.type
    zero, one, nothing = number(0.0), number(1.0), number(-np.inf)
    tops = cuda.shared.array((PARTS, ROWS), logits.dtype)
    totals = cuda.shared.array((PARTS, ROWS), logits.dtype)
    top = cuda.local.array(SIDE, logits.dtype)
    total = cuda.local.array(SIDE, logits.dtype)
    for first in range(0, rows, ROWS):
        for a in range(SIDE):
            top[a], total[a] = nothing, zero
        for place in range(part, used, PARTS):
            for a in range(SIDE):
                # Past the last query it is the last again. Sums are parts of the largest weight so far.
                logit = logits[place, min(first + lane + a * LANES, rows - 1)]
                factor = math.exp(-abs(logit - top[a]))
                total[a] = total[a] * factor + one if logit > top[a] else total[a] + factor
                top[a] = max(top[a], logit)
        for a in range(SIDE):
            tops[part, lane + a * LANES], totals[part, lane + a * LANES] = top[a], total[a]
        cuda.syncthreads()
        for row in range(thread, min(ROWS, rows - first), THREADS):
            most, together = nothing, zero
            for other in range(PARTS):
                most = max(most, tops[other, row])
            for other in range(PARTS):
                together += totals[other, row] * math.exp(tops[other, row] - most)
            lse[first + row] = most + math.log(together)
        cuda.syncthreads()


@cuda.jit(device=True)
def find_threshold(ranks, node, used, first_leaf, n, room):
    """Return the least threshold for which what is listed needs no more than room, of opened leaves one slot each."""
    thread, number = cuda.threadIdx.x, ranks.dtype.type
    zero, half, one, two = number(0.0), number(0.5), number(1.0), number(2.0)
    partial = cuda.shared.array(THREADS, ranks.dtype)
    top = zero
    for place in range(thread, used, THREADS):
        top = max(top, ranks[place])
    top = largest(partial, top)
    high = math.log2(top if top > zero else one) + one
    low = high - number(OCTAVES)
    for _ in range(HALVINGS):
        middle = half * (low + high)
        limit, needed = two**middle, zero
        for place in range(thread, used, THREADS):
            rank, slots = ranks[place], one
            if rank > limit:
                start, end = bounds_of(node[place], n)
                slots = number(end - start)
                if node[place] < first_leaf:
                    slots = min(slots, max(two, rank / limit))
            needed += slots
        if total_of(partial, needed) <= room:
            high = middle
        else:
            low = middle
    return two**high


@cuda.jit(device=True)
def open_chosen(ranks, limit, used, n, first_leaf, node, fresh):
    """Open the nodes above a threshold; return how many inner ones, and how many keys of leaves beside the first ones.

    The left child takes its parent's place, the right one a new place at the end, and both are ``fresh``; an opened leaf h
    stays as −1 − h, and is never above.
    """
    thread, zero = cuda.threadIdx.x, ranks.dtype.type(0.0)
    counts = cuda.shared.array(THREADS, np.int32)
    inner, aside = 0, 0
    for place in range(thread, used, THREADS):
        if ranks[place] > limit:
            if node[place] < first_leaf:
                inner += 1
            else:
                start, end = bounds_of(node[place], n)
                aside += end - start - 1
    pair, split = sum_before(counts, inner)
    _, aside = sum_before(counts, aside)
    for place in range(thread, used, THREADS):
        if ranks[place] > limit:
            h = node[place]
            if h < first_leaf:
                node[place], node[used + pair] = 2 * h + 1, 2 * h + 2
                fresh[2 * pair], fresh[2 * pair + 1] = place, used + pair
                pair += 1
            else:
                node[place], ranks[place] = -1 - h, zero
    cuda.syncthreads()
    return split, aside


@cuda.jit(device=True)
def is_own(own, group, block, position):
    """Return whether a block lists a position by itself."""
    found = False
    for i in range(own.shape[2]):
        found = found or own[group, block, i] == position
    return found


@cuda.jit(device=True)
def count_left(own, group, block, start, end):
    """Return how many of the keys start … end − 1 a block doesn't list by themselves."""
    left = end - start
    for i in range(own.shape[2]):
        position = own[group, block, i]
        again = i > 0 and position == own[group, block, i - 1]
        left -= start <= position < end and not again
    return left


@cuda.jit(device=True)
def list_places(group, block, spread, own, half_norm, n, node, used, key_index, log_weight):
    """List what each place holds, of an opened leaf the first key, and then the other keys of opened leaves."""
    thread, number = cuda.threadIdx.x, spread.dtype.type
    zero, nothing = number(0.0), number(-np.inf)
    nodes, count_own = spread.shape[1], own.shape[2]
    counts = cuda.shared.array(THREADS, np.int32)
    aside = 0
    for place in range(thread, used, THREADS):
        if node[place] < 0:
            start, end = bounds_of(-1 - node[place], n)
            aside += end - start - 1
    before, _ = sum_before(counts, aside)
    following = count_own + used + before
    for place in range(thread, used, THREADS):
        h, slot = node[place], count_own + place
        start, end = bounds_of(h if h >= 0 else -1 - h, n)
        if h >= 0:
            left, found = count_left(own, group, block, start, end), nothing
            if left > 0:
                log_left = math.log(number(left))
                found = log_left + frozen(spread[group, h] * half_norm, log_left)
            key_index[group, block, slot], log_weight[group, block, slot] = h, found
        else:
            for position in range(start, end):
                key_index[group, block, slot] = nodes + position
                log_weight[group, block, slot] = nothing if is_own(own, group, block, position) else zero
                slot = following if position == start else slot + 1
            following += end - start - 1


@cuda.jit(device=True)
def list_others(group, block, nodes, own, used, key_index, log_weight):
    """List own keys, and nothing where the list has ended."""
    number, count_own = log_weight.dtype.type, own.shape[2]
    zero, nothing = number(0.0), number(-np.inf)
    for i in range(cuda.threadIdx.x, count_own, THREADS):
        again = i > 0 and own[group, block, i] == own[group, block, i - 1]
        key_index[group, block, i] = nodes + own[group, block, i]
        log_weight[group, block, i] = nothing if again else zero
    for slot in range(count_own + used + cuda.threadIdx.x, key_index.shape[2], THREADS):
        key_index[group, block, slot], log_weight[group, block, slot] = 0, nothing


@for_each_reader
def open_blocks(stored: str, read: Any) -> CudaKernel:
    """Make the kernel."""
    two, three, integers = "number[:, ::1]", "number[:, :, ::1]", "int64[:, :, ::1]"

    @cuda.jit(device=True)
    def load_queries(q, coordinates, query_index, group, block, scale, queries, squares, norms):
        """Write a block's scaled queries, half the squares of their coordinates, and the queries' squared norms."""
        d, p = q.shape[2], coordinates.shape[2]
        number, zero = queries.dtype.type, queries.dtype.type(0.0)
        for r in range(cuda.threadIdx.x, query_index.shape[2], THREADS):
            row = query_index[group, block, r]
            finite, norm = True, zero
            for t in range(d):
                finite = finite and abs(read(q[group, row, t])) < np.inf
            for t in range(d):
                found = read(q[group, row, t]) * scale if finite else zero
                queries[t, r] = found
                norm += found * found
            norms[r] = norm
            for t in range(p):
                square = coordinates[group, row, t] * coordinates[group, row, t]
                squares[t, r] = number(0.5) * square if square < np.inf else zero
        cuda.syncthreads()

    @cuda_kernel(
        f"stored[:, :, ::1], {three}, {integers}, {three}, {two}, {three}, {two}, {integers}, number, int64, int64, int64, "
        f"int64, {three}, {three}, {three}, int32[:, :, ::1], {two}, {three}, {integers}, {three}",
        THREADS,
        stored,
    )
    def open_blocks(
        q, coordinates, query_index, keys, spread, variances, sizes, own, scale, level, first, end, sweeps,
        queries, squares, sums, places, ranks, logits, key_index, log_weight,
    ):  # fmt: skip
        """Open the tree for every so many blocks of queries, from the nodes first … end − 1 of a level on."""
        thread, resident = cuda.threadIdx.x, cuda.blockIdx.x
        groups, blocks, rows = query_index.shape
        d, nodes = q.shape[2], variances.shape[1]
        n, first_leaf, wanted = keys.shape[1] - nodes, nodes // 2, key_index.shape[2] - own.shape[2]
        number = ranks.dtype.type
        queries, squares, ranks, logits = queries[resident], squares[resident], ranks[resident], logits[resident]
        lse, norms, node, fresh = sums[resident, 0], sums[resident, 1], places[resident, 0], places[resident, 1]
        for task in range(resident, groups * blocks, cuda.gridDim.x):
            group, block = task // blocks, task % blocks
            used, aside = end - first, 0
            for j in range(thread, used, THREADS):
                node[j], fresh[j] = (1 << level) - 1 + first + j, j
            for row in range(thread, rows, THREADS):
                lse[row] = number(0.0)
            load_queries(q, coordinates, query_index, group, block, scale, queries, squares, norms)
            half_norm = number(0.0)
            for row in range(rows):
                half_norm += norms[row]
            half_norm *= number(0.5) / number(rows * d)
            new = used
            for sweep in range(sweeps + 1):
                weigh(group, keys, variances, sizes, queries, squares, lse, n, node, fresh, new, logits, ranks)
                if sweep <= SUMMED_SWEEPS:
                    sum_weights(logits, used, lse)
                # The first nodes are weighed again, beside their own sum.
                if sweep > 0:
                    limit = find_threshold(ranks, node, used, first_leaf, n, number(wanted - aside))
                    split, more = open_chosen(ranks, limit, used, n, first_leaf, node, fresh)
                    if split + more == 0:
                        break
                    used, aside, new = used + split, aside + more, 2 * split
            list_places(group, block, spread, own, half_norm, n, node, used, key_index, log_weight)
            list_others(group, block, nodes, own, used + aside, key_index, log_weight)

    return open_blocks
