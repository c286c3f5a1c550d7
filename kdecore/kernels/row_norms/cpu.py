"""`row_norms` in Numba for the CPU."""

import numpy as np
from numba import njit

from kdecore.kernels.threads import run_tasks, thread_count
from kdecore.namespaces import Array, Namespace, host_view

TASK_ROWS = 4096
"""Rows in a task."""


def row_norms(xp: Namespace, rows: Array) -> Array:
    """Follow `kdecore.kernels.row_norms.contract.RowNorms`."""
    rows_ = host_view(rows)
    groups, n, _ = rows_.shape
    norms = np.empty((groups, n), np.float64)
    parts = -(-n // TASK_ROWS)
    largest = np.zeros((groups, parts))
    threads = thread_count()
    run_tasks(lambda first, last: find_largest(rows_, largest, first, last), groups * parts, threads=threads, chunk=1)
    largest = largest.max(axis=1, initial=0.0)
    run_tasks(lambda first, last: norm(rows_, largest, norms, first, last), groups * parts, threads=threads, chunk=1)
    return xp.asarray(norms)


@njit(nogil=True, cache=True)
def find_largest(rows, largest, first, last):
    """Write the largest finite absolute value of each part of each group."""
    n, parts = rows.shape[1], largest.shape[1]
    for task in range(first, last):
        group, part = task // parts, task % parts
        top = rows.dtype.type(0.0)
        for i in range(part * TASK_ROWS, min(n, (part + 1) * TASK_ROWS)):
            row = rows[group, i]
            for t in range(row.shape[0]):
                size = abs(row[t])
                if size > top and size < np.inf:
                    top = size
        largest[group, part] = top


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"}, error_model="numpy")
def norm(rows, largest, norms, first, last):
    """Write the relative norms of each part of each group."""
    n = rows.shape[1]
    parts = -(-n // TASK_ROWS)
    for task in range(first, last):
        group, part = task // parts, task % parts
        top = largest[group] if largest[group] > 0 else 1.0
        for i in range(part * TASK_ROWS, min(n, (part + 1) * TASK_ROWS)):
            row = rows[group, i]
            total = 0.0
            for t in range(row.shape[0]):
                relative = row[t] / top
                total += relative * relative
            norms[group, i] = np.sqrt(total) if total < np.inf else 0.0
