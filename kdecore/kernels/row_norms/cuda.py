"""`row_norms` in Numba CUDA: the largest number of each group, then a row a thread, from tiles in shared memory.

Traffic on paper: rows are read twice and 4 bytes a row written. 2,097,152 rows of 64 bfloat16 numbers are 0.55 GB, 0.18 ms
at 3.0 TB/s; 0.3 GFLOP are nothing beside that.
"""

import math
from typing import Any

import numpy as np
from numba import cuda

from kdecore.arrays.namespace import ACCUMULATION, Array, Namespace, dtype_name
from kdecore.kernels.runtime.cuda_jit import CudaKernel, cuda_kernel, for_each_reader, launch

THREADS = 128
"""Rows of a tile, a thread each; and threads that look for the largest number."""
DEPTH = 32
"""Columns of a tile."""
PITCH = DEPTH + 1
"""Numbers from row to row of a tile: threads that read down a column meet different banks."""
PARTS = 32
"""Blocks that look for the largest number of a group."""
TINY = {"THREADS": 8, "PARTS": 3}
"""What tests in the simulator put in their place."""


def row_norms(xp: Namespace, rows: Array) -> Array:
    """Follow `kdecore.kernels.row_norms.contract.RowNorms`."""
    groups, n, d = rows.shape
    dtype = getattr(xp, ACCUMULATION[dtype_name(rows)])
    found = xp.empty((groups, n), dtype=dtype, device=rows.device)
    tops = xp.empty((groups, PARTS), dtype=dtype, device=rows.device)
    launch(largest(rows), groups * PARTS, THREADS, xp.reshape(rows, (groups, n * d)), tops)
    launch(norms(rows), groups * -(-n // THREADS), THREADS, rows, tops, found)
    return found


@for_each_reader
def largest(stored: str, read: Any) -> CudaKernel:
    """Make the first kernel."""

    @cuda_kernel("stored[:, ::1], number[:, ::1]", THREADS, stored)
    def largest(rows, tops):
        """Write the largest finite absolute value of each of `PARTS` interleaved parts of a group."""
        lane, group, part = cuda.threadIdx.x, cuda.blockIdx.x // PARTS, cuda.blockIdx.x % PARTS
        found = cuda.shared.array(THREADS, tops.dtype)
        top = tops.dtype.type(0.0)
        for i in range(part * THREADS + lane, rows.shape[1], PARTS * THREADS):
            size = abs(read(rows[group, i]))
            if top < size < np.inf:
                top = size
        found[lane] = top
        cuda.syncthreads()
        if lane == 0:
            for i in range(THREADS):
                top = max(top, found[i])
            tops[group, part] = top

    return largest


@for_each_reader
def norms(stored: str, read: Any) -> CudaKernel:
    """Make the second kernel."""

    @cuda_kernel("stored[:, :, ::1], number[:, ::1], number[:, ::1]", THREADS, stored)
    def norms(rows, tops, found):
        """Write the norms of a tile of rows, each divided by its group's largest number."""
        n, d = rows.shape[1], rows.shape[2]
        lane, tiles = cuda.threadIdx.x, -(-n // THREADS)
        group, first = cuda.blockIdx.x // tiles, cuda.blockIdx.x % tiles * THREADS
        tile = cuda.shared.array((THREADS, PITCH), found.dtype)
        top = found.dtype.type(0.0)
        for part in range(PARTS):
            top = max(top, tops[group, part])
        total = found.dtype.type(0.0)
        for column in range(0, d, DEPTH):
            width = min(DEPTH, d - column)
            # Neighbouring threads read neighbouring numbers; each sums a row of the tile then.
            for i in range(lane, min(THREADS, n - first) * DEPTH, THREADS):
                row, t = i // DEPTH, i % DEPTH
                if t < width:
                    tile[row, t] = read(rows[group, first + row, column + t])
            cuda.syncthreads()
            if first + lane < n and top > 0:
                for t in range(width):
                    size = tile[lane, t] / top
                    total += size * size
            cuda.syncthreads()
        if first + lane < n:
            found[group, first + lane] = math.sqrt(total) if total < np.inf else found.dtype.type(0.0)

    return norms
