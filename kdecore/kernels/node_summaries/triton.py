"""`node_summaries` in Triton for NVIDIA devices: a subtree a program, from its rows up; then what lies above, likewise.

A program gathers the keys, the values, the coordinates or the sizes of neighbouring leaves, writes them in the order of the
tree, and climbs: a leaf's mean and variance follow from its rows in registers, in two passes, and other nodes' likewise from
their children's. The root of a subtree goes to the next launch in float32. Three launches for 131,072 keys of 64 columns in
leaves of 4. What finds the spreads writes them beside the values.

On paper, 16 heads of 131,072 keys, d = d_v = 64 in bfloat16, p = 16: rows read once and their order four times, 0.75 GB; as
many and half as many nodes written in bfloat16, values 80 apart, 0.91 GB, and variances, spreads and sizes, 0.08 GB: 1.7 GB,
0.58 ms at 3.0 TB/s. 2 GFLOP are nothing beside it, nor are the shuffles, 20 · 10⁶ of a warp, that add up the rows of a leaf.
"""

import torch
import triton
import triton.language as tl

from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.tree import depth, node_count
from kdecore.kernels.node_summaries.contract import NUMBERS, TreeNodes
from kdecore.kernels.runtime.grids import flat_grid

KINDS = 4
"""Keys, values, coordinates and sizes, a program each: together they would hold more than the registers do."""
PITCH = 16
"""Rows of values begin at multiples of so many numbers, so that they are read 16 bytes at a time."""


