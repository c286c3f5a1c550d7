"""`attend_blocks` in Numba CUDA: one pass over each block's list, without tensor cores, with nothing gathered in memory.

A thread block has a tile of 64 of a block's queries, and up to 128 columns of their results, which stay in registers. It
meets the block's keys and values 32 slots at a time:

1. logits, in units of log 2, by register tiles of 4 queries × 4 slots, of 16 columns at a time in shared memory;
2. weights relative to the largest logit so far, as in FlashAttention (Dao et al. 2022), into shared memory;
3. values, times weights, added by register tiles of 8 queries × a sixteenth of the columns.

For wider values there are more thread blocks, each of which finds the logits again. Results go to their rows of out and
lse, merged with what was before.

On paper, for n = 131,072 queries and keys of 16 heads, d = d_v = 64 in float32, 512 slots for each block of 64 queries, on
an H100:

- 4 n · 512 · 64 · 16 = 2.7e11 operations: 4.1 ms at 67 TFLOP/s. As compiled they are 48 % of what is issued, beside loads,
  addresses and 1.1e9 exp2: 8.4 ms, which is the bound.
- Shared memory gives each multiprocessor 128 bytes a cycle. Four neighbouring numbers are one load, and threads share what
  they read alike: 6.7e8 times 128 bytes, 2.9 ms.
- Through the second-level cache: 8.6 GB of keys and values, 1.6 ms at 5.5 TB/s. A tile's queries are read as often, from
  the first level.
- To and from memory: q, k, v, lists and out, which begins with zeros, 2.9 GB, 1.0 ms at 3.0 TB/s.

cuBLAS multiplies at nearly the full rate, but gathered rows are written and read again for it, 17 GB, 5.7 ms, and logits
some ten times, 43 GB, 8 ms even where they stay in the second-level cache: 18 ms. And that in tiles as large as they can
be. The reference's, of 2¹⁸ numbers, are 67 million operations each, 1 µs, whatever the widths, in 23 launches of 5 µs at
least: 0.5 s for 4,096 tiles. So this kernel is expected to be faster for all sizes, for rows so wide that logits are found
several times, and in float64, where it has half the rate and cuBLAS, by tensor cores, the full one. Blocks of fewer than 64
queries leave a part of each tile empty: those of 16 take four times as long. Half precision is converted as it is read, and
multiplied in float32.
"""

import math
from typing import Any

import numpy as np
from numba import cuda

from kdecore.arrays.memory import contiguous
from kdecore.arrays.namespace import Array, Namespace, accumulation_dtype, dtype_name
from kdecore.core.state import AttentionState
from kdecore.kernels.runtime.cuda_jit import READERS, SIMULATED, CudaKernel, cuda_kernel, from_number, launch

THREADS = 128
SIDE = 4
"""Queries, and slots, that a thread multiplies at once."""
LANES = 8
"""Threads that multiply the same queries and other slots."""
ROWS, SLOTS = THREADS // LANES * SIDE, LANES * SIDE
"""Queries and slots of a tile."""
ROW_PITCH, SLOT_PITCH = ROWS + 4, SLOTS + 4
"""Numbers from column to column of a tile: threads that write rows down their columns meet different banks."""
DEPTH = 16
"""Columns that are multiplied between two barriers."""
STEP = 4
"""Columns that are multiplied without a look at how many there are."""
NEAR = 8
"""Threads that read columns of a row side by side: 32 bytes of float32."""
ACROSS = 16
"""Threads that add values to the same queries in other columns."""
TALL = ROWS * ACROSS // THREADS
"""Queries that such a thread adds to."""
DEEP = 16
"""Slots whose values are added between two barriers."""
TINY = {
    "THREADS": 8, "SIDE": 2, "LANES": 2, "ROWS": 8, "SLOTS": 4, "ROW_PITCH": 9, "SLOT_PITCH": 5, "DEPTH": 4, "STEP": 2,
    "NEAR": 2, "ACROSS": 4, "TALL": 4, "DEEP": 2,
}  # fmt: skip
"""What tests in the simulator put in their place."""
WIDTHS = {"float64": (4, 5), "float32": (4, 5, 8), "float16": (4, 5, 8), "bfloat16": (4, 5, 8)}
"""Columns of the values that a thread may have, by dtype: as many as registers and shared memory hold; five where there are
65, as of a tree's values with their spread."""
ALIGNED = None if SIMULATED else 16
"""Bytes, of which the addresses of arrays in shared memory are multiples: four numbers are read at once."""
LOG2E, LN2 = math.log2(math.e), math.log(2.0)


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
    sizes = (*query_index.shape, key_index.shape[1])
    return attend_lists(xp, q, k, v, (query_index, key_index, log_weight), sizes, scale, bias, before, groups, whole)


