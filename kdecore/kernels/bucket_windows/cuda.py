"""`bucket_windows` in Numba CUDA: a binary search a thread, four of them for a block of queries.

On paper: 16,384 blocks over orders of 131,072 rows take 36 dependent reads a thread, a row's number and its code in turn,
most of them from cache: some ten microseconds, where array operations take some fifty launches. Codes in order would take
half as many reads, and two launches more to put them so.
"""

import numpy as np
from numba import cuda

from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.runtime.cuda_jit import cuda_kernel, launch

SEARCHES = 4
"""Of a block: for the first of its middle query's bucket and for the one behind the last, among queries and among keys."""
THREADS = 128
TINY = {"THREADS": 8}
"""What tests in the simulator put in its place."""


def bucket_windows(
    xp: Namespace, query_codes: Array, query_order: Array, key_codes: Array, key_order: Array, blocks: int, size: int
) -> Array:
    """Follow `kdecore.kernels.bucket_windows.contract.BucketWindows`."""
    groups = int(query_codes.shape[0])
    starts = xp.empty((groups, blocks), dtype=xp.int64, device=query_codes.device)
    grid = groups * -(-blocks * SEARCHES // THREADS)
    launch(place_windows, grid, THREADS, query_codes, query_order, key_codes, key_order, size, starts)
    return starts


@cuda.jit(device=True)
def first_not_below(codes, order, group, value):
    """Return the first place in a group's order whose code is at least ``value``."""
    low, high = 0, order.shape[1]
    while low < high:
        middle = (low + high) >> 1
        if codes[group, order[group, middle]] < value:
            low = middle + 1
        else:
            high = middle
    return low


@cuda_kernel(
    "int16[:, ::1], int64[:, ::1], int16[:, ::1], int64[:, ::1], int64, int64[:, ::1]",
    THREADS,
)
def place_windows(query_codes, query_order, key_codes, key_order, size, starts):
    """Write where some blocks' windows begin."""
    n_q, n_k, blocks = query_order.shape[1], key_order.shape[1], starts.shape[1]
    thread, tiles = cuda.threadIdx.x, -(-blocks * SEARCHES // THREADS)
    group, place = cuda.blockIdx.x // tiles, cuda.blockIdx.x % tiles * THREADS + thread
    i, search = place // SEARCHES, place % SEARCHES
    middle = (i * n_q // blocks + (i + 1) * n_q // blocks) // 2
    found = cuda.shared.array(THREADS, np.int64)
    if i < blocks:
        code = int(query_codes[group, query_order[group, middle]])
        if search < 2:
            found[thread] = first_not_below(query_codes, query_order, group, code + search)
        else:
            found[thread] = first_not_below(key_codes, key_order, group, code + search - 2)
    cuda.syncthreads()
    if i < blocks and search == 0:
        q_first, k_first = found[thread], found[thread + 2]
        q_count, k_count = found[thread + 1] - q_first, found[thread + 3] - k_first
        halves = (2 * (middle - q_first) + 1) * k_count - size * q_count
        starts[group, i] = min(max(k_first + halves // (2 * q_count), 0), n_k - size)