@triton.jit
def load_rows(rows, row, held, pitch, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Return rows [N, K] in float32, [N, K, COLUMNS]; 0 from WIDTH on, and for those that are not held."""
    column = tl.arange(0, COLUMNS)[None, None, :]
    mask = held[:, :, None] & (column < WIDTH)
    return tl.load(rows + row[:, :, None] * pitch + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(rows, row, held, pitch, found, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Write what `load_rows` returns."""
    column = tl.arange(0, COLUMNS)[None, None, :]
    mask = held[:, :, None] & (column < WIDTH)
    tl.store(rows + row[:, :, None] * pitch + column, found.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def copy_rows(rows, row, copies, place, held, pitch, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Return rows and write them to their places, ``pitch`` apart."""
    found = load_rows(rows, row, held, WIDTH, WIDTH, COLUMNS)
    store_rows(copies, place, held, pitch, found, WIDTH, COLUMNS)
    return found


@triton.jit
def count_rows(node, level, n):
    """Return how many rows nodes of a level hold."""
    return ((((node + 1) * n) >> level) - ((node * n) >> level)).to(tl.float32)


@triton.jit
def nodes_of(subtree, NODES: tl.constexpr):
    """Return the numbers of the nodes of a subtree at the level where it has so many."""
    return subtree * NODES + tl.arange(0, NODES)


@triton.jit
def children_of(node):
    """Return the numbers [N, 2] of nodes' children in their level."""
    return 2 * node[:, None] + tl.arange(0, 2)[None, :]


@triton.jit
def shares_of(node, level, n):
    """Return which parts of the rows of nodes are their children's."""
    return count_rows(children_of(node), level + 1, n) / count_rows(node, level, n)[:, None]


@triton.jit
def merge_states(means, variances, shares, TOGETHER: tl.constexpr):
    """Return means [N, C] and variances of what children [N, K, C] make; TOGETHER adds up those of all columns, [N, 1]."""
    mean = tl.sum(means * shares[:, :, None], 1)
    gaps = means - mean[:, None, :]
    squares = gaps * gaps
    if TOGETHER:
        squares = tl.sum(squares, 2)[:, :, None]
    return mean, tl.sum((variances + squares) * shares[:, :, None], 1)


@triton.jit
def limited(spread, half_norm, count):
    """Return the spreads of nodes of so many rows, by the frozen phase where that is less."""
    # Of one row the logarithm is 0, and so is the spread.
    logarithm = tl.log(count)
    frozen = half_norm * spread > logarithm
    return tl.where(frozen, tl.sqrt(spread * logarithm / tl.where(frozen, half_norm, 1.0)), spread)


@triton.jit
def store_spreads(values, row, held, spread, D_V: tl.constexpr, PITCH: tl.constexpr, REST: tl.constexpr):
    """Write the last column of rows [N, K] of values from [N, K, 1], and 0 into those beyond it: whole sectors."""
    column = D_V + tl.arange(0, REST)[None, None, :]
    found = tl.where(column == D_V, spread, 0.0).to(values.dtype.element_ty)
    tl.store(values + row[:, :, None] * PITCH + column, found, mask=held[:, :, None] & (column < PITCH))


@triton.jit
def climb(
    children, children_variances, shares, subtree, level, n, means, pitch, variances, root, values, half_norm,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr, LEVELS: tl.constexpr, D_V: tl.constexpr,
    PITCH: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Summarise the nodes of a subtree: those of ``level``, which have these children, and of LEVELS − 1 more, to its root.

    Means and variances are written where there is a place for them, spreads beside the ``values`` too.
    """
    V_WIDTH: tl.constexpr = 1 if TOGETHER else WIDTH
    V_COLUMNS: tl.constexpr = 1 if TOGETHER else COLUMNS
    mean, variance = merge_states(children, children_variances, shares, TOGETHER)
    for up in tl.static_range(LEVELS):
        node = nodes_of(subtree, 1 << (LEVELS - 1 - up))
        if up > 0:
            means_below = tl.reshape(mean, (node.shape[0], 2, COLUMNS))
            variances_below = tl.reshape(variance, (node.shape[0], 2, V_COLUMNS))
            mean, variance = merge_states(means_below, variances_below, shares_of(node, level - up, n), TOGETHER)
        row = (1 << (level - up)) - 1 + node[:, None]
        every = row >= 0
        if means is not None:
            store_rows(means, row, every, pitch, mean[:, None, :], WIDTH, COLUMNS)
        if variances is not None:
            store_rows(variances, row, every, V_WIDTH, variance[:, None, :], V_WIDTH, V_COLUMNS)
        if values is not None:
            found = limited(variance, half_norm, count_rows(node, level - up, n)[:, None])
            store_spreads(values, row, every, found[:, None, :], D_V, PITCH, REST)
    column = tl.arange(0, COLUMNS)[None, :]
    tl.store(root + column, mean, mask=column < WIDTH)


@triton.jit
def summarise_rows(
    k, v, coordinates, sizes, order, half_norm, keys, values, spread, variances, mean_sizes, roots, n, level, nodes,
    D: tl.constexpr, D_COLUMNS: tl.constexpr, D_V: tl.constexpr, D_V_COLUMNS: tl.constexpr, P: tl.constexpr,
    P_COLUMNS: tl.constexpr, PITCH: tl.constexpr, REST: tl.constexpr, LEAF: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Write the rows of a subtree's leaves, those of ``level``, and summarise it."""
    high = level - (LEVELS - 1)
    group, subtree = (tl.program_id(0) >> high).to(tl.int64), (tl.program_id(0) & ((1 << high) - 1)).to(tl.int64)
    keys, values = keys + group * (nodes + n) * D, values + group * (nodes + n) * PITCH
    spread, variances, mean_sizes = spread + group * nodes, variances + group * nodes * P, mean_sizes + group * nodes
    root = roots + tl.program_id(0).to(tl.int64) * (D + D_V + P + 1)

    leaf = nodes_of(subtree, 1 << (LEVELS - 1))
    place = ((leaf * n) >> level)[:, None] + tl.arange(0, LEAF)[None, :]
    held = place < (((leaf + 1) * n) >> level)[:, None]
    shares = tl.where(held, 1.0 / count_rows(leaf, level, n)[:, None], 0.0)
    row = group * n + tl.load(order + group * n + place, mask=held, other=0)

    kind = tl.program_id(1)
    if kind == 0:
        key, half = copy_rows(k, row, keys, nodes + place, held, D, D, D_COLUMNS), tl.load(half_norm + group)
        store_spreads(values, nodes + place, held, tl.zeros_like(shares)[:, :, None], D_V, PITCH, REST)
        climb(
            key, 0.0, shares, subtree, level, n, keys, D, spread, root, values, half, D, D_COLUMNS, True, LEVELS, D_V, PITCH,
            REST,
        )  # fmt: skip
    elif kind == 1:
        value = copy_rows(v, row, values, nodes + place, held, PITCH, D_V, D_V_COLUMNS)
        climb(
            value, 0.0, shares, subtree, level, n, values, PITCH, None, root + D, None, 0.0, D_V, D_V_COLUMNS, False, LEVELS,
            D_V, PITCH, REST,
        )  # fmt: skip
    elif kind == 2:
        along = load_rows(coordinates, row, held, P, P, P_COLUMNS)
        climb(
            along, 0.0, shares, subtree, level, n, None, P, variances, root + D + D_V, None, 0.0, P, P_COLUMNS, False,
            LEVELS, D_V, PITCH, REST,
        )  # fmt: skip
    else:
        size = load_rows(sizes, row, held, 1, 1, 1)
        climb(
            size, 0.0, shares, subtree, level, n, mean_sizes, 1, None, root + D + D_V + P, None, 0.0, 1, 1, False, LEVELS,
            D_V, PITCH, REST,
        )  # fmt: skip


@triton.jit
def summarise_nodes(
    below, half_norm, keys, values, spread, variances, mean_sizes, roots, n, level, nodes,
    D: tl.constexpr, D_COLUMNS: tl.constexpr, D_V: tl.constexpr, D_V_COLUMNS: tl.constexpr, P: tl.constexpr,
    P_COLUMNS: tl.constexpr, PITCH: tl.constexpr, REST: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Summarise a subtree from the roots below the nodes of ``level``."""
    width = D + D_V + P + 1
    high = level - (LEVELS - 1)
    group, subtree = (tl.program_id(0) >> high).to(tl.int64), (tl.program_id(0) & ((1 << high) - 1)).to(tl.int64)
    keys, values = keys + group * (nodes + n) * D, values + group * (nodes + n) * PITCH
    spread, variances, mean_sizes = spread + group * nodes, variances + group * nodes * P, mean_sizes + group * nodes
    root = roots + tl.program_id(0).to(tl.int64) * width

    node = nodes_of(subtree, 1 << (LEVELS - 1))
    child, shares = children_of(node), shares_of(node, level, n)
    every, place, row = child >= 0, (2 << level) - 1 + child, (group << (level + 1)) + child

    kind = tl.program_id(1)
    if kind == 0:
        key, within = load_rows(below, row, every, width, D, D_COLUMNS), load_rows(spread, place, every, 1, 1, 1)
        climb(
            key, within, shares, subtree, level, n, keys, D, spread, root, values, tl.load(half_norm + group), D, D_COLUMNS,
            True, LEVELS, D_V, PITCH, REST,
        )  # fmt: skip
    elif kind == 1:
        value = load_rows(below + D, row, every, width, D_V, D_V_COLUMNS)
        climb(
            value, 0.0, shares, subtree, level, n, values, PITCH, None, root + D, None, 0.0, D_V, D_V_COLUMNS, False, LEVELS,
            D_V, PITCH, REST,
        )  # fmt: skip
    elif kind == 2:
        along = load_rows(below + D + D_V, row, every, width, P, P_COLUMNS)
        varying = load_rows(variances, place, every, P, P, P_COLUMNS)
        climb(
            along, varying, shares, subtree, level, n, None, P, variances, root + D + D_V, None, 0.0, P, P_COLUMNS, False,
            LEVELS, D_V, PITCH, REST,
        )  # fmt: skip
    else:
        size = load_rows(below + D + D_V + P, row, every, width, 1, 1)
        climb(
            size, 0.0, shares, subtree, level, n, mean_sizes, 1, None, root + D + D_V + P, None, 0.0, 1, 1, False, LEVELS,
            D_V, PITCH, REST,
        )  # fmt: skip


def floor_log(x: int) -> int:
    """Return the largest level that has at most x nodes."""
    return x.bit_length() - 1


def node_summaries(
    xp: Namespace,
    k: Array,
    v: Array,
    coordinates: Array,
    sizes: Array,
    order: Array,
    leaf_size: int,
    half_norm: Array,
) -> TreeNodes:
    """Follow `kdecore.kernels.node_summaries.contract.NodeSummaries`, within its `triton_limit`."""
    (groups, n, d), d_v, p = k.shape, int(v.shape[2]), int(coordinates.shape[2])
    columns, leaf = [triton.next_power_of_2(x) for x in (d, d_v, p)], triton.next_power_of_2(min(n, leaf_size))
    most = NUMBERS // max(columns)
    assert most >= max(2, leaf)
    last, nodes, pitch = depth(n, leaf_size), node_count(n, leaf_size), triton.cdiv(d_v + 1, PITCH) * PITCH
    stored = torch.bfloat16 if k.dtype == torch.bfloat16 else torch.float32
    widths = [width for pair in zip((d, d_v, p), columns, strict=True) for width in pair]
    widths += [pitch, triton.next_power_of_2(pitch - d_v)]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Array:
        return torch.empty((groups, *shape), dtype=dtype, device=k.device)

    with torch.cuda.device_of(k):
        keys, values = empty(nodes + n, d, dtype=stored), empty(nodes + n, pitch, dtype=stored)
        spread, variances, mean_sizes = empty(nodes), empty(nodes, p), empty(nodes)
        found = keys, values, spread, variances, mean_sizes
        high, half_norm = max(0, last - floor_log(most // leaf)), half_norm.contiguous()
        rows, roots = [x.contiguous() for x in (k, v, coordinates, sizes, order)], empty(1 << high, d + d_v + p + 1)
        grid = *flat_grid("summarise_rows", groups << high), KINDS
        summarise_rows[grid](*rows, half_norm, *found, roots, n, last, nodes, *widths, leaf, last - high + 1)
        while high > 0:
            level, below = high - 1, roots
            high = max(0, high - floor_log(most))
            roots = empty(1 << high, d + d_v + p + 1)
            grid = *flat_grid("summarise_nodes", groups << high), KINDS
            summarise_nodes[grid](below, half_norm, *found, roots, n, level, nodes, *widths, level - high + 1)
    return TreeNodes(keys, values[:, :, : d_v + 1], spread, variances, mean_sizes)