def attend_lists(
    xp: Namespace,
    q: Array,
    k: Array,
    v: Array,
    lists: tuple[Array, Array, Array] | None,
    sizes: tuple[int, int, int],
    scale: float,
    bias: Array | None = None,
    before: AttentionState | None = None,
    groups: int = 1,
    whole: bool = True,
) -> AttentionState:
    """Let blocks of queries attend to lists of keys.

    Parameters
    ----------
    xp, q, k, v
        As in `kdecore.kernels.attend_blocks.contract.AttendBlocks`.
    lists
        query_index, key_index and log_weight, as there; None where blocks and their keys follow each other row by row.
    sizes
        Numbers of blocks, of their queries and of their slots.
    scale, bias, before, groups, whole
        As there.
    """
    (blocks, rows, slots), d_v, name = sizes, int(v.shape[1]), dtype_name(q)
    dtype = accumulation_dtype(xp, name)

    def nothing(dimensions: int, dtype: Any) -> Array:
        return xp.empty((0,) * dimensions, dtype=dtype, device=q.device)

    if before is None:
        old, found = nothing(1, dtype), {"dtype": dtype, "device": q.device}
        out = xp.empty((q.shape[0], d_v), **found) if whole else xp.zeros((q.shape[0], d_v), **found)
        lse = xp.empty((q.shape[0],), **found) if whole else xp.full((q.shape[0],), -math.inf, **found)
    else:
        # Thread blocks of other columns read what lse was before.
        out, old, lse = contiguous(before.out), before.lse, xp.asarray(before.lse, copy=True)
    if lists is None:
        lists = nothing(2, xp.int64), nothing(2, xp.int64), nothing(2, dtype)
    added = nothing(3, dtype) if bias is None else bias
    slices = max(1, -(-d_v // (ACROSS * max(WIDTHS[name]))))
    width = next(x for x in WIDTHS[name] if ACROSS * x * slices >= d_v)
    # A number of the arrays' dtype: a Python float would be computed with in float64.
    factor = np.dtype(dtype_name(out)).type(scale * LOG2E)
    values = v if d_v > 0 else k  # something is read
    of_a_group = blocks // groups, q.shape[0] // groups, k.shape[0] // groups
    numbers = rows, slots, slices, *of_a_group, factor, before is not None
    grid = blocks * -(-rows // ROWS) * slices
    launch(TILES[name, width], grid, THREADS, q, k, values, *lists, added, *numbers, old, out, lse)
    return AttentionState(out, lse)


@cuda.jit(device=True)
def number_at(index, block, place, length):
    """Return the row number at a place of a block's list; without lists, blocks follow each other row by row."""
    return index[block, place] if index.shape[0] > 0 else block * length + place


@cuda.jit(device=True)
def slots_used(log_weight, block, slots, used):
    """Return how many slots a block's list has up to the last that counts: of lists of one length, many end early."""
    if log_weight.shape[0] == 0:
        return slots
    thread, last = cuda.threadIdx.x, 0
    if thread == 0:
        used[0] = 0
    cuda.syncthreads()
    for slot in range(thread, slots, THREADS):
        if log_weight[block, slot] > -np.inf:
            last = slot + 1
    cuda.atomic.max(used, 0, last)
    cuda.syncthreads()
    return used[0]


@cuda.jit(device=True)
def finite_or(zero, top):
    """Return what is subtracted from logits, 0 where nothing counts yet: −∞ − −∞ would be NaN."""
    return top if top > -np.inf else zero


@cuda.jit(device=True)
def clear(numbers):
    """Write zeros into an array of a thread's own."""
    for a in range(numbers.shape[0]):
        for b in range(numbers.shape[1]):
            numbers[a, b] = numbers.dtype.type(0.0)


@cuda.jit(device=True)
def place_among(count):
    """Return which of so many neighbours this thread is, and how many such groups there are before it.

    Unsigned, as numbers in inner loops are: no index is looked at for being negative, and the compiler sees that four
    neighbours can be read at once.
    """
    thread, threads = np.uintp(cuda.threadIdx.x), np.uintp(count)
    return thread % threads, thread // threads


@cuda.jit(device=True)
def add_products(found, row_tile, slot_tile, depth):
    """Add to a thread's logits the products of so many columns, which are 0 up to a multiple of `STEP`."""
    lane, part = place_among(LANES)
    row, slot = part * np.uintp(SIDE), lane * np.uintp(SIDE)
    for first in range(0, depth, STEP):
        for t in range(STEP):
            for a in range(SIDE):
                for b in range(SIDE):
                    column = np.uintp(first + t)
                    found[a, b] += row_tile[column, row + np.uintp(a)] * slot_tile[column, slot + np.uintp(b)]


@cuda.jit(device=True)
def add_bias(found, bias, block, first, start, used):
    """Add the bias, in units of log 2, to a thread's logits: −∞ whatever they are where it is −∞."""
    thread, number = cuda.threadIdx.x, found.dtype.type
    at = block if bias.shape[0] > 1 else 0
    for a in range(SIDE):
        row = min(first + thread // LANES * SIDE + a, bias.shape[1] - 1)
        for b in range(SIDE):
            more = bias[at, row, min(start + thread % LANES * SIDE + b, used - 1)]
            found[a, b] = found[a, b] + more * number(LOG2E) if more > -np.inf else number(-np.inf)


@cuda.jit(device=True)
def weigh(found, maxima, tops, shrinks, totals, weights):
    """Write a tile's weights relative to the largest logits so far, and what earlier sums are multiplied by; add them up."""
    thread, number = cuda.threadIdx.x, found.dtype.type
    lane, first = thread % LANES, thread // LANES * SIDE
    for a in range(SIDE):
        top = found[a, 0]
        for b in range(1, SIDE):
            top = max(top, found[a, b])
        maxima[lane, first + a] = top
    cuda.syncthreads()
    for row in range(thread, ROWS, THREADS):
        top = tops[row]
        for other in range(LANES):
            top = max(top, maxima[other, row])
        shrinks[row] = math.exp2(tops[row] - finite_or(number(0.0), top))
        tops[row] = top
    cuda.syncthreads()
    for a in range(SIDE):
        shift, total = finite_or(number(0.0), tops[first + a]), number(0.0)
        for b in range(SIDE):
            weight = math.exp2(found[a, b] - shift)
            total += weight
            weights[lane * SIDE + b, first + a] = weight
        totals[a] = totals[a] * shrinks[first + a] + total


@cuda.jit(device=True)
def finish(query_index, block, first, rows, first_query, totals, maxima, tops, of_rows, merging, old, lse):
    """Write lse of a tile's queries, and in two rows of ``maxima`` what their sums and their rows of out are multiplied by.

    A query that is there again is neither merged nor written again: its number becomes −1.
    """
    thread, number, listed = cuda.threadIdx.x, tops.dtype.type, query_index.shape[0] > 0
    for a in range(SIDE):
        maxima[thread % LANES, thread // LANES * SIDE + a] = totals[a]
    cuda.syncthreads()
    for row in range(thread, ROWS, THREADS):
        place, query, total, kept = first + row, of_rows[row], number(0.0), number(0.0)
        for other in range(LANES):
            total += maxima[other, row]
        total = total if total != number(0.0) else number(1.0)
        found, inverse = (tops[row] + math.log2(total)) * number(LN2), number(1.0) / total
        if place >= rows or (listed and place > 0 and query_index[block, place - 1] + first_query == query):
            of_rows[row] = -1
        else:
            if merging:
                before = old[query]
                top = max(before, found)
                shift = finite_or(number(0.0), top)
                old_weight, new_weight = math.exp(before - shift), math.exp(found - shift)
                both = old_weight + new_weight
                both = both if both != number(0.0) else number(1.0)
                found, inverse, kept = top + math.log(both), inverse * (new_weight / both), old_weight / both
            lse[query] = found
        maxima[0, row], maxima[1, row] = inverse, kept
    cuda.syncthreads()


def columns_by(read: Any) -> Any:
    """Make the function that puts columns of rows, which ``read`` reads, into shared memory."""

    @cuda.jit(device=True)
    def load_columns(rows, numbers, count, begin, tile):
        """Write `DEPTH` columns of so many rows down a tile, 0 beyond the last column."""
        (near, line), last = place_among(NEAR), np.uintp(rows.shape[1] - 1)
        for i in range(count // (THREADS // NEAR)):
            r = line + np.uintp(i * (THREADS // NEAR))
            for j in range(DEPTH // NEAR):
                t = near + np.uintp(j * NEAR)
                column = np.uintp(begin) + t
                found = read(rows[np.uintp(numbers[r]), min(column, last)])
                tile[t, r] = found if column <= last else tile.dtype.type(0.0)

    return load_columns


def values_by(read: Any, width: int) -> Any:
    """Make the function that adds values, which ``read`` reads, so many columns a thread."""

    @cuda.jit(device=True)
    def add_values(sums, shrinks, weights, v, of_slots, column, value_tile):
        """Add a tile's values, from a column on, times weights, to a thread's sums."""
        (across, part), last = place_among(ACROSS), np.uintp(v.shape[1] - 1)
        first = part * np.uintp(TALL)
        for i in range(TALL):
            for j in range(width):
                sums[i, j] *= shrinks[first + np.uintp(i)]
        for begin in range(0, SLOTS, DEEP):
            for i in range(DEEP // (THREADS // ACROSS)):
                s = part + np.uintp(i * (THREADS // ACROSS))
                key = np.uintp(of_slots[np.uintp(begin) + s])
                for j in range(width):
                    # Past the last column it is that again, and nothing is done with its sums.
                    value_tile[s, np.uintp(j), across] = read(v[key, min(np.uintp(column + j * ACROSS) + across, last)])
            cuda.syncthreads()
            for s in range(DEEP):
                for i in range(TALL):
                    for j in range(width):
                        weight = weights[np.uintp(begin + s), first + np.uintp(i)]
                        sums[i, j] += weight * value_tile[np.uintp(s), np.uintp(j), across]
            cuda.syncthreads()

    return add_values


def make(stored: str, width: int) -> CudaKernel:
    """Make the kernel for rows of a dtype and so many columns of the values a thread."""
    read = READERS.get(stored, from_number)
    load_columns, add_values = columns_by(read), values_by(read, width)
    given = ", ".join(["stored[:, ::1]"] * 3 + ["int64[:, ::1]"] * 2 + ["number[:, ::1], number[:, :, ::1]"])

    @cuda_kernel(
        f"{given}, int64, int64, int64, int64, int64, int64, number, boolean, number[::1], number[:, ::1], number[::1]",
        THREADS,
        stored,
    )
    def attend_tile(
        q, k, v, query_index, key_index, log_weight, bias, rows, slots, slices, group_blocks, group_queries, group_keys,
        factor, merging, old, out, lse,
    ):  # fmt: skip
        """Let a tile of a block's queries attend to the block's list, into some columns of their rows of out, and lse."""
        thread, number, d, d_v = cuda.threadIdx.x, out.dtype.type, q.shape[1], out.shape[1]
        task, column = cuda.blockIdx.x // slices, cuda.blockIdx.x % slices * ACROSS * width
        tiles = -(-rows // ROWS)
        block, first = task // tiles, task % tiles * ROWS
        first_query, first_key = block // group_blocks * group_queries, block // group_blocks * group_keys
        row_tile = cuda.shared.array((DEPTH, ROW_PITCH), out.dtype, ALIGNED)
        slot_tile = cuda.shared.array((DEPTH, SLOT_PITCH), out.dtype, ALIGNED)
        value_tile = cuda.shared.array((DEEP, width, ACROSS), out.dtype, ALIGNED)
        weights = cuda.shared.array((SLOTS, ROW_PITCH), out.dtype, ALIGNED)
        maxima = cuda.shared.array((LANES, ROWS), out.dtype)
        tops = cuda.shared.array(ROWS, out.dtype)
        shrinks = cuda.shared.array(ROWS, out.dtype, ALIGNED)
        of_rows = cuda.shared.array(ROWS, np.int64)
        of_slots = cuda.shared.array(SLOTS, np.int64)
        added = cuda.shared.array(SLOTS, out.dtype)
        used = slots_used(log_weight, block, slots, cuda.shared.array(1, np.int64))
        found = cuda.local.array((SIDE, SIDE), out.dtype)
        totals = cuda.local.array(SIDE, out.dtype)
        sums = cuda.local.array((TALL, width), out.dtype)
        for row in range(thread, ROWS, THREADS):
            # Past the last query it is the last again.
            of_rows[row] = number_at(query_index, block, min(first + row, rows - 1), rows) + first_query
            tops[row] = -np.inf
        for a in range(SIDE):
            totals[a] = number(0.0)
        clear(sums)
        for start in range(0, used, SLOTS):
            for s in range(thread, SLOTS, THREADS):
                # Past the last slot that counts it is that again, and does not count.
                slot = min(start + s, used - 1)
                of_slots[s] = number_at(key_index, block, slot, slots) + first_key
                weight = log_weight[block, slot] * number(LOG2E) if log_weight.shape[0] > 0 else number(0.0)
                added[s] = weight if start + s < used else number(-np.inf)
            cuda.syncthreads()
            clear(found)
            for begin in range(0, d, DEPTH):
                load_columns(q, of_rows, ROWS, begin, row_tile)
                load_columns(k, of_slots, SLOTS, begin, slot_tile)
                cuda.syncthreads()
                add_products(found, row_tile, slot_tile, min(DEPTH, d - begin))
                cuda.syncthreads()
            for a in range(SIDE):
                for b in range(SIDE):
                    found[a, b] = found[a, b] * factor + added[thread % LANES * SIDE + b]
            if bias.shape[0] > 0:
                add_bias(found, bias, block, first, start, used)
            weigh(found, maxima, tops, shrinks, totals, weights)
            add_values(sums, shrinks, weights, v, of_slots, column, value_tile)
        finish(query_index, block, first, rows, first_query, totals, maxima, tops, of_rows, merging, old, lse)
        for i in range(TALL):
            row = thread // ACROSS * TALL + i
            query = of_rows[row]
            if query >= 0:
                for j in range(width):
                    c = column + j * ACROSS + thread % ACROSS
                    if c < d_v:
                        mine = sums[i, j] * maxima[0, row]
                        out[query, c] = mine + out[query, c] * maxima[1, row] if merging else mine

    return attend_tile


TILES: dict[tuple[str, int], CudaKernel] = {(name, x): make(name, x) for name, every in WIDTHS.items() for x in every}
"""Dtype of the rows and columns a thread → the kernel."""
