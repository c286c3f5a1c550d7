"""Down a tree over the keys in one pass, for a block of queries: what three kernels share on the CPU.

A block's queries lie across the lanes, in panels of one vector. Logits are kept in units of log 2; weights, and sums of
them, relative to each query's largest logit so far, and brought down when a node exceeds it.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from kdecore.arrays.memory import host_view
from kdecore.core.tree import BlockQueries, Tree
from kdecore.kernels.attend_blocks.cpu import load_queries, round_up
from kdecore.kernels.open_tree.contract import ALONG, LEAST, SHORT, STEP
from kdecore.kernels.runtime.jit import helper
from kdecore.kernels.runtime.simd import (
    TILE_ROWS,
    VECTOR_BYTES,
    column_max,
    copy_rows,
    copy_vector,
    exp2_columns,
    fourth_powers,
    inner_product,
    multiply_spreads,
    multiply_tile,
    prefetch,
    scaled_squares,
)

LN2 = math.log(2.0)
AHEAD = 8
"""Nodes that are asked for before they are weighed."""
LOWEST = -1e30
"""Below every logit: what is subtracted from logits has to be finite."""


class Work(NamedTuple):
    """Memory of a thread, for blocks of ``filled`` rows (a whole number of vectors) and levels of ``width`` nodes.

    Attributes
    ----------
    rows, queries, squares, norm, ratios, own_squares
        A block's queries: their rows, (panels, d, lanes) scaled, half their mean squared coordinates (p) and norm (1), and
        what each norm is of the mean; where they are taken apart this is 1, and there are half the squared coordinates and
        norm of each, (panels, p + 1, lanes).
    tile, variances, bias, sizes, sigma, error
        A level's nodes: their keys, log-weights, ln of their counts, what sums of shares have to be multiplied by, and these
        in fourth powers; variances and spreads (p + 1) where queries are taken apart.
    logits, weights
        (panels, width, lanes) of a level's nodes.
    halves
        (width, lanes): half variances of a panel's logits, for queries that are taken apart.
    current, following
        Nodes of a level, numbered within it, and of the next one.
    tops, totals, closed_totals
        Each query's largest logit so far, and sums of weights: of all nodes, and of those closed.
    node, log_weight, kept, less
        The block's list: rows of the keys, log-weights, (panels, width, lanes) logits, and how much less closed nodes are
        listed with than they were weighed by.
    leaves
        The leaves opened.
    factors
        One vector.
    """

    rows: Any
    queries: Any
    squares: Any
    norm: Any
    ratios: Any
    own_squares: Any
    tile: Any
    variances: Any
    bias: Any
    sizes: Any
    sigma: Any
    error: Any
    logits: Any
    weights: Any
    halves: Any
    current: Any
    following: Any
    tops: Any
    totals: Any
    closed_totals: Any
    node: Any
    log_weight: Any
    kept: Any
    less: Any
    leaves: Any
    factors: Any


@helper()
def memory(filled, d, p, width, like):
    """Return `Work` for blocks and lists of these sizes."""
    dtype, lanes = like.dtype, VECTOR_BYTES // like.itemsize
    panel_sizes = filled // lanes * width * lanes
    return Work(
        np.zeros(filled, np.int64),
        np.zeros(filled * d, dtype),
        np.zeros(round_up(p, lanes), dtype),
        np.zeros(1, dtype),
        np.zeros(filled, dtype),
        np.zeros(filled * (p + 1), dtype),
        np.zeros(width * d, dtype),
        np.zeros(width * (p + 1), dtype),
        np.zeros(width, dtype),
        np.zeros(width, dtype),
        np.zeros(width, dtype),
        np.zeros(width, dtype),
        np.zeros(panel_sizes, dtype),
        np.zeros(panel_sizes, dtype),
        np.zeros(width * lanes, dtype),
        np.zeros(width, np.int64),
        np.zeros(width, np.int64),
        np.zeros(filled, dtype),
        np.zeros(filled, dtype),
        np.zeros(filled, dtype),
        np.zeros(width, np.int64),
        np.zeros(width, dtype),
        np.zeros(panel_sizes, dtype),
        np.zeros(width, dtype),
        np.zeros(width, np.int64),
        np.zeros(lanes, dtype),
    )


def host_queries(queries: BlockQueries) -> BlockQueries:
    """Return queries as `kdecore.arrays.memory.host_view` has them."""
    q, scale, coordinates, index, apart = queries
    return BlockQueries(host_view(q), float(scale), host_view(coordinates), host_view(index), apart)


def host_tree(tree: Tree) -> Tree:
    """Return a tree as `kdecore.arrays.memory.host_view` has it."""
    return Tree(*map(host_view, tree))


@helper()
def load_block(block_queries, task, work):
    """Load a block's queries, those that are not finite as 0, and what half variances follow from."""
    q, scale, coordinates, query_index, apart = block_queries
    _, blocks, b = query_index.shape
    n_q, d = q.shape[1:]
    p = coordinates.shape[2]
    group, block = task // blocks, task % blocks
    lanes, filled = VECTOR_BYTES // q.itemsize, work.rows.shape[0]
    flat_q, flat_coordinates, vectors = q.reshape(-1), coordinates.reshape(-1), d // lanes
    for r in range(filled):
        work.rows[r] = group * n_q + query_index[group, block, min(r, b - 1)]
    for lane in range(0, filled, lanes):
        load_queries(flat_q, work.rows, lane, d, q.dtype.type(scale / LN2), work.queries)
    work.squares[:], work.ratios[:], work.own_squares[:], norm = 0.0, 0.0, 0.0, 0.0
    half, norm_half = q.dtype.type(ALONG * 0.5), scale * scale * 0.5 / d
    for r in range(filled):
        row_square = scaled_squares(flat_q, work.rows[r] * d, vectors, 1.0)
        for t in range(vectors * lanes, d):
            row_square += np.float64(flat_q[work.rows[r] * d + t]) ** 2
        if not row_square < np.inf:
            lane = r // lanes * lanes
            for t in range(d):
                work.queries[lane * d + t * lanes + r - lane] = 0.0
            continue
        if r < b:
            norm += row_square
            work.ratios[r] = row_square
            at, to = work.rows[r] * p, r // lanes * lanes * (p + 1) + r % lanes
            for t in range(p):
                square = flat_coordinates[at + t] * flat_coordinates[at + t]
                square = square if square < np.inf else 0.0
                work.squares[t] += square
                if apart:
                    work.own_squares[to + t * lanes] = half * square
            work.own_squares[to + p * lanes] = row_square * norm_half
    for t in range(p):
        work.squares[t] *= half / b
    work.norm[0] = norm / b * norm_half
    for r in range(filled):
        work.ratios[r] = work.ratios[r] * b / norm if norm > 0 and not apart else 1.0


