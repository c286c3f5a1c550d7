"""Validation for `kdecore.kde`, and the Gaussian form that every primitive works on."""

import math
from dataclasses import dataclass
from typing import TypedDict

from kdecore.arrays.errors import DTypeError, OptionError, ShapeError
from kdecore.arrays.namespace import Array, Namespace, check_floating, dtype_name
from kdecore.arrays.scalars import to_float


class KdeOptions(TypedDict, total=False):
    """Arguments by name of both densities, but ``return_report``: what their overloads have in common."""

    eps: float
    delta: float
    primitive: str
    seed: int


@dataclass(frozen=True)
class Accuracy:
    """What is asked for: relative error at most ``eps`` for each query with probability at least 1 − ``delta``."""

    eps: float
    delta: float


@dataclass(frozen=True)
class GaussianForm:
    """One kernel sum, log Γⱼ = offsetⱼ + log Σᵢ exp(heightᵢ − ‖xᵢ − yⱼ‖²/2), with max height = 0.

    Attributes
    ----------
    x
        (n, d) points of positive weight, n ≥ 1.
    height
        (n,), finite and ≤ 0: −half the square of the coordinate that the map of Algorithm 2 appends to x.
    y
        (m, d) queries.
    offset
        (m,), natural log.
    log_weight
        (n,), natural log of the weights the user gave, which sampling may follow; None where they are equal.
    xp
        Array namespace.
    device
        Device of all arrays.
    """

    x: Array
    height: Array
    y: Array
    offset: Array
    log_weight: Array | None
    xp: Namespace
    device: object

    @property
    def n(self) -> int:
        """Number of points."""
        return int(self.x.shape[0])

    @property
    def m(self) -> int:
        """Number of queries."""
        return int(self.y.shape[0])

    @property
    def d(self) -> int:
        """Dimension."""
        return int(self.x.shape[1])


def check_accuracy(eps: object, delta: object) -> Accuracy:
    """Return both as floats in (0, 1), or raise `OptionError` naming the one that is not."""
    return Accuracy(_open_unit("eps", eps), _open_unit("delta", delta))


def _open_unit(name: str, value: object) -> float:
    number = to_float(value)
    if not 0.0 < number < 1.0:
        raise OptionError(f"{name} must lie strictly between 0 and 1, got {value!r}")
    return number


def check_bandwidth(bandwidth: object) -> float:
    """Return ``bandwidth`` as a positive finite float, or raise `OptionError`."""
    number = to_float(bandwidth)
    if not (math.isfinite(number) and number > 0):
        raise OptionError(f"bandwidth must be a positive finite number, got {bandwidth!r}")
    return number


def check_arrays(xp: Namespace, x: Array, y: Array, weights: Array | None, name: str) -> None:
    """Check dtypes, shapes and finiteness of x (…, n, d), y (…, m, d) and weights (…, n).

    Raises
    ------
    DTypeError, ShapeError, OptionError
        Naming the argument, what was expected and what came.
    """
    for label, array in (("x", x), ("y", y), (name, weights)):
        if array is not None:
            check_floating(label, array)
    if dtype_name(y) != dtype_name(x):
        raise DTypeError(f"y must have the same dtype as x ({dtype_name(x)}), got {dtype_name(y)}")
    for label, array, form in (("x", x, "(…, n, d)"), ("y", y, "(…, m, d)")):
        if array.ndim < 2:
            raise ShapeError(f"{label} must have at least 2 dimensions {form}, got shape {tuple(array.shape)}")
    shapes = f"got x {tuple(x.shape)}, y {tuple(y.shape)}"
    if x.shape[-1] != y.shape[-1]:
        raise ShapeError(f"y must have x's last dimension d = {x.shape[-1]}; {shapes}")
    if x.shape[-1] == 0:
        raise ShapeError(f"x must have a last dimension d of at least 1; {shapes}")
    if x.shape[:-2] != y.shape[:-2]:
        raise ShapeError(f"y must have the leading dimensions of x, {tuple(x.shape[:-2])}; {shapes}")
    if weights is not None and tuple(weights.shape) != tuple(x.shape[:-1]):
        raise ShapeError(f"{name} must have the shape {tuple(x.shape[:-1])} of x without d, got {tuple(weights.shape)}")
    for label, array in (("x", x), ("y", y)):
        bad = _count(xp, ~xp.isfinite(array))
        if bad:
            raise OptionError(f"{label} must be finite, got {bad} NaN or infinite numbers")


def check_weights(xp: Namespace, weights: Array) -> None:
    """Check that every weight is finite and at least 0, or raise `OptionError`."""
    bad = _count(xp, ~(xp.isfinite(weights) & (weights >= 0)))
    if bad:
        raise OptionError(f"weights must be finite and at least 0, got {bad} that are not")


def check_log_weights(xp: Namespace, log_weights: Array) -> None:
    """Check that every log-weight is a number below +∞ (−∞ is weight 0), or raise `OptionError`."""
    bad = _count(xp, ~(log_weights < math.inf))
    if bad:
        raise OptionError(f"log_weights must be numbers below +inf (-inf is weight 0), got {bad} that are not")


def _count(xp: Namespace, condition: Array) -> int:
    return int(xp.count_nonzero(condition))
