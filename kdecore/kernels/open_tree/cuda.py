"""`open_tree` in Numba CUDA: a thread block goes down the tree for one block of queries after another; one launch.

Nodes lie in the order in which they are met, level by level, and within a level from left to right. Logits of all of them,
for every query of the block, lie in global memory that the thread block uses again for its next block of queries, so that
they stay in cache. A level

1. is weighed by register tiles of 4 queries × 4 nodes, which sum weights as they go;
2. gives each of its nodes a sum of fourth powers of shares times half variances, and so an error;
3. is opened: children go to places that follow from sums over the threads before;
4. adds weights of its closed nodes to each query's sum of those closed before.

Sums are kept as logarithms, so that nothing is lost where a node that is opened weighed more than all others. What the last
level sums gives the shares.

On paper, 131,072 queries of 16 heads in blocks of 64, d = 64, p = 16, 512 slots in float32, on an H100: 600 nodes, and 80
that fill up tiles, are weighed in some 5 levels for each of 32,768 blocks, 680 · 64 · 2 · 64 operations, 0.18 TFLOP, 3.0 ms
at 60 TFLOP/s; 16 products take 8 loads from shared memory, which allow half of that rate. Means and variances are 0.2 MB a
block, 6.9 GB, 1.3 ms at 5.5 TB/s from L2. Logits are written once and read three times, 600 rows of 64, 0.6 MB a block,
20 GB, 3.7 ms. Beside them 4.7 · 10⁹ exp, 1.3 ms at 16 for each of 132 multiprocessors and cycle, and some 250 barriers a
block of some 40 cycles, 0.7 ms where nothing hides them. Lists are written once, 0.3 GB, 0.1 ms at 3.0 TB/s. Tensor cores
are not used.
"""

import math
from typing import Any

import numpy as np
from numba import cuda

from kdecore.arrays.namespace import Array, Namespace, dtype_name
from kdecore.core.tree import BlockQueries, Tree, depth_of
from kdecore.kernels.open_tree import contract
from kdecore.kernels.open_tree.contract import ALONG, LEAST, SHORT, STEP
from kdecore.kernels.runtime.cuda_jit import CudaKernel, cuda_kernel, for_each_reader, launch

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
RESIDENT = contract.RESIDENT
LOWEST = -1e30
"""The logarithm of a sum of nothing: what is subtracted from logits has to be finite."""
TINY = {
    "THREADS": 8, "SIDE": 2, "LANES": 2, "PARTS": 4, "ROWS": 4, "NODES": 8, "DEPTH": 2, "PITCH": 3, "RESIDENT": 3,
}  # fmt: skip
"""What tests in the simulator put in their place."""


def open_tree(
    xp: Namespace,
    queries: BlockQueries,
    tree: Tree,
    threshold: Array,
    most: int,
    start: tuple[int, int, int],
) -> tuple[Array, Array, Array, Array]:
    """Follow `kdecore.kernels.open_tree.contract.OpenTree`."""
    (groups, blocks, rows), like = queries.index.shape, queries.coordinates
    # Opened nodes keep their places. Four new nodes take three slots more; two take one, but only below the first level: so
    # there are no more than three places to two slots.
    resident, width = min(RESIDENT, groups * blocks), most + most // 2
    sums, numbers, logits = empty_like(xp, like, (resident, 2, rows), (resident, 3, width), (resident, 2, width, rows))
    node = xp.empty((resident, width), dtype=xp.int32, device=like.device)
    log_weight, share = empty_like(xp, like, (groups, blocks, most), (groups, blocks, most))
    key_index = xp.empty((groups, blocks, most), dtype=xp.int64, device=like.device)
    counts = xp.empty((groups, blocks), dtype=xp.int64, device=like.device)
    limit = xp.astype(xp.reshape(threshold, (1,)), like.dtype, copy=False)
    given = *flat_arguments(queries, tree), limit, most, *start, depth_of(tree.nodes)
    work = *for_queries(xp, queries, resident), sums, node, numbers, logits
    launch(open_blocks(queries.q), resident, THREADS, *given, *work, key_index, log_weight, share, counts)
    return key_index, log_weight, share, counts


def empty_like(xp: Namespace, like: Array, *shapes: tuple[int, ...]) -> list[Array]:
    """Return arrays for numbers of the dtype of another one."""
    return [xp.empty(shape, dtype=like.dtype, device=like.device) for shape in shapes]


