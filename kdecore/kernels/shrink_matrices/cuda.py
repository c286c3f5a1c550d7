"""`shrink_matrices` in Numba CUDA: a thread block for each matrix, which finds anew what its group has in common.

On paper, 64 matrices of 64 · 64 in all: of one group each block reads all of them, 1 MB from the second-level cache, some 10
µs; of 16 groups a sixteenth of that.
"""

import numpy as np
from numba import cuda

from kdecore.arrays.namespace import Array, Namespace, dtype_name
from kdecore.kernels.runtime.cuda_jit import cuda_kernel, launch
from kdecore.kernels.shrink_matrices.reference import chance_limits

THREADS = 256
TINY = {"THREADS": 8}
"""What tests in the simulator put in their place: a power of two."""


def shrink_matrices(xp: Namespace, matrices: Array, chances: Array, each_block: bool, factor: float) -> Array:
    """Follow `kdecore.kernels.shrink_matrices.contract.ShrinkMatrices`."""
    groups, blocks, d, d_v = matrices.shape
    kept = blocks if each_block else 1
    found = xp.empty((groups, kept, d, d_v), dtype=matrices.dtype, device=matrices.device)
    flat, out = (xp.reshape(x, (groups, int(x.shape[1]), d * d_v)) for x in (matrices, found))
    numbers = (getattr(np, dtype_name(chances))(x) for x in (*chance_limits(xp, chances), factor))
    launch(shrink, groups * kept, THREADS, flat, chances, *numbers, out)
    return found


@cuda.jit(device=True)
def added_up(number, sums):
    """Return the sum of all threads' numbers."""
    thread = cuda.threadIdx.x
    cuda.syncthreads()
    sums[thread] = number
    width = THREADS // 2
    while width > 0:
        cuda.syncthreads()
        if thread < width:
            sums[thread] += sums[thread + width]
        width //= 2
    cuda.syncthreads()
    return sums[0]


@cuda_kernel("number[:, :, ::1], number[:, ::1], number, number, number, number[:, :, ::1]", THREADS)
def shrink(matrices, chances, least, most, factor, found):
    """Write a matrix."""
    blocks, kept, size = matrices.shape[1], found.shape[1], found.shape[2]
    group, block = cuda.blockIdx.x // kept, cuda.blockIdx.x % kept
    number = found.dtype.type
    sums = cuda.shared.array(THREADS, found.dtype)
    of_common = number(0.0)
    for i in range(blocks):
        of_common += min(max(chances[group, i], least), most) / number(blocks)
    of_common /= number(blocks)
    of_own = min(max(chances[group, block], least), most)
    signal = number(0.0)
    for e in range(cuda.threadIdx.x, size, THREADS):
        common = number(0.0)
        for i in range(blocks):
            common += matrices[group, i, e]
        common /= number(blocks)
        signal += common * common
        found[group, block, e] = common
    signal = added_up(signal, sums)
    common_part, own_part = number(1.0) - of_common / max(signal, of_common), number(0.0)
    if kept == blocks:
        signal = number(0.0)
        for e in range(cuda.threadIdx.x, size, THREADS):
            own = matrices[group, block, e] - common_part * found[group, block, e]
            signal += own * own
        own_part = number(1.0) - of_own / max(added_up(signal, sums), of_own)
    for e in range(cuda.threadIdx.x, size, THREADS):
        common = common_part * found[group, block, e]
        found[group, block, e] = factor * (common + own_part * (matrices[group, block, e] - common))
