"""`gap_moments` in Numba for the CPU: a block a task, its gaps in cache."""

import numpy as np

from kdecore.arrays.memory import from_host_like, host_view
from kdecore.arrays.namespace import Array, Namespace, host
from kdecore.kernels.gap_moments.reference import draw
from kdecore.kernels.runtime.jit import kernel
from kdecore.kernels.runtime.simd import TILE_ROWS, VECTOR_BYTES, multiply_tile, prefetch
from kdecore.kernels.runtime.threads import run_tasks

DEPTH = 64
"""Keys that are multiplied together: their gaps stay in the first-level cache."""
AHEAD = 4
"""Keys that are asked for before they are read."""


def gap_moments(
    xp: Namespace, keys: Array, values: Array, key_index: Array, share: Array, nodes: int, draws: int
) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.gap_moments.contract.GapMoments`."""
    drawn = draw(host, host_view(key_index), host_view(share), nodes, int(keys.shape[1]) - nodes, draws)
    inputs = host_view(keys), host_view(values), *drawn
    (groups, blocks, _), d, d_v = inputs[2].shape, inputs[0].shape[2], inputs[1].shape[2] - 1
    found = np.zeros((groups, blocks, d, d_v), inputs[0].dtype), np.zeros((groups, blocks), inputs[0].dtype)
    run_tasks(lambda first, last: multiply(*inputs, *found, first, last), groups * blocks, chunk=1)
    matrices, chances = (from_host_like(xp, x, keys) for x in found)
    return matrices, chances


@kernel()
def multiply(keys, values, drawn, mean, matrices, chances, first, last):
    """Write the matrices and chances of blocks first … last − 1, counted through all groups."""
    _, blocks, count = drawn.shape
    rows, d, d_v = keys.shape[1], keys.shape[2], values.shape[2] - 1
    lanes = VECTOR_BYTES // keys.itemsize
    height, panels = -(-d // TILE_ROWS) * TILE_ROWS, -(-d_v // lanes)
    flat_keys, flat_values = keys.reshape(-1), values.reshape(-1)
    of_keys, of_values = np.zeros(DEPTH * height, keys.dtype), np.zeros(panels * DEPTH * lanes, keys.dtype)
    found, zeros = np.zeros(panels * height * lanes, keys.dtype), np.zeros(TILE_ROWS, keys.dtype)
    for task in range(first, last):
        group, block = task // blocks, task % blocks
        total, spread = 0.0, 0.0
        for at in range(0, count, DEPTH):
            depth = min(DEPTH, count - at)
            for r in range(depth):
                ahead = group * rows + drawn[group, block, min(at + r + AHEAD, count - 1)]
                prefetch(flat_keys, ahead * d, d)
                prefetch(flat_values, ahead * (d_v + 1), d_v)
                row, middle = group * rows + drawn[group, block, at + r], group * rows + mean[group, block, at + r]
                size, value_size = keys.dtype.type(0.0), keys.dtype.type(0.0)
                source, centre, target = np.uintp(row * d), np.uintp(middle * d), np.uintp(r * height)
                for t in range(np.uintp(d)):
                    gap = flat_keys[source + t] - flat_keys[centre + t]
                    of_keys[target + t] = gap
                    size += gap * gap
                source, centre = np.uintp(row * (d_v + 1)), np.uintp(middle * (d_v + 1))
                for j in range(0, d_v, lanes):
                    target, start = np.uintp((j * DEPTH) + r * lanes), np.uintp(j)
                    for i in range(np.uintp(min(lanes, d_v - j))):
                        gap = flat_values[source + start + i] - flat_values[centre + start + i]
                        of_values[target + i] = gap
                        value_size += gap * gap
                total += np.float64(size) * value_size
                spread += size
            for panel in range(panels):
                for i in range(0, height, TILE_ROWS):
                    to, begin = (panel * height + i) * lanes, panel * DEPTH * lanes
                    multiply_tile(of_keys, i, 1, height, of_values, begin, depth, zeros, 0, found, to, at == 0)
        unit = keys.dtype.type(1.0 / spread if spread > 0 else 0.0)
        chances[group, block] = total * unit * unit
        for i in range(d):
            for j in range(d_v):
                matrices[group, block, i, j] = found[(j // lanes * height + i) * lanes + j % lanes] * unit
