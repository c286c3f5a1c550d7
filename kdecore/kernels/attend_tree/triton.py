"""`attend_tree` in Triton for NVIDIA devices: lists of some blocks are made, and attended to while they are in cache.

Lists are those of `kdecore.kernels.open_tree.triton`, in memory that is used again for the next blocks. Attention is that of
`kdecore.kernels.attend_blocks.triton`; what a query's own key, the first-order term and the limits change is changed before
results are written, in their rows.

On paper, for the case given there: of blocks of 64 queries each program keeps one, meets 512 slots, and adds a product of
64 · 64 · 64: no more than 1 part in 16 of what it multiplies. Lists are 16 bytes a slot, twice through the cache, against
256 of the key and value that the slot stands for.
"""

import math

import torch
import triton
import triton.language as tl

from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.state import AttentionState
from kdecore.core.tree import BlockQueries, Tree, depth_of
from kdecore.kernels.attend_blocks.triton import (
    LN2,
    LOG2E,
    Limits,
    add_rows,
    columns,
    first_of_its_kind,
    load_parts,
    load_rows,
    no_sums,
    one_run,
    products,
    store_rows,
    tiling,
    widths,
)
from kdecore.kernels.attend_tree.contract import AT_ONCE
from kdecore.kernels.open_tree.triton import compiled_for, open_blocks, stored
from kdecore.kernels.runtime.grids import flat_grid

ATTEND = {2: Limits(64, 2**15, 64, 2**13, 2**12, 3), 4: Limits(64, 2**14, 16, 2**11, 2**14, 2)}
"""As in `kdecore.kernels.attend_blocks.triton`, with room for own keys and matrices."""
DEPTH = tl.constexpr(16)
"""Dimensions of queries that are multiplied with those of a first-order matrix at a time."""


@triton.jit
def is_listed(key_index, used, row, SEARCH: tl.constexpr):
    """Return which rows are among the first of a list, which ascends."""
    low = tl.zeros_like(row).to(tl.int32)
    high = low + used
    for _ in tl.static_range(SEARCH):
        middle = (low + high) // 2
        below = (low < high) & (tl.load(key_index + middle, mask=low < high, other=0) < row)
        low, high = tl.where(below, middle + 1, low), tl.where(below | (low >= high), high, middle)
    return tl.load(key_index + low, mask=low < used, other=-1) == row


