"""`shrink_matrices` in the array API."""

from kdecore.arrays.namespace import Array, Namespace


def shrink_matrices(xp: Namespace, matrices: Array, chances: Array, each_block: bool, factor: float) -> Array:
    """Follow `kdecore.kernels.shrink_matrices.contract.ShrinkMatrices`."""
    chances = xp.clip(chances[..., None, None], *chance_limits(xp, chances))
    of_common = xp.mean(chances, axis=1, keepdims=True) / int(matrices.shape[1])
    common = certain(xp, xp.mean(matrices, axis=1, keepdims=True), of_common)
    return factor * (common + certain(xp, matrices - common, chances) if each_block else common)


def chance_limits(xp: Namespace, chances: Array) -> tuple[float, float]:
    """Return between what chances are kept: neither 0, nor a mean of them, nor infinite. All of nothing is nothing then."""
    numbers = xp.finfo(chances.dtype)
    return 2.0**20 * float(numbers.smallest_normal), float(numbers.max)


def certain(xp: Namespace, matrices: Array, chances: Array) -> Array:
    """Return what of matrices (…, d, d_v) is more than chance, the expected sum of its squares (> 0), leaves."""
    signal = xp.sum(matrices * matrices, axis=(-2, -1), keepdims=True)
    return matrices * (1.0 - chances / xp.maximum(signal, chances))
