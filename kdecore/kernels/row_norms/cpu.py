"""`row_norms` in Numba for the CPU."""

import numpy as np

from kdecore.arrays.memory import from_host_like, host_view
from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.runtime.jit import kernel
from kdecore.kernels.runtime.simd import VECTOR_BYTES, largest_size, scaled_squares
from kdecore.kernels.runtime.threads import run_tasks

TASK_ROWS = 4096
"""Rows in a task."""


def row_norms(xp: Namespace, rows: Array) -> Array:
    """Follow `kdecore.kernels.row_norms.contract.RowNorms`."""
    rows_ = host_view(rows)
    groups, n, d = rows_.shape
    largest, relative = np.empty((groups, n)), np.empty((groups, n))
    flat = rows_.reshape(groups * n, d)
    run_tasks(
        lambda first, last: norms(flat, largest.reshape(-1), relative.reshape(-1), first, last),
        -(-groups * n // TASK_ROWS),
        chunk=1,
    )
    top = largest.max(axis=1, initial=0.0, keepdims=True)
    return from_host_like(xp, largest / np.where(top > 0, top, 1.0) * relative, rows)


@kernel()
def norms(rows, largest, relative, first, last):
    """Write each row's largest finite absolute value, and its norm in units of that; 0 for a row that is not finite."""
    count, d = rows.shape
    vectors = d * rows.itemsize // VECTOR_BYTES
    rest = vectors * VECTOR_BYTES // rows.itemsize
    flat = rows.reshape(-1)
    for i in range(first * TASK_ROWS, min(count, last * TASK_ROWS)):
        start = i * d
        top = float(largest_size(flat, start, vectors))
        # Only finite numbers count, which the vectors do not tell apart.
        top = top if top < np.inf else 0.0
        for t in range(rest if top > 0 else 0, d):
            size = abs(np.float64(flat[start + t]))
            if size > top and size < np.inf:
                top = size
        # A least number, since the inverse of a subnormal one is infinite.
        unit = max(top, 1e-300)
        inverse = 1.0 / unit
        total = scaled_squares(flat, start, vectors, inverse)
        for t in range(rest, d):
            scaled = flat[start + t] * inverse
            total += scaled * scaled
        largest[i] = unit if top > 0 else 0.0
        relative[i] = np.sqrt(total) if total < np.inf else 0.0
