"""`hash_codes` in Numba CUDA: projections, their means, and then each row's signs and Gray rank.

Three launches for queries, and three for keys. Traffic on paper, 2,097,152 rows of 64 bfloat16 numbers, 12 planes: rows
read once, 0.27 GB; projections written once and read twice, 0.3 GB: 0.19 ms at 3.0 TB/s. 3.2 GFLOP by register tiles of 4
rows × 4 planes, which read half a number from shared memory for each multiplication: 0.1 ms beside that.

Means are summed in two numbers each (Knuth's two-sum): of rows far from the origin, those of one float32 sum would put rows
on the wrong side.
"""

from typing import Any

import numpy as np
from numba import cuda

from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.runtime.cuda_jit import CudaKernel, cuda_kernel, for_each_reader, launch

SIDE = 4
"""Rows, and planes, that a thread multiplies."""
LANES = 32
"""Threads beside each other in a tile's rows."""
THREADS = LANES * SIDE
ROWS = LANES * SIDE
"""Rows of a tile."""
PLANES = SIDE * SIDE
"""Planes of a tile."""
DEPTH = 32
"""Columns of a tile."""
PITCH = DEPTH + 1
TINY = {"LANES": 3, "THREADS": 12, "ROWS": 12, "DEPTH": 4, "PITCH": 5}
"""What tests in the simulator put in their place."""


def hash_codes(xp: Namespace, q: Array, k: Array, planes: Array) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.hash_codes.contract.HashCodes`."""
    return hash_rows(xp, q, planes), hash_rows(xp, k, planes)


def hash_rows(xp: Namespace, x: Array, planes: Array) -> Array:
    """Return the buckets of rows (G, n, d)."""
    groups, n, _ = x.shape
    bits = int(planes.shape[1])
    projected = xp.empty((groups, bits, n), dtype=planes.dtype, device=x.device)
    means = xp.empty((groups, bits), dtype=planes.dtype, device=x.device)
    codes = xp.empty((groups, n), dtype=xp.int16 if bits <= 15 else xp.int32, device=x.device)
    launch(project(x), groups * -(-n // ROWS), THREADS, x, planes, projected)
    launch(average, groups * bits, THREADS, projected, means)
    launch(pack, groups * -(-n // THREADS), THREADS, projected, means, codes)
    return codes


@for_each_reader
def project(stored: str, read: Any) -> CudaKernel:
    """Make the first kernel."""

    @cuda_kernel("stored[:, :, ::1], number[:, ::1], number[:, :, ::1]", THREADS, stored)
    def project(x, planes, projected):
        """Write the products of a tile of rows with all planes."""
        n, d, bits = x.shape[1], x.shape[2], planes.shape[1]
        thread, tiles = cuda.threadIdx.x, -(-n // ROWS)
        group, first = cuda.blockIdx.x // tiles, cuda.blockIdx.x % tiles * ROWS
        lane, part = thread % LANES, thread // LANES
        rows = cuda.shared.array((ROWS, PITCH), planes.dtype)
        normals = cuda.shared.array((DEPTH, PLANES), planes.dtype)
        sums = cuda.local.array((SIDE, SIDE), planes.dtype)
        zero = planes.dtype.type(0.0)
        for bit in range(0, bits, PLANES):
            for i in range(SIDE):
                for j in range(SIDE):
                    sums[i, j] = zero
            for column in range(0, d, DEPTH):
                for place in range(thread, ROWS * DEPTH, THREADS):
                    row, t = place // DEPTH, place % DEPTH
                    inside = first + row < n and column + t < d
                    rows[row, t] = read(x[group, first + row, column + t]) if inside else zero
                for place in range(thread, DEPTH * PLANES, THREADS):
                    t, j = place // PLANES, place % PLANES
                    inside = column + t < d and bit + j < bits
                    normals[t, j] = planes[column + t, bit + j] if inside else zero
                cuda.syncthreads()
                for t in range(DEPTH):
                    for i in range(SIDE):
                        for j in range(SIDE):
                            sums[i, j] += rows[lane + i * LANES, t] * normals[t, part * SIDE + j]
                cuda.syncthreads()
            for i in range(SIDE):
                row = first + lane + i * LANES
                for j in range(SIDE):
                    plane = bit + part * SIDE + j
                    if row < n and plane < bits:
                        projected[group, plane, row] = sums[i, j]

    return project


@cuda.jit(device=True)
def add_exactly(total, error, number):
    """Return a sum, and what its rounding has lost so far."""
    found = total + number
    kept = found - total
    return found, error + ((total - (found - kept)) + (number - kept))


@cuda_kernel("number[:, :, ::1], number[:, ::1]", THREADS)
def average(projected, means):
    """Write the mean of the finite projections on a plane."""
    lane, bits = cuda.threadIdx.x, means.shape[1]
    group, bit = cuda.blockIdx.x // bits, cuda.blockIdx.x % bits
    totals = cuda.shared.array(THREADS, means.dtype)
    errors = cuda.shared.array(THREADS, means.dtype)
    counts = cuda.shared.array(THREADS, np.int32)
    total, error, count = means.dtype.type(0.0), means.dtype.type(0.0), 0
    for i in range(lane, projected.shape[2], THREADS):
        number = projected[group, bit, i]
        if abs(number) < np.inf:
            total, error = add_exactly(total, error, number)
            count += 1
    totals[lane], errors[lane], counts[lane] = total, error, count
    cuda.syncthreads()
    if lane == 0:
        for i in range(1, THREADS):
            total, error = add_exactly(total, error, totals[i])
            error += errors[i]
            count += counts[i]
        means[group, bit] = (total + error) / means.dtype.type(max(count, 1))


@cuda_kernel("number[:, :, ::1], number[:, ::1], int16[:, ::1]", THREADS)
def pack(projected, means, codes):
    """Write the Gray rank of a row's signs."""
    bits, tiles = means.shape[1], -(-codes.shape[1] // THREADS)
    group, i = cuda.blockIdx.x // tiles, cuda.blockIdx.x % tiles * THREADS + cuda.threadIdx.x
    if i < codes.shape[1]:
        code = 0
        for bit in range(bits):
            code = (code << 1) | (projected[group, bit, i] > means[group, bit])
        shift = 1
        while shift < bits:
            code ^= code >> shift
            shift *= 2
        codes[group, i] = code
