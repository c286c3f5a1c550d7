"""`project_rows` in Numba for the CPU: rows across the lanes, as many at a time as a vector has."""

import numpy as np

from kdecore.arrays.memory import from_host_like, host_view
from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.attend_blocks.cpu import load_queries, round_up
from kdecore.kernels.runtime.jit import kernel
from kdecore.kernels.runtime.simd import TILE_ROWS, VECTOR_BYTES, multiply_tile
from kdecore.kernels.runtime.threads import run_tasks, small_tasks

TASK_ROWS = 512
"""Rows in a task."""
DEPTH = 256
"""Columns multiplied together: their products are added up in two levels, so that errors grow little with d."""


def project_rows(xp: Namespace, rows: Array, matrix: Array, less: Array | None = None) -> Array:
    """Follow `kdecore.kernels.project_rows.contract.ProjectRows`."""
    rows_, matrix_ = host_view(rows), host_view(matrix)
    groups, n, _ = rows_.shape
    out = np.empty((groups, n, matrix_.shape[2]), rows_.dtype)
    chunk = small_tasks(min(n, TASK_ROWS) * rows_.shape[2])
    run_tasks(lambda first, last: project(rows_, matrix_, out, first, last), groups * -(-n // TASK_ROWS), chunk=chunk)
    if less is not None:
        out -= host_view(less)
    return from_host_like(xp, out, rows)


@kernel()
def project(rows, matrix, out, first, last):
    """Write the products of tasks first … last − 1."""
    _, n, d = rows.shape
    p = matrix.shape[2]
    lanes = VECTOR_BYTES // rows.itemsize
    parts = -(-n // TASK_ROWS)
    width = round_up(p, TILE_ROWS)
    flat, flat_out = rows.reshape(-1), out.reshape(-1)
    columns = np.zeros(d * width, rows.dtype)
    panel, found = np.empty(d * lanes, rows.dtype), np.empty(width * lanes, rows.dtype)
    index = np.empty(lanes, np.int64)
    zeros = np.zeros(TILE_ROWS, rows.dtype)
    one = rows.dtype.type(1.0)
    held = -1
    for task in range(first, last):
        group = task // parts
        if group != held:
            held = group
            for t in range(d):
                for j in range(p):
                    columns[t * width + j] = matrix[group, t, j]
        end = group * n + min(n, (task % parts + 1) * TASK_ROWS)
        for i in range(group * n + task % parts * TASK_ROWS, end, lanes):
            for r in range(lanes):
                index[r] = min(i + r, end - 1)
            load_queries(flat, index, 0, d, one, panel)
            for t in range(0, d, DEPTH):
                depth = min(DEPTH, d - t)
                for j in range(0, width, TILE_ROWS):
                    at, b, fresh = t * width + j, t * lanes, t == 0
                    multiply_tile(columns, at, 1, width, panel, b, depth, zeros, 0, found, j * lanes, fresh)
            for r in range(min(lanes, end - i)):
                for j in range(p):
                    flat_out[(i + r) * p + j] = found[j * lanes + r]
