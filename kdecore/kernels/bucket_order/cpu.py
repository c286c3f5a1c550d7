"""`bucket_order` in Numba for the CPU: a counting sort, stable and linear."""

import numpy as np

from kdecore.arrays.memory import from_host_like, host_view
from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.runtime.jit import kernel
from kdecore.kernels.runtime.threads import run_tasks, small_tasks


def bucket_order(xp: Namespace, codes: Array, bits: int) -> Array:
    """Follow `kdecore.kernels.bucket_order.contract.BucketOrder`."""
    codes_ = host_view(codes)
    groups, n = codes_.shape
    buckets = int(codes_.max(initial=0)) + 1
    if buckets > 8 * n + 65536:  # counting would cost more than comparing
        return from_host_like(xp, np.argsort(codes_, axis=-1, stable=True).astype(np.int64, copy=False), codes)
    order = np.empty((groups, n), np.int64)
    run_tasks(
        lambda first, last: counting_sort(codes_, buckets, order, first, last),
        groups,
        chunk=small_tasks(n),
    )
    return from_host_like(xp, order, codes)


@kernel()
def counting_sort(codes, buckets, order, first, last):
    """Write the stable order of groups first … last − 1."""
    n = codes.shape[1]
    for group in range(first, last):
        place = np.zeros(buckets + 1, np.int64)
        for i in range(n):
            place[codes[group, i] + 1] += 1
        for bucket in range(buckets):
            place[bucket + 1] += place[bucket]
        for i in range(n):
            bucket = codes[group, i]
            order[group, place[bucket]] = i
            place[bucket] += 1
