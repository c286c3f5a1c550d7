"""Pathfinder, 32 × 32 as Long Range Arena has it: whether two marks lie on one dashed path (Linsley et al., 2018).

Two paths of 14 paddles grow in turn from seeds 7 px apart. From a pivot 1 px behind a paddle's head the next one ends on a
circle of 3 px, drawn by cos²(min(continuity · turn, π/2)) among what is free, and covers the last 2 px before that end; what
comes within 2 px of another path or of an earlier paddle, gaps included, is drawn anew, thrice at most, and then all from
the start. Up to five distractors of four paddles follow. One mark is on a path's first tip, the other on the last tip of the
same path or of the other.

From the published recipe this differs where that draws with masks: distances of lines stand for overlaps of dilated bitmaps,
and a paddle is checked against the other path's newest one, too, which the authors' program leaves out, so that paths never
touch. Pivots and tails are not rounded, and lines are smoothed by a triangle filter instead of Lanczos'.
"""

import math

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from bench.lra.samples import Samples

CLASSES, VOCABULARY, LENGTH = 2, 256, 1024
"""A token is a pixel's brightness."""
SIDE, EDGE = 32, 2
"""Pixels on a side, and at the border, where no paddle ends: one of padding, and one from that."""
PADDLES, SEED_DISTANCE, CONTINUITY = 14, 7, 1.0
PADDLE, MARGIN, MARKER = 2.0, 1.0, 1.5
"""Length, gap on either side, and radius of marks, in pixels."""
DISTRACTORS, DISTRACTOR_PADDLES, DISTRACTOR_TRIALS = 5, 4, 5
TRIALS = 3
DISTRACTOR_CONTRAST, CONTRAST = 2.0, 1.5
FINE = 2
"""Pixels of lines to a pixel; lines are one of them wide, which is a thickness of 0.5."""

STEP, APART = PADDLE + MARGIN, 2 * MARGIN
DIRECTIONS = math.ceil(2 * math.pi * STEP)
"""Ends that are tried on a circle, a pixel apart."""
MOST = 2 * PADDLES + DISTRACTORS * DISTRACTOR_PADDLES


def generate(count: int, length: int, seed: int) -> Samples:
    """Draw so many images, a token a pixel.

    Parameters
    ----------
    count
        How many.
    length
        1024.
    seed
        Of everything.

    Raises
    ------
    ValueError
        Another length.
    """
    if length != LENGTH:
        raise ValueError(f"length must be {LENGTH} for pathfinder, got {length}")
    images, labels, _ = draw(count, seed)
    tokens = torch.from_numpy(images).reshape(count, 1, LENGTH)
    return Samples(tokens, torch.full((count, 1), LENGTH), torch.from_numpy(labels))


def draw(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.float64]]:
    """Draw images, their labels, and what they were drawn from.

    Returns
    -------
    images
        (count, 32, 32) uint8, the brightest pixel 255.
    labels
        (count,) int64: 1 where both marks are on one path.
    lines
        (count, 48, 4) float64: y and x of each paddle's tail and head in pixels; 14 of the path with the first mark, 14 of
        the other, then distractors', NaN where one found no room.
    """
    images, labels = np.zeros((count, SIDE, SIDE), dtype=np.uint8), np.zeros(count, dtype=np.int64)
    lines = np.full((count, MOST, 4), np.nan)
    _draw(images, labels, lines, np.random.default_rng(seed))
    return images, labels, lines


@numba.njit(cache=True)
def _draw(images, labels, lines, draws):
    for i in range(len(images)):
        # What lies between paddles: from the head before, or the tail itself, to the tail.
        gaps = np.full((MOST, 4), np.nan)
        while not _paths(lines[i], gaps, draws):
            lines[i] = gaps[:] = np.nan
        _distractors(lines[i], gaps, draws)
        labels[i] = draws.integers(0, 2)
        _paint(images[i], lines[i], labels[i])


