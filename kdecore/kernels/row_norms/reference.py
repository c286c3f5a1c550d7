"""`row_norms` in the array API."""

from kdecore.arrays.gradients import without_gradient
from kdecore.arrays.namespace import Array, Namespace


def row_norms(xp: Namespace, rows: Array) -> Array:
    """Follow `kdecore.kernels.row_norms.contract.RowNorms`."""
    groups, n, d = rows.shape
    if d == 0:
        return xp.zeros((groups, n), dtype=xp.float64, device=rows.device)
    absolute = xp.astype(xp.abs(without_gradient(rows)), xp.float64)
    finite = xp.isfinite(absolute)
    absolute = xp.where(finite, absolute, 0.0)
    largest = xp.max(absolute, axis=(-2, -1), keepdims=True)
    relative = absolute / xp.where(largest > 0, largest, 1.0)
    norms = xp.sqrt(xp.sum(relative * relative, axis=-1))
    return xp.where(xp.all(finite, axis=-1), norms, 0.0)
