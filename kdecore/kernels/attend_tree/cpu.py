"""`attend_tree` in Numba for the CPU: a block of queries a task, down the tree and attention in one pass, without lists."""

from functools import partial

import numpy as np

from kdecore.arrays.memory import from_host_like, host_memory, host_view
from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.state import AttentionState
from kdecore.core.tree import BlockQueries, Tree
from kdecore.kernels.attend_blocks.cpu import LN2, round_up, write_panel
from kdecore.kernels.runtime.descent import (
    AHEAD,
    LOWEST,
    descend,
    first_at_least,
    host_queries,
    host_tree,
    leaf_level,
    list_leaves,
    load_block,
    memory,
)
from kdecore.kernels.runtime.jit import helper, kernel
from kdecore.kernels.runtime.simd import (
    SHORT_TILE_ROWS,
    TILE_ROWS,
    VECTOR_BYTES,
    column_max,
    columns_from_rows,
    copy_rows,
    exp2_columns,
    inner_product,
    multiply_short_tile,
    multiply_tile,
    prefetch,
)
from kdecore.kernels.runtime.threads import fair_chunk, run_tasks

DEPTH = 128
"""Keys in one product with the values: their rows and weights stay in the first-level cache."""
TASKS = 8
"""Blocks a thread takes at a time, at most."""


def attend_tree(
    xp: Namespace,
    queries: BlockQueries,
    tree: Tree,
    values: Array,
    threshold: Array,
    most: int,
    start: tuple[int, int, int],
    own: Array | None = None,
    slope: Array | None = None,
    limits: tuple[Array, Array] | None = None,
    before: AttentionState | None = None,
) -> tuple[AttentionState, Array]:
    """Follow `kdecore.kernels.attend_tree.contract.AttendTree`."""
    given, nodes, rows = host_queries(queries), host_tree(tree), host_view(values)
    (groups, n_q, d), d_v, dtype = given.q.shape, rows.shape[2] - 1, given.q.dtype
    mine = np.empty((groups, 0), np.int64) if own is None else host_view(own)
    ends = np.empty((2, 0, 0), dtype) if limits is None else np.stack([host_view(x) for x in limits])
    matrices = np.zeros((groups, 0, d, d_v), dtype) if slope is None else host_view(slope)
    # What a panel's last tile reads beyond the last column has to be there. Queries are scaled by 1 / ln 2 too.
    slopes = np.zeros((*matrices.shape[:2], d * d_v + TILE_ROWS), dtype)
    slopes[:, :, : d * d_v] = matrices.reshape(*matrices.shape[:2], d * d_v) * LN2
    if before is None:
        out, lse = np.empty((groups, n_q, d_v), dtype), np.empty((groups, n_q), dtype)
    else:
        out, lse = host_memory(before.out), host_memory(before.lse)
    counts = np.zeros(given.index.shape[:2], np.int64)
    opening = float(host_view(threshold).item()), most, start
    more, results = (mine, slopes, ends), (out, lse, counts)
    run_tasks(
        partial(attend_some, given, nodes, rows, more, opening, before is not None, results),
        counts.size,
        chunk=fair_chunk(counts.size, TASKS),
    )
    out, lse, counts = (from_host_like(xp, x, queries.q) for x in results)
    return AttentionState(out, lse), counts


