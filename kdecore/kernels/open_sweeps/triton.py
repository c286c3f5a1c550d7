"""`open_sweeps` in Triton for NVIDIA devices: a program opens the tree for one block of queries; one launch.

The block's queries, and half the squares of their coordinates, stay in registers; what is listed lies in the block's row of
the result, with ranks in the place of log-weights, and keys of opened leaves are put aside at its end. A sweep takes

1. the threshold, by halvings over all that is listed at once;
2. children and keys to their places, by sums of what goes before them;
3. tiles of parents and of their children, weighed for all queries on tensor cores: ranks, and how sums of weights change.

On paper, for 131,072 queries of 16 heads in blocks of 64, d = 64, p = 16, 512 slots in bfloat16: lists begin with 64 to 128
nodes, weighed twice, some 300 are split, their 600 children weighed, and half of the parents again, 1,000 · 64 · 2 (64 + 16)
operations for each of 32,768 blocks, 0.34 TFLOP, 0.4 ms at an H100's 798 TFLOP/s; beside them 2 · 10⁹ exp, 0.6 ms at 16 for
each of 132 multiprocessors and cycle, and some 25 other instructions for each, 1.8 ms. Means and variances are read from the
second-level cache, 192 bytes each, 6.3 GB, 1.1 ms at 5.5 TB/s. Lists are written once, 0.4 GB. Sums over all threads, some
12 a sweep, are not counted here: an H200 took 16.6 ms.
"""

import math

import torch
import triton
import triton.language as tl

from kdecore.kernels.grids import flat_grid
from kdecore.kernels.open_sweeps.contract import (
    GROWTH,
    HALVINGS,
    LARGEST_ERROR,
    LARGEST_SHARE,
    LEAST_SHARE,
    MORE_SWEEPS,
    OCTAVES,
    SUMMED_SWEEPS,
    triton_limit,
)
from kdecore.kernels.site import Largest
from kdecore.namespaces import Array, Namespace

LOG2E = tl.constexpr(math.log2(math.e))
TO_RANK = tl.constexpr(GROWTH / 4)
MOST_ERROR = tl.constexpr(LARGEST_ERROR)
MOST_SHARE = tl.constexpr(LARGEST_SHARE * math.log2(math.e))
FEWEST_SHARE = tl.constexpr(LEAST_SHARE * math.log2(math.e))
RANGE = tl.constexpr(OCTAVES)
STEPS = tl.constexpr(HALVINGS)
SUMMED = tl.constexpr(SUMMED_SWEEPS - 1)
"""Sums that a sweep changes are those of the next one's beginning."""
LEAST_SUM = tl.constexpr(2.0**-20)

MOST_REGISTERS = 255
TILE, SMALL_TILE = 32, 16
"""Nodes that are weighed at once, and where queries leave the registers less room, or are few."""


