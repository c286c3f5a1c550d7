"""`attend_blocks` in Numba for the CPU: gather, product, softmax, product in one pass over tiles that stay in cache.

Per task (a block's rows, at most `TASK_ROWS`): the block's keys are copied together in chunks of `CHUNK_SLOTS`, and each
panel of queries (one vector of them, transposed) meets the chunk: products, maximum, exp and products with the values,
merging chunks by the running maximum as FlashAttention does. Queries lie across the vector's lanes, so neither keys nor
values are transposed, and maximum and sum run down the lanes. Logits are kept in units of log 2, so that exp is 2**x.
"""

import math

import numpy as np

from kdecore.arrays.memory import from_host_like, host_memory, host_view
from kdecore.arrays.namespace import Array, Namespace, host
from kdecore.arrays.rows import of_all_groups
from kdecore.core.state import AttentionState
from kdecore.kernels.runtime.jit import helper, kernel
from kdecore.kernels.runtime.simd import (
    SHORT_TILE_ROWS,
    TILE_ROWS,
    VECTOR_BYTES,
    column_max,
    columns_from_rows,
    copy_rows,
    copy_vector,
    exp2_columns,
    multiply_short_tile,
    multiply_tile,
    prefetch,
    rows_from_columns,
)
from kdecore.kernels.runtime.threads import fair_chunk, run_tasks, team

TASK_ROWS = 256
"""Rows that share one copy of their keys, at most."""
LEAST_TASK_ROWS = 48
"""Where there are fewer tasks than threads, tasks are cut down to so many rows."""
CHUNK_SLOTS = 600
"""Keys copied together at most: with d = d_v = 64 in float32, 300 of 512 KiB of second-level cache."""
VALUE_DEPTH = 96
"""Keys in one product with the values: their rows and weights stay in the first-level cache."""
AHEAD = 16
"""Rows that are asked for before they are copied."""
LN2 = math.log(2.0)


