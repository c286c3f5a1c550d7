"""Rows as points in bandwidths: centred, turned to their leading axes, and divided by the bandwidth."""

import math
from dataclasses import dataclass
from typing import Any

from kdecore.arrays.errors import OptionError, did_you_mean
from kdecore.arrays.namespace import Array, host
from kdecore.arrays.rows import FEWEST_ROWS, SMALL_PRODUCT, cross_moment, spans
from kdecore.kde.problem import check_bandwidth

RULES = ("scott", "silverman")
LARGEST_ROUNDING = 1e-3
"""Of the logarithm of a kernel; what would be rounded by more in float32 is computed in float64, in float64 refused."""


@dataclass(frozen=True)
class Scaling:
    """Where points are, in bandwidths: distances are those of rows, divided by the bandwidth.

    Attributes
    ----------
    bandwidth
        What they are divided by.
    centre
        (d,) float64: the mean row, since kernels of points far from 0 would be rounded.
    axes
        (d, d) float64: eigenvectors of the rows' covariance, the largest first, over the bandwidth.
    dtype
        Dtype of points.
    """

    bandwidth: float
    centre: Array
    axes: Array
    dtype: Any

    @property
    def reach(self) -> float:
        """How far from the centre points may be: logarithms of kernels, half a square, are rounded in proportion to it."""
        return math.sqrt(LARGEST_ROUNDING / float(host.finfo(self.dtype).eps))

    def distances(self, rows: Array) -> Array:
        """Return how far from the centre points of rows (n, d) are: (n,) float64."""
        return lengths(rows - self.centre) / self.bandwidth

    def points(self, rows: Array) -> Array:
        """Return points (n, d) of rows (n, d)."""
        step = SMALL_PRODUCT // rows.shape[1] ** 2
        found = host.empty(rows.shape, dtype=self.dtype)
        for part in spans(len(rows), step if step >= FEWEST_ROWS else len(rows)):
            found[part] = (rows[part] - self.centre) @ self.axes
        return found


def scaling_of(rows: Array, weights: Array, bandwidth: float | str) -> Scaling:
    """Find where points are of rows (n, d), float32 or float64, of weights (n,), for a bandwidth or a rule for it.

    Raises
    ------
    OptionError
        The bandwidth is neither a positive finite number nor a rule, or so small beside the rows' distances that float64
        can't tell which is nearer.
    ValueError
        Rows are so large that their squares overflow, or weights so different that float64 can't hold both beside another.
    """
    dtype, rows = rows.dtype, rows.astype(host.float64)
    heaviest = float(host.max(weights))
    weights = weights / heaviest
    lightest, total = float(host.min(weights)), float(host.sum(weights))
    centre = (weights / total) @ rows
    moved = rows - centre
    furthest = float(host.max(lengths(moved)))
    covariance = cross_moment(host, (moved * weights[:, None])[None], moved[None])[0] * (len(rows) / total)
    deviation = math.sqrt(float(host.trace(covariance)) / rows.shape[1])
    width = bandwidth_of(deviation, heaviest * total, rows.shape[1], bandwidth)
    axes = host.linalg.eigh(covariance)[1][:, ::-1] / width
    for kind in (dtype, host.dtype(host.float64)):
        found = Scaling(width, centre, axes, kind)
        if furthest / width <= found.reach and lightest >= float(host.finfo(kind).smallest_normal):
            return found
    if furthest / width <= found.reach:
        raise ValueError(f"sample_weight must differ by less than float64 can hold, got {lightest:.3g} of the largest")
    made = "" if bandwidth == width else f", which makes {width:.3g}"
    raise OptionError(
        f"bandwidth must be at least {furthest / found.reach:.3g}, since a row of X lies {furthest:.3g} from the mean, "
        f"got {bandwidth!r}{made}"
    )


def lengths(rows: Array) -> Array:
    """Return the length of each row (n, d) → (n,) float64, or raise `ValueError`."""
    with host.errstate(over="ignore"):
        found = host.sqrt(host.sum(host.square(rows, dtype=host.float64), axis=1))
    if not bool(host.all(host.isfinite(found))):
        largest = float(host.max(host.abs(rows)))
        raise ValueError(f"X must have rows whose squares float64 can hold, got a number {largest:.3g} from the mean")
    return found


def bandwidth_of(deviation: float, n: float, d: int, bandwidth: float | str) -> float:
    """Return a bandwidth as it is, or by a rule for n rows of d features with such a root mean square deviation."""
    if not isinstance(bandwidth, str):
        return check_bandwidth(bandwidth)
    if bandwidth not in RULES:
        expected = " or ".join(f'"{rule}"' for rule in RULES)
        hint = did_you_mean(bandwidth, RULES)
        raise OptionError(f"bandwidth must be a positive finite number, {expected}, got {bandwidth!r}{hint}")
    factor: float = (n if bandwidth == "scott" else n * (d + 2) / 4) ** (-1 / (d + 4))
    # Rows that are all the same have the same prediction at any bandwidth.
    return factor * deviation or 1.0
