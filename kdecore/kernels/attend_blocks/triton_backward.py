"""Gradients of `attend_blocks` and `attend_dense` in Triton: weights are made again from logits and lse, and not kept.

The formulas are those of the kernels that PyTorch's backend records (`Backend.recorded_kernels`). One kernel keeps a tile
of queries and meets keys: a query is in one block, so its gradient is written, and that of a bias for each block too. The
other keeps a tile of slots and meets the block's queries; a key is in many lists, so its gradients are added in float32, in
no fixed order, by atomic additions that nothing waits for. Σ ∂out ∘ out of each query is Σ P ∘ ∂P over its keys, another
pass over them, where out is not kept: lists are short.

Gradients of out and of logits are rounded to the dtype of q, k and v for tensor cores, as in FlashAttention: in float16,
what is scaled beyond its range is lost.

On paper, for the case in `kdecore.kernels.attend_blocks.triton`: nine products, 1.2e12 operations, 1.6 ms at 798 TFLOP/s;
inputs are read twice and ∂out in float32 with them, 3 GB, gradients of k and v are cleared, added to and cast, 4.8 GB: 2.6
ms at 3.0 TB/s, which is the bound. The 1.1e9 additions meet in the second-level cache, four numbers at a time on sm_90.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from kdecore.kernels.attend_blocks.contract import backward_limit
from kdecore.kernels.attend_blocks.triton import (
    LN2,
    LOG2E,
    SCANNED,
    Limits,
    add_rows,
    added_to_slots,
    columns,
    first_of_its_kind,
    load_parts,
    no_sums,
    numbers,
    plain_rows,
    products,
    slots_used,
    store_parts,
    tile_logits,
    tiling,
    widest,
    widths,
)
from kdecore.kernels.runtime.grids import flat_grid

OF_QUERIES = {2: Limits(64, 2**14, 32, 2**13, 2**14, 2), 4: Limits(16, 2**11, 32, 2**12, 2**13, 2)}
OF_KEYS = {2: Limits(64, 2**14, 32, 2**12, 2**13, 3), 4: Limits(16, 2**11, 32, 2**12, 2**13, 2)}
"""Of the kernels below: in one queries are kept and keys met, in the other keys are kept and queries met."""


@triton.jit
def own_rows(query_index, lse, block, row, rows):
    """Return the numbers of a block's queries, their lse in units of log 2, and which of them have a gradient.

    A query that is there again has none, nor one without keys, whose numbers may be anything.
    """
    counts = row < rows
    query = numbers(query_index, block, row, counts, rows)
    mine = first_of_its_kind(query_index, block, row, counts, rows)
    own_lse = tl.load(lse + query, mask=mine, other=float("inf")) * LOG2E
    return query, own_lse, mine, mine & (own_lse != float("inf"))


@triton.jit
def gradient_of_queries(
    q,
    k,
    v,
    query_index,
    key_index,
    log_weight,
    bias,
    lse,
    grad_out,
    grad_lse,
    slopes,
    of_q,
    of_bias,
    factor,
    rows,
    slots,
    q_stride,
    k_stride,
    v_stride,
    grad_stride,
    bias_stride,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    D_V: tl.constexpr,
    D_V_MAIN: tl.constexpr,
    D_V_REST: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Write the gradients of a tile of a block's queries, and of its bias, added up where blocks have it SHARED.

    ``slopes``, Σ ∂out ∘ out − ∂lse of each query, are given where ``grad_lse`` is not, and are written else.
    """
    tiles = tl.cdiv(rows, ROWS)
    block, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row = tile * ROWS + tl.arange(0, ROWS)
    query, own_lse, mine, learns = own_rows(query_index, lse, block, row, rows)
    queries, queries_rest = load_parts(q, query, q_stride, learns, D_MAIN, D_REST, D)
    grads, grads_rest = load_parts(grad_out, query, grad_stride, learns, D_V_MAIN, D_V_REST, D_V)
    grads, grads_rest = grads.to(q.dtype.element_ty), grads_rest.to(q.dtype.element_ty)
    used = slots_used(log_weight, block, slots, SCANNED)
    if grad_lse is None:
        slope = tl.load(slopes + query, mask=learns, other=0.0)
    else:
        slope = -tl.load(grad_lse + query, mask=learns, other=0.0)
        for first in range(0, used, SLOTS):
            slot = first + tl.arange(0, SLOTS)
            inside = slot < used
            key = numbers(key_index, block, slot, inside, slots)
            keys, keys_rest = load_parts(k, key, k_stride, inside, D_MAIN, D_REST, D)
            found = products(queries, queries_rest, keys, keys_rest, D_REST)
            added = added_to_slots(log_weight, block, slot, inside, slots)[None, :]
            logits = tile_logits(found, factor, added, bias, block, bias_stride, row[:, None], slot[None, :], rows, slots)
            values, values_rest = load_parts(v, key, v_stride, inside, D_V_MAIN, D_V_REST, D_V)
            of_weights = products(grads, grads_rest, values, values_rest, D_V_REST)
            slope += tl.sum(tl.exp2(logits - own_lse[:, None]) * of_weights, 1)
        tl.store(slopes + query, slope, mask=mine)
    sums, sums_rest = no_sums(ROWS, D_MAIN, D_REST)
    if of_bias is not None:
        # Every slot's is written.
        used = slots
    for first in range(0, used, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        inside = slot < used
        key = numbers(key_index, block, slot, inside, slots)
        keys, keys_rest = load_parts(k, key, k_stride, inside, D_MAIN, D_REST, D)
        found = products(queries, queries_rest, keys, keys_rest, D_REST)
        added = added_to_slots(log_weight, block, slot, inside, slots)[None, :]
        logits = tile_logits(found, factor, added, bias, block, bias_stride, row[:, None], slot[None, :], rows, slots)
        values, values_rest = load_parts(v, key, v_stride, inside, D_V_MAIN, D_V_REST, D_V)
        of_weights = products(grads, grads_rest, values, values_rest, D_V_REST)
        of_logits = tl.exp2(logits - own_lse[:, None]) * (of_weights - slope[:, None])
        if of_bias is not None:
            places = of_bias + block.to(tl.int64) * bias_stride + row[:, None].to(tl.int64) * slots + slot[None, :]
            there = (row < rows)[:, None] & inside[None, :]
            if SHARED:
                tl.atomic_add(places, of_logits, mask=there, sem="relaxed")
            else:
                tl.store(places, of_logits, mask=there)
        sums, sums_rest = add_rows(of_logits, keys, keys_rest, sums, sums_rest, D_REST)
    scale = factor * LN2
    store_parts(of_q, query, mine, sums * scale, sums_rest * scale, D_MAIN, D_REST, D)


@triton.jit
def gradient_of_keys(
    q,
    k,
    v,
    query_index,
    key_index,
    log_weight,
    bias,
    lse,
    grad_out,
    slopes,
    of_k,
    of_v,
    factor,
    rows,
    slots,
    q_stride,
    k_stride,
    v_stride,
    grad_stride,
    bias_stride,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    D_V: tl.constexpr,
    D_V_MAIN: tl.constexpr,
    D_V_REST: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Add the gradients of a tile of a block's slots to those of their keys and values.

    Without lists a key has one slot, and they are written.
    """
    tiles = tl.cdiv(slots, SLOTS)
    block, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    slot = tile * SLOTS + tl.arange(0, SLOTS)
    inside = slot < slots
    added = added_to_slots(log_weight, block, slot, inside, slots)
    # A slot that doesn't count teaches its key nothing, and a tile of such reads no queries.
    inside = added > float("-inf")
    rows = tl.where(tl.max(inside.to(tl.int32), 0) > 0, rows, 0)
    key = numbers(key_index, block, slot, inside, slots)
    keys, keys_rest = load_parts(k, key, k_stride, inside, D_MAIN, D_REST, D)
    values, values_rest = load_parts(v, key, v_stride, inside, D_V_MAIN, D_V_REST, D_V)
    added = added[:, None]
    of_keys, of_keys_rest = no_sums(SLOTS, D_MAIN, D_REST)
    of_values, of_values_rest = no_sums(SLOTS, D_V_MAIN, D_V_REST)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        query, own_lse, _, learns = own_rows(query_index, lse, block, row, rows)
        queries, queries_rest = load_parts(q, query, q_stride, learns, D_MAIN, D_REST, D)
        grads, grads_rest = load_parts(grad_out, query, grad_stride, learns, D_V_MAIN, D_V_REST, D_V)
        grads, grads_rest = grads.to(v.dtype.element_ty), grads_rest.to(v.dtype.element_ty)
        slope = tl.load(slopes + query, mask=learns, other=0.0)
        found = products(keys, keys_rest, queries, queries_rest, D_REST)
        logits = tile_logits(found, factor, added, bias, block, bias_stride, row[None, :], slot[:, None], rows, slots)
        weights = tl.exp2(logits - own_lse[None, :])
        of_values, of_values_rest = add_rows(weights, grads, grads_rest, of_values, of_values_rest, D_V_REST)
        of_weights = products(values, values_rest, grads, grads_rest, D_V_REST)
        of_logits = weights * (of_weights - slope[None, :])
        of_keys, of_keys_rest = add_rows(of_logits, queries, queries_rest, of_keys, of_keys_rest, D_REST)
    scale = factor * LN2
    of_keys, of_keys_rest = of_keys * scale, of_keys_rest * scale
    if key_index is None:
        store_parts(of_k, key, inside, of_keys, of_keys_rest, D_MAIN, D_REST, D)
        store_parts(of_v, key, inside, of_values, of_values_rest, D_V_MAIN, D_V_REST, D_V)
    else:
        add_parts(of_k, key, inside, of_keys, of_keys_rest, D_MAIN, D_REST, D)
        add_parts(of_v, key, inside, of_values, of_values_rest, D_V_MAIN, D_V_REST, D_V)


@triton.jit
def add_parts(rows, row, counts, main, rest, MAIN: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr):
    """Add both parts of rows to those in memory, to which other programs add too."""
    add_columns(rows, row, counts, main, 0, MAIN, WIDTH)
    if REST > 0:
        add_columns(rows, row, counts, rest, MAIN, REST, WIDTH)


@triton.jit
def add_columns(rows, row, counts, found, FIRST: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Add to what `store_rows` writes."""
    column = FIRST + tl.arange(0, COLUMNS)
    places = rows + row[:, None] * WIDTH + column[None, :]
    tl.atomic_add(places, found, mask=counts[:, None] & (column < WIDTH)[None, :], sem="relaxed")


def gradients(
    q: Any,
    k: Any,
    v: Any,
    lists: tuple[Any, Any, Any] | None,
    sizes: tuple[int, int, int],
    scale: float,
    lse: Any,
    grad_out: Any,
    grad_lse: Any,
    bias: Any = None,
    of_bias: bool = False,
    out: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """Return the gradients of q, k, v and bias.

    Parameters
    ----------
    q, k, v, lists, sizes, scale, bias
        As in `kdecore.kernels.attend_blocks.triton.attend_lists`, within `backward_limit` of the kernel's contract.
    lse
        As that found it; +∞ for queries without keys.
    grad_out, grad_lse
        Gradients of out and lse; 0 for the lse of queries without keys.
    of_bias
        Whether the bias has a gradient; None takes its place else.
    out
        As that found it; None to make Σ ∂out ∘ out of each query again, another pass over its keys, so that it need not be
        kept.
    """
    blocks, rows, slots = sizes
    assert backward_limit(widest(q, v)) is None
    q, k, v, grad_out = (plain_rows(x) for x in (q, k, v, grad_out))
    query_index, key_index, log_weight = (None, None, None) if lists is None else (x.contiguous() for x in lists)
    bias = None if bias is None else bias.contiguous()
    shared = bias is not None and len(bias) == 1
    known = widths(q.shape[1], v.shape[1])
    of_rows = tiling(OF_QUERIES[q.element_size()], rows, columns(known, bias))
    of_slots = tiling(OF_KEYS[q.element_size()], slots, columns(known, bias))
    strides = (*(x.stride(0) for x in (q, k, v, grad_out)), 0 if bias is None or shared else rows * slots)
    with torch.cuda.device_of(q):
        slopes = torch.empty_like(lse) if out is None else torch.linalg.vecdot(grad_out, out) - grad_lse
        found_bias = None if not of_bias else torch.zeros_like(bias) if shared else torch.empty_like(bias)
        # Without lists every row is written, and once; with them rows of k and v are added up, and some of q in no block.
        of_q, of_k, of_v = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device)
            if lists is None
            else torch.zeros(x.shape, dtype=x.dtype if x is q else torch.float32, device=x.device)
            for x in (q, k, v)
        )
        inputs = (q, k, v, query_index, key_index, log_weight, bias, lse, grad_out)
        sizes_and_strides = (scale * math.log2(math.e), rows, slots, *strides)
        gradient_of_queries[flat_grid("gradient_of_queries", blocks * triton.cdiv(rows, of_rows.kept))](
            *inputs,
            grad_lse.contiguous() if out is None else None,
            slopes,
            of_q,
            found_bias,
            *sizes_and_strides,
            **known,
            SHARED=shared,
            ROWS=of_rows.kept,
            SLOTS=of_rows.met,
            num_warps=of_rows.warps,
            num_stages=of_rows.stages,
        )
        gradient_of_keys[flat_grid("gradient_of_keys", blocks * triton.cdiv(slots, of_slots.kept))](
            *inputs,
            slopes,
            of_k,
            of_v,
            *sizes_and_strides,
            **known,
            ROWS=of_slots.met,
            SLOTS=of_slots.kept,
            num_warps=of_slots.warps,
            num_stages=of_slots.stages,
        )
    return of_q, of_k.to(k.dtype), of_v.to(v.dtype), found_bias
