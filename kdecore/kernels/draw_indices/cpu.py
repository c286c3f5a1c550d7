"""`draw_indices` in Numba for the CPU: points are found by a guide table (Chen & Asau 1974), in a few steps at any n."""

import numpy as np

from kdecore.arrays.memory import from_host_like, host_view
from kdecore.arrays.namespace import Array, Namespace, host
from kdecore.kernels.draw_indices.contract import Weights
from kdecore.kernels.draw_indices.reference import shares_in_order
from kdecore.kernels.draw_uniform.reference import draw_uniform
from kdecore.kernels.runtime.jit import helper, kernel
from kdecore.kernels.runtime.threads import run_tasks, small_tasks


def draw_indices(
    xp: Namespace,
    order: Array,
    weights: Weights | None,
    window_start: Array,
    window_size: int,
    seed: int,
    stream: int,
    count: int,
    dtype: str,
) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.draw_indices.contract.DrawIndices`."""
    keys, windows = host_view(order), host_view(window_start)
    groups, n = keys.shape
    blocks = windows.shape[1]
    starts = draw_uniform(host, seed, stream, windows.shape, None)
    given = None if weights is None else Weights(*(host_view(x) for x in weights))
    shares = shares_in_order(host, keys, given, (n - window_size) / count)
    cumulative = np.zeros((groups, n + 1), np.float64)
    np.cumsum(shares, axis=1, out=cumulative[:, 1:])
    guide = np.empty((groups, n), np.int64)
    key_index = np.empty((groups, blocks, window_size + count), np.int64)
    log_weight = np.empty(key_index.shape, dtype)
    log_shares = np.log(shares)

    def work(first: int, last: int) -> None:
        draw(cumulative, guide, log_shares, keys, windows, window_size, starts, key_index, log_weight, first, last)

    run_tasks(lambda first, last: fill_guide(cumulative, guide, first, last), groups, chunk=small_tasks(n))
    run_tasks(work, groups * blocks, chunk=small_tasks(count))
    return from_host_like(xp, key_index, order), from_host_like(xp, log_weight, order)


@kernel()
def draw(cumulative, guide, log_shares, order, windows, size, starts, key_index, log_weight, first, last):
    """List keys for blocks first … last − 1, counted through all groups."""
    blocks, count = key_index.shape[1], key_index.shape[2] - size
    n = log_shares.shape[1]
    for task in range(first, last):
        group, block = task // blocks, task % blocks
        sums, places, keys = cumulative[group], guide[group], order[group]
        index, added = key_index[group, block], log_weight[group, block]
        bins = n / sums[n]
        start = windows[group, block]
        for i in range(size):
            index[i] = keys[start + i]
            added[i] = 0.0
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
            index[size + i] = keys[position]
            added[size + i] = -(log_shares[group, position] + shift)


@kernel()
def fill_guide(cumulative, guide, first, last):
    """Write, for each of n equal parts of the sum, where it begins: the last index whose sum is at most the part's start."""
    n = guide.shape[1]
    for group in range(first, last):
        sums, place = cumulative[group], 0
        for j in range(n):
            place = last_at_most(sums, place, j * (sums[n] / n))
            guide[group, j] = place


@helper()
def last_at_most(ascending, near, value):
    """Return the last index whose element is at most ``value``, step by step from one ``near`` it; 0 if there is none."""
    place = near
    while place > 0 and ascending[place] > value:
        place -= 1
    while place + 1 < ascending.shape[0] and ascending[place + 1] <= value:
        place += 1
    return place