def flat_arguments(queries: BlockQueries, tree: Tree) -> tuple[Any, ...]:
    """Return queries and trees as kernels take them."""
    # A number of the arrays' dtype: a Python float would be computed with in float64.
    scale = np.dtype(dtype_name(queries.coordinates)).type(queries.scale)
    return queries.q, queries.coordinates, queries.index, queries.apart, *tree, scale


def for_queries(xp: Namespace, queries: BlockQueries, resident: int) -> list[Array]:
    """Return memory for the queries of so many blocks, their squares, and the squares' means, as `loader` fills it."""
    d, p, rows = int(queries.q.shape[2]), int(queries.coordinates.shape[2]), int(queries.index.shape[2])
    shapes = (resident, d, rows), (resident, p + 1, rows), (resident, p + 1)
    return empty_like(xp, queries.coordinates, *shapes)


@cuda.jit(device=True)
def bounds_of(node, n):
    """Return where a node's keys begin and end."""
    level = 31 - cuda.clz(np.int32(node + 1))
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
def listed_as(log_weight, log_count, short):
    """Return the log-weight that a closed node is listed with, as the contract has it; ``short`` is its `SHORT`."""
    sigma, reached = log_weight - log_count, log_count * log_count / (log_count + short)
    if not sigma > reached:
        return log_weight
    root = math.sqrt(sigma * log_count)
    root = sigma + log_count if sigma > log_count else root + root
    return root * math.sqrt(log_count / (log_count + short)) - reached + log_count


@cuda.jit(device=True)
def shared_memory(like):
    """Return tiles of queries, of nodes and of their numbers; two numbers of each query or node by each part; counts."""
    row_tile = cuda.shared.array((DEPTH, ROWS), like.dtype)
    node_tile = cuda.shared.array((NODES, PITCH), like.dtype)
    of_nodes = cuda.shared.array(NODES, np.int32)
    tops = cuda.shared.array((PARTS, ROWS), like.dtype)
    totals = cuda.shared.array((PARTS, ROWS), like.dtype)
    counts = cuda.shared.array(THREADS, np.int32)
    return row_tile, node_tile, of_nodes, tops, totals, counts


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
def share_of(begin, end):
    """Return this thread's part of begin … end − 1: parts follow each other as threads do."""
    length = (end - begin + THREADS - 1) // THREADS
    first = min(begin + cuda.threadIdx.x * length, end)
    return first, min(first + length, end)


@cuda.jit(device=True)
def add_weight(top, total, a, logit):
    """Add one more to a query's largest logit so far, and to the sum of weights relative to it."""
    factor = math.exp(-abs(logit - top[a]))
    total[a] = total[a] * factor + total.dtype.type(1.0) if logit > top[a] else total[a] + factor
    top[a] = max(top[a], logit)


@cuda.jit(device=True)
def add_sums(shared, top, total, first, closed, sums):
    """Write ln of each query's sum of weights: of those closed before, and of what all threads have summed."""
    thread, rows, number = cuda.threadIdx.x, sums.shape[0], sums.dtype.type
    lane, part, tops, totals = thread % LANES, thread // LANES, shared[3], shared[4]
    for a in range(SIDE):
        tops[part, lane + a * LANES], totals[part, lane + a * LANES] = top[a], total[a]
    cuda.syncthreads()
    for row in range(thread, min(ROWS, rows - first), THREADS):
        most, together = number(LOWEST), number(0.0)
        for other in range(PARTS):
            most = max(most, tops[other, row])
        for other in range(PARTS):
            together += totals[other, row] * math.exp(tops[other, row] - most)
        # It is 0, or at least 1.
        level, before = most + math.log(max(together, number(1.0))), closed[first + row]
        sums[first + row] = max(level, before) + math.log1p(math.exp(-abs(level - before)))
    cuda.syncthreads()


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
def weigh_spreads(tree, group, means, apart, node, begin, end, bias, sizes_of):
    """Write log-weights of nodes, and what shares that count by their own half variances, or not, are multiplied by."""
    keys, spread, variances, sizes = tree
    n, p, number = keys.shape[1] - spread.shape[1], variances.shape[2], bias.dtype.type
    for place in range(begin + cuda.threadIdx.x, end, THREADS):
        h = node[place]
        first, last = bounds_of(h, n)
        log_count, found = math.log(number(last - first)), spread[group, h] * means[p]
        for t in range(p):
            found += variances[group, h, t] * means[t]
        sigma = frozen(found, log_count)
        bias[place], sizes_of[place] = sigma + log_count, sizes[group, h] if apart else sigma * sizes[group, h]
    cuda.syncthreads()