@triton.jit
def bounds_of(node, n):
    """Return where the keys of nodes of any level begin and end."""
    # The exponent of a float32, which holds these numbers exactly.
    level = ((node + 1).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    place = (node + 1 - (1 << level)).to(tl.int64)
    return ((place * n) >> level).to(tl.int32), (((place + 1) * n) >> level).to(tl.int32)


@triton.jit
def frozen(half_variance, log_count):
    """Return ln of the mean of exp over so many normal numbers, as the contract of `open_tree` has it."""
    return tl.where(half_variance > log_count, 2.0 * tl.sqrt(half_variance * log_count) - log_count, half_variance)


@triton.jit
def first_not_below(own, value, count, SEARCH: tl.constexpr):
    """Return how many of ``count`` ascending positions are below each value."""
    low, high = tl.zeros_like(value), tl.zeros_like(value) + count
    for _ in tl.static_range(SEARCH):
        middle = (low + high) // 2
        searching = low < high
        below = searching & (tl.load(own + middle, mask=searching, other=0) < value)
        low, high = tl.where(below, middle + 1, low), tl.where(below | (low >= high), high, middle)
    return low


@triton.jit
def is_own(own, position, count, among, SEARCH: tl.constexpr):
    """Return which positions are among the own ones."""
    place = first_not_below(own, position, count, SEARCH)
    inside = among & (place < count)
    return inside & (tl.load(own + place, mask=inside, other=-1) == position)


@triton.jit
def distinct_below(own, distinct, value, count, among, SEARCH: tl.constexpr):
    """Return how many of the own positions, each counted once, are below each value."""
    place = first_not_below(own, value, count, SEARCH)
    return tl.load(distinct + place - 1, mask=among & (place > 0), other=0.0).to(tl.int32)


@triton.jit
def weigh(
    queries, squares, keys, variances, node, there, n, factor, key_stride,
    D: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr, DIRECTIONS: tl.constexpr,
):  # fmt: skip
    """Return log₂ w and σ of nodes for every query, (queries, nodes), and the numbers of their keys."""
    column, direction = tl.arange(0, COLUMNS), tl.arange(0, DIRECTIONS)
    begin, end = bounds_of(node, n)
    count = tl.where(there, end - begin, 1)
    log_count = tl.log(count.to(tl.float32))
    row = node.to(tl.int64)
    means = tl.load(
        keys + row[:, None] * key_stride + column[None, :], mask=there[:, None] & (column < D)[None, :], other=0.0
    )
    along = tl.load(
        variances + row[:, None] * P + direction[None, :], mask=there[:, None] & (direction < P)[None, :], other=0.0
    )
    half_variance = tl.dot(squares, tl.trans(along), input_precision="tf32")
    sigma = frozen(half_variance, log_count[None, :])
    logits = tl.dot(queries, tl.trans(means.to(queries.dtype)), input_precision="tf32") * factor
    logits += (sigma + log_count[None, :]) * LOG2E
    return tl.where(there[None, :], logits, float("-inf")), sigma, count


@triton.jit
def ranks(logits, sigma, count, sizes, node, there, lse, counts):
    """Return the ranks of nodes, and each query's sum of weights as parts of 2**lse."""
    above = tl.minimum(logits - lse[:, None], MOST_SHARE)
    share = tl.exp2(tl.maximum(above, FEWEST_SHARE))
    size = tl.load(sizes + node, mask=there, other=0.0)
    error = tl.where(counts[:, None], share * sigma * size[None, :], 0.0)
    error *= error
    errors = tl.minimum(tl.sum(error * error, 0), MOST_ERROR)
    rank = tl.where(errors > 0, tl.exp2(tl.log2(tl.where(errors > 0, errors, 1.0)) * TO_RANK), 0.0)
    return rank / count.to(tl.float32), tl.sum(tl.where(there[None, :], share, 0.0), 1)


@triton.jit
def list_first(
    queries, squares, keys, variances, sizes, listed, rank_of, counts, level, first, used, n, factor, key_stride,
    D: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr, DIRECTIONS: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """Write the first nodes and their ranks; return log₂ of the sum of their weights, for each query."""
    top = tl.full([queries.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([queries.shape[0]], tl.float32)
    for begin in range(0, used, NODES):
        at = begin + tl.arange(0, NODES)
        node = (1 << level) - 1 + first + at
        logits, _, _ = weigh(
            queries, squares, keys, variances, node, at < used, n, factor, key_stride, D, COLUMNS, P, DIRECTIONS
        )
        new_top = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(logits - new_top[:, None]), 1)
        top = new_top
    lse = top + tl.log2(total)
    for begin in range(0, used, NODES):
        at = begin + tl.arange(0, NODES)
        there, node = at < used, (1 << level) - 1 + first + at
        logits, sigma, count = weigh(
            queries, squares, keys, variances, node, there, n, factor, key_stride, D, COLUMNS, P, DIRECTIONS
        )
        rank, _ = ranks(logits, sigma, count, sizes, node, there, lse, counts)
        tl.store(listed + at, node.to(tl.int64), mask=there)
        tl.store(rank_of + at, rank, mask=there)
    return lse


@triton.jit
def find_threshold(rank, count, there, is_leaf, room):
    """Return the least threshold for which what is listed needs no more than room."""
    top = tl.max(rank, 0)
    high = tl.log2(tl.where(top > 0, top, 1.0)) + 1.0
    low = high - RANGE
    held, one = count.to(tl.float32), there.to(tl.float32)
    for _ in range(STEPS):
        middle = 0.5 * (low + high)
        limit, per_limit = tl.exp2(middle), tl.exp2(-middle)
        predicted = tl.where(is_leaf, held, tl.minimum(held, tl.maximum(2.0, rank * per_limit)))
        fits = tl.sum(tl.where(rank > limit, predicted, one), 0) <= room
        low, high = tl.where(fits, low, middle), tl.where(fits, middle, high)
    return tl.exp2(high)


@triton.jit
def open_listed(
    listed, rank_of, wanted, used, put_aside, n, nodes, SLOTS: tl.constexpr, LEAF: tl.constexpr
):  # fmt: skip
    """Open what is above the threshold; return how many nodes were split, and how many keys more were put aside.

    Right children follow what is listed, their left ones' places in the place of their ranks. Of an opened leaf, the first
    key takes its place, and the others are put aside at the list's end.
    """
    place = tl.arange(0, SLOTS)
    there = place < used
    node = tl.load(listed + place, mask=there, other=0).to(tl.int32)
    is_node = there & (node < nodes)
    rank = tl.load(rank_of + place, mask=is_node, other=0.0)
    start, end = bounds_of(tl.where(is_node, node, 0), n)
    held = end - start
    is_leaf = node >= nodes // 2
    limit = find_threshold(rank, held, there, is_leaf, (wanted - put_aside).to(tl.float32))
    opened = is_node & (rank > limit)
    split, whole = opened & (node < nodes // 2), opened & is_leaf
    # What was read above is written from here on.
    tl.debug_barrier()
    right = used + tl.cumsum(split.to(tl.int32), 0) - 1
    tl.store(listed + place, (2 * node + 1).to(tl.int64), mask=split)
    tl.store(listed + right, (2 * node + 2).to(tl.int64), mask=split)
    tl.store(rank_of + right, place.to(tl.float32), mask=split)
    tl.store(listed + place, (nodes + start).to(tl.int64), mask=whole)
    more = tl.where(whole, held - 1, 0)
    aside = wanted - put_aside - tl.cumsum(more, 0)
    for j in tl.static_range(1, LEAF):
        tl.store(listed + aside + j - 1, (nodes + start + j).to(tl.int64), mask=whole & (j < held))
    return tl.sum(split.to(tl.int32), 0), tl.sum(more, 0)


@triton.jit
def weigh_children(
    queries, squares, keys, variances, sizes, listed, rank_of, lse, counts, used, splits, summed, n, factor, key_stride,
    D: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr, DIRECTIONS: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """Write the ranks of all children; return lse, of what is listed now where it is to be ``summed`` anew."""
    change = tl.zeros([queries.shape[0]], tl.float32)
    for begin in range(0, tl.where(summed, splits, 0), NODES):
        at = begin + tl.arange(0, NODES)
        there = at < splits
        parent = tl.load(listed + used + at, mask=there, other=2).to(tl.int32) // 2 - 1
        logits, _, _ = weigh(
            queries, squares, keys, variances, parent, there, n, factor, key_stride, D, COLUMNS, P, DIRECTIONS
        )
        change -= tl.sum(tl.exp2(tl.minimum(logits - lse[:, None], MOST_SHARE)), 1)
    for begin in range(0, 2 * splits, NODES):
        at = begin + tl.arange(0, NODES)
        pair, is_right, there = used + at // 2, at % 2, at < 2 * splits
        node = tl.load(listed + pair, mask=there, other=1).to(tl.int32) - 1 + is_right
        left_place = tl.load(rank_of + pair, mask=there, other=0.0).to(tl.int32)
        logits, sigma, count = weigh(
            queries, squares, keys, variances, node, there, n, factor, key_stride, D, COLUMNS, P, DIRECTIONS
        )
        rank, total = ranks(logits, sigma, count, sizes, node, there, lse, counts)
        # Where the left child lies was read from the place of the right one's rank.
        tl.debug_barrier()
        tl.store(rank_of + tl.where(is_right == 1, pair, left_place), rank, mask=there)
        change += total
    # What is left of a sum that was nearly all one parent's is rounding.
    return tl.where(summed, lse + tl.log2(tl.maximum(1.0 + change, LEAST_SUM)), lse)


@triton.jit
def list_weights(
    spread, own, distinct, listed, weights, half_norm, count_own, used, put_aside, wanted, n, nodes,
    SLOTS: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """Write the log-weights of all that is listed, and what empty slots hold."""
    place = tl.arange(0, SLOTS)
    empty = (place >= used) & (place < wanted - put_aside)
    there = (place < wanted) & (empty == 0)
    node = tl.load(listed + place, mask=there, other=0).to(tl.int32)
    is_node = there & (node < nodes)
    start, end = bounds_of(tl.where(is_node, node, 0), n)
    left = end - start + distinct_below(own, distinct, start, count_own, is_node, SEARCH)
    left -= distinct_below(own, distinct, end, count_own, is_node, SEARCH)
    log_left = tl.log(tl.maximum(left, 1).to(tl.float32))
    half_variance = tl.load(spread + node, mask=is_node, other=0.0) * half_norm
    weight = log_left + tl.where(end - start > 1, frozen(half_variance, log_left), 0.0)
    weight = tl.where(left > 0, weight, float("-inf"))
    of_key = tl.where(is_own(own, node - nodes, count_own, there & (node >= nodes), SEARCH), float("-inf"), 0.0)
    weight = tl.where(is_node, weight, of_key)
    tl.store(weights + place, tl.where(empty, float("-inf"), weight), mask=place < wanted)
    tl.store(listed + place, tl.zeros([SLOTS], tl.int64), mask=empty)


@triton.jit(do_not_specialize=["blocks", "rows", "n_q", "n", "nodes", "count_own", "level", "first", "used", "sweeps"])
def open_blocks(
    q, coordinates, query_index, keys, spread, variances, sizes, own, key_index, log_weight,
    factor, scale, blocks, rows, n_q, n, nodes, slots, count_own, level, first, used, sweeps, key_stride,
    D: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr, DIRECTIONS: tl.constexpr, ROWS: tl.constexpr,
    SLOTS: tl.constexpr, OWN: tl.constexpr, NODES: tl.constexpr, LEAF: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """Open the tree for one block of queries, whose list begins with ``used`` nodes from ``first`` on, of ``level``.

    Logits are in units of log 2: ``factor`` is scale / ln 2.
    """
    block = tl.program_id(0).to(tl.int64)
    group = block // blocks
    # Everything of this group, and of this block's list.
    q, coordinates, keys = q + group * n_q * D, coordinates + group * n_q * P, keys + group * (nodes + n) * key_stride
    spread, sizes, variances = spread + group * nodes, sizes + group * nodes, variances + group * nodes * P
    own, key_index, log_weight = own + block * count_own, key_index + block * slots, log_weight + block * slots
    listed, rank_of, wanted = key_index + count_own, log_weight + count_own, slots - count_own

    lane, column, direction = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DIRECTIONS)
    counts = lane < rows
    row = tl.load(query_index + block * rows + lane, mask=counts, other=0)
    queries = tl.load(q + row[:, None] * D + column[None, :], mask=counts[:, None] & (column < D)[None, :], other=0.0)
    finite = tl.max(tl.where(tl.abs(queries.to(tl.float32)) < float("inf"), 0, 1), 1) == 0
    # Half precision is multiplied as it is where means are stored so.
    queries = tl.where(finite[:, None], queries, 0.0).to(keys.dtype.element_ty)
    wide = queries.to(tl.float32) * scale
    half_norm = tl.sum(tl.sum(wide * wide, 1), 0) * (0.5 / (rows * D))
    squares = tl.load(
        coordinates + row[:, None] * P + direction[None, :], mask=counts[:, None] & (direction < P)[None, :], other=0.0
    )
    squares *= squares
    squares = 0.5 * tl.where(squares < float("inf"), squares, 0.0)

    lse = list_first(
        queries, squares, keys, variances, sizes, listed, rank_of, counts, level, first, used, n, factor, key_stride,
        D, COLUMNS, P, DIRECTIONS, NODES,
    )  # fmt: skip
    put_aside, sweep = 0 * used, 0 * used
    while sweep < sweeps:
        tl.debug_barrier()
        splits, aside = open_listed(listed, rank_of, wanted, used, put_aside, n, nodes, SLOTS, LEAF)
        tl.debug_barrier()
        lse = weigh_children(
            queries, squares, keys, variances, sizes, listed, rank_of, lse, counts, used, splits, sweep < SUMMED, n, factor,
            key_stride, D, COLUMNS, P, DIRECTIONS, NODES,
        )  # fmt: skip
        used, put_aside = used + splits, put_aside + aside
        sweep = tl.where(splits + aside > 0, sweep + 1, sweeps)
    tl.debug_barrier()
    if OWN > 0:
        # Own positions may come again: how many there are up to each lies in the place of their log-weights for a while.
        mine = tl.arange(0, OWN)
        is_mine = mine < count_own
        position = tl.load(own + mine, mask=is_mine, other=0)
        again = (mine > 0) & (tl.load(own + mine - 1, mask=is_mine & (mine > 0), other=-1) == position)
        tl.store(key_index + mine, nodes + position, mask=is_mine)
        tl.store(log_weight + mine, tl.cumsum(tl.where(again, 0, 1), 0).to(tl.float32), mask=is_mine)
        tl.debug_barrier()
    list_weights(
        spread, own, log_weight, listed, rank_of, half_norm, count_own, used, put_aside, wanted, n, nodes, SLOTS, SEARCH
    )
    if OWN > 0:
        tl.debug_barrier()
        tl.store(log_weight + mine, tl.where(again, float("-inf"), 0.0), mask=is_mine)


def nodes_at_once(rows: int, d: int, itemsize: int) -> int:
    """Return how many nodes are weighed at once for so many queries of d numbers of so many bytes."""
    return SMALL_TILE if rows <= 16 or is_wide(rows, d, itemsize) else TILE


def is_wide(rows: int, d: int, itemsize: int) -> bool:
    """Return whether a block's queries leave the registers little room."""
    return rows * max(64, d) * itemsize > 2**14


def open_sweeps(
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
    """Follow `kdecore.kernels.open_sweeps.contract.OpenSweeps`, within its `triton_limit`."""
    groups, blocks, rows = query_index.shape
    d, p, nodes = int(q.shape[2]), int(coordinates.shape[2]), int(spread.shape[1])
    largest = Largest(d=d, directions=p, rows=rows, slots=slots, nodes=nodes, item_bytes=keys.element_size())
    assert triton_limit(largest) is None
    q, coordinates, query_index, spread, variances, sizes = (
        x.contiguous() for x in (q, coordinates, query_index, spread, variances, sizes)
    )
    keys = keys if keys.stride(2) == 1 and keys.stride(0) == keys.shape[1] * keys.stride(1) else keys.contiguous()
    count_own = 0 if own is None else int(own.shape[2])
    # Never read where there are none.
    given_own = query_index if own is None else own.contiguous()
    n, (level, first, end) = int(keys.shape[1]) - nodes, start
    last = ((nodes + 1) // 2).bit_length() - 1
    sweeps = last - level + 1 + MORE_SWEEPS
    with torch.cuda.device_of(q):
        key_index = torch.empty((groups, blocks, slots), dtype=torch.int64, device=q.device)
        log_weight = torch.empty((groups, blocks, slots), dtype=torch.float32, device=q.device)
        open_blocks[flat_grid("open_blocks", groups * blocks)](
            q, coordinates, query_index, keys, spread, variances, sizes, given_own, key_index, log_weight,
            scale * math.log2(math.e), scale, blocks, rows, int(q.shape[1]), n, nodes, slots, count_own,
            level, first, end - first, sweeps, keys.stride(1),
            D=d, COLUMNS=triton.next_power_of_2(max(16, d)), P=p, DIRECTIONS=triton.next_power_of_2(max(16, p)),
            ROWS=triton.next_power_of_2(max(16, rows)), SLOTS=triton.next_power_of_2(slots),
            OWN=0 if own is None else triton.next_power_of_2(count_own),
            NODES=nodes_at_once(rows, d, keys.element_size()),
            LEAF=-(-n >> last), SEARCH=count_own.bit_length(), num_warps=4, num_stages=1,
            # Left to itself, the assembler spills a few registers for room that wide rows don't leave anyway.
            maxnreg=MOST_REGISTERS if keys.element_size() == 4 or is_wide(rows, d, keys.element_size()) else None,
        )  # fmt: skip
    return key_index, log_weight