def attend_blocks(
    xp: Namespace,
    q: Array,
    k: Array,
    v: Array,
    query_index: Array,
    key_index: Array,
    log_weight: Array,
    scale: float,
    bias: Array | None = None,
    before: AttentionState | None = None,
    groups: int = 1,
    whole: bool = False,
) -> AttentionState:
    """Follow `kdecore.kernels.attend_blocks.contract.AttendBlocks`."""
    queries, keys, values, index, listed, weight = (host_view(x) for x in (q, k, v, query_index, key_index, log_weight))
    index = of_all_groups(host, index, groups, len(queries) // groups)
    inputs = queries, keys, values, index, of_all_groups(host, listed, groups, len(keys) // groups), weight
    if before is None:
        out = np.zeros((queries.shape[0], values.shape[1]), queries.dtype)
        lse = np.full(queries.shape[0], -np.inf, queries.dtype)
    else:
        out, lse = host_memory(before.out), host_memory(before.lse)
    factor = queries.dtype.type(scale / LN2)
    blocks, rows = index.shape
    added = host_view(np.empty((0, 0, 0), queries.dtype) if bias is None else bias)
    with team() as own:
        parts = max(-(-rows // TASK_ROWS), min(-(-own.threads // max(1, blocks)), -(-rows // LEAST_TASK_ROWS)))
        # Small blocks by the dozen: a call of the kernel costs as much as a few queries.
        chunk = fair_chunk(blocks * parts, TASK_ROWS // max(1, rows))
        run_tasks(
            lambda first, last: attend_tasks(*inputs, added, factor, parts, before is not None, out, lse, first, last),
            blocks * parts,
            chunk=chunk,
        )
    return AttentionState(from_host_like(xp, out, q), from_host_like(xp, lse, q))


@kernel()
def attend_tasks(q, k, v, query_index, key_index, log_weight, added, factor, parts, merging, out, lse, first, last):
    """Evaluate tasks first … last − 1, ``parts`` a block, into out and lse.

    ``added`` has no blocks where nothing is; merging with what out and lse hold.
    """
    rows, slots = query_index.shape[1], key_index.shape[1]
    d, d_v = q.shape[1], v.shape[1]
    lanes = VECTOR_BYTES // q.itemsize
    task_rows = round_up(-(-rows // max(1, parts)), lanes) if parts > 1 else rows
    panels = -(-task_rows // lanes)
    chunk = round_up(-(-slots // -(-slots // CHUNK_SLOTS)), TILE_ROWS)
    # What is left over of the values takes one tile, a short one if that will do.
    tiled = d_v // TILE_ROWS * TILE_ROWS
    short = 0 < d_v - tiled <= SHORT_TILE_ROWS
    columns = tiled + SHORT_TILE_ROWS if short else round_up(d_v, TILE_ROWS)
    flat_q, flat_k, flat_v, flat_out = q.reshape(-1), k.reshape(-1), v.reshape(-1), out.reshape(-1)
    flat_added, square = added.reshape(-1), np.empty(lanes * lanes, q.dtype)
    query_rows, added_rows = np.zeros(panels * lanes, np.int64), np.zeros(panels * lanes, np.int64)
    queries = np.zeros(panels * d * lanes, q.dtype)
    keys = np.zeros(chunk * d, q.dtype)
    values = np.zeros(chunk * columns, q.dtype)
    bias = np.empty(chunk, q.dtype)
    zeros = np.zeros(TILE_ROWS, q.dtype)
    logits = np.empty(chunk * lanes, q.dtype)
    chunk_sums = np.zeros(columns * lanes, q.dtype)
    chunk_totals = np.empty(lanes, q.dtype)
    before, shifts = np.empty(lanes, q.dtype), np.empty(lanes, q.dtype)
    tops = np.empty(panels * lanes, q.dtype)
    again = np.empty(panels * lanes, np.bool_)
    work = (np.empty(lanes, q.dtype), np.empty(lanes * d_v, q.dtype), np.empty(panels * lanes, q.dtype), np.arange(lanes))
    # Chunks are added up in float64, so that float32 errors do not grow with the number of keys.
    sums = np.zeros(panels * columns * lanes, np.float64)
    totals = np.empty(panels * lanes, np.float64)
    for task in range(first, last):
        block, begin = task // parts, task % parts * task_rows
        count = min(task_rows, rows - begin)
        if count <= 0:
            continue
        # Lanes beyond the block repeat its last query.
        filled = round_up(count, lanes)
        for r in range(filled):
            at = begin + r
            query_rows[r] = query_index[block, min(at, begin + count - 1)]
            again[r] = r >= count or (at > 0 and query_index[block, at] == query_index[block, at - 1])
            added_rows[r] = (block if added.shape[0] > 1 else 0) * rows + begin + min(r, count - 1)
            prefetch(flat_q, query_rows[r] * d, d)
            if merging:
                prefetch(flat_out, query_rows[r] * d_v, d_v)
        for lane in range(0, filled, lanes):
            load_queries(flat_q, query_rows, lane, d, factor, queries)
        tops[:] = -np.inf
        totals[:] = 0.0
        for start in range(0, slots, chunk):
            used = min(chunk, slots - start)
            width = round_up(used, TILE_ROWS)
            # Slots that only fill a tile: of weight 0, and finite so that 0 times them is 0, but for a query that is not.
            bias[used:width] = -np.inf
            keys[used * d : width * d] = 0.0
            values[used * columns : width * columns] = 0.0
            for j in range(used):
                ahead = key_index[block, start + min(j + AHEAD, used - 1)]
                prefetch(flat_k, ahead * d, d)
                prefetch(flat_v, ahead * d_v, d_v)
                key = key_index[block, start + j]
                copy_rows(flat_k, key * d, keys, j * d, d)
                copy_rows(flat_v, key * d_v, values, j * columns, d_v)
                bias[j] = log_weight[block, start + j] * (1.0 / LN2)
            for lane in range(0, filled, lanes):
                for j in range(0, width, TILE_ROWS):
                    multiply_tile(keys, j * d, d, 1, queries, lane * d, d, bias, j, logits, j * lanes, True)
                if added.shape[0] > 0:
                    add_bias(flat_added, added_rows, lane, slots, start, used, square, logits)
                    logits[used * lanes : width * lanes] = -np.inf
                copy_vector(tops, lane, before, 0)
                column_max(logits, 0, width, tops, lane)
                for i in range(lanes):
                    shifts[i] = tops[lane + i] if tops[lane + i] > -np.inf else 0.0
                chunk_totals[:] = 0.0
                for deep in range(0, width, VALUE_DEPTH):
                    depth = min(VALUE_DEPTH, width - deep)
                    exp2_columns(logits, deep * lanes, depth, shifts, 0, chunk_totals, 0)
                    value, weight, fresh = deep * columns, deep * lanes, deep == 0
                    for column in range(0, tiled if short else columns, TILE_ROWS):
                        target = column * lanes
                        multiply_tile(
                            values, value + column, 1, columns, logits, weight, depth, zeros, 0, chunk_sums, target, fresh
                        )
                    if short:
                        target = tiled * lanes
                        multiply_short_tile(
                            values, value + tiled, 1, columns, logits, weight, depth, zeros, 0, chunk_sums, target, fresh
                        )
                if used == slots:
                    for i in range(lanes):
                        totals[lane + i] = chunk_totals[i]
                    write_panel(chunk_sums, tops, totals, query_rows, lane, again, merging, d_v, work, lse, flat_out)
                else:
                    add_chunk(before, shifts, chunk_totals, chunk_sums, totals, sums, lane, columns, start == 0)
        if chunk < slots:
            for lane in range(0, filled, lanes):
                for t in range(columns * lanes):
                    chunk_sums[t] = sums[lane * columns + t]
                write_panel(chunk_sums, tops, totals, query_rows, lane, again, merging, d_v, work, lse, flat_out)


@helper()
def load_queries(q, query_rows, lane, d, factor, queries):
    """Write the queries of one panel down its lanes, scaled."""
    lanes = VECTOR_BYTES // q.itemsize
    square = d // lanes * lanes
    for t in range(0, square, lanes):
        columns_from_rows(q, query_rows, lane, d, t, factor, queries, lane * d + t * lanes)
    for r in range(lanes):
        for t in range(square, d):
            queries[lane * d + t * lanes + r] = q[query_rows[lane + r] * d + t] * factor


@helper()
def add_bias(bias, rows, lane, slots, start, used, square, logits):
    """Add the bias of slots start … start + used − 1 of a panel's queries to their logits; −∞ whatever they are for −∞."""
    lanes = VECTOR_BYTES // bias.itemsize
    squares = used // lanes * lanes
    unit = bias.dtype.type(1.0 / LN2)
    for t in range(0, squares, lanes):
        columns_from_rows(bias, rows, lane, slots, start + t, unit, square, 0)
        base = np.uintp(t * lanes)
        for i in range(np.uintp(lanes * lanes)):
            logits[base + i] = logits[base + i] + square[i] if square[i] > -np.inf else -np.inf
    for r in range(lanes):
        for t in range(squares, used):
            extra = bias[rows[lane + r] * slots + start + t] * unit
            logits[t * lanes + r] = logits[t * lanes + r] + extra if extra > -np.inf else -np.inf


@helper()
def write_panel(panel, tops, totals, query_rows, lane, again, merging, d_v, work, lse, out):
    """Write the results of a panel of queries, or merge them with what lse and out hold."""
    inverses, rows, kept, places = work
    finish_queries(tops, totals, query_rows, lane, again, merging, inverses, kept, lse)
    if merging:
        store_queries(panel, places, 0, d_v, inverses, rows)
        add_rows(rows, kept, query_rows, lane, again, d_v, out)
    else:
        store_queries(panel, query_rows, lane, d_v, inverses, out)


@helper()
def finish_queries(tops, totals, query_rows, lane, again, merging, inverses, kept, lse):
    """Write lse, what a panel's sums are multiplied by, and, merging, what the rows of out are kept times.

    Lanes that hold a query ``again`` are not merged again.
    """
    lanes = inverses.shape[0]
    for i in range(lanes):
        r = lane + i
        total = totals[r]
        inverses[i] = 1.0 / total if total != 0 else 1.0
        found = (tops[r] + np.log2(total)) * LN2 if total != 0 else -np.inf
        if again[r]:
            continue
        if not merging:
            lse[query_rows[r]] = found
            continue
        kept[r] = 1.0
        old = lse[query_rows[r]]
        top = max(old, found)
        if top > -np.inf or top != top:
            old_weight, new_weight = np.exp(np.float64(old - top)), np.exp(np.float64(found - top))
            both = old_weight + new_weight
            lse[query_rows[r]] = top + np.log(both)
            kept[r] = old_weight / both
            inverses[i] *= new_weight / both


@helper()
def add_rows(rows, kept, query_rows, lane, again, d_v, out):
    """Merge a panel's rows into those of out."""
    for r in range(lane, lane + VECTOR_BYTES // out.itemsize):
        if again[r]:
            continue
        source, target = np.uintp((r - lane) * d_v), np.uintp(query_rows[r] * d_v)
        for t in range(np.uintp(d_v)):
            out[target + t] = out[target + t] * kept[r] + rows[source + t]


@helper()
def store_queries(panel, query_rows, lane, d_v, inverses, out):
    """Write a panel's sums, times ``inverses``, into the rows of out."""
    lanes = inverses.shape[0]
    square = d_v // lanes * lanes
    for t in range(0, square, lanes):
        rows_from_columns(panel, t * lanes, inverses, 0, out, query_rows, lane, d_v, t)
    for r in range(lanes):
        for t in range(square, d_v):
            out[query_rows[lane + r] * d_v + t] = panel[t * lanes + r] * inverses[r]


@helper()
def add_chunk(before, shifts, chunk_totals, chunk_sums, totals, sums, lane, columns, fresh):
    """Add a chunk's sums to a panel's, after bringing those from the maximum before it to the new one."""
    lanes = np.uintp(before.shape[0])
    first = np.uintp(lane)
    shrinks = np.zeros(lanes, np.float64)
    if not fresh:
        for i in range(lanes):
            shrinks[i] = 1.0 if before[i] == shifts[i] else np.exp2(np.float64(before[i] - shifts[i]))
    for i in range(lanes):
        totals[first + i] = totals[first + i] * shrinks[i] + chunk_totals[i]
    base = first * np.uintp(columns)
    for t in range(np.uintp(columns)):
        for i in range(lanes):
            at = t * lanes + i
            # What an earlier task left may be infinite, and 0 times it NaN.
            old = 0.0 if fresh else sums[base + at] * shrinks[i]
            sums[base + at] = old + chunk_sums[at]


@helper()
def round_up(number, step):
    """Return the least multiple of step that is at least number."""
    return -(-number // step) * step
