"""Errors of an estimated attention output against the exact one."""

from dataclasses import dataclass

from kdecore.arrays.errors import ShapeError
from kdecore.arrays.namespace import Array, Namespace
from kdecore.arrays.rows import row_norms
from kdecore.arrays.scalars import to_float


@dataclass(frozen=True)
class Errors:
    """Relative errors of an estimate, with E = estimate − exact and O = exact; all are 0 for a perfect one.

    Attributes
    ----------
    spectral
        ‖E‖₂ / ‖O‖₂ (largest singular values), the norm that KDEformer bounds and reports.
    frobenius
        ‖E‖_F / ‖O‖_F.
    worst_row
        max over rows i of ‖Eᵢ‖ / ‖Oᵢ‖.
    """

    spectral: float
    frobenius: float
    worst_row: float


def errors(xp: Namespace, estimate: Array, exact: Array) -> Errors:
    """Compare over the last two axes, and average each of the three errors over the leading dimensions.

    Parameters
    ----------
    xp
        Array namespace of both arrays.
    estimate, exact
        (…, n, d_v), n and d_v ≥ 1, any floating-point dtype; computed in float64.

    Returns
    -------
    Errors
        Where a norm of ``exact`` is 0 (a zero row, for instance), that ratio is 0 if the estimate is 0 there too, else
        infinite. A matrix with NaN or infinity in either array has NaN errors, and so has the average.
        O(n d_v · min(n, d_v)).

    Raises
    ------
    ShapeError
        Different shapes, fewer than 2 dimensions, or no elements.
    """
    shape = tuple(exact.shape)
    if tuple(estimate.shape) != shape or len(shape) < 2 or 0 in shape:
        raise ShapeError(f"estimate and exact must have one shape (…, n, d_v) without zeros, got {estimate.shape}, {shape}")
    exact = xp.reshape(xp.astype(exact, xp.float64, copy=False), (-1, *shape[-2:]))
    estimate = xp.reshape(xp.astype(estimate, xp.float64, copy=False), (-1, *shape[-2:]))
    finite = xp.all(xp.isfinite(estimate) & xp.isfinite(exact), axis=(-2, -1))
    # Eigenvalue solvers reject NaN, so such matrices are zeroed here and their errors replaced below.
    keep = finite[:, None, None]
    exact, estimate = xp.where(keep, exact, 0.0), xp.where(keep, estimate, 0.0)
    # One common factor changes no ratio, and keeps squares from overflow and underflow.
    largest = xp.max(xp.abs(exact), axis=(-2, -1), keepdims=True)
    factor = 1.0 / xp.where(largest > 0, largest, 1.0)
    difference = estimate * factor - exact * factor
    exact = exact * factor

    rows_exact, rows_difference = row_norms(xp, exact), row_norms(xp, difference)
    ratios = (
        _ratio(xp, _spectral_norm(xp, difference), _spectral_norm(xp, exact)),
        _ratio(xp, row_norms(xp, rows_difference), row_norms(xp, rows_exact)),
        xp.max(_ratio(xp, rows_difference, rows_exact), axis=-1),
    )
    return Errors(*(to_float(xp.mean(xp.where(finite, ratio, xp.nan))) for ratio in ratios))


def _spectral_norm(xp: Namespace, matrices: Array) -> Array:
    """Largest singular values (G, n, m) → (G,), from the eigenvalues of the smaller Gram matrix."""
    transposed = xp.matrix_transpose(matrices)
    gram = transposed @ matrices if matrices.shape[1] >= matrices.shape[2] else matrices @ transposed
    top = xp.linalg.eigvalsh(gram)[:, -1]
    return xp.sqrt(xp.where(top > 0, top, 0.0))


def _ratio(xp: Namespace, numerator: Array, denominator: Array) -> Array:
    at_zero = xp.where(numerator > 0, xp.inf, numerator)
    return xp.where(denominator > 0, numerator / xp.where(denominator > 0, denominator, 1.0), at_zero)
