"""`cross_moment` in the array API."""

from kdecore.namespaces import Array, Namespace
from kdecore.namespaces import cross_moment as of_small_products


def cross_moment(xp: Namespace, x: Array, y: Array) -> Array:
    """Follow `kdecore.kernels.cross_moment.contract.CrossMoment`."""
    return of_small_products(xp, x, y)
