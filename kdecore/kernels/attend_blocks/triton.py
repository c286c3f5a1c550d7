"""`attend_blocks` in Triton for NVIDIA devices: one pass over each block's list, with nothing gathered in memory.

A program keeps a tile of a block's queries, and their results, in registers, and meets the block's keys and values a few
dozen slots at a time: rows are read by their numbers into shared memory while those before them are multiplied on tensor
cores, and steps are merged by the running maximum as FlashAttention does (Dao et al. 2022). Results go to their rows of out
and lse, merged with what was before, without another pass.

On paper, for n = 131,072 queries and keys of 16 heads, d = d_v = 64 in bfloat16, 512 slots for each block of 128 queries:

- 4 n · 512 · 64 · 16 = 2.7e11 operations in products: 0.34 ms at an H100's 798 TFLOP/s; beside them 1.1e9 exp2.
- To and from memory, once each: q, k, v 0.81 GB, out and lse in float32 0.55 GB, lists 0.12 GB; 1.47 GB, 0.49 ms at 3.0
  TB/s, which is the bound. Rows gathered into copies would take 2.1 GB written and read again.
- Through the second-level cache, which programs share: 2.1 GB of keys and values, each row four times. A head's are 33 MB
  and fit in its 50 MB: blocks come head by head, and so do programs, block by block, a block's tiles beside each other.

Rows are read 16 bytes at a time where each begins at a multiple of them: of 65 columns side by side they are read one number
at a time, so rows that wide should lie 80 apart (a view of wider rows is taken as it is; Triton asks for multiples of 16).
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.state import AttentionState
from kdecore.kernels.attend_blocks.contract import parts, triton_limit
from kdecore.kernels.runtime.grids import flat_grid
from kdecore.kernels.site import Largest

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
SCANNED = tl.constexpr(256)
"""Slots whose log-weights are looked at together."""
PRECISION = tl.constexpr("tf32x3")
"""Of products in float32: three of tf32 make one whose errors are nearly float32's, at a third of the rate. One alone would
leave errors of 5e-4. Half precision is multiplied as it is."""


class Limits(NamedTuple):
    """What one program of a kernel may hold.

    Fixed, not tuned at run time, which would wait for the device. What a program keeps from one step to the next lies in
    registers, as much as is not spilled on sm_80 and sm_90 (`tests/triton_compile.py`): the more rows it keeps, the fewer
    programs read what it meets.

    Attributes
    ----------
    kept, kept_numbers
        Rows that stay, at most, and their numbers in all columns, of keys and of values.
    met, met_numbers
        Rows of a step, at most, and their numbers.
    narrow
        Numbers that four warps keep, which leaves room for a second program to work while the first waits for its rows;
        eight warps keep more.
    stages
        Steps whose rows are under way at once, where rows are not wide.
    """

    kept: int
    kept_numbers: int
    met: int
    met_numbers: int
    narrow: int
    stages: int


class Tiling(NamedTuple):
    """How a kernel is cut and compiled: rows kept and met, warps of a program, stages."""

    kept: int
    met: int
    warps: int
    stages: int


# In float32 a product holds both parts of its operands: twice the registers for half the numbers. And it has four warps:
# eight, of few columns, read shared memory that isn't theirs on an H200 (Triton 3.6).
ATTEND = {2: Limits(128, 2**15, 64, 2**13, 2**14, 3), 4: Limits(64, 15 * 2**10, 16, 2**11, 2**14, 3)}
"""Of `attend_tile`, by the bytes of a number: queries are kept, with their results, and keys are met."""


@triton.jit
def numbers(index, block, place, counts, length):
    """Return the row numbers at some places of a block's list; without lists, blocks follow each other row by row."""
    found = block.to(tl.int64) * length + place
    if index is not None:
        found = tl.load(index + found, mask=counts, other=0)
    return found


@triton.jit
def first_of_its_kind(index, block, place, counts, length):
    """Return which of some places count and do not have the row of the place before them."""
    first = counts
    if index is not None:
        at = block.to(tl.int64) * length + place
        follows = counts & (place > 0)
        row, last = tl.load(index + at, mask=counts, other=0), tl.load(index + at - 1, mask=follows, other=-1)
        first = counts & (row != last)
    return first


