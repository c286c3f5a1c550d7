"""`value_sizes` by Numba's norms for the CPU, and NumPy's comparisons, whose speed memory bounds."""

from kdecore.arrays.gradients import without_gradient
from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.row_norms.cpu import row_norms
from kdecore.kernels.value_sizes.reference import beside_ranges


def value_sizes(xp: Namespace, v: Array) -> tuple[Array, Array, Array]:
    """Follow `kdecore.kernels.value_sizes.contract.ValueSizes`."""
    return beside_ranges(xp, without_gradient(v), row_norms(xp, v))
