"""`second_moment` in Numba for the CPU: columns across the lanes, stretches of rows by themselves and then added up."""

from functools import partial

import numpy as np

from kdecore.arrays.memory import from_host_like, host_view
from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.runtime.jit import kernel
from kdecore.kernels.runtime.simd import TILE_ROWS, VECTOR_BYTES, copy_vector, multiply_tile
from kdecore.kernels.runtime.threads import run_tasks

TASK_ROWS = 512
"""Rows in a task; the result doesn't depend on how many threads share the tasks."""
DEPTH = 64
"""Rows multiplied together: their columns stay in the first-level cache."""


def second_moment(xp: Namespace, rows: Array, step: int, centred: bool) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.second_moment.contract.SecondMoment`."""
    given = host_view(rows)
    groups, n, d = given.shape
    count = -(-n // step)
    parts = -(-count // TASK_ROWS)
    means, sums = np.zeros((groups, d)), np.zeros((groups, parts, d, d))
    run_tasks(partial(write_means, given, step, means), groups, chunk=1)
    shift = means if centred else np.zeros_like(means)
    run_tasks(partial(multiply, given, step, shift, sums), groups * parts, chunk=1)
    return from_host_like(xp, sums.sum(axis=1) / count, rows), from_host_like(xp, means, rows)


@kernel()
def write_means(rows, step, means, first, last):
    """Write the mean rows of groups first … last − 1."""
    _, n, d = rows.shape
    count = -(-n // step)
    for group in range(first, last):
        for j in range(0, n, step):
            for t in range(d):
                value = np.float64(rows[group, j, t])
                means[group, t] += value if abs(value) < np.inf else 0.0
        for t in range(d):
            means[group, t] /= count


@kernel()
def multiply(rows, step, shift, sums, first, last):
    """Write the sums of x xᵀ over the rows, less ``shift``, of tasks first … last − 1."""
    _, n, d = rows.shape
    count, parts = -(-n // step), sums.shape[1]
    lanes = VECTOR_BYTES // sums.itemsize
    panels = -(-d // lanes)
    height = -(-panels * lanes // TILE_ROWS) * TILE_ROWS
    columns, zeros = np.zeros(DEPTH * height), np.zeros(TILE_ROWS)
    panel, found = np.zeros(DEPTH * lanes), np.zeros(panels * height * lanes)
    for task in range(first, last):
        group, part = task // parts, task % parts
        begin, end = part * TASK_ROWS, min(count, (part + 1) * TASK_ROWS)
        for at in range(begin, end, DEPTH):
            depth = min(DEPTH, end - at)
            for r in range(depth):
                row, target = (at + r) * step, r * height
                for t in range(d):
                    value = np.float64(rows[group, row, t])
                    columns[target + t] = (value if abs(value) < np.inf else 0.0) - shift[group, t]
            for p in range(panels):
                for r in range(depth):
                    copy_vector(columns, r * height + p * lanes, panel, r * lanes)
                # Of a symmetric matrix: what is above the diagonal.
                for i in range(0, min(height, (p + 1) * lanes), TILE_ROWS):
                    to = (p * height + i) * lanes
                    multiply_tile(columns, i, 1, height, panel, 0, depth, zeros, 0, found, to, at == begin)
        for j in range(d):
            for i in range(j + 1):
                value = found[(j // lanes * height + i) * lanes + j % lanes]
                sums[group, part, i, j] = value
                sums[group, part, j, i] = value
