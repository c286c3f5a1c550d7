"""`tree_order` in Numba CUDA: a subtree of at most `ROWS` rows a thread block, all its levels in shared memory; one launch.

Levels whose nodes are larger are cut by array operations, a sort each: the treecode leaves these to `rank_codes`.

Traffic on paper, 2,097,152 rows of 16 float32 coordinates: gathered once, 0.13 GB, and 8 bytes a row written: 0.05 ms at 3.0
TB/s. Each of five levels takes 8 products of a row's coordinates and comparisons with the rows of its node, 10 · 10⁹
operations in all by shared memory: about 1 ms, mostly waiting at barriers, some 25 a level, which other thread blocks fill.
"""

import math

import numpy as np
from numba import cuda

from kdecore.kernels.cuda_jit import cuda_kernel, launch
from kdecore.kernels.tree_order import reference
from kdecore.kernels.tree_order.contract import ITERATIONS, SUBTREE_ROWS
from kdecore.namespaces import Array, Namespace, contiguous
from kdecore.tree import depth

ROWS = SUBTREE_ROWS
"""Fewer than the contract's sample, so that all rows of a node are its sample."""
THREADS = 128
COLUMNS = 16
"""Coordinates, at most; wider rows take the reference."""
PITCH = COLUMNS + 1
NODES = 64
"""Nodes of a subtree that are cut at once: half its rows, since two rows are not."""
TINY = {"THREADS": 8, "ROWS": 24, "NODES": 12}
"""What tests in the simulator put in their place."""


def tree_order(xp: Namespace, x: Array, leaf_size: int, in_order: int = 0) -> Array:
    """Follow `kdecore.kernels.tree_order.contract.TreeOrder`."""
    groups, n, d = x.shape
    if d > COLUMNS:
        return reference.tree_order(xp, x, leaf_size, in_order)
    last = depth(n, leaf_size)
    top = min(last, max(in_order, depth(n, ROWS)))
    # Of the levels above, the reference makes the subtrees the leaves.
    order = contiguous(reference.tree_order(xp, x, max(leaf_size, ROWS), in_order))
    if top == last:
        return order
    found = xp.empty((groups, n), dtype=xp.int64, device=x.device)
    launch(cut_subtrees, groups << top, THREADS, x, order, top, last, found)
    return found


@cuda.jit(device=True)
def node_at(position, level, n):
    """Return the node of a level that holds a position, and where the node begins and ends."""
    node = (((position + 1) << level) - 1) // n
    return node, (node * n) >> level, ((node + 1) * n) >> level


