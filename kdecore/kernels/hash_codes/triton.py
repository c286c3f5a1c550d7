"""`hash_codes` in Triton for NVIDIA devices: projections on tensor cores with their means so far, then signs and Gray ranks.

Two launches, of queries and keys together. A program of the first multiplies some tiles of a group's rows, as they are
stored, with all planes. It sums how far projections lie from the mean of its first tile, so that the means of rows far from
the origin are known better than their projections. A program of the second puts these sums together, `PARTS` for each
plane, and packs the signs of many rows.

Traffic on paper, 16 heads of 131,072 queries and keys, d = 64 in bfloat16, 12 planes: rows read once, 0.54 GB; projections
in float32 written and read once, 0.4 GB; codes, 8 MB: 0.31 ms at 3.0 TB/s. 6.4 GFLOP, 26 with four columns of padding and
three tf32 products each, are 0.07 ms at 400 TFLOP/s beside it. Reading rows twice instead, for their mean and for the
products, would move 1.1 GB, and in float32 2.1 GB instead of 1.5.
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
"""Programs of a group's queries, or keys, in the first launch, at most: a power of two."""
PACKED = 1024
"""Rows of a program of the second launch."""
PLANES = 32
"""Columns, at most."""


@triton.jit
def rows_of(number, groups, n_q, n_k):
    """Return a group's number, its rows, and how many rows lie before its set, by its number among all of both sets."""
    of_keys = number >= groups
    group = tl.where(of_keys, number - groups, number).to(tl.int64)
    return group, tl.where(of_keys, n_k, n_q), tl.where(of_keys, groups * n_q, 0).to(tl.int64)


@triton.jit
def project_signs(
    q,
    k,
    planes,
    projected,
    centres,
    distances,
    counts,
    groups,
    n_q,
    n_k,
    parts,
    D: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the projections of some tiles of a group's queries or keys, and for each plane what their mean follows from.

    That is the mean of the first tile, and the sum of how far all lie from it, in units of ``ROWS``; of finite ones.
    """
    part, number = tl.program_id(0) % parts, tl.program_id(0) // parts
    group, n, before = rows_of(number, groups, n_q, n_k)
    rows = k if number >= groups else q
    tiles = tl.cdiv(n, ROWS)
    each = tl.cdiv(tiles, parts)
    column, place = tl.arange(0, COLUMNS), tl.arange(0, STEP)
    normals = planes + place[:, None] * BITS + column[None, :]
    target = projected + before * BITS + (group * BITS + column)[None, :] * n
    centre, distance = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    count = tl.zeros([COLUMNS], tl.int32)
    for tile in range(part * each, tl.minimum(part * each + each, tiles)):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < n)[:, None]
        numbers = rows + (group * n + row)[:, None] * D + place[None, :]
        found = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, D, STEP):
            within = first + place < D
            some = tl.load(numbers + first, mask=inside & within[None, :], other=0.0).to(tl.float32)
            factors = tl.load(normals + first * BITS, mask=within[:, None] & (column < BITS)[None, :], other=0.0)
            found = tl.dot(some, factors, found, input_precision=PRECISION)
        tl.store(target + row[:, None], found, mask=inside & (column < BITS)[None, :])
        counted = inside & (tl.abs(found) < float("inf"))
        more = tl.sum(counted.to(tl.int32), 0)
        # Divided before they are summed, large numbers don't overflow.
        mean = tl.sum(tl.where(counted, found, 0.0) / ROWS, 0) * (ROWS / tl.maximum(more, 1).to(tl.float32))
        centre = tl.where(tile == part * each, mean, centre)
        distance += tl.sum(tl.where(counted, found - centre[None, :], 0.0) / ROWS, 0)
        count += more
    at = (number.to(tl.int64) * BITS + column) * parts + part
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
    groups,
    n_q,
    n_k,
    parts,
    unit,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Write the Gray ranks of many rows' signs; ``unit`` is what distances are measured in."""
    tiles = tl.cdiv(tl.maximum(n_q, n_k), PACKED)
    tile, number = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    group, n, before = rows_of(number, groups, n_q, n_k)
    row, part = tile * PACKED + tl.arange(0, PACKED), tl.arange(0, PARTS)
    code = tl.zeros([PACKED], tl.int32)
    for bit in range(BITS):
        first = (number.to(tl.int64) * BITS + bit) * parts
        count = tl.load(counts + first + part, mask=part < parts, other=0).to(tl.float32)
        total = tl.maximum(tl.sum(count, 0), 1.0)
        centre = tl.load(centres + first)
        # Differences from one of the means: of numbers far from 0 these are exact.
        apart = tl.load(centres + first + part, mask=part < parts, other=0.0) - centre
        distance = tl.load(distances + first + part, mask=part < parts, other=0.0)
        mean = centre + tl.sum(apart * (count / total), 0) + tl.sum(distance, 0) * (unit / total)
        found = tl.load(projected + before * BITS + (group * BITS + bit) * n + row, mask=row < n, other=0.0)
        code = code << 1 | (found > mean).to(tl.int32)
    for power in tl.static_range(5):
        code = code ^ code >> (1 << power)
    tl.store(codes + before + group * n + row, code, mask=row < n)


def hash_codes(xp: Namespace, q: Array, k: Array, planes: Array) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.hash_codes.contract.HashCodes`."""
    groups, n_q, d = q.shape
    n_k, bits = k.shape[1], int(planes.shape[1])
    most = max(n_q, n_k)
    parts = max(1, min(PARTS, triton.cdiv(most, ROWS)))
    with torch.cuda.device_of(q):
        integers = torch.int16 if bits <= 15 else torch.int32
        codes = torch.empty((groups * (n_q + n_k),), dtype=integers, device=q.device)
        projected = torch.empty((bits * len(codes),), dtype=torch.float32, device=q.device)
        centres, distances = torch.empty((2, 2, groups, bits, parts), dtype=torch.float32, device=q.device)
        counts = torch.empty((2, groups, bits, parts), dtype=torch.int32, device=q.device)
        sums, sizes = (projected, centres, distances, counts), (groups, n_q, n_k, parts)
        tile = ROWS, padded(d, STEP), padded(bits, PLANES)
        grid = flat_grid("project_signs", 2 * groups * parts)
        # Four warps, as in `project_rows`: eight, of few columns, have been seen to read beyond shared memory.
        project_signs[grid](q.contiguous(), k.contiguous(), planes.contiguous(), *sums, *sizes, d, bits, *tile, num_warps=4)
        grid = flat_grid("pack_signs", 2 * groups * triton.cdiv(most, PACKED))
        pack_signs[grid](*sums, codes, *sizes, float(ROWS), bits, PARTS, PACKED)
    return codes[: groups * n_q].reshape(groups, n_q), codes[groups * n_q :].reshape(groups, n_k)
