"""`attend_blocks` in Numba for the CPU: gather, product, softmax, product in one pass over tiles that stay in cache.

Per task (a block's rows, at most `TASK_ROWS`): the block's keys are copied together in chunks of `CHUNK_SLOTS`, and each
panel of queries (one vector of them, transposed) meets the chunk: products, maximum, exp and products with the values,
merging chunks by the running maximum as FlashAttention does. Queries lie across the vector's lanes, so neither keys nor
values are transposed, and maximum and sum run down the lanes. Logits are kept in units of log 2, so that exp is 2**x.
"""

import math

import numpy as np

from kdecore.kernels.jit import kernel
from kdecore.kernels.simd import (
    SHORT_TILE_ROWS,
    TILE_ROWS,
    VECTOR_BYTES,
    column_max,
    columns_from_rows,
    copy_rows,
    exp2_columns,
    multiply_short_tile,
    multiply_tile,
    prefetch,
    rows_from_columns,
)
from kdecore.kernels.threads import fair_chunk, run_tasks, team
from kdecore.merge import Part
from kdecore.namespaces import Array, Namespace, from_host_like, host_view

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
) -> Part:
    """Follow `kdecore.kernels.attend_blocks.contract.AttendBlocks`."""
    inputs = tuple(host_view(x) for x in (q, k, v, query_index, key_index, log_weight))
    queries, values, index = inputs[0], inputs[2], inputs[3]
    out = np.empty((queries.shape[0], values.shape[1]), queries.dtype)
    lse = np.empty(queries.shape[0], queries.dtype)
    factor = queries.dtype.type(scale / LN2)
    blocks, rows = index.shape
    with team() as own:
        parts = max(-(-rows // TASK_ROWS), min(-(-own.threads // max(1, blocks)), -(-rows // LEAST_TASK_ROWS)))
        # Small blocks by the dozen: a call of the kernel costs as much as a few queries.
        chunk = fair_chunk(blocks * parts, TASK_ROWS // max(1, rows))
        run_tasks(
            lambda first, last: attend_tasks(*inputs, factor, parts, out, lse, first, last), blocks * parts, chunk=chunk
        )
    return Part(from_host_like(xp, out, q), from_host_like(xp, lse, q))


@kernel()
def attend_tasks(q, k, v, query_index, key_index, log_weight, factor, parts, out, lse, first, last):
    """Evaluate tasks first … last − 1, ``parts`` a block, into out and lse."""
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
    query_rows = np.zeros(panels * lanes, np.int64)
    queries = np.zeros(panels * d * lanes, q.dtype)
    keys = np.zeros(chunk * d, q.dtype)
    values = np.zeros(chunk * columns, q.dtype)
    bias = np.empty(chunk, q.dtype)
    zeros = np.zeros(TILE_ROWS, q.dtype)
    logits = np.empty(chunk * lanes, q.dtype)
    chunk_sums = np.zeros(columns * lanes, q.dtype)
    chunk_totals = np.empty(lanes, q.dtype)
    before, shifts, inverses = np.empty(lanes, q.dtype), np.empty(lanes, q.dtype), np.empty(lanes, q.dtype)
    tops = np.empty(panels * lanes, q.dtype)
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
            query_rows[r] = query_index[block, begin + min(r, count - 1)]
            prefetch(flat_q, query_rows[r] * d, d)
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
                before[:] = tops[lane : lane + lanes]
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
                    store_queries(chunk_sums, totals, query_rows, lane, d_v, inverses, flat_out)
                else:
                    add_chunk(before, shifts, chunk_totals, chunk_sums, totals, sums, lane, columns, start == 0)
        for r in range(count):
            total = totals[r]
            lse[query_rows[r]] = (tops[r] + np.log2(total)) * LN2 if total != 0 else -np.inf
        if chunk < slots:
            for lane in range(0, filled, lanes):
                for t in range(columns * lanes):
                    chunk_sums[t] = sums[lane * columns + t]
                store_queries(chunk_sums, totals, query_rows, lane, d_v, inverses, flat_out)


@kernel()
def load_queries(q, query_rows, lane, d, factor, queries):
    """Write the queries of one panel down its lanes, scaled."""
    lanes = VECTOR_BYTES // q.itemsize
    square = d // lanes * lanes
    for t in range(0, square, lanes):
        columns_from_rows(q, query_rows, lane, d, t, factor, queries, lane * d + t * lanes)
    for r in range(lanes):
        for t in range(square, d):
            queries[lane * d + t * lanes + r] = q[query_rows[lane + r] * d + t] * factor


@kernel()
def store_queries(panel, totals, query_rows, lane, d_v, inverses, out):
    """Write a panel's sums, divided by their totals, into the rows of out."""
    lanes = inverses.shape[0]
    for i in range(lanes):
        inverses[i] = 1.0 / totals[lane + i] if totals[lane + i] != 0 else 1.0
    square = d_v // lanes * lanes
    for t in range(0, square, lanes):
        rows_from_columns(panel, t * lanes, inverses, 0, out, query_rows, lane, d_v, t)
    for r in range(lanes):
        for t in range(square, d_v):
            out[query_rows[lane + r] * d_v + t] = panel[t * lanes + r] * inverses[r]


@kernel()
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


@kernel()
def round_up(number, step):
    """Return the least multiple of step that is at least number."""
    return -(-number // step) * step
