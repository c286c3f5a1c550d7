"""`value_sizes` in Numba CUDA: each part of a group in units of its own, then all in those of the group. Two launches.

1. A program reads a part of the rows once, in tiles of `DEPTH` columns, to shared memory. While it reads a tile, each thread
   meets one column and keeps its least and largest number; then it adds up a row of the tile, in units of the row's largest
   number so far. In the end the part's rows are put in units of its largest number, written beside the largest norm.
2. Each program finds the largest of its group's parts and divides its rows by it. Those of a group share the columns, whose
   ranges they find from the ranges of the parts.

Traffic on paper: rows are read once, and 4 bytes a row written, read and written again; ranges take 8 bytes a column of 512
rows. 2,097,152 rows of 64 bfloat16 numbers are 0.30 GB, 0.10 ms at 3.0 TB/s. A number takes some 36 instructions, which
mostly find where it lies: 0.15 · 10⁹ of 32 threads each, 0.17 ms at 4 a cycle of 132 processors and 1.7 GHz, which is the
bound. In the second launch each of 1,024 programs reads 2 kB of its group's parts, from L2.
"""

import math
from typing import Any

import numpy as np
from numba import cuda

from kdecore.arrays.namespace import ACCUMULATION, Array, Namespace, dtype_name
from kdecore.kernels.runtime.cuda_jit import WRITERS, CudaKernel, cuda_kernel, for_each_reader, launch

THREADS = 128
"""Rows of a tile, a thread each: a power of two."""
DEPTH = 32
"""Columns of a tile, of which several threads share each."""
PITCH = DEPTH + 1
"""Numbers from row to row of a tile: threads that read down a column meet different banks."""
TILES = 4
"""Tiles of rows of a part."""
ROWS = 16
"""Rows that a thread divides."""
TINY = {"THREADS": 8, "DEPTH": 4, "PITCH": 5, "TILES": 2, "ROWS": 3}
"""What tests in the simulator put in their place."""


