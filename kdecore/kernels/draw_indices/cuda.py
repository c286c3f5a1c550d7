"""`draw_indices` in Numba CUDA: weights are summed in chunks of the order, then a thread writes a key of a block's list.

Two launches, one where all keys weigh the same. A drawn key is found by binary searches, in the sums of chunks, which each
thread block adds up in shared memory, and in the one chunk. The contract's sums are in float64, and so is this: of 131,072
weights in float32, the points between two keys would be few. It is one quotient, two logarithms and some 17 comparisons a
key.

Traffic on paper, 16 × 820 blocks of 160 queries over 131,072 keys in float32, 170 keys of their own and 342 drawn: orders
and sizes read once to be summed and sums written, 42 MB; 12 bytes a slot written, 80 MB; together 0.04 ms at 3.0 TB/s.
Searches are the bound, 4.5 million of 11 dependent reads through a chunk's sums, which stay in L2: 1.6 GB of 32 bytes each
there, 0.3 ms at 5 TB/s; neighbours of a list meet the same parts of the sums.
"""

import math

import numpy as np
from numba import cuda

from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.draw_indices.contract import Weights
from kdecore.kernels.draw_uniform.cuda import halves, random_number
from kdecore.kernels.runtime.cuda_jit import cuda_kernel, launch

THREADS = 256
"""Threads of a block, and chunks of an order, at most."""
TILES = 8
"""Tiles of ``THREADS`` keys that a chunk has at least."""
TINY = {"THREADS": 8, "TILES": 2}
"""What tests in the simulator put in their place."""


