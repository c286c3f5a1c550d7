"""`scaled_nodes` in Numba CUDA: tiles of sampled rows, and then tiles of nodes; two launches.

The first multiplies the gaps of sampled rows to their leaves' means with C, tile by tile in shared memory, a thread four
columns of a row; a block of each group has the directions in place of rows, whose squares are what coordinates see. The
second sums what the tiles found, always in the same order, and scales nodes.

On paper, 131,072 keys of 16 heads, d = 64, p = 16: 511 rows a head, in 17 blocks with that of the directions. A block
multiplies a tile of 32 · 32 gaps with one of C four times, in 32 steps of five reads of shared memory by 8 warps: 5,100
cycles, 3 µs at 1.7 GHz, for 272 blocks on 132 multiprocessors at once. Gaps are made three times, of 4.2 MB of rows and
means in float32, most of them from cache. The second launch reads and writes 1,048,560 spreads and sizes, 17 MB, 6 µs at
3.0 TB/s; each of its 1,024 blocks reads the 1.2 KB that a group's tiles found.
"""

import math
from typing import Any

import numpy as np
from numba import cuda

from kdecore.arrays.namespace import Array, Namespace, dtype_name
from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.kernels.open_tree.contract import ALONG
from kdecore.kernels.runtime.cuda_jit import CudaKernel, cuda_kernel, for_each_reader, launch
from kdecore.kernels.scaled_nodes.contract import MOST_DIRECTIONS, spacing

THREADS = 256
ROWS = MOST_DIRECTIONS
"""Rows of a tile; the directions of a group are one."""
SUMS = ROWS + 2
"""Numbers that are summed over rows, at most: forms, spreads and variances."""
PARTS = THREADS // ROWS
"""Threads that multiply a row."""
TOGETHER = 4
"""Columns of a product that a thread computes at once, from one read of its row."""
DEPTH = PARTS * TOGETHER
"""Columns of a tile."""
PITCH = DEPTH + 1
"""Numbers from row to row of a tile: threads that read down a column meet different banks."""
NODES = 4 * THREADS
"""Nodes of a tile."""
TINY = {"THREADS": 8, "ROWS": 4, "PARTS": 2, "DEPTH": 8, "NODES": 16}
"""What tests in the simulator put in their place."""