@numba.njit(cache=True)
def _paths(lines, gaps, draws):
    """Grow both paths, and return whether they found room."""
    inner = 2 * SEED_DISTANCE
    y, x = float(draws.integers(inner, SIDE - inner)), float(draws.integers(inner, SIDE - inner))
    turn = 2 * math.pi * draws.random()
    first = PADDLES * draws.integers(0, 2)
    second = PADDLES - first
    if not _seed(lines, gaps, first, y, x, draws):
        return False
    y, x = np.rint(y + SEED_DISTANCE * math.sin(turn)), np.rint(x + SEED_DISTANCE * math.cos(turn))
    if not _seed(lines, gaps, second, y, x, draws):
        return False
    for k in range(1, PADDLES):
        for path in (first, second):
            if not _extend(lines, gaps, path + k, draws):
                return False
    return True


@numba.njit(cache=True)
def _distractors(lines, gaps, draws):
    for number in range(DISTRACTORS):
        start = 2 * PADDLES + number * DISTRACTOR_PADDLES
        for _ in range(DISTRACTOR_TRIALS):
            y, x = float(draws.integers(EDGE, SIDE - EDGE)), float(draws.integers(EDGE, SIDE - EDGE))
            grown = _seed(lines, gaps, start, y, x, draws)
            for k in range(start + 1, start + DISTRACTOR_PADDLES):
                grown = grown and _extend(lines, gaps, k, draws)
            if grown:
                break
            lines[start : start + DISTRACTOR_PADDLES] = gaps[start : start + DISTRACTOR_PADDLES] = np.nan


@numba.njit(cache=True)
def _seed(lines, gaps, k, y, x, draws):
    """Put a first paddle, whose tail is given, in any direction, and return whether it found room."""
    turn = 2 * math.pi * draws.random()
    lines[k] = y, x, y + PADDLE * math.sin(turn), x + PADDLE * math.cos(turn)
    gaps[k] = y, x, y, x
    return _inside(y, x) and _inside(lines[k, 2], lines[k, 3]) and _clear(lines, gaps, k)


@numba.njit(cache=True)
def _extend(lines, gaps, k, draws):
    """Put a paddle behind the one before, and return whether it found room."""
    tail_y, tail_x, y, x = lines[k - 1]
    along_y, along_x = (y - tail_y) / PADDLE, (x - tail_x) / PADDLE
    pivot_y, pivot_x = y + MARGIN * along_y, x + MARGIN * along_x
    ends, weights = np.empty((DIRECTIONS, 2)), np.zeros(DIRECTIONS)
    for i in range(DIRECTIONS):
        turn = 2 * math.pi * i / DIRECTIONS
        ends[i] = np.rint(pivot_y + STEP * math.sin(turn)), np.rint(pivot_x + STEP * math.cos(turn))
        if _inside(ends[i, 0], ends[i, 1]) and not _tried(ends, i) and _free(lines, k, ends[i, 0], ends[i, 1]):
            far_y, far_x = ends[i, 0] - pivot_y, ends[i, 1] - pivot_x
            cosine = (far_y * along_y + far_x * along_x) / math.hypot(far_y, far_x)
            angle = CONTINUITY * math.acos(min(1.0, max(-1.0, cosine)))
            weights[i] = math.cos(min(angle, math.pi / 2)) ** 2
    sums = weights.cumsum()
    if sums[-1] < 1e-4:
        return False
    for _ in range(TRIALS):
        head_y, head_x = ends[np.searchsorted(sums, draws.random() * sums[-1], side="right")]
        share = PADDLE / math.hypot(head_y - pivot_y, head_x - pivot_x)
        lines[k] = head_y - share * (head_y - pivot_y), head_x - share * (head_x - pivot_x), head_y, head_x
        gaps[k] = y, x, lines[k, 0], lines[k, 1]
        if _clear(lines, gaps, k):
            return True
    lines[k] = gaps[k] = np.nan
    return False


@numba.njit(cache=True)
def _inside(y, x):
    return EDGE <= y < SIDE - EDGE and EDGE <= x < SIDE - EDGE


@numba.njit(cache=True)
def _tried(ends, i):
    return np.any((ends[:i, 0] == ends[i, 0]) & (ends[:i, 1] == ends[i, 1]))


