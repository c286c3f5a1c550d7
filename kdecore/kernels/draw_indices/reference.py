"""`draw_indices` in the array API."""

import math

from kdecore.arrays.namespace import Array, Namespace
from kdecore.arrays.rows import searchsorted_rows, take_along_rows


def draw_indices(
    xp: Namespace, weights: Array, window_start: Array, window_size: int, starts: Array, count: int
) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.draw_indices.contract.DrawIndices`."""
    n = int(weights.shape[1])
    cumulative = xp.cumulative_sum(weights, axis=1, include_initial=True)
    window_end = window_start + window_size
    below = take_along_rows(xp, cumulative, window_start)
    inside = take_along_rows(xp, cumulative, window_end) - below
    total = cumulative[:, -1:] - inside
    steps = xp.arange(count, dtype=xp.float64, device=weights.device)
    points = (starts[..., None] + steps) * (total / count)[..., None]
    # Where the window is at the end, nothing lies after it, whatever rounding says.
    after = (points >= below[..., None]) & (window_end < n)[..., None]
    points = xp.where(after, points + inside[..., None], points)
    positions = searchsorted_rows(xp, cumulative, points, side="right") - 1
    # Rounding may put a point on the wrong side of the window's edge, or past the end.
    last_before, first_after = window_start[..., None] - 1, window_end[..., None]
    positions = xp.where(after, xp.maximum(positions, first_after), xp.minimum(positions, last_before))
    positions = xp.clip(positions, 0, n - 1)
    log_inclusion = xp.log(take_along_rows(xp, weights, positions)) + math.log(count) - xp.log(total)[..., None]
    return positions, log_inclusion
