"""`rank_codes` in Numba CUDA: each coordinate's sample sorted, bits dealt out, then a row a thread. Three launches.

Traffic on paper, 2,097,152 rows of 16 float32 coordinates: read once, 0.13 GB, and 8 MB of codes written: 0.05 ms at 3.0
TB/s. Ranks take ten reads of shared memory for each coordinate, 0.3 · 10⁹ in all, and bits some 15 integer operations each:
0.1 ms.
"""

import numpy as np
from numba import cuda

from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.rank_codes.contract import MOST_COLUMNS, RATIO, SAMPLE
from kdecore.kernels.runtime.cuda_jit import cuda_kernel, launch

THREADS = 128
"""Rows of a tile, a thread each; and threads that sort a sample."""
COLUMNS = MOST_COLUMNS
BITS = 30
TINY = {"THREADS": 8}
"""What tests in the simulator put in their place."""


def rank_codes(xp: Namespace, x: Array, bits: int, in_order: int = 0) -> Array:
    """Follow `kdecore.kernels.rank_codes.contract.RankCodes`, within its `numba_cuda_limit`."""
    groups, n, p = x.shape
    assert p <= COLUMNS
    ascending = xp.empty((groups, p, min(SAMPLE, n)), dtype=x.dtype, device=x.device)
    variances = xp.empty((groups, p), dtype=x.dtype, device=x.device)
    dealt = xp.empty((2, groups, bits - in_order), dtype=xp.int32, device=x.device)
    codes = xp.empty((groups, n), dtype=xp.int32, device=x.device)
    launch(sort_samples, groups * p, THREADS, x, ascending, variances)
    launch(deal_bits, groups, 1, variances, dealt)
    launch(number_cells, groups * -(-n // THREADS), THREADS, x, ascending, dealt, in_order, codes)
    return codes


@cuda.jit(device=True)
def finite_or_zero(number, zero):
    """Return a number, 0 in place of one that is not finite."""
    return number if abs(number) < np.inf else zero


@cuda_kernel("number[:, :, ::1], number[:, :, ::1], number[:, ::1]", THREADS)
def sort_samples(x, ascending, variances):
    """Write the sorted sample of a coordinate, and its variance."""
    n, p, count = x.shape[1], x.shape[2], ascending.shape[2]
    lane, group, column = cuda.threadIdx.x, cuda.blockIdx.x // p, cuda.blockIdx.x % p
    sample = cuda.shared.array(SAMPLE, x.dtype)
    zero = x.dtype.type(0.0)
    for j in range(lane, count, THREADS):
        sample[j] = finite_or_zero(x[group, j * n // count, column], zero)
    cuda.syncthreads()
    for j in range(lane, count, THREADS):
        number, place = sample[j], 0
        for i in range(count):
            place += sample[i] < number or (sample[i] == number and i < j)
        ascending[group, column, place] = number
    if lane == 0:
        mean, total = zero, zero
        for i in range(count):
            mean += sample[i]
        mean /= x.dtype.type(count)
        for i in range(count):
            total += (sample[i] - mean) * (sample[i] - mean)
        variances[group, column] = total / x.dtype.type(count)


@cuda_kernel("number[:, ::1], int32[:, :, ::1]", 1)
def deal_bits(variances, dealt):
    """Write the coordinate that each bit belongs to, and how many bits it has with that."""
    group, p = cuda.blockIdx.x, variances.shape[1]
    shares = cuda.shared.array(COLUMNS, variances.dtype)
    counts = cuda.shared.array(COLUMNS, np.int32)
    for t in range(p):
        shares[t], counts[t] = variances[group, t], 0
    for bit in range(dealt.shape[2]):
        widest = 0
        for t in range(1, p):
            if shares[t] > shares[widest]:
                widest = t
        shares[widest] /= variances.dtype.type(RATIO)
        counts[widest] += 1
        dealt[0, group, bit], dealt[1, group, bit] = widest, counts[widest]


@cuda_kernel("number[:, :, ::1], number[:, :, ::1], int32[:, :, ::1], int64, int32[:, ::1]", THREADS)
def number_cells(x, ascending, dealt, in_order, codes):
    """Write the codes of a tile of rows."""
    n, p, count, given = x.shape[1], x.shape[2], ascending.shape[2], dealt.shape[2]
    lane, tiles = cuda.threadIdx.x, -(-n // THREADS)
    group, row = cuda.blockIdx.x // tiles, cuda.blockIdx.x % tiles * THREADS + lane
    zero = x.dtype.type(0.0)
    sample = cuda.shared.array(SAMPLE, x.dtype)
    columns = cuda.shared.array(BITS, np.int32)
    depths = cuda.shared.array(BITS, np.int32)
    for bit in range(lane, given, THREADS):
        columns[bit], depths[bit] = dealt[0, group, bit], dealt[1, group, bit]
    cuda.syncthreads()
    code = 0
    for column in range(p):
        used = False
        for bit in range(given):
            used |= columns[bit] == column
        # All threads agree on that.
        if used:
            for j in range(lane, count, THREADS):
                sample[j] = ascending[group, column, j]
            cuda.syncthreads()
            if row < n:
                number, low, high = finite_or_zero(x[group, row, column], zero), 0, count
                while low < high:
                    middle = (low + high) >> 1
                    if sample[middle] <= number:
                        low = middle + 1
                    else:
                        high = middle
                for bit in range(given):
                    if columns[bit] == column:
                        cell = (low << depths[bit]) // (count + 1)
                        code |= ((cell ^ (cell >> 1)) & 1) << (given - 1 - bit)
            cuda.syncthreads()
    if row < n:
        shift = 1
        while shift < given:
            code ^= code >> shift
            shift *= 2
        codes[group, row] = ((((row + 1) << in_order) - 1) // n << given) | code
