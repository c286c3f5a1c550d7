"""`gap_moments` in Triton for NVIDIA devices: a program for each block, which keeps the sum of products in registers.

On paper, for 64 blocks and d = d_v = 64: each adds up its shares, 256 at a time, and searches its list for 512 nodes, 32 at
a time, in a dozen loads one after another, and reads and multiplies as many keys; 30 µs, which only other launches could
hide.
"""

import torch
import triton
import triton.language as tl

from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.attend_blocks.triton import one_run
from kdecore.kernels.gap_moments import contract
from kdecore.kernels.gap_moments.contract import triton_limit
from kdecore.kernels.open_tree.triton import bounds_of, level_of
from kdecore.kernels.runtime.grids import flat_grid
from kdecore.kernels.site import Largest

TURN = tl.constexpr(contract.TURN)
ROWS = tl.constexpr(32)
"""Keys that are multiplied together."""
SUMMED = tl.constexpr(256)
"""Shares that are added up together."""


@triton.jit
def gaps(rows, stride, position, node, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Return what rows differ by from others."""
    column = tl.arange(0, COLUMNS)
    there = (column < WIDTH)[None, :]
    found = tl.load(rows + position[:, None] * stride + column[None, :], mask=there, other=0.0).to(tl.float32)
    return found - tl.load(rows + node[:, None] * stride + column[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit
def draw(key_index, sums, first, draws, slots, n, nodes, SEARCH: tl.constexpr):
    """Return the rows of some of the keys drawn from a block's list, and the nodes that they are drawn from."""
    number = first + tl.arange(0, ROWS)
    wanted = (number.to(tl.float32) + 0.5) * (tl.load(sums + slots - 1) / draws)
    low = tl.zeros([ROWS], tl.int32)
    high = low + slots - 1
    for _ in tl.static_range(SEARCH):
        middle = (low + high) // 2
        below = (low < high) & (tl.load(sums + middle) < wanted)
        low, high = tl.where(below, middle + 1, low), tl.where(below, high, middle)
    # What has no share may be no node.
    node = tl.minimum(tl.load(key_index + low), nodes - 1)
    level = level_of(node)
    begin, end = bounds_of(node + 1 - (1 << level), level, n)
    turn = ((number.to(tl.int64) + 1) * TURN) & 0xFFFFFFFF
    return nodes + begin + (((end - begin) * turn) >> 32), node


@triton.jit
def add_up(share, sums, slots):
    """Write the running sums of a block's shares."""
    total = tl.zeros([1], tl.float32)
    for first in range(0, slots, SUMMED):
        at = first + tl.arange(0, SUMMED)
        some = tl.load(share + at, mask=at < slots, other=0.0)
        tl.store(sums + at, tl.cumsum(some, 0) + total, mask=at < slots)
        total += tl.sum(some, 0)


@triton.jit(do_not_specialize=["draws", "slots", "n", "nodes", "blocks"])
def measure_gaps(
    keys, values, key_index, share, sums, matrices, chances, draws, slots, n, nodes, blocks, key_stride, value_stride,
    D: tl.constexpr, COLUMNS: tl.constexpr, D_V: tl.constexpr, VALUE_COLUMNS: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """Write the matrix of one block, and what chance leaves of it."""
    block = tl.program_id(0).to(tl.int64)
    group = block // blocks
    keys, values = keys + group * (nodes + n) * key_stride, values + group * (nodes + n) * value_stride
    key_index, sums = key_index + block * slots, sums + block * slots
    add_up(share + block * slots, sums, slots)
    tl.debug_barrier()
    found = tl.zeros([COLUMNS, VALUE_COLUMNS], tl.float32)
    spreads, sizes = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(0, draws, ROWS):
        position, node = draw(key_index, sums, first, draws, slots, n, nodes, SEARCH)
        of_keys = gaps(keys, key_stride, position, node, D, COLUMNS)
        of_values = gaps(values, value_stride, position, node, D_V, VALUE_COLUMNS)
        squares = tl.sum(of_keys * of_keys, 1)
        spreads += squares
        sizes += squares * tl.sum(of_values * of_values, 1)
        found = tl.dot(tl.trans(of_keys), of_values, found, input_precision="tf32")
    spread = tl.sum(spreads, 0)
    unit = tl.where(spread > 0, 1.0 / spread, 0.0)
    row, column = tl.arange(0, COLUMNS), tl.arange(0, VALUE_COLUMNS)
    places = matrices + block * (D * D_V) + row[:, None] * D_V + column[None, :]
    tl.store(places, found * unit, mask=(row < D)[:, None] & (column < D_V)[None, :])
    tl.store(chances + block, tl.sum(sizes, 0) * unit * unit)


def gap_moments(
    xp: Namespace, keys: Array, values: Array, key_index: Array, share: Array, nodes: int, draws: int
) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.gap_moments.contract.GapMoments`, within its `triton_limit`; products are rounded to tf32."""
    (groups, blocks, slots), d, d_v = key_index.shape, int(keys.shape[2]), int(values.shape[2]) - 1
    assert triton_limit(Largest(d=d, d_v=d_v, nodes=nodes)) is None
    key_index = key_index.contiguous()
    keys, values = one_run(keys), one_run(values)
    with torch.cuda.device_of(keys):
        share = share.contiguous()
        sums = torch.empty_like(share)
        matrices = torch.empty((groups, blocks, d, d_v), dtype=torch.float32, device=keys.device)
        chances = torch.empty((groups, blocks), dtype=torch.float32, device=keys.device)
        measure_gaps[flat_grid("measure_gaps", groups * blocks)](
            keys, values, key_index, share, sums, matrices, chances, draws, slots, int(keys.shape[1]) - nodes, nodes,
            blocks, keys.stride(1), values.stride(1), D=d, COLUMNS=triton.next_power_of_2(max(16, d)), D_V=d_v,
            VALUE_COLUMNS=triton.next_power_of_2(max(16, d_v)), SEARCH=slots.bit_length(),
            num_warps=8 if d * d_v > 2**13 else 4,
        )  # fmt: skip
    return matrices, chances
