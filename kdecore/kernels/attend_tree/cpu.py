"""`attend_tree` in Numba for the CPU: a block of queries a task, down the tree and attention in one pass, without lists."""

import numpy as np

from kdecore.kernels.attend_blocks.cpu import LN2, round_up, write_panel
from kdecore.kernels.descent import AHEAD, LOWEST, descend, first_at_least, leaf_level, list_leaves, load_block, memory
from kdecore.kernels.jit import kernel
from kdecore.kernels.simd import (
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
from kdecore.kernels.threads import fair_chunk, run_tasks
from kdecore.merge import Part
from kdecore.namespaces import Array, Namespace, from_host_like, host_memory, host_view

DEPTH = 128
"""Keys in one product with the values: their rows and weights stay in the first-level cache."""
TASKS = 8
"""Blocks a thread takes at a time, at most."""


def attend_tree(
    xp: Namespace,
    q: Array,
    scale: float,
    coordinates: Array,
    query_index: Array,
    keys: Array,
    values: Array,
    spread: Array,
    variances: Array,
    sizes: Array,
    threshold: Array,
    most: int,
    start: tuple[int, int, int],
    own: Array | None = None,
    slope: Array | None = None,
    limits: tuple[Array, Array] | None = None,
    before: Part | None = None,
) -> tuple[Part, Array]:
    """Follow `kdecore.kernels.attend_tree.contract.AttendTree`."""
    q_, coordinates_, index = host_view(q), host_view(coordinates), host_view(query_index)
    tree = tuple(host_view(x) for x in (keys, spread, variances, sizes))
    values_ = host_view(values)
    groups, n_q, d = q_.shape
    d_v = values_.shape[2] - 1
    own_ = np.empty((groups, 0), np.int64) if own is None else host_view(own)
    # What a panel's last tile reads beyond the last column has to be there.
    matrices = np.zeros((groups, 0, d, d_v), q_.dtype) if slope is None else host_view(slope)
    ends = np.empty((2, 0, 0), q_.dtype) if limits is None else np.stack([host_view(x) for x in limits])
    slopes = np.zeros((*matrices.shape[:2], d * d_v + TILE_ROWS), q_.dtype)
    slopes[:, :, : d * d_v] = matrices.reshape(*matrices.shape[:2], d * d_v) * LN2  # queries are scaled by 1 / ln 2 too
    if before is None:
        out, lse = np.empty((groups, n_q, d_v), q_.dtype), np.empty((groups, n_q), q_.dtype)
    else:
        out, lse = host_memory(before.out), host_memory(before.lse)
    counts = np.zeros(index.shape[:2], np.int64)
    limit = float(host_view(threshold).item())
    tasks = counts.size
    run_tasks(
        lambda first, last: attend_blocks_of_tree(
            q_, coordinates_, index, tree, values_, own_, slopes, ends, float(scale), limit, most, start, before is not None,
            out, lse, counts, first, last,
        ),
        tasks,
        chunk=fair_chunk(tasks, TASKS),
    )  # fmt: skip
    return Part(from_host_like(xp, out, q), from_host_like(xp, lse, q)), from_host_like(xp, counts, q)


@kernel()
def attend_blocks_of_tree(
    q,
    coordinates,
    query_index,
    tree,
    values,
    own,
    slopes,
    limits,
    scale,
    threshold,
    most,
    start,
    merging,
    out,
    lse,
    counts,
    first,
    last,
):
    """Evaluate blocks first … last − 1, counted through all groups."""
    _, blocks, b = query_index.shape
    n_q, d = q.shape[1:]
    keys, variances = tree[0], tree[2]
    nodes, rows, d_v = variances.shape[1], keys.shape[1], values.shape[2] - 1
    n, lanes = rows - nodes, VECTOR_BYTES // q.itemsize
    filled, width = round_up(b, lanes), round_up(most, TILE_ROWS) + TILE_ROWS
    last_level = leaf_level(nodes)
    matrices = slopes.shape[1]
    with_slope, with_own = matrices > 0, own.shape[1] > 0
    wide = d_v + 1 if with_slope else d_v
    tiled = wide // TILE_ROWS * TILE_ROWS
    short = 0 < wide - tiled <= SHORT_TILE_ROWS
    columns = tiled + SHORT_TILE_ROWS if short else round_up(wide, TILE_ROWS)
    flat_q, flat_keys, flat_values, flat_out = q.reshape(-1), keys.reshape(-1), values.reshape(-1), out.reshape(-1)
    work = memory(filled, d, variances.shape[2], width, q)
    no_weight = np.zeros(TILE_ROWS, q.dtype)
    value_tile, sums = np.zeros((DEPTH + TILE_ROWS) * columns, q.dtype), np.zeros(filled * (columns + TILE_ROWS), q.dtype)
    change = np.zeros((round_up(d_v, TILE_ROWS)) * lanes, q.dtype)
    own_rows, own_logits, square = np.zeros(filled, np.int64), np.zeros(filled, q.dtype), np.zeros(lanes * lanes, q.dtype)
    totals, again = np.zeros(filled, np.float64), np.zeros(filled, np.bool_)
    writing = (np.empty(lanes, q.dtype), np.empty(lanes * d_v, q.dtype), np.empty(filled, q.dtype), np.arange(lanes))
    tops, vectors, log2 = work.tops, d // lanes, scale / LN2
    for task in range(first, last):
        group, block = task // blocks, task % blocks
        half_norm = load_block(q, coordinates, query_index, task, scale, work)
        closed, opened, slots = descend(tree, group, start, threshold, most, b, half_norm, work)
        counts[group, block] = slots
        list_leaves(n, last_level, nodes, closed, opened, work)
        single = slots - closed
        for j in range(single):
            prefetch(flat_keys, (group * rows + work.node[closed + min(j + AHEAD, single - 1)]) * d, d)
            copy_rows(flat_keys, (group * rows + work.node[closed + j]) * d, work.tile, j * d, d)
        for r in range(filled):
            again[r] = r >= b or (r > 0 and work.rows[r] == work.rows[r - 1])
            own_logits[r] = -np.inf
            # Nodes that were opened may have weighed more than what came of them.
            tops[r] = LOWEST
            own_rows[r] = group * rows
        if with_own:
            for r in range(filled):
                position = own[group, work.rows[r] - group * n_q]
                if not 0 <= position < n:
                    continue
                leaf = (((position + 1) << last_level) - 1) // n
                place = first_at_least(work.leaves, opened, leaf)
                if place < opened and work.leaves[place] == leaf:
                    continue
                own_rows[r] = group * rows + nodes + position
                logit = np.float64(inner_product(flat_q, work.rows[r] * d, flat_keys, own_rows[r] * d, vectors))
                for t in range(vectors * lanes, d):
                    logit += flat_q[work.rows[r] * d + t] * flat_keys[own_rows[r] * d + t]
                own_logits[r] = logit * log2
                tops[r] = max(tops[r], own_logits[r])
        for lane in range(0, filled, lanes):
            at = lane * width
            for j in range(0, single, TILE_ROWS):
                multiply_tile(
                    work.tile,
                    j * d,
                    d,
                    1,
                    work.queries,
                    lane * d,
                    d,
                    no_weight,
                    0,
                    work.kept,
                    at + (closed + j) * lanes,
                    True,
                )
            column_max(work.kept, at, slots, tops, lane)
            work.totals[lane : lane + lanes] = 0.0
            exp2_columns(work.kept, at, slots, tops, lane, work.totals, lane)
        for begin in range(0, slots, DEPTH):
            depth = min(DEPTH, slots - begin)
            for j in range(depth):
                ahead = work.node[begin + min(j + AHEAD, depth - 1)]
                prefetch(flat_values, (group * rows + ahead) * (d_v + 1), wide)
                copy_rows(flat_values, (group * rows + work.node[begin + j]) * (d_v + 1), value_tile, j * columns, wide)
            for lane in range(0, filled, lanes):
                weight = lane * width + begin * lanes
                for column in range(0, tiled if short else columns, TILE_ROWS):
                    target = lane * columns + column * lanes
                    multiply_tile(
                        value_tile, column, 1, columns, work.kept, weight, depth, no_weight, 0, sums, target, begin == 0
                    )
                if short:
                    target = lane * columns + tiled * lanes
                    multiply_short_tile(
                        value_tile, tiled, 1, columns, work.kept, weight, depth, no_weight, 0, sums, target, begin == 0
                    )
        matrix = slopes[group, block * matrices // blocks] if with_slope else no_weight
        for lane in range(0, filled, lanes):
            base = lane * columns
            if with_slope:
                for column in range(0, d_v, TILE_ROWS):
                    multiply_tile(
                        matrix, column, 1, d_v, work.queries, lane * d, d, no_weight, 0, change, column * lanes, True
                    )
                spreads = base + d_v * lanes
                for t in range(d_v):
                    for i in range(lanes):
                        sums[base + t * lanes + i] += change[t * lanes + i] * sums[spreads + i]
            for i in range(lanes):
                totals[lane + i] = work.totals[lane + i]
            if with_own:
                some = False
                for i in range(lanes):
                    work.factors[i] = np.exp2(own_logits[lane + i] - tops[lane + i])
                    totals[lane + i] += work.factors[i]
                    some |= work.factors[i] > 0
                if some:
                    squares = d_v // lanes * lanes
                    for t in range(0, squares, lanes):
                        columns_from_rows(flat_values, own_rows, lane, d_v + 1, t, q.dtype.type(1.0), square, 0)
                        for u in range(lanes):
                            for i in range(lanes):
                                sums[base + (t + u) * lanes + i] += square[u * lanes + i] * work.factors[i]
                    for t in range(squares, d_v):
                        for i in range(lanes):
                            value = flat_values[own_rows[lane + i] * (d_v + 1) + t]
                            sums[base + t * lanes + i] += value * work.factors[i]
            if limits.shape[1] > 0:
                for t in range(d_v):
                    low, high = limits[0, group, t], limits[1, group, t]
                    for i in range(lanes):
                        total = q.dtype.type(totals[lane + i])
                        at = base + t * lanes + i
                        sums[at] = min(max(sums[at], low * total), high * total)
            write_panel(
                sums[base : base + columns * lanes],
                tops,
                totals,
                work.rows,
                lane,
                again,
                merging,
                d_v,
                writing,
                lse.reshape(-1),
                flat_out,
            )