def scaled_nodes(
    xp: Namespace,
    nodes: TreeNodes,
    moment: Array,
    directions: Array,
    half_norm: Array,
    scale: float,
    octaves: float,
) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.scaled_nodes.contract.ScaledNodes`, within its `numba_cuda_limit`."""
    keys, _, spread, variances, sizes = nodes
    groups, count, p = variances.shape
    assert p <= ROWS
    n = int(keys.shape[1]) - count
    step = spacing(n, groups)
    rows = -(-n // step)
    tiles = -(-rows // ROWS)

    def empty(*shape: int) -> Array:
        return xp.empty((groups, *shape), dtype=spread.dtype, device=spread.device)

    squares, sums, scaled_spread, scaled_sizes = empty(p), empty(tiles, p + 2), empty(count), empty(count)
    given = keys, spread, variances, moment, directions
    launch(measure(keys), groups * (tiles + 1), THREADS, *given, step, squares, sums)
    # Numbers of the arrays' dtype: Python's floats would be computed with in float64.
    number = np.dtype(dtype_name(spread)).type
    factors = number(0.5 * scale**2 / rows), number(0.5 * ALONG / rows), number(1.0 / rows)
    rates = *factors, number(keys.shape[2]), number(octaves * math.log(2.0))
    given = spread, sizes, half_norm, squares, sums
    launch(scale_tile, groups * -(-count // NODES), THREADS, *given, *rates, scaled_spread, scaled_sizes)
    return scaled_spread, scaled_sizes


@for_each_reader
def measure(stored: str, read: Any) -> CudaKernel:
    """Make the first kernel."""

    @cuda.jit(device=True)
    def load(keys, directions, group, position, leaf, first, tile):
        """Write columns of a tile's gaps, or of its directions where it has no rows; 0 beyond them."""
        d, p = directions.shape[1], directions.shape[2]
        for i in range(cuda.threadIdx.x, ROWS * DEPTH, THREADS):
            row, column = i // DEPTH, first + i % DEPTH
            number = tile.dtype.type(0.0)
            if column < d:
                if position[row] >= 0:
                    number = read(keys[group, position[row], column]) - read(keys[group, leaf[row], column])
                elif position[0] < 0 and row < p:
                    number = directions[group, column, row]
            tile[row, i % DEPTH] = number

    numbers = "number[:, ::1], number[:, :, ::1], float64[:, :, ::1], number[:, :, ::1]"

    @cuda_kernel(f"stored[:, :, ::1], {numbers}, int64, number[:, ::1], number[:, :, ::1]", THREADS, stored)
    def measure(keys, spread, variances, moments, directions, step, squares, sums):
        """Write κᵀ C κ for a group's directions; or its sum over a tile of rows, and those of their leaves."""
        thread, tiles = cuda.threadIdx.x, sums.shape[1]
        group, tile = cuda.blockIdx.x // (tiles + 1), cuda.blockIdx.x % (tiles + 1)
        nodes, d, p = spread.shape[1], directions.shape[1], directions.shape[2]
        n, leaves = keys.shape[1] - nodes, nodes // 2 + 1
        zero = spread.dtype.type(0.0)
        left = cuda.shared.array((ROWS, PITCH), spread.dtype)
        right = cuda.shared.array((ROWS, PITCH), spread.dtype)
        matrix = cuda.shared.array((DEPTH, DEPTH), spread.dtype)
        found = cuda.shared.array((PARTS, ROWS), spread.dtype)
        position = cuda.shared.array(ROWS, np.int64)
        leaf = cuda.shared.array(ROWS, np.int64)
        if thread < ROWS:
            j = (tile * ROWS + thread) * step
            held = tile < tiles and j < n
            position[thread] = nodes + j if held else -1
            leaf[thread] = leaves - 1 + ((j + 1) * leaves - 1) // n if held else -1
        cuda.syncthreads()
        row, part = thread % ROWS, thread // ROWS
        column, total = part * TOGETHER, zero
        for a in range(0, d, DEPTH):
            load(keys, directions, group, position, leaf, a, left)
            for b in range(0, d, DEPTH):
                load(keys, directions, group, position, leaf, b, right)
                for i in range(thread, DEPTH * DEPTH, THREADS):
                    s, t = b + i // DEPTH, a + i % DEPTH
                    matrix[i // DEPTH, i % DEPTH] = moments[group, s, t] if s < d and t < d else zero
                cuda.syncthreads()
                w, x, y, z = zero, zero, zero, zero
                for t in range(DEPTH):
                    number = right[row, t]
                    w += number * matrix[t, column]
                    x += number * matrix[t, column + 1]
                    y += number * matrix[t, column + 2]
                    z += number * matrix[t, column + 3]
                total += left[row, column] * w + left[row, column + 1] * x
                total += left[row, column + 2] * y + left[row, column + 3] * z
                cuda.syncthreads()
        found[part, row] = total
        cuda.syncthreads()
        if part == 0:
            for other in range(1, PARTS):
                total += found[other, row]
            found[0, row] = total
        cuda.syncthreads()
        if tile == tiles:
            for c in range(thread, p, THREADS):
                squares[group, c] = found[0, c]
        else:
            for c in range(thread, p + 2, THREADS):
                total = zero
                for r in range(ROWS):
                    if position[r] >= 0:
                        if c == 0:
                            total += found[0, r]
                        elif c == 1:
                            total += spread[group, leaf[r]]
                        else:
                            total += variances[group, leaf[r], c - 2]
                sums[group, tile, c] = total

    return measure


@cuda_kernel(
    "number[:, ::1], number[:, ::1], number[::1], number[:, ::1], number[:, :, ::1], number, number, number, number, "
    "number, number[:, ::1], number[:, ::1]",
    THREADS,
)
def scale_tile(
    spread, sizes, half_norm, squares, sums, of_whole, of_seen, of_around, most, rate, scaled_spread, scaled_sizes
):
    """Write a tile of nodes, from a group's sums and what these are multiplied by."""
    thread, nodes = cuda.threadIdx.x, spread.shape[1]
    tiles, p = -(-nodes // NODES), squares.shape[1]
    group, first = cuda.blockIdx.x // tiles, cuda.blockIdx.x % tiles * NODES
    zero = spread.dtype.type(0.0)
    totals = cuda.shared.array(SUMS, spread.dtype)
    for c in range(thread, p + 2, THREADS):
        total = zero
        for tile in range(sums.shape[1]):
            total += sums[group, tile, c]
        totals[c] = total
    cuda.syncthreads()
    seen = zero
    for c in range(p):
        seen += squares[group, c] * totals[c + 2]
    around = half_norm[group] * totals[1] * of_around
    share = totals[0] * of_whole - seen * of_seen
    if around > zero:
        share /= around
    # Written so that NaN stays.
    if share < zero:
        share = zero
    if share > most:
        share = most
    for node in range(first + thread, min(first + NODES, nodes), THREADS):
        level = 31 - cuda.clz(np.int32(node + 1))
        scaled_spread[group, node] = spread[group, node] * share
        scaled_sizes[group, node] = sizes[group, node] * math.exp(rate * spread.dtype.type(level))