@kernel()
def attend_some(queries, tree, values, more, opening, merging, results, first, last):
    """Evaluate blocks first … last − 1, counted through all groups."""
    q, scale, (own, slopes, limits), (out, lse, counts) = queries.q, queries.scale, more, results
    (threshold, most, start), (_, blocks, b) = opening, queries.index.shape
    n_q, d = q.shape[1:]
    keys = tree.keys
    nodes, rows, d_v, matrices = tree.spread.shape[1], keys.shape[1], values.shape[2] - 1, slopes.shape[1]
    n, last_level, lanes = rows - nodes, leaf_level(nodes), VECTOR_BYTES // q.itemsize
    filled, width = round_up(b, lanes), round_up(most, TILE_ROWS) + TILE_ROWS
    wide = d_v + 1 if matrices > 0 else d_v
    columns = columns_of(wide)
    flat_q, flat_keys, flat_values, flat_out = q.reshape(-1), keys.reshape(-1), values.reshape(-1), out.reshape(-1)
    work, none = memory(filled, d, tree.variances.shape[2], width, q), np.zeros(TILE_ROWS, q.dtype)
    tile, sums = np.zeros((DEPTH + TILE_ROWS) * columns, q.dtype), np.zeros(filled * (columns + TILE_ROWS), q.dtype)
    change, square = np.zeros(round_up(d_v, TILE_ROWS) * lanes, q.dtype), np.zeros(lanes * lanes, q.dtype)
    own_rows, own_logits = np.zeros(filled, np.int64), np.zeros(filled, q.dtype)
    totals, again = np.zeros(filled, np.float64), np.zeros(filled, np.bool_)
    writing = (np.empty(lanes, q.dtype), np.empty(lanes * d_v, q.dtype), np.empty(filled, q.dtype), np.arange(lanes))
    for task in range(first, last):
        group, block = task // blocks, task % blocks
        load_block(queries, task, work)
        closed, opened, slots = descend(tree, group, start, threshold, most, b, queries.apart, work)
        counts[group, block] = slots
        list_leaves(n, last_level, nodes, closed, opened, work)
        single, top_row = slots - closed, group * rows
        for j in range(single):
            prefetch(flat_keys, (top_row + work.node[closed + min(j + AHEAD, single - 1)]) * d, d)
            copy_rows(flat_keys, (top_row + work.node[closed + j]) * d, work.tile, j * d, d)
        for r in range(filled):
            again[r] = r >= b or (r > 0 and work.rows[r] == work.rows[r - 1])
            # Nodes that were opened may have weighed more than what came of them.
            work.tops[r], own_logits[r], own_rows[r] = LOWEST, -np.inf, top_row
        for r in range(filled if own.shape[1] > 0 else 0):
            position = unlisted_own(own[group, work.rows[r] - group * n_q], work.leaves, opened, n, last_level)
            if position >= 0:
                own_rows[r] = top_row + nodes + position
                own_logits[r] = row_product(flat_q, work.rows[r] * d, flat_keys, own_rows[r] * d, d) * (scale / LN2)
                work.tops[r] = max(work.tops[r], own_logits[r])
        for lane in range(0, filled, lanes):
            at, to = lane * width, lane * width + closed * lanes
            for j in range(0, single, TILE_ROWS):
                multiply_tile(work.tile, j * d, d, 1, work.queries, lane * d, d, none, 0, work.kept, to + j * lanes, True)
            column_max(work.kept, at, slots, work.tops, lane)
            work.totals[lane : lane + lanes] = 0.0
            exp2_columns(work.kept, at, slots, work.tops, lane, work.totals, lane)
        add_values(flat_values, top_row, d_v + 1, wide, slots, work, tile, none, sums)
        for lane in range(0, filled, lanes):
            base = lane * columns
            if matrices > 0:
                add_first_order(slopes[group, block * matrices // blocks], d, d_v, lane, base, work, change, none, sums)
            for i in range(lanes):
                totals[lane + i] = work.totals[lane + i]
            if own.shape[1] > 0:
                add_own(flat_values, d_v, own_rows, own_logits, lane, base, work, square, totals, sums)
            if limits.shape[1] > 0:
                hold(limits, group, d_v, lane, base, totals, sums)
            panel = sums[base : base + columns * lanes]
            write_panel(panel, work.tops, totals, work.rows, lane, again, merging, d_v, writing, lse.reshape(-1), flat_out)


@helper()
def columns_of(wide):
    """Return the columns of values in whole tiles, of which the last may be a short one."""
    tiled = wide // TILE_ROWS * TILE_ROWS
    return tiled + SHORT_TILE_ROWS if 0 < wide - tiled <= SHORT_TILE_ROWS else round_up(wide, TILE_ROWS)


@helper()
def unlisted_own(position, leaves, opened, n, last_level):
    """Return the position of a query's own key, −1 where it has none or its leaf is among those opened, which ascend."""
    if not 0 <= position < n:
        return -1
    leaf = (((position + 1) << last_level) - 1) // n
    place = first_at_least(leaves, opened, leaf)
    return -1 if place < opened and leaves[place] == leaf else position


@helper()
def row_product(a, a0, b, b0, d):
    """Return the product of two rows of d numbers."""
    vectors = d // (VECTOR_BYTES // a.itemsize)
    total = inner_product(a, a0, b, b0, vectors)
    for t in range(vectors * (VECTOR_BYTES // a.itemsize), d):
        total += a[a0 + t] * b[b0 + t]
    return total


@helper()
def add_values(values, top_row, step, wide, slots, work, tile, none, sums):
    """Write the sums of weights times values over a block's list, panel by panel: (panels, columns, lanes)."""
    lanes, filled, width = VECTOR_BYTES // work.bias.itemsize, work.rows.shape[0], work.bias.shape[0]
    columns, tiled = columns_of(wide), wide // TILE_ROWS * TILE_ROWS
    short = columns - tiled == SHORT_TILE_ROWS
    for begin in range(0, slots, DEPTH):
        depth, fresh = min(DEPTH, slots - begin), begin == 0
        for j in range(depth):
            prefetch(values, (top_row + work.node[begin + min(j + AHEAD, depth - 1)]) * step, wide)
            copy_rows(values, (top_row + work.node[begin + j]) * step, tile, j * columns, wide)
        for lane in range(0, filled, lanes):
            weight, base = lane * width + begin * lanes, lane * columns
            for column in range(0, tiled if short else columns, TILE_ROWS):
                target = base + column * lanes
                multiply_tile(tile, column, 1, columns, work.kept, weight, depth, none, 0, sums, target, fresh)
            if short:
                target = base + tiled * lanes
                multiply_short_tile(tile, tiled, 1, columns, work.kept, weight, depth, none, 0, sums, target, fresh)


@helper()
def add_first_order(matrix, d, d_v, lane, base, work, change, none, sums):
    """Add to a panel's sums what their last column, of spreads, makes of queries times a matrix."""
    lanes = VECTOR_BYTES // sums.itemsize
    for column in range(0, d_v, TILE_ROWS):
        multiply_tile(matrix, column, 1, d_v, work.queries, lane * d, d, none, 0, change, column * lanes, True)
    spreads = np.uintp(base + d_v * lanes)
    for t in range(d_v):
        source, target = np.uintp(t * lanes), np.uintp(base + t * lanes)
        for i in range(np.uintp(lanes)):
            sums[target + i] += change[source + i] * sums[spreads + i]


@helper()
def add_own(values, d_v, own_rows, own_logits, lane, base, work, square, totals, sums):
    """Add to a panel's totals and sums what its queries' own keys weigh."""
    lanes, some = VECTOR_BYTES // sums.itemsize, False
    for i in range(lanes):
        work.factors[i] = np.exp2(own_logits[lane + i] - work.tops[lane + i])
        totals[lane + i] += work.factors[i]
        some |= work.factors[i] > 0
    squares = d_v // lanes * lanes if some else 0
    for t in range(0, squares, lanes):
        columns_from_rows(values, own_rows, lane, d_v + 1, t, values.dtype.type(1.0), square, 0)
        for u in range(lanes):
            source, target = np.uintp(u * lanes), np.uintp(base + (t + u) * lanes)
            for i in range(np.uintp(lanes)):
                sums[target + i] += square[source + i] * work.factors[i]
    for t in range(squares, d_v if some else 0):
        for i in range(lanes):
            sums[base + t * lanes + i] += values[own_rows[lane + i] * (d_v + 1) + t] * work.factors[i]


@helper()
def hold(limits, group, d_v, lane, base, totals, sums):
    """Bring a panel's sums over totals within limits."""
    lanes = VECTOR_BYTES // sums.itemsize
    for t in range(d_v):
        low, high = limits[0, group, t], limits[1, group, t]
        target, first = np.uintp(base + t * lanes), np.uintp(lane)
        for i in range(np.uintp(lanes)):
            total = sums.dtype.type(totals[first + i])
            sums[target + i] = min(max(sums[target + i], low * total), high * total)
