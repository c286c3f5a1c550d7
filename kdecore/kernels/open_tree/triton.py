"""`open_tree` in Triton for NVIDIA devices: a program opens the tree for one block of queries; one launch.

The block's queries stay in registers. Its list grows in its row of the result: closed nodes from the front, the nodes of
the next level from the back, while those of the level lie in the place of their shares. A level is met twice, in tiles that
are weighed for all queries on tensor cores: first for sums of weights, then for errors, by which nodes are closed or opened,
to places that follow from sums over the tile. At the end the closed nodes are weighed once more, for their shares.

On paper, for 131,072 queries of 16 heads in blocks of 64, d = 64, 512 slots in bfloat16: of a block some 350 nodes stay
closed and 130 are opened; weighed twice, and the closed ones once more, that is 1,300 · 64 · 2 · 64 operations for each of
32,768 blocks, 0.35 TFLOP, 0.4 ms at an H100's 798 TFLOP/s; beside them 2.7 · 10⁹ exp, 0.7 ms at 16 for each of 132
multiprocessors and cycle, and some ten other instructions for each, 1.7 ms. Means and variances are read from the
second-level cache, 192 bytes each, 8.2 GB, 1.5 ms at 5.5 TB/s. Queries that are taken apart add a product of 16 columns and
a square root for each and each node in the second meeting, 1.0 · 10⁹ of each. A program meets some six levels one after
another.
"""

import math

import torch
import triton
import triton.language as tl

from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.tree import BlockQueries, Tree, depth_of
from kdecore.kernels.attend_blocks.triton import one_run
from kdecore.kernels.open_tree import contract
from kdecore.kernels.open_tree.contract import ALONG, LEAST, STEP, triton_limit
from kdecore.kernels.runtime.grids import flat_grid
from kdecore.kernels.site import Largest

LOG2E = tl.constexpr(math.log2(math.e))
HALF_ALONG = tl.constexpr(0.5 * ALONG)
LEVELS, BELOW = tl.constexpr(STEP), tl.constexpr(1 << STEP)
SMALLEST = tl.constexpr(LEAST)
SHORT = tl.constexpr(contract.SHORT)
LOWEST = tl.constexpr(-1e30)
"""Below every logit: what is subtracted from logits has to be finite."""

MOST_REGISTERS = 255
TILE, SMALL_TILE = 32, 16
"""Nodes that are weighed at once, and where queries leave the registers less room, or are few."""


@triton.jit
def load_block(
    q, coordinates, query_index, block, group, scale, rows, n_q,
    D: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr, DIRECTIONS: tl.constexpr, ROWS: tl.constexpr,
    STORED: tl.constexpr,
):  # fmt: skip
    """Return a block's queries, their squared coordinates times `ALONG` / 2, ‖scale q‖² / 2d, and which rows count."""
    lane, column, direction = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DIRECTIONS)
    counts = lane < rows
    row = group * n_q + tl.load(query_index + block * rows + lane, mask=counts, other=0)
    queries = tl.load(q + row[:, None] * D + column[None, :], mask=counts[:, None] & (column < D)[None, :], other=0.0)
    finite = tl.max(tl.where(tl.abs(queries.to(tl.float32)) < float("inf"), 0, 1), 1) == 0
    # Half precision is multiplied as it is where means are stored so.
    queries = tl.where(finite[:, None], queries, 0.0).to(STORED)
    wide = queries.to(tl.float32) * scale
    half_norms = tl.sum(wide * wide, 1) * (0.5 / D)
    squares = tl.load(
        coordinates + row[:, None] * P + direction[None, :], mask=counts[:, None] & (direction < P)[None, :], other=0.0
    )
    squares *= squares
    squares = tl.where((squares < float("inf")) & finite[:, None], squares, 0.0)
    return queries, squares * HALF_ALONG, half_norms, counts


@triton.jit
def ratios_of(half_norms, half_norm, APART: tl.constexpr):
    """Return what half variances of each query are of the block's; 1 where they are its own."""
    ratios = tl.zeros_like(half_norms) + 1.0
    if not APART:
        ratios = tl.where(half_norm > 0, half_norms / tl.where(half_norm > 0, half_norm, 1.0), 1.0)
    return ratios


