"""`second_moment` in Numba CUDA: a thread block for each tile of products, everything in one launch.

In float64, as the contract is. Rows less the first of them are multiplied, so that one pass finds mean and moment: what they
share is taken out before it is squared, and of the rest float64 holds enough.

On paper, 16 heads, d = 64, 1,024 rows each: ten tiles a head, of which each reads 32 columns of all rows, 0.02 GB through
the second-level cache in float32, and multiplies 0.3 · 10⁶ numbers; 16 stretches of rows one after another, each a wait
for memory and 64 products a thread, 700 cycles: 10 µs.
"""

from typing import Any

import numpy as np
from numba import cuda

from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.runtime.cuda_jit import CudaKernel, cuda_kernel, for_each_reader, launch

TILE = 16
"""Columns of a tile, and rows: its products are a thread's each."""
THREADS = TILE * TILE
DEPTH = 64
"""Rows that are multiplied together."""
TINY = {"THREADS": 9, "TILE": 3, "DEPTH": 5}
"""What tests in the simulator put in their place."""


def second_moment(xp: Namespace, rows: Array, step: int, centred: bool) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.second_moment.contract.SecondMoment`."""
    groups, _, d = rows.shape
    moment = xp.empty((groups, d, d), dtype=xp.float64, device=rows.device)
    mean = xp.empty((groups, d), dtype=xp.float64, device=rows.device)
    across = -(-d // TILE)
    launch(multiply(rows), groups * (across * (across + 1) // 2), THREADS, rows, step, centred, moment, mean)
    return moment, mean


@for_each_reader
def multiply(stored: str, read: Any) -> CudaKernel:
    """Make the kernel."""

    @cuda_kernel("stored[:, :, ::1], int64, boolean, float64[:, :, ::1], float64[:, ::1]", THREADS, stored)
    def multiply(rows, step, centred, moment, mean):
        """Write a tile on or below the diagonal, and what mirrors it; those on it write means too."""
        n, d = rows.shape[1], rows.shape[2]
        count, across = -(-n // step), -(-d // TILE)
        group, tile = cuda.blockIdx.x // (across * (across + 1) // 2), cuda.blockIdx.x % (across * (across + 1) // 2)
        down = 0
        while (down + 1) * (down + 2) // 2 <= tile:
            down += 1
        right = tile - down * (down + 1) // 2
        thread = cuda.threadIdx.x
        i, j = thread // TILE, thread % TILE
        some = cuda.shared.array((DEPTH, 2, TILE), np.float64)
        first = cuda.shared.array((2, TILE), np.float64)
        sums = cuda.shared.array((2, TILE), np.float64)
        for side in range(i, 2, TILE):
            column = (down if side == 0 else right) * TILE + j
            number = np.float64(read(rows[group, 0, column])) if column < d else 0.0
            first[side, j], sums[side, j] = number if abs(number) < np.inf else 0.0, 0.0
        total = 0.0
        for begin in range(0, count, DEPTH):
            depth = min(DEPTH, count - begin)
            cuda.syncthreads()
            for place in range(thread, depth * 2 * TILE, THREADS):
                t, side, c = place // (2 * TILE), place // TILE % 2, place % TILE
                column = (down if side == 0 else right) * TILE + c
                number = np.float64(read(rows[group, (begin + t) * step, column])) if column < d else 0.0
                some[t, side, c] = (number if abs(number) < np.inf else 0.0) - first[side, c]
            cuda.syncthreads()
            for t in range(depth):
                total += some[t, 0, i] * some[t, 1, j]
            for side in range(i, 2, TILE):
                for t in range(depth):
                    sums[side, j] += some[t, side, j]
        cuda.syncthreads()
        row, column = down * TILE + i, right * TILE + j
        left, above = sums[0, i] / count, sums[1, j] / count
        if centred:
            total = total / count - left * above
        else:
            total = total / count + left * first[1, j] + first[0, i] * (above + first[1, j])
        if row < d and column < d and (down > right or i >= j):
            moment[group, row, column] = total
            moment[group, column, row] = total
        if down == right and i == j and row < d:
            mean[group, row] = first[0, i] + left

    return multiply
