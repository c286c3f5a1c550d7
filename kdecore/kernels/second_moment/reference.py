"""`second_moment` in the array API."""

import math

from kdecore.arrays.namespace import Array, Namespace
from kdecore.arrays.rows import cross_moment


def second_moment(xp: Namespace, rows: Array, step: int, centred: bool) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.second_moment.contract.SecondMoment`."""
    rows = xp.astype(rows[:, ::step, :], xp.float64)
    # Half as many operations as `isfinite` takes of PyTorch.
    rows = xp.where(xp.abs(rows) < math.inf, rows, 0.0)
    mean = xp.mean(rows, axis=1, keepdims=True)
    rows = rows - mean if centred else rows
    return cross_moment(xp, rows, rows), mean[:, 0, :]