@helper()
def frozen(half_variance, log_count):
    """Return ln of the mean of exp over so many normal numbers, as `open_tree`'s contract has it."""
    if half_variance > log_count:
        return 2.0 * np.sqrt(half_variance * log_count) - log_count
    return half_variance


@helper()
def listed_as(sigma, log_count):
    """Return what a closed node is listed with for its half variance, frozen or not, as `open_tree`'s contract has it."""
    reached = log_count * log_count / (log_count + SHORT)
    if sigma <= reached:
        return sigma
    root = sigma + log_count if sigma > log_count else 2.0 * np.sqrt(sigma * log_count)
    return root * np.sqrt(log_count / (log_count + SHORT)) - reached


@helper()
def weigh_level(tree, group, level, m, b, apart, work):
    """Weigh the m current nodes of a level for a block's queries, and estimate the errors of leaving them closed."""
    keys, spread, variances, sizes = tree.keys, tree.spread, tree.variances, tree.sizes
    nodes, p = variances.shape[1:]
    rows, d = keys.shape[1:]
    n, lanes, filled = rows - nodes, VECTOR_BYTES // keys.itemsize, work.rows.shape[0]
    width = work.bias.shape[0]
    flat_keys, flat_variances = keys.reshape(-1), variances.reshape(-1)
    base, vectors = (1 << level) - 1, p // lanes
    for c in range(m):
        prefetch(flat_keys, (group * rows + base + work.current[min(c + AHEAD, m - 1)]) * d, d)
        i = work.current[c]
        h = base + i
        copy_rows(flat_keys, (group * rows + h) * d, work.tile, c * d, d)
        size = np.log(float((((i + 1) * n) >> level) - ((i * n) >> level)))
        at = (group * nodes + h) * p
        sigma = np.float64(inner_product(flat_variances, at, work.squares, 0, vectors))
        for t in range(vectors * lanes, p):
            sigma += flat_variances[at + t] * work.squares[t]
        sigma = frozen(sigma + spread[group, h] * work.norm[0], size)
        if apart:
            copy_rows(flat_variances, at, work.variances, c * (p + 1), p)
            work.variances[c * (p + 1) + p] = spread[group, h]
        work.sizes[c], work.bias[c] = size, (sigma + size) * (1.0 / LN2)
        work.sigma[c] = sizes[group, h] if apart else sigma * sizes[group, h]
    tiled, none = round_up(m, TILE_ROWS), np.zeros(TILE_ROWS, keys.dtype)
    for lane in range(0, filled, lanes):
        at = lane * width
        for j in range(0, tiled, TILE_ROWS):
            multiply_tile(work.tile, j * d, d, 1, work.queries, lane * d, d, work.bias, j, work.logits, at + j * lanes, True)
        copy_vector(work.tops, lane, work.factors, 0)
        column_max(work.logits, at, m, work.tops, lane)
        for i in range(lanes):
            work.closed_totals[lane + i] *= np.exp2(work.factors[i] - work.tops[lane + i])
            work.totals[lane + i] = work.closed_totals[lane + i]
        copy_rows(work.logits, at, work.weights, at, m * lanes)
        exp2_columns(work.weights, at, m, work.tops, lane, work.totals, lane)
        lost = False
        for i in range(lanes):
            if work.totals[lane + i] == 0:
                # A node that was opened weighed so much more than what is left that nothing is left of that.
                work.tops[lane + i], work.closed_totals[lane + i], lost = LOWEST, 0.0, True
        if lost:
            column_max(work.logits, at, m, work.tops, lane)
            copy_rows(work.logits, at, work.weights, at, m * lanes)
            copy_vector(work.closed_totals, lane, work.totals, lane)
            exp2_columns(work.weights, at, m, work.tops, lane, work.totals, lane)
        for i in range(lanes):
            work.factors[i] = work.ratios[lane + i] / work.totals[lane + i] if lane + i < b else 0.0
        if apart:
            of_panel = lane * (p + 1)
            for j in range(0, tiled, TILE_ROWS):
                row, to = j * (p + 1), j * lanes
                multiply_tile(
                    work.variances, row, p + 1, 1, work.own_squares, of_panel, p + 1, none, 0, work.halves, to, True
                )
            multiply_spreads(work.weights, at, work.halves, 0, m, work.sizes)
            fourth_powers(work.halves, 0, m, work.factors, 0, work.error, lane == 0)
        else:
            fourth_powers(work.weights, at, m, work.factors, 0, work.error, lane == 0)


