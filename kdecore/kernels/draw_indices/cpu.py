"""`draw_indices` in Numba for the CPU: points are found by a guide table (Chen & Asau 1974), in a few steps at any n."""

import numpy as np

from kdecore.arrays.memory import from_host_like, host_view
from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.runtime.jit import kernel
from kdecore.kernels.runtime.threads import run_tasks, small_tasks


def draw_indices(
    xp: Namespace, weights: Array, window_start: Array, window_size: int, starts: Array, count: int
) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.draw_indices.contract.DrawIndices`."""
    weights_, windows, starts_ = host_view(weights), host_view(window_start), host_view(starts)
    groups, n = weights_.shape
    blocks = windows.shape[1]
    cumulative = np.zeros((groups, n + 1), np.float64)
    np.cumsum(weights_, axis=1, out=cumulative[:, 1:])
    guide = np.empty((groups, n), np.int64)
    positions = np.empty((groups, blocks, count), np.int64)
    log_inclusion = np.empty((groups, blocks, count), np.float64)
    log_weights = np.log(weights_)

    def work(first: int, last: int) -> None:
        draw(cumulative, guide, log_weights, windows, window_size, starts_, positions, log_inclusion, first, last)

    run_tasks(lambda first, last: fill_guide(cumulative, guide, first, last), groups, chunk=small_tasks(n))
    run_tasks(work, groups * blocks, chunk=small_tasks(count))
    return from_host_like(xp, positions, weights), from_host_like(xp, log_inclusion, weights)


@kernel()
def draw(cumulative, guide, log_weights, windows, size, starts, positions, log_inclusion, first, last):
    """Draw for blocks first … last − 1, counted through all groups."""
    blocks, count = positions.shape[1], positions.shape[2]
    n = log_weights.shape[1]
    for task in range(first, last):
        group, block = task // blocks, task % blocks
        sums, places = cumulative[group], guide[group]
        bins = n / sums[n]
        start = windows[group, block]
        below = sums[start]
        inside = sums[start + size] - below
        total = sums[n] - inside
        step = total / count
        shift = np.log(np.float64(count)) - np.log(total)
        for i in range(count):
            point = (starts[group, block] + i) * step
            # Where the window is at the end, nothing lies after it, whatever rounding says.
            after = point >= below and start + size < n
            if after:
                point += inside
            found = last_at_most(sums, places[min(int(point * bins), n - 1)], point)
            # Rounding may put a point on the wrong side of the window's edge, or past the end.
            position = max(found, start + size) if after else min(found, start - 1)
            position = min(max(position, 0), n - 1)
            positions[group, block, i] = position
            log_inclusion[group, block, i] = log_weights[group, position] + shift


@kernel()
def fill_guide(cumulative, guide, first, last):
    """Write, for each of n equal parts of the sum, where it begins: the last index whose sum is at most the part's start."""
    n = guide.shape[1]
    for group in range(first, last):
        sums, place = cumulative[group], 0
        for j in range(n):
            place = last_at_most(sums, place, j * (sums[n] / n))
            guide[group, j] = place


@kernel()
def last_at_most(ascending, near, value):
    """Return the last index whose element is at most ``value``, step by step from one ``near`` it; 0 if there is none."""
    place = near
    while place > 0 and ascending[place] > value:
        place -= 1
    while place + 1 < ascending.shape[0] and ascending[place + 1] <= value:
        place += 1
    return place
