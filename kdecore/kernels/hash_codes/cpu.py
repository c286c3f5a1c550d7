"""`hash_codes` in Numba for the CPU: projections in register tiles, then each row's signs and Gray rank."""

import numpy as np

from kdecore.kernels.jit import kernel
from kdecore.kernels.simd import TILE_ROWS, VECTOR_BYTES, multiply_tile
from kdecore.kernels.threads import run_tasks, small_tasks, thread_count
from kdecore.namespaces import Array, Namespace, from_host_like, host_view

TASK_ROWS = 2052
"""Rows in a task, a multiple of `TILE_ROWS`."""


def hash_codes(xp: Namespace, x: Array, planes: Array) -> Array:
    """Follow `kdecore.kernels.hash_codes.contract.HashCodes`."""
    groups, n, d = x.shape
    bits = int(planes.shape[1])
    rows = host_view(x).reshape(groups * n, d)
    lanes = VECTOR_BYTES // rows.itemsize
    panels = -(-bits // lanes)
    # Panels of one vector, each with a plane in every lane.
    padded = np.zeros((d, panels * lanes), rows.dtype)
    padded[:, :bits] = host_view(planes)
    normals = np.ascontiguousarray(padded.reshape(d, panels, lanes).transpose(1, 0, 2))
    projected = np.empty((panels, groups * n, lanes), rows.dtype)
    codes = np.empty((groups, n), np.int16 if bits <= 15 else np.int32)

    run_tasks(
        lambda first, last: project(rows, normals, projected, first, last),
        -(-groups * n // TASK_ROWS),
        threads=thread_count(),
        chunk=1,
    )
    run_tasks(
        lambda first, last: pack(projected, bits, codes, first, last), groups, threads=thread_count(), chunk=small_tasks(n)
    )
    return from_host_like(xp, codes, x)


@kernel()
def project(rows, normals, projected, first, last):
    """Write ⟨row, plane⟩ for the rows of tasks first … last − 1."""
    count, d = rows.shape
    panels, _, lanes = normals.shape
    flat_rows, flat_normals, flat_projected = rows.reshape(-1), normals.reshape(-1), projected.reshape(-1)
    zeros = np.zeros(TILE_ROWS, rows.dtype)
    spare_rows = np.zeros(TILE_ROWS * d, rows.dtype)
    spare = np.zeros(TILE_ROWS * lanes, rows.dtype)
    end = min(count, last * TASK_ROWS)
    for i in range(first * TASK_ROWS, end, TILE_ROWS):
        for panel in range(panels):
            if i + TILE_ROWS <= count:
                target = (panel * count + i) * lanes
                multiply_tile(
                    flat_rows, i * d, d, 1, flat_normals, panel * d * lanes, d, zeros, 0, flat_projected, target, True
                )
            else:
                spare_rows[: (count - i) * d] = flat_rows[i * d :]
                multiply_tile(spare_rows, 0, d, 1, flat_normals, panel * d * lanes, d, zeros, 0, spare, 0, True)
                projected[panel, i:] = spare.reshape(TILE_ROWS, lanes)[: count - i]


@kernel()
def pack(projected, bits, codes, first, last):
    """Write the Gray rank of the sign patterns of groups first … last − 1."""
    panels, _, lanes = projected.shape
    n = codes.shape[1]
    means = np.empty((panels, lanes), projected.dtype)
    for group in range(first, last):
        for panel in range(panels):
            sums, counts = np.zeros(lanes, np.float64), np.zeros(lanes, np.float64)
            for i in range(group * n, (group + 1) * n):
                row = projected[panel, i]
                for lane in range(lanes):
                    finite = abs(row[lane]) < np.inf
                    sums[lane] += row[lane] if finite else 0.0
                    counts[lane] += finite
            means[panel] = (sums / np.maximum(counts, 1.0)).astype(projected.dtype)
        for i in range(n):
            code = 0
            for panel in range(-(-bits // lanes)):
                row, mean = projected[panel, group * n + i], means[panel]
                for lane in range(min(lanes, bits - panel * lanes)):
                    code = (code << 1) | (row[lane] > mean[lane])
            shift = 1
            while shift < bits:
                code ^= code >> shift
                shift *= 2
            codes[group, i] = code