@helper()
def descend(tree, group, start, threshold, most, b, apart, work):
    """Open the tree for a block; return how many nodes stay closed, how many leaves are opened, and the slots that takes.

    Closed nodes are in ``work.node``, ``log_weight`` and ``kept``, leaves in ``work.leaves``. Where they would take more
    than ``most`` slots, the threshold is raised as `open_tree`'s contract has it.
    """
    nodes = tree.spread.shape[1]
    n, last = tree.keys.shape[1] - nodes, leaf_level(nodes)
    lanes, filled, width = VECTOR_BYTES // work.bias.itemsize, work.rows.shape[0], work.bias.shape[0]
    limit = np.float64(threshold) ** 4
    while True:
        work.tops[:] = LOWEST
        work.closed_totals[:] = 0.0
        level, first, end = start
        m, closed, opened, slots = end - first, 0, 0, end - first
        for c in range(m):
            work.current[c] = first + c
        while m > 0 and slots <= most:
            weigh_level(tree, group, level, m, b, apart, work)
            base, step, found = (1 << level) - 1, STEP - (last - level) % STEP, 0
            for c in range(m):
                square = np.float64(work.sigma[c]) * work.sigma[c]
                if not work.error[c] * square * square > limit:
                    # Here, and not in a function: passing so many arrays takes as long.
                    sigma = np.float64(work.bias[c]) * LN2 - work.sizes[c]
                    less = (sigma - listed_as(sigma, np.float64(work.sizes[c]))) * (1.0 / LN2)
                    work.node[closed], work.log_weight[closed] = base + work.current[c], work.bias[c] - less
                    work.less[closed] = less
                    for lane in range(0, filled, lanes):
                        source, target = lane * width + c * lanes, lane * width + closed * lanes
                        copy_vector(work.logits, source, work.kept, target)
                        weight, total = np.uintp(source), np.uintp(lane)
                        for i in range(np.uintp(lanes)):
                            work.closed_totals[total + i] += work.weights[weight + i]
                            work.kept[np.uintp(target) + i] -= less
                    closed += 1
                elif level == last:
                    i = work.current[c]
                    work.leaves[opened] = i
                    opened += 1
                    slots += (((i + 1) * n) >> level) - ((i * n) >> level) - 1
                else:
                    slots += (1 << step) - 1
                    if slots > most:
                        break
                    for j in range(1 << step):
                        work.following[found] = (work.current[c] << step) + j
                        found += 1
            level += step
            m = found
            for c in range(found):
                work.current[c] = work.following[c]
        if slots <= most:
            return closed, opened, slots
        limit = np.float64(max(limit, LEAST**4) * 2.0**4)


@helper()
def leaf_level(nodes):
    """Return the level of the leaves of a tree of so many nodes."""
    level = 0
    while (4 << level) - 1 <= nodes:
        level += 1
    return level


@helper()
def list_leaves(n, last, nodes, closed, opened, work):
    """Write the keys of the leaves opened to the list, after the closed nodes."""
    at = closed
    for c in range(opened):
        i = work.leaves[c]
        for position in range((i * n) >> last, ((i + 1) * n) >> last):
            work.node[at] = nodes + position
            at += 1


@helper()
def first_at_least(ascending, count, value):
    """Return the first place of the first ``count`` whose number is at least ``value``, or ``count``."""
    low, high = 0, count
    while low < high:
        middle = (low + high) >> 1
        if ascending[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low