@numba.njit(cache=True)
def _free(lines, k, y, x):
    """Return whether a head keeps its distance from all paddles but the one before its own."""
    nearest = math.inf
    for j in range(MOST):
        # A paddle that isn't there has NaN for a distance.
        if j not in (k - 1, k) and _from_point(y, x, lines[j]) < nearest:
            nearest = _from_point(y, x, lines[j])
    return nearest >= APART


@numba.njit(cache=True)
def _clear(lines, gaps, k):
    """Return whether a paddle and its gap keep their distance from all others but those they follow."""
    start = _start(k)
    for j in range(MOST):
        if lines[j, 0] != lines[j, 0] or j == k or (j == k - 1 and k > start):
            continue
        for mine in (lines[k], gaps[k]):
            if _between(mine, lines[j]) < APART or _between(mine, gaps[j]) < APART:
                return False
    return True


@numba.njit(cache=True)
def _start(k):
    """Return the first paddle of what a paddle belongs to."""
    if k < 2 * PADDLES:
        return k // PADDLES * PADDLES
    return k - (k - 2 * PADDLES) % DISTRACTOR_PADDLES


@numba.njit(cache=True)
def _between(a, b):
    """Return the distance of two lines, y x y x each; 0 where they cross."""
    if _side(a, b[0], b[1]) * _side(a, b[2], b[3]) < 0 and _side(b, a[0], a[1]) * _side(b, a[2], a[3]) < 0:
        return 0.0
    ends_of_a = min(_from_point(a[0], a[1], b), _from_point(a[2], a[3], b))
    return min(ends_of_a, _from_point(b[0], b[1], a), _from_point(b[2], b[3], a))


@numba.njit(cache=True)
def _side(line, y, x):
    return (line[2] - line[0]) * (x - line[1]) - (line[3] - line[1]) * (y - line[0])


@numba.njit(cache=True)
def _from_point(y, x, line):
    """Return the distance of a point from a line between two ends, which may be one."""
    along_y, along_x = line[2] - line[0], line[3] - line[1]
    far_y, far_x = y - line[0], x - line[1]
    squared = along_y * along_y + along_x * along_x
    share = min(1.0, max(0.0, (far_y * along_y + far_x * along_x) / squared)) if squared > 0 else 0.0
    return math.hypot(far_y - share * along_y, far_x - share * along_x)


@numba.njit(cache=True)
def _paint(image, lines, label):
    """Paint paddles and marks, the brightest of whatever falls on a pixel."""
    found = np.zeros((SIDE, SIDE))
    for k in range(MOST):
        if lines[k, 0] == lines[k, 0]:
            _paint_line(found, lines[k], CONTRAST if k < 2 * PADDLES else DISTRACTOR_CONTRAST)
    last = PADDLES - 1 if label else 2 * PADDLES - 1
    _paint_mark(found, lines[0, 0], lines[0, 1])
    _paint_mark(found, lines[last, 2], lines[last, 3])
    image[:] = np.round(255 * found / found.max()).astype(np.uint8)


@numba.njit(cache=True)
def _paint_line(found, line, contrast):
    fine = np.zeros((FINE * SIDE + 2, FINE * SIDE + 2))
    steps = math.ceil(2 * FINE * PADDLE)
    for step in range(steps + 1):
        y, x = line[:2] + (line[2:] - line[:2]) * step / steps
        fine[round(FINE * y) + 1, round(FINE * x) + 1] = contrast
    for y in range(SIDE):
        for x in range(SIDE):
            i, j = FINE * y + 1, FINE * x + 1
            value = 0.0
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    value += fine[i + down, j + right] * (2 - abs(down)) * (2 - abs(right)) / 16
            found[y, x] = max(found[y, x], value)


@numba.njit(cache=True)
def _paint_mark(found, y, x):
    """Paint a disc, each pixel by the part of its 4 × 4 points that lie in it."""
    for row in range(SIDE):
        for column in range(SIDE):
            part = 0
            for i in range(16):
                point_y, point_x = row + (i // 4 - 1.5) / 4 - y, column + (i % 4 - 1.5) / 4 - x
                part += point_y * point_y + point_x * point_x <= MARKER * MARKER
            found[row, column] = max(found[row, column], part / 16)
