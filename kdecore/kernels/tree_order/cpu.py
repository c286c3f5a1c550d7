"""`tree_order` in Numba for the CPU: level by level with a node a task, then a small subtree a task, in cache.

At each level rows are copied to where their node lies, so that every node is read in one go. A node's rows stay in ascending
order when they part, so that nothing is ever sorted.
"""

from functools import partial

import numpy as np

from kdecore.arrays.memory import from_host_like, host_view
from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.tree import cuts, depth
from kdecore.kernels.runtime.jit import helper, kernel
from kdecore.kernels.runtime.simd import VECTOR_BYTES, add_multiples, add_squared_gaps, copy_rows, inner_product
from kdecore.kernels.runtime.threads import run_tasks, small_tasks
from kdecore.kernels.tree_order.contract import ITERATIONS, SAMPLE

TASK_ROWS = 2048
"""Rows of a subtree that is one task, at most."""
FEW, PASSES, COUNTED = 32, 16, 4096
"""Numbers that are reordered to find a median, passes at most until no more are left, and numbers counted at a time."""


def tree_order(xp: Namespace, x: Array, parts: int, in_order: int = 0) -> Array:
    """Follow `kdecore.kernels.tree_order.contract.TreeOrder`."""
    found = host_view(x)
    groups, n, d = found.shape
    lanes = VECTOR_BYTES // found.itemsize
    # Two places for rows, in whole vectors, and for their numbers: those of a level, and those of the next one.
    rows = np.empty((2, groups, n, -(-d // lanes) * lanes), found.dtype)
    order = np.empty((2, groups, n), np.int64)
    run_tasks(partial(start, found, rows, order), groups * n, chunk=small_tasks(2 * rows.shape[3]))
    last = (parts - 1).bit_length()
    first = min(in_order, last)
    whole = min(last, max(first, depth(n, TASK_ROWS)))
    # The rows of the first level that is split are where they begin.
    if first & 1:
        rows[1], order[1] = rows[0], order[0]
    largest = np.asarray([np.diff(cuts(n, parts, level)).max() for level in range(last + 1)])
    split = partial(split_subtrees, rows, order, parts, largest)
    for level in range(first, whole):
        run_tasks(partial(split, level, level + 1), groups << level, chunk=1)
    run_tasks(partial(split, whole, last), groups << whole, chunk=1)
    return from_host_like(xp, order[last & 1], x)


@kernel()
def start(found, rows, order, first, last):
    """Write rows first … last − 1, counted through all groups, and their numbers where level 0 has them."""
    _, n, d = found.shape
    width = rows.shape[3]
    flat, flat_rows, flat_order = found.reshape(-1), rows.reshape(-1), order.reshape(-1)
    for i in range(first, last):
        source, target = np.uintp(i * d), np.uintp(i * width)
        for t in range(np.uintp(d)):
            value = flat[source + t]
            flat_rows[target + t] = value if abs(value) < np.inf else 0.0
        for t in range(np.uintp(d), np.uintp(width)):
            flat_rows[target + t] = 0.0
        flat_order[i] = i % n


@kernel()
def split_subtrees(rows, order, parts, largest, top, end_level, first, last):
    """Split the nodes of levels top … end_level − 1 under nodes first … last − 1 of level ``top`` of all groups.

    ``largest`` has the rows of the largest node of each level.
    """
    _, groups, n, width = rows.shape
    flat, flat_order = rows.reshape(-1), order.reshape(-1)
    direction, sums = np.empty(width, rows.dtype), np.empty(width, rows.dtype)
    sample = np.empty(SAMPLE * width, rows.dtype)
    factors = np.empty(SAMPLE, rows.dtype)
    along, work = np.empty(largest[top], rows.dtype), np.empty(largest[top], rows.dtype)
    vectors = width * rows.itemsize // VECTOR_BYTES
    for task in range(first, last):
        group, subtree = task >> top, task & ((1 << top) - 1)
        for level in range(top, end_level):
            source = ((level & 1) * groups + group) * n
            target = (((level + 1) & 1) * groups + group) * n
            samples = min(SAMPLE, largest[level])
            for i in range(subtree << (level - top), (subtree + 1) << (level - top)):
                start, end = ((i * parts) >> level) * n // parts, (((i + 1) * parts) >> level) * n // parts
                low = (((2 * i + 1) * parts) >> (level + 1)) * n // parts - start
                size = end - start
                begin = source + start
                # A single part lies on one side of its cut.
                if size > 2 and 0 < low < size:
                    for j in range(samples):
                        copy_rows(flat, (begin + j * size // samples) * width, sample, j * width, width)
                    lead(sample, samples, width, factors, direction, sums)
                    for j in range(size):
                        along[j] = inner_product(flat, (begin + j) * width, direction, 0, vectors)
                    threshold = nth_smallest(along, size, low - 1, work)
                    part(flat, flat_order, begin, target + start, size, low, along, threshold, width)
                else:
                    copy_rows(flat, begin * width, flat, (target + start) * width, size * width)
                    copy_rows(flat_order, begin, flat_order, target + start, size)


@helper()
def part(flat, flat_order, source, target, size, low, along, threshold, width):
    """Copy the ``low`` rows of least projection to ``target`` and the others behind them, each part in its order."""
    less = 0
    for j in range(size):
        less += along[j] < threshold
    ties = low - less
    left, right = 0, low
    for j in range(size):
        goes_left = along[j] < threshold
        if along[j] == threshold and ties > 0:
            ties -= 1
            goes_left = True
        # Projections that overflow compare with nothing: no part takes more than its share.
        if right == size or (goes_left and left < low):
            to = target + left
            left += 1
        else:
            to = target + right
            right += 1
        copy_rows(flat, (source + j) * width, flat, to * width, width)
        flat_order[to] = flat_order[source + j]


@helper()
def lead(sample, samples, width, factors, direction, sums):
    """Write the leading principal direction of a sample of rows."""
    vectors = width * sample.itemsize // VECTOR_BYTES
    one = sample.dtype.type(1.0)
    scale = sample.dtype.type(1.0 / samples)
    factors[:samples] = scale
    add_multiples(factors, 0, sample, 0, samples, direction, 0, vectors)
    sums[:] = 0.0
    for j in range(samples):
        add_squared_gaps(sample, j * width, direction, 0, sums, 0, vectors)
    widest = np.argmax(sums)
    direction[:] = 0.0
    direction[widest] = 1.0
    for _ in range(ITERATIONS):
        mean = sample.dtype.type(0.0)
        for j in range(samples):
            factors[j] = inner_product(sample, j * width, direction, 0, vectors)
            mean += factors[j]
        mean *= scale
        for j in range(samples):
            factors[j] -= mean
        # The factors add up to 0, so that the rows need not be centred.
        add_multiples(factors, 0, sample, 0, samples, sums, 0, vectors)
        length = inner_product(sums, 0, sums, 0, vectors)
        inverse = one / np.sqrt(length) if length > 0 else one
        for t in range(width):
            direction[t] = sums[t] * inverse


@kernel()
def nth_smallest(values, size, nth, work):
    """Return the number that ``nth`` (from 0) of the first ``size`` are below; the median, or next to it, is found soonest.

    Numbers between two bounds are counted, in vectors and without branches, until few are left: a median is within one
    standard deviation of the mean.
    """
    below, inside = 0, size
    low = high = values[0]
    if size >= FEW:
        mean, deviation = mean_and_deviation(values, size)
        low, high = mean - deviation, mean + deviation
        below = count_less(values, size, low)
        inside = count_less(values, size, high) - below
    if size < FEW or not below <= nth < below + inside:
        # Assigned as a slice, it would take seconds more to compile.
        for j in range(size):
            work[j] = values[j]
        return select(work, size, nth)
    for step in range(PASSES):
        if inside <= FEW:
            break
        share = (nth + 0.5 - below) / inside
        # Where numbers aren't spread evenly, one of the bounds would hardly move.
        middle = values.dtype.type(low + (high - low) * (0.5 if step % 3 == 2 else share))
        if not low < middle < high:
            break
        less = count_less(values, size, middle) - below
        if below + less <= nth:
            low, below, inside = middle, below + less, inside - less
        else:
            high, inside = middle, less
    found = 0
    for j in range(size):
        if low <= values[j] and values[j] < high:
            work[found] = values[j]
            found += 1
    return select(work, found, nth - below)


@helper(fastmath={"reassoc", "contract", "nsz"})
def mean_and_deviation(values, size):
    """Return the mean of the first ``size`` numbers, and a little more than their standard deviation."""
    total = values.dtype.type(0.0)
    for j in range(size):
        total += values[j]
    mean = total / values.dtype.type(size)
    square = values.dtype.type(0.0)
    for j in range(size):
        gap = values[j] - mean
        square += gap * gap
    return mean, np.sqrt(square / values.dtype.type(size)) * values.dtype.type(1.01)


@helper(fastmath={"reassoc", "contract", "nsz"})
def count_less(values, size, bound):
    """Return how many of the first ``size`` numbers are less than a bound."""
    found, one, zero = 0, values.dtype.type(1.0), values.dtype.type(0.0)
    for start in range(0, size, COUNTED):
        # In numbers as wide as the others, so that a vector counts as many as it holds.
        less = zero
        for j in range(start, min(size, start + COUNTED)):
            less += one if values[j] < bound else zero
        found += int(less)
    return found


@helper()
def select(values, size, nth):
    """Return the number that ``nth`` (from 0) of the first ``size`` are below, reordering them (Hoare's selection)."""
    low, high = 0, size - 1
    while low < high:
        a, b, c = values[low], values[(low + high) >> 1], values[high]
        pivot = max(min(a, b), min(max(a, b), c))
        i, j = low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while pivot < values[j]:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if nth <= j:
            high = j
        elif nth >= i:
            low = i
        else:
            break
    return values[nth]
