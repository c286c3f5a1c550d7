"""`value_sizes` in the array API."""

from kdecore.arrays.gradients import without_gradient
from kdecore.arrays.namespace import Array, Namespace, accumulation_dtype, dtype_name
from kdecore.arrays.rows import column_ranges
from kdecore.kernels.row_norms.reference import row_norms


def value_sizes(xp: Namespace, v: Array) -> tuple[Array, Array, Array]:
    """Follow `kdecore.kernels.value_sizes.contract.ValueSizes`."""
    return beside_ranges(xp, without_gradient(v), row_norms(xp, v))


def beside_ranges(xp: Namespace, v: Array, norms: Array) -> tuple[Array, Array, Array]:
    """Return norms (G, n) in any one unit for each group relative to the largest, and the ranges of the columns."""
    top = xp.max(norms, axis=1, keepdims=True)
    sizes = xp.astype(norms / xp.where(top > 0, top, 1.0), accumulation_dtype(xp, dtype_name(v)), copy=False)
    return sizes, *column_ranges(xp, v)
