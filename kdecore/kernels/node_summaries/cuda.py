"""`node_summaries` in Numba CUDA: a column of a subtree a thread, from its rows up, `LEVELS` levels a launch.

A thread goes through its nodes one after another, which needs no barriers; neighbouring threads take neighbouring columns of
keys, values, coordinates and sizes. Spreads, which are over all columns, follow from the distances between the means of
siblings: a node a thread, and then a subtree a thread. Seven launches for 131,072 keys in leaves of 4.

Traffic on paper, 16 heads of 131,072 keys, d = d_v = 64 in bfloat16, p = 16: rows read twice, once from cache, 0.7 GB; as
many and half as many nodes written in float32, 1.6 GB, and means read for spreads, 0.8 GB: 3.1 GB, 1.0 ms at 3.0 TB/s, of
which two thirds are keys and values written in float32. 1 GFLOP is nothing beside it.
"""

import math
from typing import Any

from numba import cuda

from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.tree import depth, node_count
from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.kernels.runtime.cuda_jit import CudaKernel, cuda_kernel, for_each_reader, from_number, launch

LEVELS = 5
"""Levels that a launch goes up."""
THREADS = 128
TINY = {"LEVELS": 2, "THREADS": 8}
"""What tests in the simulator put in their place."""


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
    groups, n, d = k.shape
    d_v, p = int(v.shape[2]), int(coordinates.shape[2])
    last, nodes = depth(n, leaf_size), node_count(n, leaf_size)

    def empty(*shape: int) -> Array:
        return xp.empty((groups, *shape), dtype=coordinates.dtype, device=k.device)

    keys, values, spread = empty(nodes + n, d), empty(nodes + n, d_v + 1), empty(nodes)
    centres, variances, mean_sizes = empty(nodes, p), empty(nodes, p), empty(nodes, 1)
    rows = k, v, coordinates, xp.reshape(sizes, (groups, n, 1)), order
    width = d + d_v + p + 1
    steps = [(low, max(low - LEVELS, 0)) for low in range(last, 0, -LEVELS)] or [(0, 0)]
    for low, high in steps:
        grid = groups * -(-(width << high) // THREADS)
        launch(climb(k), grid, THREADS, *rows, low, high, low == last, keys, values, centres, variances, mean_sizes)
    launch(distances, groups * -(-nodes // THREADS), THREADS, keys, values, spread)
    for low, high in steps:
        grid = groups * -(-(1 << high) // THREADS)
        launch(climb_spreads, grid, THREADS, order, half_norm, low, high, low == last, values, spread)
    return TreeNodes(keys, values, spread, variances, xp.reshape(mean_sizes, (groups, nodes)))


@cuda.jit(device=True)
def shares(node, level, n):
    """Return which parts of the rows of a node of a level are its children's."""
    start, end = (node * n) >> level, ((node + 1) * n) >> level
    left = ((2 * node + 1) * n >> (level + 1)) - start
    return left, end - start


def column_by(read: Any) -> Any:
    """Make the function that climbs a column of rows, which ``read`` reads."""

    @cuda.jit(device=True)
    def climb_column(rows, order, group, column, subtree, low, high, from_rows, means, copied, variances, varying):
        """Write means of a column of a subtree, variances where they are ``varying``, and rows where they are ``copied``."""
        n = order.shape[1]
        one = means.dtype.type(1.0)
        if from_rows:
            for leaf in range(subtree << (low - high), (subtree + 1) << (low - high)):
                start, end = (leaf * n) >> low, ((leaf + 1) * n) >> low
                count, place = means.dtype.type(end - start), (1 << low) - 1 + leaf
                mean, variance = means.dtype.type(0.0), means.dtype.type(0.0)
                for j in range(start, end):
                    number = read(rows[group, order[group, j], column])
                    mean += number
                    if copied:
                        means[group, means.shape[1] - n + j, column] = number
                mean /= count
                means[group, place, column] = mean
                if varying:
                    for j in range(start, end):
                        gap = read(rows[group, order[group, j], column]) - mean
                        variance += gap * gap
                    variances[group, place, column] = variance / count
        for level in range(low - 1, high - 1, -1):
            for node in range(subtree << (level - high), (subtree + 1) << (level - high)):
                place = (1 << level) - 1 + node
                part, whole = shares(node, level, n)
                left = means.dtype.type(part) / means.dtype.type(whole)
                right = one - left
                a, b = means[group, 2 * place + 1, column], means[group, 2 * place + 2, column]
                means[group, place, column] = left * a + right * b
                if varying:
                    within = left * variances[group, 2 * place + 1, column] + right * variances[group, 2 * place + 2, column]
                    variances[group, place, column] = within + left * right * (a - b) * (a - b)

    return climb_column


climb_numbers = column_by(from_number)


@for_each_reader
def climb(stored: str, read: Any) -> CudaKernel:
    """Make the kernel of means, and of variances of coordinates."""
    climb_rows = column_by(read)
    three = "number[:, :, ::1]"
    rows = f"stored[:, :, ::1], stored[:, :, ::1], {three}, {three}, int64[:, ::1]"

    @cuda_kernel(f"{rows}, int64, int64, boolean, {three}, {three}, {three}, {three}, {three}", THREADS, stored)
    def climb(k, v, coordinates, sizes, order, low, high, from_rows, keys, values, centres, variances, mean_sizes):
        """Climb a column of keys, values, coordinates or sizes."""
        d, d_v, p = k.shape[2], v.shape[2], coordinates.shape[2]
        width = d + d_v + p + 1
        tiles = -(-(width << high) // THREADS)
        group, i = cuda.blockIdx.x // tiles, cuda.blockIdx.x % tiles * THREADS + cuda.threadIdx.x
        column, subtree = i % width, i // width
        if subtree < 1 << high:
            if column < d:
                climb_rows(k, order, group, column, subtree, low, high, from_rows, keys, True, keys, False)
            elif column < d + d_v:
                climb_rows(v, order, group, column - d, subtree, low, high, from_rows, values, True, values, False)
            elif column < d + d_v + p:
                column -= d + d_v
                climb_numbers(
                    coordinates, order, group, column, subtree, low, high, from_rows, centres, False, variances, True
                )
            else:
                climb_numbers(sizes, order, group, 0, subtree, low, high, from_rows, mean_sizes, False, mean_sizes, False)

    return climb


@cuda_kernel("number[:, :, ::1], number[:, :, ::1], number[:, ::1]", THREADS)
def distances(keys, values, spread):
    """Write a leaf's spread, and 0 for those of its keys; or the squared distance of an inner node's children."""
    nodes, d, last = spread.shape[1], keys.shape[2], values.shape[2] - 1
    tiles = -(-nodes // THREADS)
    group, place = cuda.blockIdx.x // tiles, cuda.blockIdx.x % tiles * THREADS + cuda.threadIdx.x
    n, leaves = keys.shape[1] - nodes, nodes // 2 + 1
    if place < nodes:
        total = spread.dtype.type(0.0)
        if place < nodes // 2:
            for t in range(d):
                gap = keys[group, 2 * place + 1, t] - keys[group, 2 * place + 2, t]
                total += gap * gap
        else:
            leaf = place - nodes // 2
            start, end = leaf * n // leaves, (leaf + 1) * n // leaves
            for j in range(nodes + start, nodes + end):
                for t in range(d):
                    gap = keys[group, j, t] - keys[group, place, t]
                    total += gap * gap
                values[group, j, last] = spread.dtype.type(0.0)
            total /= spread.dtype.type(end - start)
        spread[group, place] = total


@cuda_kernel("int64[:, ::1], number[::1], int64, int64, boolean, number[:, :, ::1], number[:, ::1]", THREADS)
def climb_spreads(order, half_norm, low, high, from_rows, values, spread):
    """Write the spreads of a subtree, and the last column of its values."""
    n, last, tiles = order.shape[1], values.shape[2] - 1, -(-(1 << high) // THREADS)
    group, subtree = cuda.blockIdx.x // tiles, cuda.blockIdx.x % tiles * THREADS + cuda.threadIdx.x
    one = spread.dtype.type(1.0)
    if subtree < 1 << high:
        for level in range(low if from_rows else low - 1, high - 1, -1):
            for node in range(subtree << (level - high), (subtree + 1) << (level - high)):
                place = (1 << level) - 1 + node
                part, whole = shares(node, level, n)
                found = spread[group, place]
                if level < low or not from_rows:
                    left = spread.dtype.type(part) / spread.dtype.type(whole)
                    right = one - left
                    within = left * spread[group, 2 * place + 1] + right * spread[group, 2 * place + 2]
                    found = within + left * right * found
                    spread[group, place] = found
                # Of one number the logarithm is 0, and so is the spread.
                logarithm = math.log(spread.dtype.type(whole))
                frozen = half_norm[group] * found > logarithm
                values[group, place, last] = math.sqrt(found * logarithm / half_norm[group]) if frozen else found
