"""Collision probability of Euclidean locality-sensitive hashing (Datar, Immorlica, Indyk & Mirrokni 2004)."""

import math
from functools import lru_cache

from kdecore.arrays.memory import from_host
from kdecore.arrays.namespace import Array, Namespace, host

KNOTS = 8192
"""Knots of the table that `log_collision_probability` interpolates."""


def collision_probability(ratio: float, projections: int = 1) -> float:
    """Probability that two points fall into the same cell.

    For ``projections`` independent hashes ⌊(⟨g, x⟩ + u)/w⌋, g standard normal, u uniform in [0, w):
    p(c) = [erf(1/(√2 c)) − √(2/π) c (1 − exp(−1/(2c²)))]^projections, c = distance/w (PAPER.md; a known C++
    implementation has erf(1/c), wrong by √2).

    Parameters
    ----------
    ratio
        c ≥ 0.
    projections
        At least 1.
    """
    if ratio == 0.0:
        return 1.0
    inverse = 1.0 / ratio
    if inverse < 0.1:
        # The two terms cancel: their series, to the seventh power of 1/c.
        square = inverse * inverse
        series = 0.5 - square / 24.0 + square**2 / 240.0 - square**3 / 2688.0
        return float((math.sqrt(2.0 / math.pi) * inverse * series) ** projections)
    value = math.erf(inverse / math.sqrt(2.0)) + math.sqrt(2.0 / math.pi) * ratio * math.expm1(-0.5 * inverse * inverse)
    return float(value**projections)


@lru_cache(maxsize=1)
def _table() -> Array:
    """Return log p(c) − log(1 − s) at KNOTS + 1 values of s = c/(1 + c), NumPy float64; smooth up to s = 1."""
    logs = [math.log(collision_probability(s / (1.0 - s))) - math.log1p(-s) for s in (i / KNOTS for i in range(KNOTS))]
    return host.asarray([*logs, -0.5 * math.log(2.0 * math.pi)])


def log_collision_probability(xp: Namespace, ratio: Array, projections: int) -> Array:
    """Return the natural log of `collision_probability` for an array of ratios ≥ 0, finite.

    By linear interpolation in c/(1 + c): error below 1e-8 · projections in float64 (derived; the array API has no erf).
    """
    table = from_host(xp, _table(), dtype=ratio.dtype, device=ratio.device)
    s = ratio / (1.0 + ratio)
    place = xp.clip(xp.astype(xp.floor(s * KNOTS), xp.int64), 0, KNOTS - 1)
    flat = xp.reshape(place, (-1,))
    left = xp.reshape(xp.take(table, flat), ratio.shape)
    right = xp.reshape(xp.take(table, flat + 1), ratio.shape)
    part = s * KNOTS - xp.astype(place, ratio.dtype)
    return projections * (left + (right - left) * part - xp.log1p(ratio))
