"""`hash_codes` in Numba for the CPU: projections in register tiles, then each row's signs and Gray rank."""

import numpy as np

from kdecore.arrays.memory import from_host_like, host_view
from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.runtime.jit import kernel
from kdecore.kernels.runtime.simd import TILE_ROWS, VECTOR_BYTES, add_finite, copy_rows, greater, multiply_tile
from kdecore.kernels.runtime.threads import run_tasks, small_tasks

TASK_ROWS = 2046
"""Rows in a task, a multiple of `TILE_ROWS`."""


def hash_codes(xp: Namespace, q: Array, k: Array, planes: Array) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.hash_codes.contract.HashCodes`."""
    return hash_rows(xp, q, planes), hash_rows(xp, k, planes)


def hash_rows(xp: Namespace, x: Array, planes: Array) -> Array:
    """Return the buckets of rows (G, n, d)."""
    rows, normals = host_view(x), host_view(planes)
    groups, n, d = rows.shape
    bits = normals.shape[1]
    lanes = VECTOR_BYTES // rows.itemsize
    panels = -(-bits // lanes)
    # Panels of one vector, the last plane in the first lane: a comparison of lanes is then the sign pattern as it stands.
    padded = np.zeros((d, panels * lanes), rows.dtype)
    padded[:, :bits] = normals[:, ::-1]
    normals = np.ascontiguousarray(padded.reshape(d, panels, lanes).transpose(1, 0, 2))
    tasks = -(-n // TASK_ROWS)
    projected = np.empty((panels, groups, n, lanes), rows.dtype)
    sums, counts = np.zeros((2, groups, tasks, panels, lanes), np.float64)
    codes = np.empty((groups, n), np.int16 if bits <= 15 else np.int32)

    run_tasks(
        lambda first, last: project(rows, normals, projected, sums, counts, first, last),
        groups * tasks,
        chunk=1,
    )
    means = (sums.sum(axis=1) / np.maximum(counts.sum(axis=1), 1.0)).astype(rows.dtype)
    run_tasks(
        lambda first, last: pack(projected, means, bits, codes, first, last),
        groups,
        chunk=small_tasks(4 * n * panels),
    )
    return from_host_like(xp, codes, x)


@kernel()
def project(rows, normals, projected, sums, counts, first, last):
    """Write ⟨row, plane⟩ for the rows of tasks first … last − 1, and each task's sums and numbers of finite ones."""
    _, n, d = rows.shape
    panels, _, lanes = normals.shape
    tasks = sums.shape[1]
    flat_rows, flat_normals, flat_projected = rows.reshape(-1), normals.reshape(-1), projected.reshape(-1)
    zeros = np.zeros(TILE_ROWS, rows.dtype)
    spare_rows = np.zeros(TILE_ROWS * d, rows.dtype)
    spare = np.zeros(TILE_ROWS * lanes, rows.dtype)
    for task in range(first, last):
        group, begin = task // tasks, task % tasks * TASK_ROWS
        end = min(n, begin + TASK_ROWS)
        for panel in range(panels):
            plane, target = panel * d * lanes, (panel * rows.shape[0] + group) * n * lanes
            for i in range(begin, end - TILE_ROWS + 1, TILE_ROWS):
                source = (group * n + i) * d
                multiply_tile(
                    flat_rows, source, d, 1, flat_normals, plane, d, zeros, 0, flat_projected, target + i * lanes, True
                )
            rest = (end - begin) % TILE_ROWS
            if rest:
                source = (group * n + end - rest) * d
                copy_rows(flat_rows, source, spare_rows, 0, rest * d)
                multiply_tile(spare_rows, 0, d, 1, flat_normals, plane, d, zeros, 0, spare, 0, True)
                copy_rows(spare, 0, flat_projected, target + (end - rest) * lanes, rest * lanes)
            add_finite(
                flat_projected,
                target + begin * lanes,
                end - begin,
                sums[group, task % tasks, panel],
                counts[group, task % tasks, panel],
            )


@kernel()
def pack(projected, means, bits, codes, first, last):
    """Write the Gray rank of the sign patterns of groups first … last − 1."""
    panels, groups, n, lanes = projected.shape
    flat_projected, flat_means = projected.reshape(-1), means.reshape(-1)
    for group in range(first, last):
        for i in range(n):
            code = 0
            for panel in range(panels):
                place = ((panel * groups + group) * n + i) * lanes
                code |= greater(flat_projected, place, flat_means, (group * panels + panel) * lanes) << (panel * lanes)
            shift = 1
            while shift < bits:
                code ^= code >> shift
                shift *= 2
            codes[group, i] = code
