"""`open_tree` in Numba for the CPU: a block a task, its queries across the lanes, its lists of weights in cache.

Logits are kept in units of log 2, weights and errors relative to each query's largest logit so far, and brought down when an
opened node's child exceeds it. The children of a node lie on a line through it, so that one product gives both their logits.
Closed nodes are kept in bins by the size of their errors, which spares sorting them in every round.
"""

import math

import numpy as np

from kdecore.kernels.attend_blocks.cpu import load_queries, round_up
from kdecore.kernels.jit import kernel
from kdecore.kernels.open_tree.contract import GROWTH, REFRESH
from kdecore.kernels.simd import (
    TILE_ROWS,
    VECTOR_BYTES,
    add_spreads,
    column_max,
    copy_rows,
    copy_vector,
    exp2_columns,
    fourth_powers,
    multiply_rows,
    multiply_tile,
    part_vector,
    prefetch,
    scale_columns,
    scaled_squares,
)
from kdecore.kernels.threads import fair_chunk, run_tasks
from kdecore.namespaces import Array, Namespace, from_host_like, host_view

LN2 = math.log(2.0)
AHEAD = 6
"""Nodes whose children are asked for before they are opened."""
HOLDER_LEVEL = 6
"""Level whose nodes are as many as a word has bits."""
BINS = 4096
"""Bins of float32 errors: an octave has 16."""