@triton.jit
def load_rows(rows, row, stride, counts, FIRST: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Return columns FIRST … FIRST + COLUMNS − 1 of rows; 0 from WIDTH on, and for a row that does not count."""
    column = FIRST + tl.arange(0, COLUMNS)
    places = rows + row[:, None] * stride + column[None, :]
    mask = counts[:, None]
    if FIRST + COLUMNS > WIDTH:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(places, mask=mask, other=0.0)


@triton.jit
def store_rows(rows, row, counts, found, FIRST: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Write what `load_rows` reads, where rows follow each other without gaps."""
    column = FIRST + tl.arange(0, COLUMNS)
    places = rows + row[:, None] * WIDTH + column[None, :]
    mask = counts[:, None]
    if FIRST + COLUMNS > WIDTH:
        mask = mask & (column < WIDTH)[None, :]
    tl.store(places, found, mask=mask)


@triton.jit
def load_parts(rows, row, stride, counts, MAIN: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr):
    """Return the two parts of rows that are WIDTH wide (`parts`), the first twice where there is one."""
    main = load_rows(rows, row, stride, counts, 0, MAIN, WIDTH)
    rest = main
    if REST > 0:
        rest = load_rows(rows, row, stride, counts, MAIN, REST, WIDTH)
    return main, rest


@triton.jit
def store_parts(rows, row, counts, main, rest, MAIN: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr):
    """Write both parts of rows."""
    store_rows(rows, row, counts, main, 0, MAIN, WIDTH)
    if REST > 0:
        store_rows(rows, row, counts, rest, MAIN, REST, WIDTH)


@triton.jit
def no_sums(ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """Return sums to begin with."""
    main = tl.zeros([ROWS, MAIN], tl.float32)
    rest = main
    if REST > 0:
        rest = tl.zeros([ROWS, REST], tl.float32)
    return main, rest


@triton.jit
def products(a, a_rest, b, b_rest, REST: tl.constexpr):
    """Return the products of all rows of a and b."""
    found = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if REST > 0:
        found = tl.dot(a_rest, tl.trans(b_rest), found, input_precision=PRECISION)
    return found


@triton.jit
def add_rows(weights, rows, rest, sums, sums_rest, REST: tl.constexpr):
    """Add rows, times weights, to sums of them; weights are rounded to the rows' dtype."""
    weights = weights.to(rows.dtype)
    sums = tl.dot(weights, rows, sums, input_precision=PRECISION)
    if REST > 0:
        sums_rest = tl.dot(weights, rest, sums_rest, input_precision=PRECISION)
    return sums, sums_rest


@triton.jit
def slots_used(log_weight, block, slots, STEP: tl.constexpr):
    """Return how many slots a block's list has up to the last that counts: of lists of one length, many end early."""
    used = slots
    if log_weight is not None:
        used = 0 * slots
        for first in range(0, slots, STEP):
            slot = first + tl.arange(0, STEP)
            added = tl.load(log_weight + block.to(tl.int64) * slots + slot, mask=slot < slots, other=float("-inf"))
            used = tl.maximum(used, tl.max(tl.where(added > float("-inf"), slot + 1, 0), 0))
    return used


@triton.jit
def added_to_slots(log_weight, block, slot, inside, slots):
    """Return what is added to all logits of each slot, in units of log 2; −∞ beyond the list."""
    added = tl.where(inside, 0.0, float("-inf"))
    if log_weight is not None:
        added = tl.load(log_weight + block.to(tl.int64) * slots + slot, mask=inside, other=float("-inf")) * LOG2E
    return added


@triton.jit
def tile_logits(found, factor, added, bias, block, bias_stride, row, slot, rows, slots):
    """Return the logits, in units of log 2, of products of rows and slots, of which either lie along.

    −∞ whatever they are where the bias is −∞.
    """
    logits = found * factor + added
    if bias is not None:
        places = bias + block.to(tl.int64) * bias_stride + row.to(tl.int64) * slots + slot
        more = tl.load(places, mask=(row < rows) & (slot < slots), other=float("-inf"))
        logits = tl.where(more > float("-inf"), logits + more * LOG2E, float("-inf"))
    return logits


@triton.jit
def attend_tile(
    q,
    k,
    v,
    query_index,
    key_index,
    log_weight,
    bias,
    out,
    lse,
    factor,
    rows,
    slots,
    group_blocks,
    group_queries,
    group_keys,
    q_stride,
    k_stride,
    v_stride,
    bias_stride,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    D_V: tl.constexpr,
    D_V_MAIN: tl.constexpr,
    D_V_REST: tl.constexpr,
    MERGING: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Let a tile of a block's queries attend to the block's list, into their rows of out and lse.

    Logits are in units of log 2: ``factor`` is scale / ln 2. MERGING with what out and lse hold. Lists number the rows of
    a block's group.
    """
    tiles = tl.cdiv(rows, ROWS)
    block, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row = tile * ROWS + tl.arange(0, ROWS)
    counts = row < rows
    # All rows together are fewer than 2³¹.
    group = block // group_blocks
    q += (group * group_queries).to(tl.int64) * q_stride
    query = numbers(query_index, block, row, counts, rows)
    queries, queries_rest = load_parts(q, query, q_stride, counts, D_MAIN, D_REST, D)
    top, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    sums, sums_rest = no_sums(ROWS, D_V_MAIN, D_V_REST)
    used = slots_used(log_weight, block, slots, SCANNED)
    for first in range(0, used, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        inside = slot < used
        key = numbers(key_index, block, slot, inside, slots) + group * group_keys
        keys, keys_rest = load_parts(k, key, k_stride, inside, D_MAIN, D_REST, D)
        found = products(queries, queries_rest, keys, keys_rest, D_REST)
        added = added_to_slots(log_weight, block, slot, inside, slots)[None, :]
        logits = tile_logits(found, factor, added, bias, block, bias_stride, row[:, None], slot[None, :], rows, slots)
        new_top = tl.maximum(top, tl.max(logits, 1))
        # Where nothing counts yet, −∞ − −∞ would be NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(logits - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(weights, 1)
        values, values_rest = load_parts(v, key, v_stride, inside, D_V_MAIN, D_V_REST, D_V)
        sums, sums_rest = sums * shrink[:, None], sums_rest * shrink[:, None]
        sums, sums_rest = add_rows(weights, values, values_rest, sums, sums_rest, D_V_REST)
        top = new_top
    total = tl.where(total == 0.0, 1.0, total)
    own_lse, inverse = (top + tl.log2(total)) * LN2, 1.0 / total
    # A query that is there again is neither merged nor written again.
    mine = first_of_its_kind(query_index, block, row, counts, rows)
    query += group * group_queries
    if MERGING:
        old = tl.load(lse + query, mask=mine, other=float("-inf"))
        both_top = tl.maximum(old, own_lse)
        shift = tl.where(both_top == float("-inf"), 0.0, both_top)
        old_weight, new_weight = tl.exp2((old - shift) * LOG2E), tl.exp2((own_lse - shift) * LOG2E)
        both = old_weight + new_weight
        both = tl.where(both == 0.0, 1.0, both)
        own_lse, inverse, kept = both_top + tl.log2(both) * LN2, inverse * (new_weight / both), (old_weight / both)[:, None]
        held, held_rest = load_parts(out, query, D_V, mine, D_V_MAIN, D_V_REST, D_V)
    sums, sums_rest = sums * inverse[:, None], sums_rest * inverse[:, None]
    if MERGING:
        sums, sums_rest = sums + held * kept, sums_rest + held_rest * kept
    store_parts(out, query, mine, sums, sums_rest, D_V_MAIN, D_V_REST, D_V)
    tl.store(lse + query, own_lse, mask=mine)


@triton.jit
def clear_rows(out, lse, count, D_V: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Write 0 into the rows of out whose lse is −∞."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    empty = tl.load(lse + row, mask=row < count, other=0.0) == float("-inf")
    store_rows(out, row, empty, tl.zeros([ROWS, COLUMNS], tl.float32), 0, COLUMNS, D_V)


def widths(d: int, d_v: int) -> dict[str, int]:
    """Return what kernels know of widths when they are compiled."""
    (d_main, d_rest), (v_main, v_rest) = parts(d), parts(d_v)
    return {"D": d, "D_MAIN": d_main, "D_REST": d_rest, "D_V": d_v, "D_V_MAIN": v_main, "D_V_REST": v_rest}


def columns(known: dict[str, int], bias: Any) -> int:
    """Return the padded columns of a key and a value together; a tile of a bias takes room too."""
    return known["D_MAIN"] + known["D_REST"] + known["D_V_MAIN"] + known["D_V_REST"] + (0 if bias is None else 64)


def tiling(limits: Limits, rows: int, width: int) -> Tiling:
    """Return the tiling for so many rows to keep, of so many columns of keys and values together."""
    kept = max(16, min(limits.kept, floor_power(limits.kept_numbers // width), triton.next_power_of_2(rows)))
    met = max(16, min(limits.met, floor_power(limits.met_numbers // width)))
    return Tiling(kept, met, 8 if kept * width > limits.narrow else 4, limits.stages if width <= 256 else 1)


def floor_power(x: int) -> int:
    """Return the largest power of two that is at most x; 1 for 0."""
    return 1 << max(0, x.bit_length() - 1)


def plain_rows(x: Any) -> Any:
    """Return rows (n, w) whose numbers lie side by side, however far one row is from the next."""
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


def one_run(x: Any) -> Any:
    """Return rows (G, n, w) that follow one another through all groups, however far one is from the next."""
    return x if x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()


def attend_lists(
    q: Any,
    k: Any,
    v: Any,
    lists: tuple[Any, Any, Any] | None,
    sizes: tuple[int, int, int],
    scale: float,
    bias: Any = None,
    before: AttentionState | None = None,
    groups: int = 1,
    whole: bool = False,
) -> AttentionState:
    """Let blocks of queries attend to lists of keys.

    Parameters
    ----------
    q, k, v
        Rows as in `kdecore.kernels.attend_blocks.contract.AttendBlocks`, within its `triton_limit`.
    lists
        query_index, key_index and log_weight, as there; None where blocks and their keys follow each other row by row.
    sizes
        Numbers of blocks, of their queries and of their slots.
    scale, bias, before, groups, whole
        As there.
    """
    blocks, rows, slots = sizes
    assert triton_limit(widest(q, v)) is None
    q, k, v = plain_rows(q), plain_rows(k), plain_rows(v)
    query_index, key_index, log_weight = (None, None, None) if lists is None else (x.contiguous() for x in lists)
    known = widths(q.shape[1], v.shape[1])
    tile = tiling(ATTEND[q.element_size()], rows, columns(known, bias))
    written = whole or lists is None
    with torch.cuda.device_of(q):
        if before is None:
            out = torch.empty((q.shape[0], v.shape[1]), dtype=torch.float32, device=q.device)
            lse = torch.empty((q.shape[0],), dtype=torch.float32, device=q.device)
            if not written:
                lse.fill_(-math.inf)
        else:
            out, lse = before.out.contiguous(), before.lse.contiguous()
        attend_tile[flat_grid("attend_tile", blocks * triton.cdiv(rows, tile.kept))](
            q,
            k,
            v,
            query_index,
            key_index,
            log_weight,
            None if bias is None else bias.contiguous(),
            out,
            lse,
            scale * math.log2(math.e),
            rows,
            slots,
            blocks // groups,
            q.shape[0] // groups,
            k.shape[0] // groups,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            0 if bias is None or len(bias) == 1 else rows * slots,
            **known,
            MERGING=before is not None,
            ROWS=tile.kept,
            SLOTS=tile.met,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if before is None and not written:
            # Cheaper than zeros first: nearly every row is written anyway.
            width = v.shape[1]
            grid = flat_grid("clear_rows", triton.cdiv(len(lse), 128))
            clear_rows[grid](out, lse, len(lse), width, triton.next_power_of_2(width), 128)
    return AttentionState(out, lse)


def widest(q: Any, v: Any) -> Largest:
    """Return what of the sizes limits how wide rows may be."""
    return Largest(d=q.shape[-1], d_v=v.shape[-1], item_bytes=q.element_size())


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
    """Follow `kdecore.kernels.attend_blocks.contract.AttendBlocks`, within its `triton_limit`."""
    sizes = (*query_index.shape, key_index.shape[1])
    return attend_lists(q, k, v, (query_index, key_index, log_weight), sizes, scale, bias, before, groups, whole)
