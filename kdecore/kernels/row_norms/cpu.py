"""`row_norms` in Numba for the CPU."""

import numpy as np

from kdecore.kernels.jit import kernel
from kdecore.kernels.threads import run_tasks, thread_count
from kdecore.namespaces import Array, Namespace, from_host_like, host_view

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
        threads=thread_count(),
        chunk=1,
    )
    top = largest.max(axis=1, initial=0.0, keepdims=True)
    return from_host_like(xp, largest / np.where(top > 0, top, 1.0) * relative, rows)


@kernel(fastmath={"reassoc", "contract"})
def norms(rows, largest, relative, first, last):
    """Write each row's largest finite absolute value, and its norm in units of that; 0 for a row that is not finite."""
    for i in range(first * TASK_ROWS, min(rows.shape[0], last * TASK_ROWS)):
        row = rows[i]
        top = 0.0
        for t in range(row.shape[0]):
            size = abs(np.float64(row[t]))
            if size > top and size < np.inf:
                top = size
        # A least number, since the inverse of a subnormal one is infinite.
        unit = max(top, 1e-300)
        inverse = 1.0 / unit
        total = 0.0
        for t in range(row.shape[0]):
            scaled = row[t] * inverse
            total += scaled * scaled
        largest[i] = unit if top > 0 else 0.0
        relative[i] = np.sqrt(total) if total < np.inf else 0.0