def value_sizes(xp: Namespace, v: Array) -> tuple[Array, Array, Array]:
    """Follow `kdecore.kernels.value_sizes.contract.ValueSizes`."""
    groups, n, d = v.shape
    parts, computed = -(-n // (THREADS * TILES)), ACCUMULATION[dtype_name(v)]
    dtype, least = getattr(xp, computed), np.finfo(computed).tiny

    def empty(dtype: Any, *shape: int) -> Array:
        return xp.empty((groups, *shape), dtype=dtype, device=v.device)

    sizes, low, high = empty(dtype, n), empty(v.dtype, d), empty(v.dtype, d)
    between = empty(dtype, parts, 2), empty(dtype, parts, d), empty(dtype, parts, d)
    launch(measure(v), groups * parts, THREADS, xp.reshape(v, (-1,)), d, least, sizes, *between)
    launch(relate(v), groups * -(-n // (THREADS * ROWS)), THREADS, sizes, *between, low, high)
    return sizes, low, high


@cuda.jit(device=True)
def lower(a, b):
    """Return the lower of two numbers, NaN where one is."""
    return b if b < a or math.isnan(b) else a


@cuda.jit(device=True)
def higher(a, b):
    """Return the higher of two numbers, NaN where one is."""
    return b if b > a or math.isnan(b) else a


@cuda.jit(device=True)
def largest_of(found, number):
    """Return the largest of all threads' numbers to each of them."""
    lane, half = cuda.threadIdx.x, THREADS // 2
    found[lane] = number
    cuda.syncthreads()
    while half > 0:
        if lane < half:
            found[lane] = max(found[lane], found[lane + half])
        cuda.syncthreads()
        half //= 2
    largest = found[0]
    cuda.syncthreads()
    return largest


@cuda.jit(device=True)
def range_of(lows, highs, low, high):
    """Return to the first `DEPTH` threads the range of all threads that met the same column."""
    lane = cuda.threadIdx.x
    lows[lane], highs[lane] = low, high
    cuda.syncthreads()
    if lane < DEPTH:
        for other in range(lane + DEPTH, THREADS, DEPTH):
            low, high = lower(low, lows[other]), higher(high, highs[other])
    cuda.syncthreads()
    return low, high


@for_each_reader
def measure(stored: str, read: Any) -> CudaKernel:
    """Make the first kernel."""
    three = "number[:, :, ::1]"

    @cuda_kernel(f"stored[::1], int64, number, number[:, ::1], {three}, {three}, {three}", THREADS, stored)
    def measure(v, d, least, sizes, largest, lows, highs):
        """Write the norms of a part of the rows in units of its largest number; that, the largest norm, and ranges."""
        n, parts = sizes.shape[1], largest.shape[1]
        lane, group, part = cuda.threadIdx.x, cuda.blockIdx.x // parts, cuda.blockIdx.x % parts
        number = sizes.dtype.type
        zero, one = number(0.0), number(1.0)
        tile = cuda.shared.array((THREADS, PITCH), sizes.dtype)
        units = cuda.shared.array((TILES, THREADS), sizes.dtype)
        totals = cuda.shared.array((TILES, THREADS), sizes.dtype)
        some = cuda.shared.array(THREADS, sizes.dtype)
        others = cuda.shared.array(THREADS, sizes.dtype)
        for turn in range(TILES):
            units[turn, lane], totals[turn, lane] = zero, zero
        for column in range(0, d, DEPTH):
            width, at = min(DEPTH, d - column), lane % DEPTH
            start = group * n * d + min(column + at, d - 1)
            # Unsigned: Numba takes instructions to count negative indices from the end.
            last, stride = np.uint64(start + (n - 1) * d), np.uint64(THREADS // DEPTH * d)
            low, high = number(np.inf), number(-np.inf)
            for turn in range(TILES):
                first = (part * TILES + turn) * THREADS
                # Neighbouring threads read neighbouring numbers: the last row and column again where there are no more.
                place, row = np.uint64(start + (first + lane // DEPTH) * d), np.uint32(lane // DEPTH)
                for _ in range(DEPTH):
                    x = read(v[min(place, last)])
                    tile[row, np.uint32(at)] = x if at < width else zero
                    low, high = lower(low, x), higher(high, x)
                    place, row = place + stride, np.uint32(row + np.uint32(THREADS // DEPTH))
                cuda.syncthreads()
                # Each adds up a row of the tile then; by a least unit, since the inverse of a subnormal one is infinite.
                unit = max(units[turn, lane], least)
                for t in range(DEPTH):
                    size = abs(tile[lane, t])
                    if size > unit:
                        unit = size
                ratio, inverse = units[turn, lane] / unit, one / unit
                total = totals[turn, lane] * ratio * ratio
                for t in range(DEPTH):
                    size = tile[lane, t] * inverse
                    total += size * size
                units[turn, lane], totals[turn, lane] = unit, total
                cuda.syncthreads()
            low, high = range_of(some, others, low, high)
            if lane < width:
                lows[group, part, column + lane], highs[group, part, column + lane] = low, high
        unit, top = least, zero
        for turn in range(TILES):
            # NaN of a row that isn't finite, since infinity in units of itself is.
            if not totals[turn, lane] < np.inf:
                units[turn, lane], totals[turn, lane] = zero, zero
            unit = max(unit, units[turn, lane])
        unit = largest_of(some, unit)
        for turn in range(TILES):
            row = (part * TILES + turn) * THREADS + lane
            if row < n:
                size = math.sqrt(totals[turn, lane]) * (units[turn, lane] / unit)
                sizes[group, row] = size
                top = max(top, size)
        top = largest_of(some, top)
        if lane == 0:
            largest[group, part, 0], largest[group, part, 1] = unit, top

    return measure


@for_each_reader
def relate(stored: str, read: Any) -> CudaKernel:
    """Make the second kernel."""
    two, three, write = "number[:, ::1]", "number[:, :, ::1]", WRITERS[stored]

    @cuda_kernel(f"{two}, {three}, {three}, {three}, stored[:, ::1], stored[:, ::1]", THREADS, stored)
    def relate(sizes, largest, lows, highs, low, high):
        """Divide some norms by the group's largest, and write the ranges of some columns."""
        n, d, parts, programs = sizes.shape[1], low.shape[1], largest.shape[1], -(-sizes.shape[1] // (THREADS * ROWS))
        lane, group, program = cuda.threadIdx.x, cuda.blockIdx.x // programs, cuda.blockIdx.x % programs
        number = sizes.dtype.type
        some = cuda.shared.array(THREADS, sizes.dtype)
        others = cuda.shared.array(THREADS, sizes.dtype)
        unit, top = number(0.0), number(0.0)
        for part in range(lane, parts, THREADS):
            unit = max(unit, largest[group, part, 0])
        unit = largest_of(some, unit)
        for part in range(lane, parts, THREADS):
            top = max(top, largest[group, part, 1] * (largest[group, part, 0] / unit))
        top = largest_of(some, top)
        first = program * THREADS * ROWS
        for row in range(first + lane, min(n, first + THREADS * ROWS), THREADS):
            size = sizes[group, row] * (largest[group, row // (THREADS * TILES), 0] / unit)
            sizes[group, row] = size / top if top > 0 else number(0.0)
        for column in range(program * DEPTH, d, programs * DEPTH):
            at = column + lane % DEPTH
            a, b = number(np.inf), number(-np.inf)
            if at < d:
                for part in range(lane // DEPTH, parts, THREADS // DEPTH):
                    a, b = lower(a, lows[group, part, at]), higher(b, highs[group, part, at])
            a, b = range_of(some, others, a, b)
            if lane < DEPTH and at < d:
                low[group, at], high[group, at] = write(a), write(b)

    return relate
