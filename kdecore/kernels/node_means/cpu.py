"""`node_means` in Numba for the CPU: level by level, from the rows up."""

from functools import partial

import numpy as np

from kdecore.kernels.jit import kernel
from kdecore.kernels.threads import run_tasks, small_tasks
from kdecore.namespaces import Array, Namespace, from_host_like, host_view
from kdecore.tree import inner_nodes, levels


def node_means(xp: Namespace, rows: Array, order: Array) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.node_means.contract.NodeMeans`."""
    rows_, order_ = host_view(rows), host_view(order)
    groups, n, width = rows_.shape
    inner = inner_nodes(n)
    means = np.empty((groups, inner + n, width), rows_.dtype)
    spread = np.empty((groups, inner), rows_.dtype)
    run_tasks(lambda first, last: copy(rows_, order_, inner, means, first, last), groups * n, chunk=small_tasks(width))
    for level in range(levels(n) - 1, -1, -1):
        run_tasks(
            partial(merge, level, means, spread),
            groups << level,
            chunk=small_tasks(width),
        )
    return from_host_like(xp, means, rows), from_host_like(xp, spread, rows)


@kernel()
def copy(rows, order, inner, means, first, last):
    """Copy the rows of positions first … last − 1, counted through all groups."""
    _, n, width = rows.shape
    flat, flat_means = rows.reshape(-1), means.reshape(-1)
    for task in range(first, last):
        group, i = task // n, task % n
        source = (group * n + order[group, i]) * width
        target = (group * (inner + n) + inner + i) * width
        for t in range(width):
            flat_means[target + t] = flat[source + t]


@kernel(fastmath={"reassoc", "contract", "nsz"})
def merge(level, means, spread, first, last):
    """Write the means and spreads of nodes first … last − 1 of a level, counted through all groups."""
    inner = spread.shape[1]
    total = means.shape[1]
    n, width = total - inner, means.shape[2]
    flat = means.reshape(-1)
    for task in range(first, last):
        group, i = task >> level, task & ((1 << level) - 1)
        start, end = (i * n) >> level, ((i + 1) * n) >> level
        middle = ((2 * i + 1) * n) >> (level + 1)
        node = (1 << level) - 1 + i
        low, high = 2 * node + 1, 2 * node + 2
        target = (group * total + node) * width
        if middle in (start, end):  # one row: an empty slot has no child to merge
            source = (group * total + inner + start) * width
            for t in range(width):
                flat[target + t] = flat[source + t]
            spread[group, node] = 0.0
            continue
        left = flat.dtype.type((middle - start) / (end - start))
        right = flat.dtype.type(1.0) - left
        within = flat.dtype.type(0.0)
        if low < inner:
            within = left * spread[group, low] + right * spread[group, high]
            first_row, second_row = low, high
        else:
            first_row, second_row = inner + start, inner + middle
        a, b = (group * total + first_row) * width, (group * total + second_row) * width
        between = flat.dtype.type(0.0)
        for t in range(width):
            gap = flat[a + t] - flat[b + t]
            between += gap * gap
            flat[target + t] = left * flat[a + t] + right * flat[b + t]
        spread[group, node] = within + left * right * between
