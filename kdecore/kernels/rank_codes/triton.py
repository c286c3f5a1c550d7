"""`rank_codes` in Triton for NVIDIA devices: samples sorted and bits dealt out, then one comparison a bit. Two launches.

A coordinate's cell at one bit more is twice its cell so far, plus 1 where it is no smaller than the sampled number at the
boundary: ⌊r 2^b / (S + 1)⌋ ≥ t where r ≥ ⌈t (S + 1) / 2^b⌉, that is, where so many sampled numbers are no larger. No rank
is looked for.

On paper, 2,097,152 rows of 16 float32 coordinates, 24 bits: read once, 0.13 GB, and 8 MB of codes written: 0.05 ms at 3.0
TB/s. 50 · 10⁶ comparisons with a number from the first-level cache, mostly one of a few, and some 20 integer operations
each: 1 · 10⁹, 0.05 ms. Rows' coordinates come one by one from the first-level cache, 32 rows in 16 of its lines: 0.05 ms.
"""

import torch
import triton
import triton.language as tl

from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.rank_codes.contract import RATIO, SAMPLE
from kdecore.kernels.runtime.grids import flat_grid

PLACES = tl.constexpr(triton.next_power_of_2(SAMPLE + 1))
"""Of a sorted sample, with room for infinity beyond it."""
BITS = tl.constexpr(32)
DIVISOR = tl.constexpr(RATIO)
ROWS = 512
"""Rows of a program."""
TOGETHER, WARPS = 16, 16
"""Coordinates whose samples are sorted together, and what sorts them: 32 numbers a thread."""


@triton.jit
def finite_or_zero(numbers):
    """Return numbers, 0 in place of those that are not finite."""
    return tl.where(tl.abs(numbers) < float("inf"), numbers, 0.0)


@triton.jit
def sort_samples(x, ascending, variances, group, n, count, P: tl.constexpr, TOGETHER: tl.constexpr):
    """Write a group's sorted samples, infinity after them, and their variances, some coordinates at a time."""
    place = tl.arange(0, PLACES)[None, :]
    held = place < count
    row = group * n + place.to(tl.int64) * n // count
    for first in range(0, P, TOGETHER):
        column = first + tl.arange(0, TOGETHER)[:, None]
        inside = held & (column < P)
        sample = finite_or_zero(tl.load(x + row * P + column, mask=inside, other=0.0))
        gaps = tl.where(inside, sample - (tl.sum(sample, 1) / count)[:, None], 0.0)
        every = first + tl.arange(0, TOGETHER)
        tl.store(variances + group * P + every, tl.sum(gaps * gaps, 1) / count, mask=every < P)
        found = tl.sort(tl.where(inside, sample, float("inf")), 1)
        tl.store(ascending + (group * P + column) * PLACES + place, found, mask=column < P)


@triton.jit
def deal_bits(
    x, ascending, variances, dealt, n, count, given,
    P: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Sort a group's samples, and write (given, 3): a coordinate, how many bits it has with this one, and which bit it is.

    Those of a coordinate follow each other.
    """
    group, column, bit = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS), tl.arange(0, BITS)
    sort_samples(x, ascending, variances, group, n, count, P, TOGETHER)
    tl.debug_barrier()
    shares = tl.load(variances + group * P + column, mask=column < P, other=-1.0)
    # An overflow's: it counts as the largest.
    shares = tl.where(shares == shares, shares, float("inf"))
    counts = tl.zeros([COLUMNS], tl.int32)
    columns, depths = tl.full([BITS], COLUMNS, tl.int32), tl.zeros([BITS], tl.int32)
    for step in range(given):
        widest = tl.argmax(shares, 0)
        chosen = column == widest
        # Rounded as the reference rounds, so that shares which are equal there are equal here.
        shares = tl.where(chosen, tl.div_rn(shares, tl.full([COLUMNS], DIVISOR, tl.float32)), shares)
        counts += chosen.to(tl.int32)
        columns = tl.where(bit == step, widest, columns)
        depths = tl.where(bit == step, tl.sum(tl.where(chosen, counts, 0)), depths)
    order = columns * BITS + bit
    place = tl.sum((order[:, None] > order[None, :]).to(tl.int32), 1)
    dealt += (group * given + place) * 3
    tl.store(dealt, columns, mask=bit < given)
    tl.store(dealt + 1, depths, mask=bit < given)
    tl.store(dealt + 2, given - 1 - bit, mask=bit < given)


@triton.jit
def number_cells(x, ascending, dealt, codes, n, count, given, in_order, P: tl.constexpr, ROWS: tl.constexpr):
    """Write the codes of a tile of a group's rows."""
    tiles = tl.cdiv(n, ROWS)
    group, row = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    inside, place = row < n, group * n + row
    number, cell = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.int32)
    code = tl.zeros([ROWS], tl.int32)
    for i in range(given):
        entry = dealt + (group * given + i) * 3
        column, depth, shift = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        if depth == 1:
            number, cell = finite_or_zero(tl.load(x + place * P + column, mask=inside, other=0.0)), tl.zeros_like(cell)
        cell = 2 * cell + 1
        smaller = (cell.to(tl.int64) * (count + 1) - 1) >> depth
        boundary = tl.load(ascending + (group * P + column) * PLACES + smaller)
        cell -= (number < boundary).to(tl.int32)
        code |= ((cell ^ (cell >> 1)) & 1) << shift
    for doubling in tl.static_range(5):
        code ^= code >> (1 << doubling)
    node = (((row.to(tl.int64) + 1) << in_order) - 1) // n
    tl.store(codes + place, (node << given).to(tl.int32) | code, mask=inside)


def rank_codes(xp: Namespace, x: Array, bits: int, in_order: int = 0) -> Array:
    """Follow `kdecore.kernels.rank_codes.contract.RankCodes`, in float32."""
    groups, n, p = x.shape
    x, count, given = x.contiguous(), min(SAMPLE, n), bits - in_order
    with torch.cuda.device_of(x):
        ascending = torch.empty((groups, p, PLACES.value), dtype=torch.float32, device=x.device)
        variances = torch.empty((groups, p), dtype=torch.float32, device=x.device)
        dealt = torch.empty((groups, given, 3), dtype=torch.int32, device=x.device)
        codes = torch.empty((groups, n), dtype=torch.int32, device=x.device)
        grid, columns = flat_grid("deal_bits", groups), triton.next_power_of_2(p)
        deal_bits[grid](x, ascending, variances, dealt, n, count, given, p, columns, min(TOGETHER, columns), num_warps=WARPS)
        grid = flat_grid("number_cells", groups * triton.cdiv(n, ROWS))
        number_cells[grid](x, ascending, dealt, codes, n, count, given, in_order, p, ROWS)
    return codes
