"""`spoil_groups` in Numba CUDA: parts of each group's keys and values are looked through, then logarithms are written.

Traffic on paper: every key and value is read once, and logarithms are read and written. 2,097,152 rows of 64 bfloat16
numbers each are 0.54 GB, 0.18 ms at 3.0 TB/s; as many logarithms 0.02 GB.
"""

from typing import Any

import numpy as np
from numba import cuda

from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.runtime.cuda_jit import CudaKernel, cuda_kernel, for_each_reader, launch

THREADS = 256
PARTS = 32
"""Blocks that look through a group."""
TINY = {"THREADS": 8, "PARTS": 3}
"""What tests in the simulator put in their place."""


def spoil_groups(xp: Namespace, lse: Array, k: Array, v: Array) -> Array:
    """Follow `kdecore.kernels.spoil_groups.contract.SpoilGroups`."""
    groups, n_q = lse.shape
    finite = xp.empty((groups, PARTS), dtype=xp.bool, device=lse.device)
    found = xp.empty((groups, n_q), dtype=lse.dtype, device=lse.device)
    launch(look(k), groups * PARTS, THREADS, *(xp.reshape(x, (groups, -1)) for x in (k, v)), finite)
    launch(spoil, groups * -(-n_q // THREADS), THREADS, lse, finite, found)
    return found


@for_each_reader
def look(stored: str, read: Any) -> CudaKernel:
    """Make the first kernel."""

    @cuda_kernel("stored[:, ::1], stored[:, ::1], boolean[:, ::1]", THREADS, stored)
    def look(keys, values, finite):
        """Write whether one of `PARTS` interleaved parts of a group is finite throughout."""
        group, part = cuda.blockIdx.x // PARTS, cuda.blockIdx.x % PARTS
        first = part * THREADS + cuda.threadIdx.x
        whole = True
        for i in range(first, keys.shape[1], PARTS * THREADS):
            whole &= abs(read(keys[group, i])) < np.inf
        for i in range(first, values.shape[1], PARTS * THREADS):
            whole &= abs(read(values[group, i])) < np.inf
        every = cuda.syncthreads_and(1 if whole else 0)
        if cuda.threadIdx.x == 0:
            finite[group, part] = every != 0

    return look


@cuda_kernel("number[:, ::1], boolean[:, ::1], number[:, ::1]", THREADS)
def spoil(lse, finite, found):
    """Write the logarithms of some queries."""
    tiles = -(-lse.shape[1] // THREADS)
    group, query = cuda.blockIdx.x // tiles, cuda.blockIdx.x % tiles * THREADS + cuda.threadIdx.x
    whole = True
    for part in range(PARTS):
        whole &= finite[group, part]
    if query < lse.shape[1]:
        kept = lse[group, query]
        found[group, query] = kept if whole or kept == -np.inf else lse.dtype.type(np.nan)
