"""`spoil_groups` in the array API."""

from kdecore.arrays.gradients import without_gradient
from kdecore.arrays.namespace import Array, Namespace


def spoil_groups(xp: Namespace, lse: Array, k: Array, v: Array) -> Array:
    """Follow `kdecore.kernels.spoil_groups.contract.SpoilGroups`."""
    of_keys, of_values = (xp.all(xp.isfinite(without_gradient(x)), axis=(1, 2)) for x in (k, v))
    kept = (of_keys & of_values)[:, None] | (lse == -xp.inf)
    return xp.where(kept, lse, xp.nan)