@cuda_kernel("number[:, :, ::1], int64[:, ::1], int64, int64, int64[:, ::1]", THREADS)
def cut_subtrees(x, order, top, last, found):
    """Cut the nodes of levels top … last − 1 under a node of level ``top``."""
    thread, group, subtree = cuda.threadIdx.x, cuda.blockIdx.x >> top, cuda.blockIdx.x & ((1 << top) - 1)
    n, d = x.shape[1], x.shape[2]
    begin, end = (subtree * n) >> top, ((subtree + 1) * n) >> top
    size = end - begin
    rows = cuda.shared.array((ROWS, PITCH), x.dtype)
    centres = cuda.shared.array((NODES, COLUMNS), x.dtype)
    directions = cuda.shared.array((NODES, COLUMNS), x.dtype)
    along = cuda.shared.array(ROWS, x.dtype)
    # Rows are numbered from the subtree's beginning, in ascending order: held says which one a place has.
    held = cuda.shared.array(ROWS, np.int32)
    moved = cuda.shared.array(ROWS, np.int32)
    zero, one = x.dtype.type(0.0), x.dtype.type(1.0)
    for place in range(thread, size * d, THREADS):
        number = x[group, order[group, begin + place // d], place % d]
        rows[place // d, place % d] = number if abs(number) < np.inf else zero
    for place in range(thread, size, THREADS):
        held[place] = place
    cuda.syncthreads()
    for level in range(top, last):
        first, nodes = subtree << (level - top), 1 << (level - top)
        samples = (n + (1 << level) - 1) >> level
        # Where no node has more than two rows, none is cut.
        if samples > 2:
            for task in range(thread, nodes * d, THREADS):
                node, t = task // d, task % d
                start, stop = ((first + node) * n) >> level, ((first + node + 1) * n) >> level
                mean, variance = zero, zero
                for j in range(samples):
                    mean += rows[held[start - begin + j * (stop - start) // samples], t]
                mean /= x.dtype.type(samples)
                for j in range(samples):
                    gap = rows[held[start - begin + j * (stop - start) // samples], t] - mean
                    variance += gap * gap
                centres[node, t], directions[node, t] = mean, variance
            cuda.syncthreads()
            for node in range(thread, nodes, THREADS):
                widest = 0
                for t in range(1, d):
                    if directions[node, t] > directions[node, widest]:
                        widest = t
                for t in range(d):
                    directions[node, t] = one if t == widest else zero
            cuda.syncthreads()
            for _ in range(ITERATIONS):
                # Rows that a sample takes twice count twice below.
                for place in range(thread, size, THREADS):
                    node, _, _ = node_at(begin + place, level, n)
                    node -= first
                    total = zero
                    for t in range(d):
                        total += (rows[held[place], t] - centres[node, t]) * directions[node, t]
                    along[place] = total
                cuda.syncthreads()
                for task in range(thread, nodes * d, THREADS):
                    node, t = task // d, task % d
                    start, stop = ((first + node) * n) >> level, ((first + node + 1) * n) >> level
                    total = zero
                    for j in range(samples):
                        place = start - begin + j * (stop - start) // samples
                        total += along[place] * (rows[held[place], t] - centres[node, t])
                    directions[node, t] = total
                cuda.syncthreads()
                for node in range(thread, nodes, THREADS):
                    total = zero
                    for t in range(d):
                        total += directions[node, t] * directions[node, t]
                    length = math.sqrt(total)
                    for t in range(d):
                        directions[node, t] /= length if length > 0 else one
                cuda.syncthreads()
            for place in range(thread, size, THREADS):
                node, _, _ = node_at(begin + place, level, n)
                total = zero
                for t in range(d):
                    total += rows[held[place], t] * directions[node - first, t]
                along[place] = total
            cuda.syncthreads()
            # A row's place in its half: how many of the half come before it, in ascending order of rows.
            for place in range(thread, size, THREADS):
                node, start, stop = node_at(begin + place, level, n)
                middle = ((2 * node + 1) * n) >> (level + 1)
                moved[place] = place
                if stop - start > 2:
                    goes_left = is_below(along, place, start - begin, stop - begin, middle - start)
                    moved[place] = goes_left
            cuda.syncthreads()
            for place in range(thread, size, THREADS):
                node, start, stop = node_at(begin + place, level, n)
                middle = ((2 * node + 1) * n) >> (level + 1)
                to = place
                if stop - start > 2:
                    to = (start if moved[place] else middle) - begin
                    for other in range(start - begin, place):
                        to += moved[other] == moved[place]
                # Projections are no longer needed: their places hold where rows go.
                along[place] = x.dtype.type(to)
            cuda.syncthreads()
            for place in range(thread, size, THREADS):
                moved[int(along[place])] = held[place]
            cuda.syncthreads()
            for place in range(thread, size, THREADS):
                held[place] = moved[place]
            cuda.syncthreads()
    for place in range(thread, size, THREADS):
        found[group, begin + place] = order[group, begin + held[place]]


@cuda.jit(device=True)
def is_below(along, place, start, stop, low):
    """Return 1 for one of the ``low`` places of least projection between start and stop, of equal ones the first; else 0."""
    before, own = 0, along[place]
    for other in range(start, stop):
        before += along[other] < own or (along[other] == own and other < place)
    return 1 if before < low else 0
