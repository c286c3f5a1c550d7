"""`tree_order` in Numba for the CPU: level by level, a node a task; medians by selection instead of sorting."""

from functools import partial

import numpy as np

from kdecore.kernels.jit import kernel
from kdecore.kernels.simd import VECTOR_BYTES, add_multiple, add_squared_gaps, inner_product
from kdecore.kernels.threads import run_tasks, small_tasks
from kdecore.kernels.tree_order.contract import ITERATIONS, SAMPLE
from kdecore.namespaces import Array, Namespace, from_host_like, host_view
from kdecore.tree import levels

SHORT = 16
"""Rows of a node that are sorted by insertion."""


def tree_order(xp: Namespace, x: Array, leaf_size: int) -> Array:
    """Follow `kdecore.kernels.tree_order.contract.TreeOrder`."""
    rows = whole_vectors(host_view(x))
    groups, n, _ = rows.shape
    order = np.empty((groups, n), np.int64)
    order[:] = np.arange(n)
    along = np.empty((groups, n), rows.dtype)
    for level in range(levels(n, leaf_size)):
        size = -(-n >> level)
        run_tasks(
            partial(split_nodes, rows, level, order, along),
            groups << level,
            chunk=small_tasks(size * rows.shape[2] // 4),
        )
    return from_host_like(xp, order, x)


def whole_vectors(rows: Array) -> Array:
    """Return rows with zeros appended so that they fill vectors: themselves where they do."""
    lanes = VECTOR_BYTES // rows.itemsize
    missing = -rows.shape[2] % lanes
    if not missing:
        return rows
    padded = np.pad(rows, ((0, 0), (0, 0), (0, missing)))
    padded.flags.writeable = False
    return padded


@kernel()
def split_nodes(rows, level, order, along, first, last):
    """Split nodes first … last − 1 of a level, counted through all groups."""
    _, n, d = rows.shape
    flat = rows.reshape(-1)
    direction, sums = np.empty(d, rows.dtype), np.empty(d, rows.dtype)
    factors = np.empty(SAMPLE, rows.dtype)
    places = np.empty(SAMPLE, np.int64)
    largest = -(-n >> level)
    for task in range(first, last):
        group, i = task >> level, task & ((1 << level) - 1)
        start, end = (i * n) >> level, ((i + 1) * n) >> level
        middle = ((2 * i + 1) * n) >> (level + 1)
        size = end - start
        base = group * n
        if size > 2:
            samples = min(SAMPLE, largest)
            for j in range(samples):
                places[j] = (base + order[group, start + j * size // samples]) * d
            lead(flat, places, samples, factors, direction, sums)
            vectors = d * rows.itemsize // VECTOR_BYTES
            for j in range(start, end):
                along[group, j] = inner_product(flat, (base + order[group, j]) * d, direction, 0, vectors)
            select(along[group], order[group], start, end, middle)
        sort_rows(order[group], start, middle)
        sort_rows(order[group], middle, end)


@kernel()
def lead(flat, places, samples, factors, direction, sums):
    """Write the leading principal direction of the rows at ``places``."""
    d = direction.shape[0]
    vectors = d * flat.itemsize // VECTOR_BYTES
    one = flat.dtype.type(1.0)
    scale = flat.dtype.type(1.0 / samples)
    direction[:] = 0.0
    sums[:] = 0.0
    for j in range(samples):
        add_multiple(scale, flat, places[j], direction, 0, vectors)
    for j in range(samples):
        add_squared_gaps(flat, places[j], direction, 0, sums, 0, vectors)
    widest = np.argmax(sums)
    direction[:] = 0.0
    direction[widest] = 1.0
    for _ in range(ITERATIONS):
        mean = flat.dtype.type(0.0)
        for j in range(samples):
            factors[j] = inner_product(flat, places[j], direction, 0, vectors)
            mean += factors[j]
        mean *= scale
        sums[:] = 0.0
        # The factors add up to 0, so that the rows need not be centred.
        for j in range(samples):
            add_multiple(factors[j] - mean, flat, places[j], sums, 0, vectors)
        length = inner_product(sums, 0, sums, 0, vectors)
        inverse = one / np.sqrt(length) if length > 0 else one
        for t in range(d):
            direction[t] = sums[t] * inverse


@kernel()
def before(value, row, other, other_row):
    """Return whether a row comes before another one."""
    return value < other or (value == other and row < other_row)


@kernel()
def select(value, row, start, end, middle):
    """Move the least of start … end − 1 before ``middle``, by value and then by row (Hoare's selection)."""
    low, high = start, end - 1
    while high - low >= SHORT:
        pivot_at = (low + high) >> 1
        # The median of three, put in the middle.
        for a, b in ((low, pivot_at), (low, high), (pivot_at, high)):
            if before(value[b], row[b], value[a], row[a]):
                value[a], value[b] = value[b], value[a]
                row[a], row[b] = row[b], row[a]
        pivot, pivot_row = value[pivot_at], row[pivot_at]
        i, j = low, high
        while i <= j:
            while before(value[i], row[i], pivot, pivot_row):
                i += 1
            while before(pivot, pivot_row, value[j], row[j]):
                j -= 1
            if i <= j:
                value[i], value[j] = value[j], value[i]
                row[i], row[j] = row[j], row[i]
                i += 1
                j -= 1
        if middle <= j:
            high = j
        elif middle >= i:
            low = i
        else:
            return
    for i in range(low + 1, high + 1):
        moved, moved_row = value[i], row[i]
        j = i - 1
        while j >= low and before(moved, moved_row, value[j], row[j]):
            value[j + 1], row[j + 1] = value[j], row[j]
            j -= 1
        value[j + 1], row[j + 1] = moved, moved_row


@kernel()
def sort_rows(row, start, end):
    """Sort rows start … end − 1."""
    if end - start > SHORT:
        row[start:end].sort()
        return
    for i in range(start + 1, end):
        moved = row[i]
        j = i - 1
        while j >= start and row[j] > moved:
            row[j + 1] = row[j]
            j -= 1
        row[j + 1] = moved
