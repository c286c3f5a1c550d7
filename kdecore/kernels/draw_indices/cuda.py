"""`draw_indices` in Numba CUDA: a drawn position a thread, by binary search in the sums of the weights.

The contract's sums are in float64, and so is this: of 131,072 weights in float32, the points between two keys would be few.
It is one product, one logarithm and some 17 comparisons a position.

Traffic on paper, 16 × 1,024 blocks of 341 positions among 131,072 keys: 16 bytes a position written, 90 MB, and as many
searches through 1 MB of sums a head, which stay in L2: 17 · 5.6 · 10⁶ reads of 32 bytes there, 3 GB, 0.6 ms at 5 TB/s, which
is the bound; neighbouring positions of a block meet the same parts of the sums.
"""

import math

from numba import cuda

from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.runtime.cuda_jit import cuda_kernel, launch

THREADS = 128


def draw_indices(
    xp: Namespace, weights: Array, window_start: Array, window_size: int, starts: Array, count: int
) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.draw_indices.contract.DrawIndices`."""
    groups, blocks = window_start.shape
    sums = xp.cumulative_sum(weights, axis=1)
    positions = xp.empty((groups, blocks, count), dtype=xp.int64, device=weights.device)
    log_inclusion = xp.empty((groups, blocks, count), dtype=xp.float64, device=weights.device)
    grid = groups * blocks * -(-count // THREADS)
    launch(draw, grid, THREADS, weights, sums, window_start, window_size, starts, positions, log_inclusion)
    return positions, log_inclusion


@cuda.jit(device=True)
def sum_before(sums, group, place):
    """Return the sum of the weights before a place."""
    return sums[group, place - 1] if place > 0 else 0.0


@cuda_kernel(
    "float64[:, ::1], float64[:, ::1], int64[:, ::1], int64, float64[:, ::1], int64[:, :, ::1], float64[:, :, ::1]", THREADS
)
def draw(weights, sums, window_start, size, starts, positions, log_inclusion):
    """Draw a block's positions."""
    n, blocks, count = weights.shape[1], positions.shape[1], positions.shape[2]
    parts = -(-count // THREADS)
    number, i = cuda.blockIdx.x // parts, cuda.blockIdx.x % parts * THREADS + cuda.threadIdx.x
    group, block = number // blocks, number % blocks
    if i < count:
        begin = window_start[group, block]
        below, end = sum_before(sums, group, begin), begin + size
        inside = sum_before(sums, group, end) - below
        total = sums[group, n - 1] - inside
        point = (starts[group, block] + i) * (total / count)
        # Where the window is at the end, nothing lies after it, whatever rounding says.
        after = point >= below and end < n
        if after:
            point += inside
        low, high = 0, n
        while low < high:
            middle = (low + high) >> 1
            if sums[group, middle] <= point:
                low = middle + 1
            else:
                high = middle
        # Rounding may put a point on the wrong side of the window's edge, or past the end.
        position = max(low, end) if after else min(low, begin - 1)
        position = min(max(position, 0), n - 1)
        positions[group, block, i] = position
        log_inclusion[group, block, i] = math.log(weights[group, position]) + math.log(float(count)) - math.log(total)