@cuda.jit(device=True)
def find_factors(tree, group, squares, means, apart, node, begin, end, factors):
    """Write what each query's shares of nodes are multiplied by: its own half variances, or what its norm is of the mean."""
    keys, spread, variances, _ = tree
    p, rows, number = variances.shape[2], squares.shape[1], factors.dtype.type
    n, zero = keys.shape[1] - spread.shape[1], number(0.0)
    for i in range(cuda.threadIdx.x, (end - begin) * rows, THREADS):
        place, row = begin + i // rows, i % rows
        norm = squares[p, row]
        if apart:
            start, stop = bounds_of(node[place], n)
            half = spread[group, node[place]] * norm
            for t in range(p):
                half += variances[group, node[place], t] * squares[t, row]
            factors[place, row] = frozen(half, math.log(number(stop - start)))
        else:
            factors[place, row] = norm / means[p] if means[p] > zero else number(1.0)
    cuda.syncthreads()


@cuda.jit(device=True)
def weigh(shared, tree, group, queries, squares, means, apart, node, begin, end, closed, sums, numbers, logits):
    """Weigh a level's nodes begin … end − 1: their logits, sums over them and those closed, and their errors."""
    thread, rows, number = cuda.threadIdx.x, queries.shape[1], logits.dtype.type
    lane, part, bias, sizes_of, errors = thread % LANES, thread // LANES, numbers[0], numbers[1], numbers[2]
    logits, factors = logits[0], logits[1]
    row_tile, node_tile, of_nodes = shared[0], shared[1], shared[2]
    found = cuda.local.array((SIDE, SIDE), logits.dtype)
    top = cuda.local.array(SIDE, logits.dtype)
    total = cuda.local.array(SIDE, logits.dtype)
    weigh_spreads(tree, group, means, apart, node, begin, end, bias, sizes_of)
    for first in range(0, rows, ROWS):
        for a in range(SIDE):
            top[a], total[a] = number(LOWEST), number(0.0)
        for tile in range(begin, end, NODES):
            for c in range(thread, NODES, THREADS):
                # Past the last node it is the last again, so that all tiles are full.
                of_nodes[c] = node[min(tile + c, end - 1)]
            for b in range(SIDE):
                for a in range(SIDE):
                    found[a, b] = bias[min(tile + part + b * PARTS, end - 1)]
            cuda.syncthreads()
            add_products(found, queries, first, tree[0], group, of_nodes, row_tile, node_tile)
            for b in range(SIDE):
                place = tile + part + b * PARTS
                if place < end:
                    for a in range(SIDE):
                        add_weight(top, total, a, found[a, b])
                        if first + lane + a * LANES < rows:
                            logits[place, first + lane + a * LANES] = found[a, b]
        add_sums(shared, top, total, first, closed, sums)
    find_factors(tree, group, squares, means, apart, node, begin, end, factors)
    sum_shares(shared[4], logits, factors, sums, begin, end, True, errors)
    for place in range(begin + thread, end, THREADS):
        errors[place] = math.sqrt(math.sqrt(errors[place])) * sizes_of[place]
    cuda.syncthreads()


