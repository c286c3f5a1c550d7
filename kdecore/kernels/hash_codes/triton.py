"""`hash_codes` in Triton for NVIDIA devices: projections on tensor cores with their means so far, then signs and Gray ranks.

Two launches. A program of the first multiplies some tiles of a group's rows, as they are stored, with all planes. It sums
how far projections lie from the mean of its first tile, so that the means of rows far from the origin are known better than
their projections. A program of the second puts these sums together, `PARTS` for each plane, and packs the signs of many
rows.

Traffic on paper, 16 heads of 131,072 rows, d = 64 in bfloat16, 12 planes: rows read once, 0.27 GB; projections in float32
written and read once, 0.2 GB; codes, 4 MB: 0.16 ms at 3.0 TB/s. 3.2 GFLOP, 13 with four columns of padding and three tf32
products each, are 0.04 ms at 400 TFLOP/s beside it. Reading rows twice instead, for their mean and for the products, would
move 0.54 GB, and in float32 1.1 GB instead of 0.7.
"""

import torch
import triton
import triton.language as tl

from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.attend_blocks.triton import PRECISION
from kdecore.kernels.project_rows.triton import padded
from kdecore.kernels.runtime.grids import flat_grid

ROWS = 64
"""Rows of a tile, which four warps multiply 16 each."""
STEP = 64
"""Numbers of a row that are multiplied at a time, at most."""
PARTS = 128
"""Programs of a group in the first launch, at most: a power of two."""
PACKED = 1024
"""Rows of a program of the second launch."""
PLANES = 32
"""Columns, at most."""


@triton.jit
def project_signs(
    rows,
    planes,
    projected,
    centres,
    distances,
    counts,
    n,
    parts,
    D: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the projections of some tiles of a group's rows, and for each plane what their mean follows from.

    That is the mean of the first tile, and the sum of how far all lie from it, in units of ``ROWS``; of finite ones.
    """
    part, group = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    tiles = tl.cdiv(n, ROWS)
    each = tl.cdiv(tiles, parts)
    column, number = tl.arange(0, COLUMNS), tl.arange(0, STEP)
    normals = planes + number[:, None] * BITS + column[None, :]
    plane = group * BITS + column
    centre, distance = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    count = tl.zeros([COLUMNS], tl.int32)
    for tile in range(part * each, tl.minimum(part * each + each, tiles)):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < n)[:, None]
        places = rows + (group * n + row)[:, None] * D + number[None, :]
        found = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, D, STEP):
            within = first + number < D
            some = tl.load(places + first, mask=inside & within[None, :], other=0.0).to(tl.float32)
            factors = tl.load(normals + first * BITS, mask=within[:, None] & (column < BITS)[None, :], other=0.0)
            found = tl.dot(some, factors, found, input_precision=PRECISION)
        tl.store(projected + plane[None, :] * n + row[:, None], found, mask=inside & (column < BITS)[None, :])
        counted = inside & (tl.abs(found) < float("inf"))
        more = tl.sum(counted.to(tl.int32), 0)
        # Divided before they are summed, large numbers don't overflow.
        mean = tl.sum(tl.where(counted, found, 0.0) / ROWS, 0) * (ROWS / tl.maximum(more, 1).to(tl.float32))
        centre = tl.where(tile == part * each, mean, centre)
        distance += tl.sum(tl.where(counted, found - centre[None, :], 0.0) / ROWS, 0)
        count += more
    at = plane * parts + part
    tl.store(centres + at, centre, mask=column < BITS)
    tl.store(distances + at, distance, mask=column < BITS)
    tl.store(counts + at, count, mask=column < BITS)


@triton.jit
def pack_signs(
    projected,
    centres,
    distances,
    counts,
    codes,
    n,
    parts,
    unit,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Write the Gray ranks of many rows' signs; ``unit`` is what distances are measured in."""
    tiles = tl.cdiv(n, PACKED)
    tile, group = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    row, part = tile * PACKED + tl.arange(0, PACKED), tl.arange(0, PARTS)
    code = tl.zeros([PACKED], tl.int32)
    for bit in range(BITS):
        plane = group * BITS + bit
        places = plane * parts + part
        count = tl.load(counts + places, mask=part < parts, other=0).to(tl.float32)
        first = tl.load(centres + plane * parts)
        # Differences from one of the means: of numbers far from 0 these are exact.
        apart = tl.load(centres + places, mask=part < parts, other=0.0) - first
        share = count / tl.maximum(tl.sum(count, 0), 1.0)
        distance = tl.load(distances + places, mask=part < parts, other=0.0)
        mean = first + tl.sum(apart * share, 0) + tl.sum(distance, 0) * (unit / tl.maximum(tl.sum(count, 0), 1.0))
        found = tl.load(projected + plane * n + row, mask=row < n, other=0.0)
        code = code << 1 | (found > mean).to(tl.int32)
    for power in tl.static_range(5):
        code = code ^ code >> (1 << power)
    tl.store(codes + group * n + row, code, mask=row < n)


def hash_codes(xp: Namespace, x: Array, planes: Array) -> Array:
    """Follow `kdecore.kernels.hash_codes.contract.HashCodes`."""
    groups, n, d = x.shape
    bits = int(planes.shape[1])
    parts = max(1, min(PARTS, triton.cdiv(n, ROWS)))
    with torch.cuda.device_of(x):
        codes = torch.empty((groups, n), dtype=torch.int16 if bits <= 15 else torch.int32, device=x.device)
        projected = torch.empty((groups, bits, n), dtype=torch.float32, device=x.device)
        centres, distances = torch.empty((2, groups, bits, parts), dtype=torch.float32, device=x.device)
        counts = torch.empty((groups, bits, parts), dtype=torch.int32, device=x.device)
        sums = projected, centres, distances, counts
        grid = flat_grid("project_signs", groups * parts)
        tile = ROWS, padded(d, STEP), padded(bits, PLANES)
        # Four warps, as in `project_rows`: eight, of few columns, have been seen to read beyond shared memory.
        project_signs[grid](x.contiguous(), planes.contiguous(), *sums, n, parts, d, bits, *tile, num_warps=4)
        grid = flat_grid("pack_signs", groups * triton.cdiv(n, PACKED))
        pack_signs[grid](*sums, codes, n, parts, float(ROWS), bits, PARTS, PACKED)
    return codes
