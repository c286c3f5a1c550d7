"""`draw_indices` in Numba for the CPU: each block's ascending points are found by galloping from the last one."""

import numpy as np

from kdecore.kernels.jit import kernel
from kdecore.kernels.threads import run_tasks, small_tasks
from kdecore.namespaces import Array, Namespace, from_host_like, host_view


def draw_indices(
    xp: Namespace, weights: Array, window_start: Array, window_size: int, starts: Array, count: int
) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.draw_indices.contract.DrawIndices`."""
    weights_, windows, starts_ = host_view(weights), host_view(window_start), host_view(starts)
    groups, n = weights_.shape
    blocks = windows.shape[1]
    cumulative = np.zeros((groups, n + 1), np.float64)
    np.cumsum(weights_, axis=1, out=cumulative[:, 1:])
    positions = np.empty((groups, blocks, count), np.int64)
    log_inclusion = np.empty((groups, blocks, count), np.float64)
    log_weights = np.log(weights_)

    def work(first: int, last: int) -> None:
        draw(cumulative, log_weights, windows, window_size, starts_, positions, log_inclusion, first, last)

    run_tasks(work, groups * blocks, chunk=small_tasks(count))
    return from_host_like(xp, positions, weights), from_host_like(xp, log_inclusion, weights)


@kernel()
def draw(cumulative, log_weights, windows, size, starts, positions, log_inclusion, first, last):
    """Draw for blocks first … last − 1, counted through all groups."""
    blocks, count = positions.shape[1], positions.shape[2]
    n = log_weights.shape[1]
    for task in range(first, last):
        group, block = task // blocks, task % blocks
        sums = cumulative[group]
        start = windows[group, block]
        below = sums[start]
        inside = sums[start + size] - below
        total = sums[n] - inside
        step = total / count
        shift = np.log(np.float64(count)) - np.log(total)
        found = 0
        for i in range(count):
            point = (starts[group, block] + i) * step
            # Where the window is at the end, nothing lies after it, whatever rounding says.
            after = point >= below and start + size < n
            if after:
                point += inside
            found = last_at_most(sums, found, point)
            # Rounding may put a point on the wrong side of the window's edge, or past the end.
            position = max(found, start + size) if after else min(found, start - 1)
            position = min(max(position, 0), n - 1)
            positions[group, block, i] = position
            log_inclusion[group, block, i] = log_weights[group, position] + shift


@kernel()
def last_at_most(ascending, start, value):
    """Return the last index at or after ``start`` whose element is at most ``value``; ``start`` if there is none."""
    low, step = start, 1
    high = ascending.shape[0]
    while low + step < high and ascending[low + step] <= value:
        low += step
        step *= 2
    high = min(high, low + step)
    while high - low > 1:
        middle = (low + high) // 2
        if ascending[middle] <= value:
            low = middle
        else:
            high = middle
    return low