@cuda.jit(device=True)
def sum_shares(partial, logits, factors, sums, begin, end, fourth, shares):
    """Write the sum over queries of each node's share of all weights, or of the fourth power of share times factor."""
    thread, rows, zero = cuda.threadIdx.x, logits.shape[1], logits.dtype.type(0.0)
    lane, part = thread % LANES, thread // LANES
    total = cuda.local.array(SIDE, logits.dtype)
    for tile in range(begin, end, NODES):
        for b in range(SIDE):
            total[b] = zero
        for row in range(lane, rows, LANES):
            for b in range(SIDE):
                # What a node that was opened weighed may be more than all, and is not asked for.
                place = min(tile + part + b * PARTS, end - 1)
                share = math.exp(min(logits[place, row] - sums[row], zero))
                if fourth:
                    share *= factors[place, row]
                    share *= share
                    share *= share
                total[b] += share
        for b in range(SIDE):
            partial[part, lane + b * LANES] = total[b]
        cuda.syncthreads()
        for c in range(thread, min(NODES, end - tile), THREADS):
            found = zero
            for other in range(LANES):
                found += partial[c % PARTS, c // PARTS * LANES + other]
            shares[tile + c] = found
        cuda.syncthreads()


@cuda.jit(device=True)
def first_nodes(node, closed, level, first, end):
    """Begin with the nodes first … end − 1 of a level, and with nothing closed."""
    for j in range(cuda.threadIdx.x, end - first, THREADS):
        node[j] = (1 << level) - 1 + first + j
    for row in range(cuda.threadIdx.x, closed.shape[0], THREADS):
        closed[row] = closed.dtype.type(LOWEST)
    cuda.syncthreads()


@cuda.jit(device=True)
def open_nodes(counts, node, errors, limit, begin, end, step, fits, below, of_parents, at):
    """Write the descendants of nodes above a limit in order, from a place on, and errors of theirs; return how many are.

    Past the first that ``fits`` say, nodes count as closed.
    """
    start, stop = share_of(begin, end)
    mine = 0
    for place in range(start, stop):
        mine += 1 if errors[place] > limit else 0
    before, found = sum_before(counts, mine)
    for place in range(start, stop):
        if errors[place] > limit:
            if before < fits:
                for j in range(1 << step):
                    child = at + (before << step) + j
                    below[child], of_parents[child] = ((node[place] + 1) << step) - 1 + j, errors[place]
            else:
                errors[place] = errors.dtype.type(0.0)
            before += 1
    cuda.syncthreads()
    return found


@cuda.jit(device=True)
def close_nodes(shared, logits, errors, limit, begin, end, closed):
    """Add weights of a level's closed nodes to each query's sum."""
    thread, rows, number = cuda.threadIdx.x, logits.shape[1], logits.dtype.type
    lane, part = thread % LANES, thread // LANES
    top = cuda.local.array(SIDE, logits.dtype)
    total = cuda.local.array(SIDE, logits.dtype)
    for first in range(0, rows, ROWS):
        for a in range(SIDE):
            top[a], total[a] = number(LOWEST), number(0.0)
        for place in range(begin + part, end, PARTS):
            if not errors[place] > limit:
                for a in range(SIDE):
                    add_weight(top, total, a, logits[place, min(first + lane + a * LANES, rows - 1)])
        add_sums(shared, top, total, first, closed, closed)


@cuda.jit(device=True)
def slots_of_leaves(counts, node, errors, limit, begin, end, n):
    """Return how many slots more the leaves above a limit take, as single keys."""
    mine = 0
    for place in range(begin + cuda.threadIdx.x, end, THREADS):
        if errors[place] > limit:
            first, last = bounds_of(node[place], n)
            mine += last - first - 1
    return sum_before(counts, mine)[1]


@cuda.jit(device=True)
def descend(
    shared, tree, group, limit, most, start, leaf_level, queries, squares, means, apart, node, sums, numbers, logits
):
    """Go down the tree; return the threshold that was enough, and how many nodes were met and slots are taken."""
    nodes, number, errors, closed = tree[1].shape[1], logits.dtype.type, numbers[2], sums[0]
    while True:
        level, begin, used = start[0], 0, start[2] - start[1]
        slots = used
        first_nodes(node, closed, level, start[1], start[2])
        while begin < used and slots <= most:
            of_block = queries, squares, means
            weigh(shared, tree, group, *of_block, apart, node, begin, used, closed, sums[1], numbers, logits)
            step, found = STEP - (leaf_level - level) % STEP, 0
            if level == leaf_level:
                slots += slots_of_leaves(shared[5], node, errors, limit, begin, used, tree[0].shape[1] - nodes)
            else:
                gain = (1 << step) - 1
                fits = (most - slots) // gain
                found = open_nodes(shared[5], node, errors, limit, begin, used, step, fits, node, errors, used)
                slots += found * gain
                if found > 0 and slots <= most:
                    close_nodes(shared, logits[0], errors, limit, begin, used, closed)
            begin, used, level = used, used + (found << step), level + step
        if slots <= most:
            return limit, used, slots
        limit = number(2.0) * max(limit, number(LEAST))


@cuda.jit(device=True)
def list_nodes(counts, nodes, n, limit, node, used, slots, numbers, rows, key_index, log_weight, share):
    """List closed nodes, then the keys of opened leaves, and nothing where the list has ended."""
    bias, shares, errors, number = numbers[0], numbers[1], numbers[2], numbers.dtype.type
    start, stop = share_of(0, used)
    closed, keys = 0, 0
    for place in range(start, stop):
        first, last = bounds_of(node[place], n)
        if not errors[place] > limit:
            closed += 1
        elif node[place] >= nodes // 2:
            keys += last - first
    slot, all_closed = sum_before(counts, closed)
    following = all_closed + sum_before(counts, keys)[0]
    for place in range(start, stop):
        first, last = bounds_of(node[place], n)
        if not errors[place] > limit:
            log_count = math.log(number(last - first))
            key_index[slot], share[slot] = node[place], shares[place] / number(rows)
            log_weight[slot] = listed_as(bias[place], log_count, number(SHORT))
            slot += 1
        elif node[place] >= nodes // 2:
            for position in range(first, last):
                key_index[following], log_weight[following], share[following] = nodes + position, number(0.0), number(0.0)
                following += 1
    for slot in range(slots + cuda.threadIdx.x, key_index.shape[0], THREADS):
        key_index[slot], log_weight[slot], share[slot] = 0, number(-np.inf), number(0.0)


def loader(read: Any) -> Any:
    """Make what loads a block's queries, which are read so."""

    @cuda.jit(device=True)
    def load_block(q, coordinates, query_index, group, block, scale, queries, squares, means):
        """Write scaled queries, those not finite as 0; halves of the means of their coordinates², and last of ‖q‖² / d."""
        d, p, rows = q.shape[2], coordinates.shape[2], query_index.shape[2]
        number, zero = queries.dtype.type, queries.dtype.type(0.0)
        for r in range(cuda.threadIdx.x, rows, THREADS):
            row, norm = query_index[group, block, r], zero
            for t in range(d):
                found = read(q[group, row, t]) * scale
                norm += found * found
            finite = norm < np.inf
            for t in range(d):
                queries[t, r] = read(q[group, row, t]) * scale if finite else zero
            for t in range(p):
                square = coordinates[group, row, t] * coordinates[group, row, t]
                squares[t, r] = number(0.5 * ALONG) * square if finite and square < np.inf else zero
            squares[p, r] = number(0.5) / number(d) * norm if finite else zero
        cuda.syncthreads()
        for t in range(cuda.threadIdx.x, p + 1, THREADS):
            total = zero
            for r in range(rows):
                total += squares[t, r]
            means[t] = total / number(rows)
        cuda.syncthreads()

    return load_block


BLOCK = (
    "stored[:, :, ::1], number[:, :, ::1], int64[:, :, ::1], boolean, number[:, :, ::1], number[:, ::1], "
    "number[:, :, ::1], number[:, ::1], number"
)
"""Types of `flat_arguments`."""


@for_each_reader
def open_blocks(stored: str, read: Any) -> CudaKernel:
    """Make the kernel."""
    load_block, two, three = loader(read), "number[:, ::1]", "number[:, :, ::1]"

    @cuda_kernel(
        f"{BLOCK}, number[::1], int64, int64, int64, int64, int64, {three}, {three}, {two}, {three}, int32[:, ::1], "
        f"{three}, number[:, :, :, ::1], int64[:, :, ::1], {three}, {three}, int64[:, ::1]",
        THREADS,
        stored,
    )
    def open_blocks(
        q, coordinates, query_index, apart, keys, spread, variances, sizes, scale, threshold, most, level, first, end,
        leaf_level, queries, squares, means, sums, node, numbers, logits, key_index, log_weight, share, counts,
    ):  # fmt: skip
        """Open the tree for every so many blocks of queries, from the nodes first … end − 1 of a level on."""
        resident, (groups, blocks, rows) = cuda.blockIdx.x, query_index.shape
        nodes, tree, start = spread.shape[1], (keys, spread, variances, sizes), (level, first, end)
        queries, squares, means = queries[resident], squares[resident], means[resident]
        sums, node, numbers, logits = sums[resident], node[resident], numbers[resident], logits[resident]
        shared = shared_memory(logits)
        for task in range(resident, groups * blocks, cuda.gridDim.x):
            group, block = task // blocks, task % blocks
            load_block(q, coordinates, query_index, group, block, scale, queries, squares, means)
            limit, used, slots = descend(
                shared, tree, group, threshold[0], most, start, leaf_level, queries, squares, means, apart, node, sums,
                numbers, logits,
            )  # fmt: skip
            sum_shares(shared[4], logits[0], logits[1], sums[1], 0, used, False, numbers[1])
            mine = key_index[group, block], log_weight[group, block], share[group, block]
            list_nodes(shared[5], nodes, keys.shape[1] - nodes, limit, node, used, slots, numbers, rows, *mine)
            counts[group, block] = slots

    return open_blocks