def draw_indices(
    xp: Namespace,
    order: Array,
    weights: Weights | None,
    window_start: Array,
    window_size: int,
    seed: int,
    stream: int,
    count: int,
    dtype: str,
) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.draw_indices.contract.DrawIndices`."""
    groups, n = order.shape
    shape, device = (groups, int(window_start.shape[1]), window_size + count), order.device
    key_index = xp.empty(shape, dtype=xp.int64, device=device)
    log_weight = xp.empty(shape, dtype=getattr(xp, dtype), device=device)
    random = *halves(seed), stream
    grid = groups * shape[1] * -(-shape[2] // THREADS)
    if weights is None:
        step = (n - window_size) / count
        launch(
            *(draw_alike, grid, THREADS, order, window_start, window_size),
            *(step, math.log(step), *random, key_index, log_weight),
        )
        return key_index, log_weight
    chunk = THREADS * max(TILES, -(-n // THREADS**2))
    chunks = -(-n // chunk)
    sums = xp.empty((groups, n), dtype=xp.float64, device=device)
    totals = xp.empty((groups, chunks), dtype=xp.float64, device=device)
    given = order, *weights, (n - window_size) / count
    launch(sum_shares, groups * chunks, THREADS, *given, chunk, sums, totals)
    launch(
        *(draw_weighed, grid, THREADS, *given, chunk, sums, totals),
        *(window_start, window_size, *random, key_index, log_weight),
    )
    return key_index, log_weight


@cuda.jit(device=True)
def share_of(order, sizes, mean, ceiling, group, place):
    """Return the weight of the key at a place of the order."""
    size, unit = float(sizes[group, order[group, place]]), float(mean[group])
    return min(1.0 + size / (unit if unit > 0.0 else 1.0), ceiling)


@cuda.jit(device=True)
def add_up(sums, lane):
    """Replace numbers in shared memory, one a thread, by the sums of those up to each."""
    step = 1
    while step < THREADS:
        before = sums[lane - step] if lane >= step else 0.0
        cuda.syncthreads()
        sums[lane] += before
        cuda.syncthreads()
        step *= 2


@cuda_kernel(
    "int64[:, ::1], number[:, ::1], number[::1], float64, int64, float64[:, ::1], float64[:, ::1]",
    THREADS,
)
def sum_shares(order, sizes, mean, ceiling, chunk, sums, totals):
    """Write the sums of weights within a chunk of the order, up to each place, and of all."""
    lane, n, chunks = cuda.threadIdx.x, order.shape[1], totals.shape[1]
    group, number = cuda.blockIdx.x // chunks, cuda.blockIdx.x % chunks
    first = number * chunk
    found = cuda.shared.array(THREADS, np.float64)
    total = 0.0
    for start in range(first, min(n, first + chunk), THREADS):
        place = start + lane
        found[lane] = share_of(order, sizes, mean, ceiling, group, place) if place < n else 0.0
        cuda.syncthreads()
        add_up(found, lane)
        if place < n:
            sums[group, place] = total + found[lane]
        total += found[THREADS - 1]
        cuda.syncthreads()
    if lane == 0:
        totals[group, number] = total


@cuda.jit(device=True)
def first_above(ascending, low, high, point):
    """Return the first place from ``low`` on and before ``high`` whose sum is above a point; ``high`` for none."""
    while low < high:
        middle = (low + high) >> 1
        if ascending[middle] <= point:
            low = middle + 1
        else:
            high = middle
    return low


@cuda.jit(device=True)
def sum_before(sums, ends, chunk, place):
    """Return the sum of the weights before a place; ``ends`` are the sums up to the ends of chunks."""
    last = max(place - 1, 0)
    number = last // chunk
    found = sums[last] + (ends[number - 1] if number > 0 else 0.0)
    return found if place > 0 else 0.0


@cuda.jit(device=True)
def kept_apart(place, after, begin, end, n):
    """Return a place where it is outside a window: rounding may put it within, or past the end of the order."""
    found = max(place, end) if after else min(place, begin - 1)
    return min(max(found, 0), n - 1)


@cuda_kernel(
    "int64[:, ::1], number[:, ::1], number[::1], float64, int64, float64[:, ::1], float64[:, ::1], int64[:, ::1], int64, "
    "int64, int64, int64, int64[:, :, ::1], number[:, :, ::1]",
    THREADS,
)
def draw_weighed(order, sizes, mean, ceiling, chunk, sums, totals, windows, size, low, high, stream, key_index, log_weight):
    """Write some slots of a block's list."""
    n, blocks, slots = order.shape[1], key_index.shape[1], key_index.shape[2]
    lane, parts, chunks = cuda.threadIdx.x, -(-slots // THREADS), totals.shape[1]
    number, slot = cuda.blockIdx.x // parts, cuda.blockIdx.x % parts * THREADS + lane
    group, block = number // blocks, number % blocks
    ends = cuda.shared.array(THREADS, np.float64)
    ends[lane] = totals[group, lane] if lane < chunks else 0.0
    cuda.syncthreads()
    add_up(ends, lane)
    begin, count = windows[group, block], slots - size
    end = begin + size
    if slot < size:
        key_index[group, block, slot] = order[group, begin + slot]
        log_weight[group, block, slot] = 0.0
    elif slot < slots:
        below = sum_before(sums[group], ends, chunk, begin)
        inside = sum_before(sums[group], ends, chunk, end) - below
        total = ends[chunks - 1] - inside
        point = (random_number(low, high, stream, number) + (slot - size)) * (total / count)
        # Where the window is at the end, nothing lies after it, whatever rounding says.
        after = point >= below and end < n
        if after:
            point += inside
        part = min(first_above(ends, 0, chunks, point), chunks - 1)
        rest = point - (ends[part - 1] if part > 0 else 0.0)
        place = first_above(sums[group], part * chunk, min(n, (part + 1) * chunk), rest)
        place = kept_apart(place, after, begin, end, n)
        share = share_of(order, sizes, mean, ceiling, group, place)
        key_index[group, block, slot] = order[group, place]
        log_weight[group, block, slot] = math.log(total) - math.log(float(count)) - math.log(share)


@cuda_kernel(
    "int64[:, ::1], int64[:, ::1], int64, float64, float64, int64, int64, int64, int64[:, :, ::1], number[:, :, ::1]",
    THREADS,
)
def draw_alike(order, windows, size, step, added, low, high, stream, key_index, log_weight):
    """Do the same where all keys weigh 1: points ``step`` apart fall on the places of their numbers."""
    n, blocks, slots = order.shape[1], key_index.shape[1], key_index.shape[2]
    parts = -(-slots // THREADS)
    number, slot = cuda.blockIdx.x // parts, cuda.blockIdx.x % parts * THREADS + cuda.threadIdx.x
    group, block = number // blocks, number % blocks
    begin = windows[group, block]
    if slot < size:
        key_index[group, block, slot] = order[group, begin + slot]
        log_weight[group, block, slot] = 0.0
    elif slot < slots:
        place = int((random_number(low, high, stream, number) + (slot - size)) * step)
        after = place >= begin and begin + size < n
        place = kept_apart(place + size if after else place, after, begin, begin + size, n)
        key_index[group, block, slot] = order[group, place]
        log_weight[group, block, slot] = added
