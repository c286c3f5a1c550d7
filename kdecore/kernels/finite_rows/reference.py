"""`finite_rows` in the array API."""

from kdecore.arrays.gradients import without_gradient
from kdecore.arrays.namespace import Array, Namespace


def finite_rows(xp: Namespace, rows: Array) -> Array:
    """Follow `kdecore.kernels.finite_rows.contract.FiniteRows`."""
    return xp.all(xp.isfinite(without_gradient(rows)), axis=-1)