@triton.jit
def frozen(half_variance, log_count):
    """Return ln of the mean of exp over so many normal numbers, as the contract has it."""
    return tl.where(half_variance > log_count, 2.0 * tl.sqrt(half_variance * log_count) - log_count, half_variance)


@triton.jit
def listed_as(sigma, log_count):
    """Return what a closed node is listed with for its half variance, frozen or not, as the contract has it."""
    reached = log_count * log_count / (log_count + SHORT)
    root = tl.where(sigma > log_count, 0.5 * (sigma + log_count), tl.sqrt(sigma * log_count))
    return tl.where(sigma > reached, 2.0 * root * tl.sqrt(log_count / (log_count + SHORT)) - reached, sigma)


@triton.jit
def level_of(node):
    """Return the levels of nodes, which are numbered through all of them."""
    # The exponent of a float32, which holds these numbers exactly.
    return ((node + 1).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def bounds_of(place, level, n):
    """Return where the keys of nodes, numbered within their level, begin and end, in 64 bits."""
    wide = place.to(tl.int64)
    return (wide * n) >> level, ((wide + 1) * n) >> level


@triton.jit
def weigh(
    queries, squares, half_norm, keys, spread, variances, level, place, there, n, factor, key_stride,
    D: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr, DIRECTIONS: tl.constexpr,
):  # fmt: skip
    """Return log₂ of the weights of nodes for every query, (queries, nodes), and their half variances for the block.

    Returns also ln of their counts, variances (nodes, directions) and spreads.
    """
    column, direction = tl.arange(0, COLUMNS), tl.arange(0, DIRECTIONS)
    row = ((1 << level) - 1 + place).to(tl.int64)
    begin, end = bounds_of(place, level, n)
    log_count = tl.log(tl.where(there, end - begin, 1).to(tl.float32))
    means = tl.load(
        keys + row[:, None] * key_stride + column[None, :], mask=there[:, None] & (column < D)[None, :], other=0.0
    )
    along = tl.load(
        variances + row[:, None] * P + direction[None, :], mask=there[:, None] & (direction < P)[None, :], other=0.0
    )
    around = tl.load(spread + row, mask=there, other=0.0)
    sigma = frozen(tl.sum(along * squares[None, :], 1) + around * half_norm, log_count)
    logits = tl.dot(queries, tl.trans(means.to(queries.dtype)), input_precision="tf32") * factor
    logits += ((sigma + log_count) * LOG2E)[None, :]
    return tl.where(there[None, :], logits, float("-inf")), sigma, log_count, along, around


@triton.jit
def estimate(
    queries, squares, half_norm, own_squares, half_norms, ratios, counts, keys, spread, variances, sizes, level, place,
    there, top, total, n, factor, key_stride,
    D: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr, DIRECTIONS: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Return weights of nodes, the errors that they are estimated to make if closed, and their log-weights in a list."""
    logits, sigma, log_count, along, around = weigh(
        queries, squares, half_norm, keys, spread, variances, level, place, there, n, factor, key_stride,
        D, COLUMNS, P, DIRECTIONS,
    )  # fmt: skip
    size = tl.load(sizes + ((1 << level) - 1 + place).to(tl.int64), mask=there, other=0.0)
    weights = tl.exp2(logits - top[:, None])
    share = tl.where(counts[:, None], weights * (ratios / total)[:, None], 0.0)
    if APART:
        half = tl.dot(own_squares, tl.trans(along), input_precision="tf32") + half_norms[:, None] * around[None, :]
        share *= frozen(half, log_count[None, :])
    else:
        size *= sigma
    share *= share
    return weights, tl.sqrt(tl.sqrt(tl.sum(share * share, 0))) * size, listed_as(sigma, log_count) + log_count


@triton.jit
def sum_level(
    queries, squares, half_norm, keys, spread, variances, current, level, m, top, closed, n, factor, key_stride,
    D: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr, DIRECTIONS: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """Return each query's largest logit so far, and sums of weights of closed nodes and of all, as parts of it."""
    most = tl.full([queries.shape[0]], LOWEST, tl.float32)
    level_sum = tl.zeros([queries.shape[0]], tl.float32)
    for begin in range(0, m, NODES):
        at = begin + tl.arange(0, NODES)
        place = tl.load(current + at, mask=at < m, other=0)
        logits, _, _, _, _ = weigh(
            queries, squares, half_norm, keys, spread, variances, level, place, at < m, n, factor, key_stride,
            D, COLUMNS, P, DIRECTIONS,
        )  # fmt: skip
        new = tl.maximum(most, tl.max(logits, 1))
        level_sum = level_sum * tl.exp2(most - new) + tl.sum(tl.exp2(logits - new[:, None]), 1)
        most = new
    new_top = tl.maximum(top, most)
    closed *= tl.exp2(top - new_top)
    total = closed + level_sum * tl.exp2(most - new_top)
    # Of a node that was opened and weighed so much more than what is left that nothing is left of that.
    lost = total == 0.0
    new_top, closed = tl.where(lost, most, new_top), tl.where(lost, 0.0, closed)
    return new_top, closed, tl.where(lost, level_sum, total)


@triton.jit
def open_level(
    queries, squares, half_norm, own_squares, half_norms, ratios, counts, keys, spread, variances, sizes, current, listed,
    weight_of, limit, level, last, m, top, closed, total, held, slots, most, n, factor, key_stride,
    D: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr, DIRECTIONS: tl.constexpr, NODES: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """List the nodes of a level that stay closed; put what takes the others' places at the list's end, the last first.

    Returns how many are closed, how many were put there, slots taken, and the sums of closed nodes' weights.
    """
    first = (1 << level) - 1
    step = tl.where(level == last, 0, LEVELS - (last - level) % LEVELS)
    found = 0 * m
    for begin in range(0, m, NODES):
        at = begin + tl.arange(0, NODES)
        there = at < m
        place = tl.load(current + at, mask=there, other=0)
        weights, error, weight = estimate(
            queries, squares, half_norm, own_squares, half_norms, ratios, counts, keys, spread, variances, sizes, level,
            place, there, top, total, n, factor, key_stride, D, COLUMNS, P, DIRECTIONS, APART,
        )  # fmt: skip
        opened = there & (error > limit)
        shut = there & (error <= limit)
        closed += tl.sum(tl.where(shut[None, :], weights, 0.0), 1)
        slot = held + tl.cumsum(shut.to(tl.int32), 0) - 1
        # A list that is too long is written again, and nothing past its end until then.
        tl.store(listed + slot, (first + place).to(tl.int64), mask=shut & (slot < most))
        tl.store(weight_of + slot, weight, mask=shut & (slot < most))
        children = tl.where(opened, 1 << step, 0)
        below = found + tl.cumsum(children, 0) - children
        for j in tl.static_range(BELOW):
            there_too = (children > j) & (below + j < most)
            tl.store(listed + most - 1 - below - j, ((place << step) + j).to(tl.int64), mask=there_too)
        start, end = bounds_of(place, level, n)
        more = tl.where(level == last, (end - start).to(tl.int32), 1 << step) - 1
        held += tl.sum(shut.to(tl.int32), 0)
        found += tl.sum(children, 0)
        slots += tl.sum(tl.where(opened, more, 0), 0)
    return held, found, slots, closed


@triton.jit
def move_to_front(listed, current, found, most, NODES: tl.constexpr):
    """Copy what was put at the list's end, the last first, to the place of the current nodes, in order."""
    for begin in range(0, found, NODES):
        at = begin + tl.arange(0, NODES)
        there = (at < found) & (at < most)
        tl.store(current + at, tl.load(listed + most - 1 - at, mask=there, other=0).to(tl.int32), mask=there)


@triton.jit
def list_keys(listed, weight_of, current, held, leaves, last, nodes, n, NODES: tl.constexpr, LEAF: tl.constexpr):
    """List the keys of opened leaves after the closed nodes."""
    place = held
    for begin in range(0, leaves, NODES):
        at = begin + tl.arange(0, NODES)
        there = at < leaves
        start, end = bounds_of(tl.load(current + at, mask=there, other=0), last, n)
        count = tl.where(there, end - start, 0).to(tl.int32)
        slot = place + tl.cumsum(count, 0) - count
        for j in tl.static_range(LEAF):
            tl.store(listed + slot + j, nodes + start + j, mask=count > j)
            tl.store(weight_of + slot + j, tl.zeros([NODES], tl.float32), mask=count > j)
        place += tl.sum(count, 0)


@triton.jit
def list_shares(
    queries, squares, half_norm, counts, keys, spread, variances, listed, share_of, top, total, held, slots, most, rows, n,
    factor, key_stride,
    D: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr, DIRECTIONS: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """Write the mean shares of the attention that closed nodes get; 0 for all others."""
    for begin in range(0, slots, NODES):
        at = begin + tl.arange(0, NODES)
        is_closed = at < held
        node = tl.load(listed + at, mask=is_closed, other=0).to(tl.int32)
        level = level_of(node)
        logits, _, _, _, _ = weigh(
            queries, squares, half_norm, keys, spread, variances, level, node + 1 - (1 << level), is_closed, n, factor,
            key_stride, D, COLUMNS, P, DIRECTIONS,
        )  # fmt: skip
        # Where nothing was left of what was closed before, it gets no more than all.
        share = tl.minimum(tl.exp2(tl.minimum(logits - top[:, None], 100.0)) / total[:, None], 1.0)
        mean = tl.sum(tl.where(counts[:, None], share, 0.0), 0) / rows
        tl.store(share_of + at, tl.where(is_closed, mean, 0.0), mask=at < slots)


@triton.jit(do_not_specialize=["blocks", "rows", "n_q", "n", "nodes", "most", "level", "first", "used", "last",
                               "before"])  # fmt: skip
def open_blocks(
    q, coordinates, query_index, keys, spread, variances, sizes, threshold, key_index, log_weight, share, current, lengths,
    factor, scale, blocks, rows, n_q, n, nodes, most, level, first, used, last, before, key_stride,
    D: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr, DIRECTIONS: tl.constexpr, ROWS: tl.constexpr,
    NODES: tl.constexpr, APART: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    """Open the tree for one block of queries, whose list begins with ``used`` nodes from ``first`` on, of ``level``.

    It is one of the blocks after so many ``before``. ``current`` may be the memory of ``share``, as integers. Without
    shares, what the list doesn't have is not written. Logits are in units of log 2: ``factor`` is scale / ln 2.
    """
    listing = tl.program_id(0).to(tl.int64)
    block = before + listing
    group = block // blocks
    keys, spread, sizes = keys + group * (nodes + n) * key_stride, spread + group * nodes, sizes + group * nodes
    variances, listed = variances + group * nodes * P, key_index + listing * most
    weight_of, current = log_weight + listing * most, current + listing * most
    queries, own_squares, half_norms, counts = load_block(
        q, coordinates, query_index, block, group, scale, rows, n_q, D, COLUMNS, P, DIRECTIONS, ROWS, keys.dtype.element_ty
    )
    squares, half_norm = tl.sum(own_squares, 0) / rows, tl.sum(half_norms, 0) / rows
    ratios = ratios_of(half_norms, half_norm, APART)
    limit = tl.load(threshold)
    top, total = tl.full([ROWS], LOWEST, tl.float32), tl.full([ROWS], 1.0, tl.float32)
    held, leaves, slots = 0 * used, 0 * used, most + 1
    while slots > most:
        tl.debug_barrier()
        for begin in range(0, used, NODES):
            at = begin + tl.arange(0, NODES)
            tl.store(current + at, first + at, mask=at < used)
        top, closed = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
        held, leaves, slots, m, here = 0 * used, 0 * used, used, used, level
        while m > 0:
            tl.debug_barrier()
            top, closed, total = sum_level(
                queries, squares, half_norm, keys, spread, variances, current, here, m, top, closed, n, factor, key_stride,
                D, COLUMNS, P, DIRECTIONS, NODES,
            )  # fmt: skip
            held, found, slots, closed = open_level(
                queries, squares, half_norm, own_squares, half_norms, ratios, counts, keys, spread, variances, sizes,
                current, listed, weight_of, limit, here, last, m, top, closed, total, held, slots, most, n, factor,
                key_stride, D, COLUMNS, P, DIRECTIONS, NODES, APART,
            )  # fmt: skip
            tl.debug_barrier()
            move_to_front(listed, current, found, most, NODES)
            leaves = tl.where(here == last, found, 0)
            m = tl.where((here == last) | (slots > most), 0, found)
            here += LEVELS - (last - here) % LEVELS
        limit = tl.where(slots > most, 2.0 * tl.maximum(limit, SMALLEST), limit)
    tl.debug_barrier()
    list_keys(listed, weight_of, current, held, leaves, last, nodes, n, NODES, LEAF)
    if share is not None:
        tl.debug_barrier()
        list_shares(
            queries, squares, half_norm, counts, keys, spread, variances, listed, share + listing * most, top, total, held,
            slots, most, rows, n, factor, key_stride, D, COLUMNS, P, DIRECTIONS, NODES,
        )  # fmt: skip
        for begin in range(slots, most, NODES):
            at = begin + tl.arange(0, NODES)
            tl.store(listed + at, tl.zeros([NODES], tl.int64), mask=at < most)
            tl.store(weight_of + at, tl.full([NODES], float("-inf"), tl.float32), mask=at < most)
            tl.store(share + listing * most + at, tl.zeros([NODES], tl.float32), mask=at < most)
    tl.store(lengths + block, slots.to(tl.int64))


def nodes_at_once(rows: int, d: int, itemsize: int) -> int:
    """Return how many nodes are weighed at once for so many queries of d numbers of so many bytes."""
    return SMALL_TILE if rows <= 16 or is_wide(rows, d, itemsize) else TILE


def is_wide(rows: int, d: int, itemsize: int) -> bool:
    """Return whether a block's queries leave the registers little room."""
    return rows * max(64, d) * itemsize > 2**14


def stored(queries: BlockQueries, tree: Tree) -> tuple[BlockQueries, Tree]:
    """Return both as kernels read them: rows one after another, those of keys at any distance."""
    q, scale, coordinates, index, apart = queries
    return (
        BlockQueries(q.contiguous(), scale, coordinates.contiguous(), index.contiguous(), apart),
        Tree(one_run(tree.keys), tree.spread.contiguous(), tree.variances.contiguous(), tree.sizes.contiguous()),
    )


def compiled_for(queries: BlockQueries, tree: Tree) -> dict[str, int | None]:
    """Return what kernels know of sizes when they are compiled, and how."""
    rows, d, p = int(queries.index.shape[2]), int(queries.q.shape[2]), int(queries.coordinates.shape[2])
    item_bytes = tree.keys.element_size()
    assert triton_limit(Largest(d=d, directions=p, rows=rows, nodes=tree.nodes, item_bytes=item_bytes)) is None
    return {
        "D": d,
        "COLUMNS": triton.next_power_of_2(max(16, d)),
        "P": p,
        "DIRECTIONS": triton.next_power_of_2(max(16, p)),
        "ROWS": triton.next_power_of_2(max(16, rows)),
        "NODES": nodes_at_once(rows, d, item_bytes),
        "APART": queries.apart,
        "num_warps": 4,
        "num_stages": 1,
        # Left to itself, the assembler spills a few registers for room that wide rows don't leave anyway.
        "maxnreg": MOST_REGISTERS if item_bytes == 4 or is_wide(rows, d, item_bytes) else None,
    }


def open_tree(
    xp: Namespace,
    queries: BlockQueries,
    tree: Tree,
    threshold: Array,
    most: int,
    start: tuple[int, int, int],
) -> tuple[Array, Array, Array, Array]:
    """Follow `kdecore.kernels.open_tree.contract.OpenTree`, within its `triton_limit`; lists are ``most`` long."""
    queries, tree = stored(queries, tree)
    q, scale, coordinates, index, _ = queries
    groups, blocks, rows = index.shape
    (level, first, end), last = start, depth_of(tree.nodes)
    with torch.cuda.device_of(q):
        key_index = torch.empty((groups, blocks, most), dtype=torch.int64, device=q.device)
        log_weight, share = (torch.empty(key_index.shape, dtype=torch.float32, device=q.device) for _ in range(2))
        counts = torch.empty((groups, blocks), dtype=torch.int64, device=q.device)
        open_blocks[flat_grid("open_blocks", groups * blocks)](
            q, coordinates, index, *tree, threshold, key_index, log_weight, share, share.view(torch.int32), counts,
            scale * math.log2(math.e), scale, blocks, rows, int(q.shape[1]), tree.n, tree.nodes, most,
            level, first, end - first, last, 0, tree.keys.stride(1), LEAF=-(-tree.n >> last), **compiled_for(queries, tree),
        )  # fmt: skip
    return key_index, log_weight, share, counts
