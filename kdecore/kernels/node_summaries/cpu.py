"""`node_summaries` in Numba for the CPU: a subtree a task, from its leaves up; then what lies above the subtrees."""

from functools import partial

import numpy as np

from kdecore.arrays.memory import from_host_like, host_view
from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.tree import depth, node_count
from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.kernels.runtime.jit import kernel
from kdecore.kernels.runtime.simd import copy_rows, prefetch
from kdecore.kernels.runtime.threads import run_tasks

TASK_ROWS = 512
"""Rows of a subtree, at most: they and their nodes stay in the second-level cache."""
AHEAD = 8
"""Rows that are asked for before they are copied."""


def node_summaries(
    xp: Namespace,
    k: Array,
    v: Array,
    coordinates: Array,
    sizes: Array,
    order: Array,
    leaf_size: int,
    half_norm: Array,
) -> TreeNodes:
    """Follow `kdecore.kernels.node_summaries.contract.NodeSummaries`."""
    k_, v_, along, sizes_, order_, norms = (host_view(x) for x in (k, v, coordinates, sizes, order, half_norm))
    groups, n, _ = k_.shape
    last = depth(n, leaf_size)
    nodes = node_count(n, leaf_size)
    keys, values = (np.empty((groups, nodes + n, x.shape[2] + more), x.dtype) for x, more in ((k_, 0), (v_, 1)))
    spread, means = np.empty((groups, nodes), k_.dtype), np.empty((groups, nodes), k_.dtype)
    centres, variances = (np.empty((groups, nodes, along.shape[2]), along.dtype) for _ in range(2))
    top = min(last, depth(n, TASK_ROWS))

    def work(low: int, high: int, begin: int, end: int) -> None:
        copied = low == last
        summarise_means(k_, order_, low, high, copied, False, norms, keys, spread, begin, end)
        summarise_means(v_, order_, low, high, copied, True, norms, values, spread, begin, end)
        summarise_variances(along, sizes_, order_, low, high, copied, centres, variances, means, begin, end)

    run_tasks(partial(work, last, top), groups << top, chunk=1)
    if top > 0:
        run_tasks(partial(work, top - 1, 0), groups, chunk=1)
    return TreeNodes(*(from_host_like(xp, x, k) for x in (keys, values, spread, variances, means)))


@kernel(fastmath={"reassoc", "contract", "nsz"})
def summarise_means(rows, order, low, high, from_rows, add_spread, half_norm, means, spread, first, last):
    """Write the means of levels low … high of the subtrees first … last − 1 below level ``high``.

    From rows, level ``low`` being that of the leaves; or else from the level below. With ``add_spread`` the means have a
    column more, for the spreads that are known already; otherwise these are written too.
    """
    _, n, width = rows.shape
    total = means.shape[1]
    nodes = total - n
    stride = means.shape[2]
    flat, out = rows.reshape(-1), means.reshape(-1)
    w, step = np.uintp(width), np.uintp(stride)
    for task in range(first, last):
        group, subtree = task >> high, task & ((1 << high) - 1)
        base, out_base = group * n, group * total
        if from_rows:
            for j in range((subtree * n) >> high, ((subtree + 1) * n) >> high):
                prefetch(flat, (base + order[group, min(j + AHEAD, n - 1)]) * width, width)
                copy_rows(flat, (base + order[group, j]) * width, out, (out_base + nodes + j) * stride, width)
                if add_spread:
                    out[(out_base + nodes + j) * stride + width] = 0.0
        for level in range(low, high - 1, -1):
            for i in range(subtree << (level - high), (subtree + 1) << (level - high)):
                start, end = (i * n) >> level, ((i + 1) * n) >> level
                node = (1 << level) - 1 + i
                target = np.uintp((out_base + node) * stride)
                within = out.dtype.type(0.0)
                if add_spread:
                    size, half = np.log(out.dtype.type(end - start)), half_norm[group]
                    found = spread[group, node]
                    out[target + w] = np.sqrt(found * size / half) if found * half > size else found
                if from_rows and level == low:
                    share = out.dtype.type(1.0 / (end - start))
                    source = np.uintp((out_base + nodes + start) * stride)
                    for t in range(w):
                        out[target + t] = out[source + t] * share
                    for j in range(1, end - start):
                        row = source + np.uintp(j) * step
                        for t in range(w):
                            out[target + t] += out[row + t] * share
                    if not add_spread:
                        for j in range(end - start):
                            row = source + np.uintp(j) * step
                            for t in range(w):
                                gap = out[row + t] - out[target + t]
                                within += gap * gap
                        spread[group, node] = within * share
                    continue
                left = out.dtype.type(((((2 * i + 1) * n) >> (level + 1)) - start) / (end - start))
                right = out.dtype.type(1.0) - left
                a = np.uintp((out_base + 2 * node + 1) * stride)
                b = a + step
                for t in range(w):
                    gap = out[a + t] - out[b + t]
                    within += gap * gap
                    out[target + t] = left * out[a + t] + right * out[b + t]
                if not add_spread:
                    children = left * spread[group, 2 * node + 1] + right * spread[group, 2 * node + 2]
                    spread[group, node] = children + left * right * within


@kernel(fastmath={"reassoc", "contract", "nsz"})
def summarise_variances(rows, sizes, order, low, high, from_rows, means, variances, mean_sizes, first, last):
    """Write means and variances of the coordinates and the mean sizes, of the same nodes as `summarise_means`."""
    _, n, width = rows.shape
    nodes = means.shape[1]
    flat, out, squares = rows.reshape(-1), means.reshape(-1), variances.reshape(-1)
    w = np.uintp(width)
    for task in range(first, last):
        group, subtree = task >> high, task & ((1 << high) - 1)
        for level in range(low, high - 1, -1):
            for i in range(subtree << (level - high), (subtree + 1) << (level - high)):
                start, end = (i * n) >> level, ((i + 1) * n) >> level
                node = (1 << level) - 1 + i
                target = np.uintp((group * nodes + node) * width)
                if from_rows and level == low:
                    share = out.dtype.type(1.0 / (end - start))
                    size = sizes.dtype.type(0.0)
                    for t in range(w):
                        out[target + t] = 0.0
                        squares[target + t] = 0.0
                    for j in range(start, end):
                        row = np.uintp((group * n + order[group, j]) * width)
                        size += sizes[group, order[group, j]]
                        for t in range(w):
                            out[target + t] += flat[row + t] * share
                    for j in range(start, end):
                        row = np.uintp((group * n + order[group, j]) * width)
                        for t in range(w):
                            gap = flat[row + t] - out[target + t]
                            squares[target + t] += gap * gap * share
                    mean_sizes[group, node] = size * share
                    continue
                left = out.dtype.type(((((2 * i + 1) * n) >> (level + 1)) - start) / (end - start))
                right = out.dtype.type(1.0) - left
                a = np.uintp((group * nodes + 2 * node + 1) * width)
                b = a + w
                for t in range(w):
                    gap = out[a + t] - out[b + t]
                    out[target + t] = left * out[a + t] + right * out[b + t]
                    squares[target + t] = left * squares[a + t] + right * squares[b + t] + left * right * gap * gap
                mean_sizes[group, node] = left * mean_sizes[group, 2 * node + 1] + right * mean_sizes[group, 2 * node + 2]