def open_tree(
    xp: Namespace,
    q: Array,
    scale: float,
    coordinates: Array,
    query_index: Array,
    keys: Array,
    spread: Array,
    variances: Array,
    sizes: Array,
    own: Array | None,
    slots: int,
    start: tuple[int, int, int],
) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.open_tree.contract.OpenTree`."""
    inputs = [host_view(x) for x in (q, coordinates, query_index, keys, spread, variances, sizes)]
    groups, blocks, _ = inputs[2].shape
    own_ = np.empty((groups, blocks, 0), np.int64) if own is None else np.array(host_view(own))
    own_.flags.writeable = False
    key_index = np.zeros((groups, blocks, slots), np.int64)
    log_weight = np.full((groups, blocks, slots), -np.inf, inputs[0].dtype)
    run_tasks(
        lambda first, last: open_blocks(*inputs, own_, float(scale), start, key_index, log_weight, first, last),
        groups * blocks,
        chunk=fair_chunk(groups * blocks, 16),
    )
    return from_host_like(xp, key_index, q), from_host_like(xp, log_weight, q)


@kernel()
def open_blocks(
    q, coordinates, query_index, keys, spread, variances, sizes, own, scale, start, key_index, log_weight, first, last
):
    """Open the tree for blocks first … last − 1, counted through all groups."""
    _, blocks, rows = query_index.shape
    n_q, d = q.shape[1:]
    nodes, p = variances.shape[1:]
    total = keys.shape[1]
    n, first_leaf = total - nodes, nodes // 2
    own_count = own.shape[2]
    wanted = key_index.shape[2] - own_count
    start_level, start_first, start_end = start
    lanes = VECTOR_BYTES // q.itemsize
    filled = round_up(rows, lanes)
    flat_q, flat_coordinates, flat_keys, flat_variances = (
        q.reshape(-1),
        coordinates.reshape(-1),
        keys.reshape(-1),
        variances.reshape(-1),
    )
    one = q.dtype.type(1.0)
    query_rows = np.empty(filled, np.int64)
    queries, squares = np.empty(filled * d, q.dtype), np.empty(filled * p, q.dtype)
    # Of a round: nodes opened, their children's differences, and what is found for the children.
    most = max(1, wanted // GROWTH)
    chosen = np.empty(wanted, np.int64)
    width = round_up(max(2 * most, start_end - start_first), TILE_ROWS)
    gaps = np.zeros(width * d, q.dtype)
    child_variances, child_logs, child_sizes = (
        np.zeros(width * p, q.dtype),
        np.zeros(width, q.dtype),
        np.zeros(width, q.dtype),
    )
    child_places, shares = np.empty(width, np.int64), np.empty((width, 2), q.dtype)
    zeros = np.zeros(TILE_ROWS, q.dtype)
    deltas, logits = np.empty(width * lanes, q.dtype), np.empty(width * lanes, q.dtype)
    child_errors = np.empty(filled * width, q.dtype)
    # Of a list: what each place holds, and for each query of the block its logit, weight and error.
    node, level, bins = np.empty(wanted, np.int64), np.empty(wanted, np.int64), np.empty(wanted, np.int64)
    plain, weights, errors = (
        np.empty(filled * wanted, q.dtype),
        np.empty(filled * wanted, q.dtype),
        np.empty(filled * wanted, q.dtype),
    )
    error, fresh = np.empty(wanted, q.dtype), np.empty(max(wanted, width), q.dtype)
    leaves = np.empty(wanted, np.int64)
    heads, following = np.full(BINS, -1, np.int32), np.empty(wanted, np.int32)
    tops, totals = np.empty(filled, q.dtype), np.empty(filled, q.dtype)
    factors, unused, no_weight = np.empty(lanes, q.dtype), np.empty(lanes, q.dtype), np.zeros(lanes, q.dtype)
    distinct = np.empty(own_count, np.int64)
    logs = log2_counts(n, q.dtype.type(0.0))
    for task in range(first, last):
        group, block = task // blocks, task % blocks
        for r in range(filled):
            query_rows[r] = group * n_q + query_index[group, block, min(r, rows - 1)]
        half_norm = load_block(flat_q, flat_coordinates, query_rows, rows, d, p, scale, queries, squares)
        # The first nodes, which come without a parent.
        gap_count, child_count = 0, start_end - start_first
        root = (1 << start_level) - 1 + start_first
        used, listed, taken, f, refreshed, opened, peak = child_count, 0, child_count, child_count, child_count, 0, 0
        few = n >> start_level
        copy_rows(flat_keys, (group * total + root) * d, gaps, 0, used * d)
        copy_rows(flat_variances, (group * nodes + root) * p, child_variances, 0, used * p)
        for j in range(used):
            node[j], level[j], bins[j], child_places[j] = root + j, start_level, 0, j
            i = start_first + j
            child_logs[j] = logs[2 * start_level + (((i + 1) * n) >> start_level) - ((i * n) >> start_level) - few]
            child_sizes[j] = sizes[group, root + j]
        tops[:] = -np.inf
        while True:
            # Weigh what is new.
            for lane in range(0, filled, lanes):
                base = lane * wanted
                for j in range(0, gap_count if listed else child_count, TILE_ROWS):
                    multiply_tile(gaps, j * d, d, 1, queries, lane * d, d, zeros, 0, deltas, j * lanes, True)
                spreads = lane * width
                for j in range(0, child_count, TILE_ROWS):
                    at = spreads + j * lanes
                    multiply_tile(child_variances, j * p, p, 1, squares, lane * p, p, zeros, 0, child_errors, at, True)
                if listed:
                    for j in range(gap_count):
                        left, right = base + child_places[2 * j] * lanes, base + child_places[2 * j + 1] * lanes
                        up, down = shares[j, 0], shares[j, 1]
                        part_vector(plain, left, right, deltas, j * lanes, up, down, logits, 2 * j * lanes)
                else:
                    copy_rows(deltas, 0, logits, 0, child_count * lanes)
                    copy_rows(deltas, 0, plain, base, child_count * lanes)
                add_spreads(logits, 0, child_errors, spreads, child_count, child_logs, 0)
                copy_vector(tops, lane, factors, 0)
                column_max(logits, 0, child_count, tops, lane)
                changed = False
                for i in range(lanes):
                    moved = factors[i] != tops[lane + i]
                    changed |= moved
                    factors[i] = np.exp2(factors[i] - tops[lane + i]) if moved else one
                scale_columns(weights, base, listed, factors, 0, totals, lane)
                if changed:
                    scale_columns(errors, base, listed, factors, 0, unused, 0)
                exp2_columns(logits, 0, child_count, tops, lane, totals, lane)
                multiply_rows(logits, 0, child_errors, spreads, child_count, child_sizes, 0)
                for j in range(child_count):
                    place = base + child_places[j] * lanes
                    copy_vector(logits, j * lanes, weights, place)
                    copy_vector(child_errors, spreads + j * lanes, errors, place)
            if f >= wanted:
                break
            # Estimate errors: of all nodes, or of what is new.
            everything = f >= REFRESH * refreshed
            for lane in range(0, filled, lanes):
                for i in range(lanes):
                    factors[i] = one / totals[lane + i] if lane + i < rows else 0.0
                if everything:
                    fourth_powers(errors, lane * wanted, used, factors, 0, fresh, lane == 0)
                else:
                    fourth_powers(child_errors, lane * width, child_count, factors, 0, fresh, lane == 0)
            if everything:
                refreshed, peak = f, 0
                for place in range(used):
                    if bins[place] >= 0:
                        heads[bins[place]] = -1
                for place in range(used):
                    if bins[place] >= 0:
                        peak = max(peak, put(error, fresh[place], bins, heads, following, place))
            else:
                for j in range(child_count):
                    peak = max(peak, put(error, fresh[j], bins, heads, following, child_places[j]))
            # Open the worst.
            step = min(max(1, f // GROWTH), wanted - f)
            f += step
            while peak > 0 and heads[peak] < 0:
                peak -= 1
            found = take_worst(error, heads, following, peak, step, chosen)
            gap_count, before, listed = 0, taken, used
            for c in range(found):
                ahead = node[chosen[min(c + AHEAD, found - 1)]]
                if ahead < first_leaf:
                    prefetch(flat_keys, (group * total + 2 * ahead + 1) * d, 2 * d)
                    prefetch(flat_variances, (group * nodes + 2 * ahead + 1) * p, 2 * p)
                place = chosen[c]
                h, depth = node[place], level[place]
                i = h + 1 - (1 << depth)
                more = (((i + 1) * n) >> depth) - ((i * n) >> depth) - 1 if h >= first_leaf else 1
                if c >= step or taken + more > wanted:
                    put(error, error[place], bins, heads, following, place)
                    continue
                taken += more
                if h >= first_leaf:
                    bins[place] = -1
                    leaves[opened] = i
                    opened += 1
                else:
                    left = 2 * h + 1
                    depth += 1
                    start, middle, end = (2 * i * n) >> depth, ((2 * i + 1) * n) >> depth, ((2 * i + 2) * n) >> depth
                    halve_gap(flat_keys, (group * total + left) * d, gaps, gap_count * d, d)
                    copy_rows(flat_variances, (group * nodes + left) * p, child_variances, 2 * gap_count * p, 2 * p)
                    few = n >> depth
                    for j, child, rows_in in ((0, left, middle - start), (1, left + 1, end - middle)):
                        child_logs[2 * gap_count + j] = logs[2 * depth + rows_in - few]
                        child_sizes[2 * gap_count + j] = sizes[group, child]
                        shares[gap_count, j] = 2.0 * (end - start - rows_in) / (end - start)
                    node[place], level[place], node[used], level[used] = left, depth, left + 1, depth
                    bins[place], bins[used] = 0, 0
                    child_places[2 * gap_count], child_places[2 * gap_count + 1] = place, used
                    for lane in range(0, filled, lanes):
                        copy_vector(no_weight, 0, weights, lane * wanted + place * lanes)
                    used += 1
                    gap_count += 1
            child_count = 2 * gap_count
            if taken == before:
                break
        for place in range(used):
            if bins[place] >= 0:
                heads[bins[place]] = -1
        at = list_own(own, group, block, nodes, distinct, key_index, log_weight)
        at = list_closed(
            node, level, bins, used, distinct, logs, spread, half_norm, n, group, block, at, key_index, log_weight
        )
        list_leaves(leaves, opened, distinct, n, nodes, group, block, at, key_index, log_weight)


@kernel()
def list_closed(node, level, bins, used, distinct, logs, spread, half_norm, n, group, block, at, key_index, log_weight):
    """List the closed nodes from slot ``at``, without the keys at ``distinct`` positions, and return the next slot."""
    # The nodes of `HOLDER_LEVEL` that hold such keys, as bits: most others need no search.
    holders = np.uint64(0)
    for position in distinct:
        if position < n:
            holders |= np.uint64(1) << np.uint64((((position + 1) << HOLDER_LEVEL) - 1) // n)
    for place in range(used):
        if bins[place] < 0:
            continue
        depth = level[place]
        i = node[place] + 1 - (1 << depth)
        start, end = (i * n) >> depth, ((i + 1) * n) >> depth
        mine = 0
        if depth < HOLDER_LEVEL or holders >> np.uint64(i >> (depth - HOLDER_LEVEL)) & np.uint64(1):
            mine = first_at_least(distinct, end) - first_at_least(distinct, start)
        if mine < end - start:
            size = LN2 * logs[2 * depth + end - start - (n >> depth)] if mine == 0 else np.log(float(end - start - mine))
            key_index[group, block, at] = node[place]
            sigma = frozen(spread[group, node[place]] * half_norm, size) if end - start > 1 else 0.0
            log_weight[group, block, at] = size + sigma
        at += 1
    return at


@kernel()
def list_leaves(leaves, opened, distinct, n, nodes, group, block, at, key_index, log_weight):
    """List the keys of the opened leaves from slot ``at``, but for those at ``distinct`` positions."""
    depth = level_of(nodes // 2)
    for c in range(opened):
        i = leaves[c]
        for position in range((i * n) >> depth, ((i + 1) * n) >> depth):
            mine = first_at_least(distinct, position)
            if mine == distinct.shape[0] or distinct[mine] != position:
                key_index[group, block, at] = nodes + position
                log_weight[group, block, at] = 0.0
            at += 1


@kernel()
def load_block(q, coordinates, query_rows, rows, d, p, scale, queries, squares):
    """Write a block's queries, and half the squares of their coordinates, across the lanes; return mean ‖scale q‖² / 2d.

    Queries that are not finite count as 0.
    """
    lanes = VECTOR_BYTES // q.itemsize
    filled = query_rows.shape[0]
    norm = 0.0
    for lane in range(0, filled, lanes):
        load_queries(q, query_rows, lane, d, q.dtype.type(scale / LN2), queries)
        load_queries(coordinates, query_rows, lane, p, q.dtype.type(1.0), squares)
    half = q.dtype.type(0.5 / LN2)
    vectors = d // lanes
    for t in range(np.uintp(filled * p)):
        square = squares[t] * squares[t] * half
        squares[t] = square if square < np.inf else 0.0
    for r in range(filled):
        row_square = scaled_squares(q, query_rows[r] * d, vectors, 1.0)
        for t in range(vectors * lanes, d):
            row_square += np.float64(q[query_rows[r] * d + t]) ** 2
        if not row_square < np.inf:
            row_square = 0.0
            lane = r // lanes * lanes
            for t in range(d):
                queries[lane * d + t * lanes + r - lane] = 0.0
        if r < rows:
            norm += row_square
    return norm / rows * scale * scale * 0.5 / d


@kernel()
def log2_counts(n, zero):
    """Return the binary logarithms of ⌊n / 2**ℓ⌋ and of one more, at 2ℓ and 2ℓ + 1."""
    logs = np.empty(2 * 64, np.asarray(zero).dtype)
    for level in range(64):
        logs[2 * level] = np.log2(float(max(1, n >> level)))
        logs[2 * level + 1] = np.log2(float((n >> level) + 1))
    return logs


@kernel()
def halve_gap(rows, place, gaps, target, d):
    """Write half the difference of the row at ``place`` from the next one."""
    first, second, out = np.uintp(place), np.uintp(place + d), np.uintp(target)
    half = rows.dtype.type(0.5)
    for t in range(np.uintp(d)):
        gaps[out + t] = half * (rows[first + t] - rows[second + t])


@kernel()
def put(error, value, bins, heads, following, place):
    """Put a closed node into the bin of its error, NaN counting as 0, and return that."""
    error[place] = value if value > 0 else 0.0
    rounded = np.float32(error[place])
    # Sign, exponent and four bits of the fraction.
    found = rounded.view(np.int32) >> 19
    bins[place] = found
    following[place] = heads[found]
    heads[found] = place
    return found


@kernel()
def take_worst(error, heads, following, peak, count, chosen):
    """Take at least ``count`` nodes of largest error out of the bins, or all: to ``chosen``, the largest first.

    No bin above ``peak`` holds a node. All nodes of the last bin are taken; return how many.
    """
    found, current = 0, peak
    while current >= 0 and found < count:
        place = heads[current]
        heads[current] = -1
        current -= 1
        while place >= 0:
            chosen[found] = place
            found += 1
            place = following[place]
    for i in range(1, found):
        place = chosen[i]
        j = i - 1
        while j >= 0 and error[chosen[j]] < error[place]:
            chosen[j + 1] = chosen[j]
            j -= 1
        chosen[j + 1] = place
    return found


@kernel()
def list_own(own, group, block, nodes, distinct, key_index, log_weight):
    """List a block's own keys, write them to ``distinct`` (those said before as a position after all); return how many."""
    count = own.shape[2]
    found = 0
    for i in range(count):
        position = own[group, block, i]
        again = i > 0 and position == own[group, block, i - 1]
        key_index[group, block, i] = nodes + position
        log_weight[group, block, i] = -np.inf if again else 0.0
        if not again:
            distinct[found] = position
            found += 1
    distinct[found:] = np.iinfo(np.int64).max
    return count


@kernel()
def frozen(half_variance, log_count):
    """Return ln of the mean of exp over so many normal numbers, as the contract has it."""
    if half_variance > log_count:
        return 2.0 * np.sqrt(half_variance * log_count) - log_count
    return half_variance


@kernel()
def first_at_least(ascending, value):
    """Return the first place whose number is at least ``value``, or the length."""
    low, high = 0, ascending.shape[0]
    while low < high:
        middle = (low + high) >> 1
        if ascending[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


@kernel()
def level_of(node):
    """Return the level of a node."""
    level = 0
    while (2 << level) - 1 <= node:
        level += 1
    return level
