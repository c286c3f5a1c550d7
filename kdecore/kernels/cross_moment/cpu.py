"""`cross_moment` in Numba for the CPU: columns of y across the lanes, stretches of rows by themselves and then added up."""

import numpy as np

from kdecore.kernels.jit import kernel
from kdecore.kernels.simd import TILE_ROWS, VECTOR_BYTES, multiply_tile
from kdecore.kernels.threads import run_tasks
from kdecore.namespaces import Array, Namespace, from_host_like, host_view

TASK_ROWS = 512
"""Rows in a task; the result doesn't depend on how many threads share the tasks."""
DEPTH = 128
"""Rows multiplied together: their columns stay in the first-level cache."""


def cross_moment(xp: Namespace, x: Array, y: Array) -> Array:
    """Follow `kdecore.kernels.cross_moment.contract.CrossMoment`."""
    x_, y_ = host_view(x), host_view(y)
    groups, n, d = x_.shape
    parts = -(-n // TASK_ROWS)
    sums = np.zeros((groups, parts, d, y_.shape[2]), x_.dtype)
    run_tasks(lambda first, last: multiply(x_, y_, sums, first, last), groups * parts, chunk=1)
    return from_host_like(xp, sums.sum(axis=1) / x_.dtype.type(n), x)


@kernel()
def multiply(x, y, sums, first, last):
    """Write the sums of x yᵀ over the rows of tasks first … last − 1."""
    _, n, d = x.shape
    parts, e = sums.shape[1], y.shape[2]
    lanes = VECTOR_BYTES // x.itemsize
    height, panels = -(-d // TILE_ROWS) * TILE_ROWS, -(-e // lanes)
    columns = np.zeros(DEPTH * height, x.dtype)
    panel = np.zeros(DEPTH * lanes, x.dtype)
    zeros = np.zeros(TILE_ROWS, x.dtype)
    found = np.zeros(panels * height * lanes, x.dtype)
    for task in range(first, last):
        group, part = task // parts, task % parts
        begin, end = part * TASK_ROWS, min(n, (part + 1) * TASK_ROWS)
        for at in range(begin, end, DEPTH):
            depth = min(DEPTH, end - at)
            for r in range(depth):
                for i in range(d):
                    columns[r * height + i] = x[group, at + r, i]
            for p in range(panels):
                width = min(lanes, e - p * lanes)
                for r in range(depth):
                    for j in range(width):
                        panel[r * lanes + j] = y[group, at + r, p * lanes + j]
                for i in range(0, height, TILE_ROWS):
                    to = (p * height + i) * lanes
                    multiply_tile(columns, i, 1, height, panel, 0, depth, zeros, 0, found, to, at == begin)
        for i in range(d):
            for j in range(e):
                sums[group, part, i, j] = found[(j // lanes * height + i) * lanes + j % lanes]