@triton.jit
def begin_with_own(
    queries, queries_rest, keys, values, key_index, used, own, query, counts, factor, nodes, key_stride, value_stride,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr, D_V: tl.constexpr, D_V_MAIN: tl.constexpr,
    D_V_REST: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """Return logits, sums of weights and of values of queries that see a key of their own that the list doesn't have."""
    place = tl.load(own + query, mask=counts, other=-1)
    row = nodes + tl.maximum(place, 0)
    mine = (place >= 0) & (is_listed(key_index, used, row, SEARCH) == 0)
    met, met_rest = load_parts(keys, row, key_stride, mine, D_MAIN, D_REST, D)
    logit = tl.sum(queries.to(tl.float32) * met.to(tl.float32), 1)
    if D_REST > 0:
        logit += tl.sum(queries_rest.to(tl.float32) * met_rest.to(tl.float32), 1)
    met, met_rest = load_parts(values, row, value_stride, mine, D_V_MAIN, D_V_REST, D_V)
    top = tl.where(mine, logit * factor, float("-inf"))
    return top, tl.where(mine, 1.0, 0.0), met.to(tl.float32), met_rest.to(tl.float32)


@triton.jit
def last_column(sums, sums_rest, D_V: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """Return column D_V of rows in two parts."""
    if D_V < MAIN:
        found = tl.sum(tl.where((tl.arange(0, MAIN) == D_V)[None, :], sums, 0.0), 1)
    else:
        found = tl.sum(tl.where((MAIN + tl.arange(0, REST) == D_V)[None, :], sums_rest, 0.0), 1)
    return found


@triton.jit
def change_of(q, query, counts, matrix, column, D: tl.constexpr, D_V: tl.constexpr, DEPTH: tl.constexpr):
    """Return the products of queries with some columns of a matrix, rounded to tf32.

    A few dimensions at a time, read again: registers are full of results.
    """
    found = tl.zeros([query.shape[0], column.shape[0]], tl.float32)
    for first in range(0, D, DEPTH):
        row = first + tl.arange(0, DEPTH)
        some = tl.load(q + query[:, None] * D + row[None, :], mask=counts[:, None] & (row < D)[None, :], other=0.0)
        there = (row < D)[:, None] & (column < D_V)[None, :]
        part = tl.load(matrix + row[:, None] * D_V + column[None, :], mask=there, other=0.0)
        found = tl.dot(some.to(tl.float32), part, found, input_precision="tf32")
    return found


@triton.jit
def within(found, low, high, column, D_V: tl.constexpr):
    """Return results no less than the limits of their columns, and no more."""
    there = column < D_V
    least, most = tl.load(low + column, mask=there, other=0.0), tl.load(high + column, mask=there, other=0.0)
    # A comparison that a NaN fails leaves it.
    found = tl.where(found < least[None, :], least[None, :], found)
    return tl.where(found > most[None, :], most[None, :], found)


@triton.jit
def finish(
    found, spread, old_weight, new_weight, q, query, counts, first, matrix, low, high, out,
    FIRST: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, MERGING: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Write some columns of results: changed to first order, within limits, and merged with what was before."""
    column = FIRST + tl.arange(0, COLUMNS)
    if matrix is not None:
        found += spread[:, None] * change_of(q, query, counts, matrix, column, D, D_V, DEPTH)
    if low is not None:
        found = within(found, low, high, column, D_V)
    if MERGING:
        found = found * new_weight[:, None] + load_rows(out, query, D_V, first, FIRST, COLUMNS, D_V) * old_weight[:, None]
    store_rows(out, query, first, found, FIRST, COLUMNS, D_V)


@triton.jit(do_not_specialize=["blocks", "rows", "n_q", "n", "nodes", "most", "before", "matrices"])
def attend_opened(
    q, query_index, keys, values, key_index, log_weight, lengths, own, slope, low, high, out, lse,
    factor, scale, blocks, rows, n_q, n, nodes, most, before, matrices, key_stride, value_stride,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr, D_V: tl.constexpr, D_V_MAIN: tl.constexpr,
    D_V_REST: tl.constexpr, MERGING: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """Let a tile of a block's queries attend to the block's list, one of those after so many ``before``.

    D_V is the width of a value with its spread. Logits are in units of log 2: ``factor`` is scale / ln 2.
    """
    tiles = tl.cdiv(rows, ROWS)
    listed, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    block = (before + listed).to(tl.int64)
    group, row = block // blocks, tile * ROWS + tl.arange(0, ROWS)
    keys, values = keys + group * (nodes + n) * key_stride, values + group * (nodes + n) * value_stride
    key_index, log_weight = key_index + listed.to(tl.int64) * most, log_weight + listed.to(tl.int64) * most
    counts = row < rows
    query = group * n_q + tl.load(query_index + block * rows + row, mask=counts, other=0)
    queries, queries_rest = load_parts(q, query, D, counts, D_MAIN, D_REST, D)
    queries, queries_rest = queries.to(keys.dtype.element_ty), queries_rest.to(keys.dtype.element_ty)
    used = tl.load(lengths + block).to(tl.int32)
    if own is None:
        top, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
        sums, sums_rest = no_sums(ROWS, D_V_MAIN, D_V_REST)
    else:
        top, total, sums, sums_rest = begin_with_own(
            queries, queries_rest, keys, values, key_index, used, own, query, counts, factor, nodes, key_stride,
            value_stride, D, D_MAIN, D_REST, D_V, D_V_MAIN, D_V_REST, SEARCH,
        )  # fmt: skip
    for first in range(0, used, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        inside = slot < used
        key = tl.load(key_index + slot, mask=inside, other=0)
        met, met_rest = load_parts(keys, key, key_stride, inside, D_MAIN, D_REST, D)
        added = tl.load(log_weight + slot, mask=inside, other=float("-inf")) * LOG2E
        logits = products(queries, queries_rest, met, met_rest, D_REST) * factor + added[None, :]
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        met, met_rest = load_parts(values, key, value_stride, inside, D_V_MAIN, D_V_REST, D_V)
        sums, sums_rest = add_rows(weights, met, met_rest, sums * shrink[:, None], sums_rest * shrink[:, None], D_V_REST)
        top = new_top
    inverse, found_lse = 1.0 / total, (top + tl.log2(total)) * LN2
    sums, sums_rest = sums * inverse[:, None], sums_rest * inverse[:, None]
    # A query that is there again is neither merged nor written again.
    first = first_of_its_kind(query_index, block, row, counts, rows)
    old_weight, new_weight = total, total
    if MERGING:
        old = tl.load(lse + query, mask=first, other=float("-inf"))
        both_top = tl.maximum(old, found_lse)
        old_weight, new_weight = tl.exp2((old - both_top) * LOG2E), tl.exp2((found_lse - both_top) * LOG2E)
        both = old_weight + new_weight
        old_weight, new_weight, found_lse = old_weight / both, new_weight / both, both_top + tl.log2(both) * LN2
    tl.store(lse + query, found_lse, mask=first)
    spread = last_column(sums, sums_rest, D_V - 1, D_V_MAIN, D_V_REST) * scale
    if slope is not None:
        slope += (group * matrices + (block - group * blocks) * matrices // blocks) * (D * (D_V - 1))
    if low is not None:
        low, high = low + group * (D_V - 1), high + group * (D_V - 1)
    finish(
        sums, spread, old_weight, new_weight, q, query, counts, first, slope, low, high, out, 0, D_V_MAIN, D, D_V - 1,
        MERGING, DEPTH,
    )  # fmt: skip
    if D_V_REST > 0:
        finish(
            sums_rest, spread, old_weight, new_weight, q, query, counts, first, slope, low, high, out, D_V_MAIN, D_V_REST, D,
            D_V - 1, MERGING, DEPTH,
        )  # fmt: skip


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
    """Follow `kdecore.kernels.attend_tree.contract.AttendTree`, within its `triton_limit`."""
    queries, tree = stored(queries, tree)
    values = one_run(values)
    q, scale, coordinates, index, _ = queries
    (groups, blocks, rows), n_q, d_v = index.shape, int(q.shape[1]), int(values.shape[2])
    (level, first, end), last, count = start, depth_of(tree.nodes), groups * blocks
    known, factor = compiled_for(queries, tree), scale * math.log2(math.e)
    wide = widths(int(q.shape[2]), d_v)
    tile, some = tiling(ATTEND[tree.keys.element_size()], rows, columns(wide, None)), max(1, min(count, AT_ONCE // most))
    own, slope = (x if x is None else x.contiguous() for x in (own, slope))
    low, high = (None, None) if limits is None else (x.contiguous() for x in limits)
    sizes = blocks, rows, n_q, tree.n, tree.nodes, most
    with torch.cuda.device_of(q):
        if before is None:
            out = torch.empty((groups, n_q, d_v - 1), dtype=torch.float32, device=q.device)
            lse = torch.empty((groups, n_q), dtype=torch.float32, device=q.device)
        else:
            out, lse = before.out.contiguous(), before.lse.contiguous()
        key_index = torch.empty((some, most), dtype=torch.int64, device=q.device)
        log_weight = torch.empty((some, most), dtype=torch.float32, device=q.device)
        current = torch.empty((some, most), dtype=torch.int32, device=q.device)
        counts = torch.empty((groups, blocks), dtype=torch.int64, device=q.device)
        for begin in range(0, count, some):
            here = min(some, count - begin)
            open_blocks[flat_grid("open_blocks", here)](
                q, coordinates, index, *tree, threshold, key_index, log_weight, None, current, counts, factor, scale,
                *sizes, level, first, end - first, last, begin, tree.keys.stride(1), LEAF=-(-tree.n >> last), **known,
            )  # fmt: skip
            attend_opened[flat_grid("attend_opened", here * triton.cdiv(rows, tile.kept))](
                q, index, tree.keys, values, key_index, log_weight, counts, own, slope, low, high, out, lse, factor, scale,
                *sizes, begin, 1 if slope is None else int(slope.shape[1]), tree.keys.stride(1), values.stride(1), **wide,
                MERGING=before is not None, ROWS=tile.kept, SLOTS=tile.met, SEARCH=most.bit_length(),
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return AttentionState(out, lse), counts
