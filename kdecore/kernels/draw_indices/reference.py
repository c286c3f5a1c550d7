"""`draw_indices` in the array API."""

import math

from kdecore.arrays.namespace import Array, Namespace
from kdecore.arrays.rows import searchsorted_rows, take_along_rows
from kdecore.kernels.draw_indices.contract import Weights
from kdecore.kernels.draw_uniform.reference import draw_uniform


def draw_indices(
    xp: Namespace,
    order: Array,
    weights: Weights | None,
    window_start: Array,
    window_size: int,
    seed: int,
    stream: int,
    count: int,
    dtype: str,
) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.draw_indices.contract.DrawIndices`."""
    starts = draw_uniform(xp, seed, stream, window_start.shape, order.device)
    shares = shares_in_order(xp, order, weights, (int(order.shape[1]) - window_size) / count)
    drawn, log_inclusion = systematic_sample(xp, shares, window_start, window_size, starts, count)
    own = window_start[..., None] + xp.arange(window_size, dtype=xp.int64, device=order.device)
    of_own = xp.zeros(own.shape, dtype=getattr(xp, dtype), device=order.device)
    log_weight = xp.concat([of_own, xp.astype(-log_inclusion, of_own.dtype)], axis=-1)
    return take_along_rows(xp, order, xp.concat([own, drawn], axis=-1)), log_weight


def shares_in_order(xp: Namespace, order: Array, weights: Weights | None, ceiling: float) -> Array:
    """Return the weights (G, m) of keys in their order, in float64 and at most ``ceiling``."""
    if weights is None:
        return xp.ones(order.shape, dtype=xp.float64, device=order.device)
    sizes, mean = (xp.astype(x, xp.float64, copy=False) for x in (take_along_rows(xp, weights.sizes, order), weights.mean))
    shares = 1.0 + sizes / xp.where(mean > 0, mean, 1.0)[:, None]
    return xp.where(shares > ceiling, ceiling, shares)


def systematic_sample(
    xp: Namespace, shares: Array, window_start: Array, window_size: int, starts: Array, count: int
) -> tuple[Array, Array]:
    """Return the places that are drawn, (G, B, count), and log π of each; ``starts`` (G, B) are the random numbers."""
    n = int(shares.shape[1])
    cumulative = xp.cumulative_sum(shares, axis=1, include_initial=True)
    window_end = window_start + window_size
    below = take_along_rows(xp, cumulative, window_start)
    inside = take_along_rows(xp, cumulative, window_end) - below
    total = cumulative[:, -1:] - inside
    steps = xp.arange(count, dtype=xp.float64, device=shares.device)
    points = (starts[..., None] + steps) * (total / count)[..., None]
    # Where the window is at the end, nothing lies after it, whatever rounding says.
    after = (points >= below[..., None]) & (window_end < n)[..., None]
    points = xp.where(after, points + inside[..., None], points)
    places = searchsorted_rows(xp, cumulative, points, side="right") - 1
    # Rounding may put a point on the wrong side of the window's edge, or past the end.
    last_before, first_after = window_start[..., None] - 1, window_end[..., None]
    places = xp.where(after, xp.maximum(places, first_after), xp.minimum(places, last_before))
    places = xp.clip(places, 0, n - 1)
    return places, xp.log(take_along_rows(xp, shares, places)) + math.log(count) - xp.log(total)[..., None]
