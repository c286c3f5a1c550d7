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
"""Of the logarithm of a kernel, in float32; rows that would be rounded by more are computed in float64."""


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
        The bandwidth is neither a positive finite number nor a rule.
    """
    total = host.sum(weights, dtype=host.float64)
    centre = host.sum(weights[:, None] * rows, axis=0) / total
    moved = rows - centre
    covariance = cross_moment(host, (moved * weights[:, None])[None], moved[None])[0] * (len(rows) / total)
    width = bandwidth_of(math.sqrt(float(host.trace(covariance)) / rows.shape[1]), float(total), rows.shape[1], bandwidth)
    axes = host.linalg.eigh(covariance)[1][:, ::-1] / width
    largest = float(host.max(host.sum(moved * moved, axis=1))) / width**2
    coarse = largest * float(host.finfo(rows.dtype).eps) > LARGEST_ROUNDING
    return Scaling(width, centre, axes, host.dtype(host.float64) if coarse else rows.dtype)


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
