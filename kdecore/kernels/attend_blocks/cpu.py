"""`attend_blocks` in Numba for the CPU: gather, product, softmax, product in one pass over tiles that stay in cache.

Per task (a block's rows, at most `TASK_ROWS`): the block's keys are copied together in chunks of `CHUNK_SLOTS`, and each
panel of queries (one vector of them, transposed) meets the chunk: products, maximum, exp and products with the values,
merging chunks by the running maximum as FlashAttention does. Queries lie across the vector's lanes, so neither keys nor
values are transposed, and maximum and sum run down the lanes. Logits are kept in units of log 2, so that exp is 2**x.
"""

import math

import numpy as np

from kdecore.kernels.jit import kernel
from kdecore.kernels.simd import TILE_ROWS, VECTOR_BYTES, column_max, copy_rows, exp2_columns, multiply_tile, prefetch
from kdecore.kernels.threads import run_tasks, thread_count
from kdecore.merge import Part
from kdecore.namespaces import Array, Namespace, from_host_like, host_view

TASK_ROWS = 256
"""Rows that share one copy of their keys."""
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
    query_row: Array,
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
    tasks = index.shape[0] * -(-index.shape[1] // TASK_ROWS)
    run_tasks(
        lambda first, last: attend_tasks(*inputs, factor, out, lse, first, last), tasks, threads=thread_count(), chunk=1
    )
    return Part(from_host_like(xp, out, q), from_host_like(xp, lse, q))


@kernel()
def attend_tasks(q, k, v, query_index, key_index, log_weight, factor, out, lse, first, last):
    """Evaluate tasks first … last − 1 into out and lse."""
    rows, slots = query_index.shape[1], key_index.shape[1]
    d, d_v = q.shape[1], v.shape[1]
    lanes = VECTOR_BYTES // q.itemsize
    parts = -(-rows // TASK_ROWS)
    panels = -(-min(rows, TASK_ROWS) // lanes)
    chunk = round_up(-(-slots // -(-slots // CHUNK_SLOTS)), TILE_ROWS)
    columns = round_up(d_v, TILE_ROWS)
    flat_q, flat_k, flat_v = q.reshape(-1), k.reshape(-1), v.reshape(-1)
    queries = np.zeros(panels * d * lanes, q.dtype)
    keys = np.zeros(chunk * d, q.dtype)
    values = np.zeros(chunk * columns, q.dtype)
    bias = np.empty(chunk, q.dtype)
    no_bias = np.zeros(TILE_ROWS, q.dtype)
    logits = np.empty(chunk * lanes, q.dtype)
    chunk_sums = np.zeros(columns * lanes, q.dtype)
    chunk_totals = np.empty(lanes, q.dtype)
    before, shifts = np.empty(lanes, q.dtype), np.empty(lanes, q.dtype)
    tops = np.empty(panels * lanes, q.dtype)
    # Chunks are added up in float64, so that float32 errors do not grow with the number of keys.
    sums = np.zeros(panels * columns * lanes, np.float64)
    totals = np.empty(panels * lanes, np.float64)
    for task in range(first, last):
        block, begin = task // parts, task % parts * TASK_ROWS
        count = min(TASK_ROWS, rows - begin)
        for r in range(count):
            ahead = query_index[block, begin + min(r + AHEAD, count - 1)]
            prefetch(flat_q, ahead * d, d)
            load_query(flat_q, np.uintp(query_index[block, begin + r] * d), queries, np.uintp(r), np.uintp(d), factor)
        tops[:] = -np.inf
        totals[:] = 0.0
        for start in range(0, slots, chunk):
            used = min(chunk, slots - start)
            width = round_up(used, TILE_ROWS)
            # Slots that only fill a tile: of weight 0, and finite so that 0 times them is 0.
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
            for panel in range(-(-count // lanes)):
                lane = panel * lanes
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
                    for column in range(0, columns, TILE_ROWS):
                        multiply_tile(
                            values,
                            deep * columns + column,
                            1,
                            columns,
                            logits,
                            deep * lanes,
                            depth,
                            no_bias,
                            0,
                            chunk_sums,
                            column * lanes,
                            deep == 0,
                        )
                add_chunk(before, shifts, chunk_totals, chunk_sums, totals, sums, lane, columns, start == 0)
        for r in range(count):
            query = query_index[block, begin + r]
            total, base = totals[r], r // lanes * columns * lanes + r % lanes
            inverse = 1.0 / total if total != 0 else 1.0
            target = out[query]
            for t in range(d_v):
                target[t] = sums[base + t * lanes] * inverse
            lse[query] = (tops[r] + np.log2(total)) * LN2 if total != 0 else -np.inf


@kernel()
def load_query(source, start, queries, r, d, factor):
    """Write query r, scaled, down its lane. Offsets are unsigned, so that no index is checked for being negative."""
    lanes = np.uintp(VECTOR_BYTES // source.itemsize)
    base = r // lanes * d * lanes + r % lanes
    for t in range(d):
        queries[base + t * lanes] = source[start + t] * factor


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
