"""`finite_rows` in the array API."""

from kdecore.arrays.gradients import without_gradient
from kdecore.arrays.namespace import Array, Namespace


def finite_rows(xp: Namespace, rows: Array) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.finite_rows.contract.FiniteRows`."""
    finite = xp.all(xp.isfinite(without_gradient(rows)), axis=-1)
    return xp.where(finite[..., None], rows, 0.0), finite
