"""`balanced_view` in the array API."""

from collections.abc import Callable
from typing import Any

from kdecore.arrays.namespace import Array, Namespace, accumulation_dtype, dtype_name
from kdecore.kernels.balanced_view.contract import ORTHOGONAL_ITERATIONS, RIDGE, SMALLEST_SQUARE, View
from kdecore.kernels.project_rows.reference import project_rows


def balanced_view(
    xp: Namespace, query_moment: Array, key_moment: Array, centre: Array, scale: float, p: int, like: Array
) -> View:
    """Follow `kdecore.kernels.balanced_view.contract.BalancedView`."""
    of_scaled = query_moment * scale**2
    directions = balanced_directions(xp, of_scaled, key_moment, p)
    return view(xp, of_scaled, *directions, centre, scale, accumulation_dtype(xp, dtype_name(like)), project_rows)


def view(
    xp: Namespace,
    query_moment: Array,
    queries: Array,
    keys: Array,
    centre: Array,
    scale: float,
    dtype: Any,
    project: Callable[..., Array],
) -> View:
    """Return a view in a dtype, from the moment of scaled queries and directions for these and for keys."""
    half_norm = xp.astype(xp.linalg.trace(query_moment) * (0.5 / int(query_moment.shape[1])), dtype)
    keys = xp.astype(keys, dtype)
    of_centre = project(xp, xp.astype(centre[:, None, :], dtype), keys)
    return View(xp.astype(queries * scale, dtype), keys, of_centre, half_norm)


def balanced_directions(xp: Namespace, query_moment: Array, key_moment: Array, p: int) -> tuple[Array, Array]:
    """Return what turns scaled queries and keys into coordinates: (G, d, p) float64 each."""
    d = int(query_moment.shape[1])
    c, s = with_ridge(xp, query_moment), with_ridge(xp, key_moment)
    # The columns that are largest where both moments are.
    size = xp.linalg.diagonal(s) * xp.linalg.diagonal(c)
    largest = xp.argsort(-size, axis=1, stable=True)[:, :p]
    basis = xp.astype(largest[:, None, :] == xp.arange(d, dtype=largest.dtype, device=c.device)[None, :, None], c.dtype)
    for _ in range(ORTHOGONAL_ITERATIONS if p < d else 0):
        basis, _ = xp.linalg.qr(s @ (c @ basis))
    seen = c @ basis
    root = xp.linalg.cholesky(xp.matrix_transpose(basis) @ seen)
    # Query coordinates of unit moment, and the moment of the keys in what goes with them.
    whitened = xp.matrix_transpose(xp.linalg.solve(root, xp.matrix_transpose(basis)))
    eigenvalues, axes = xp.linalg.eigh(xp.matrix_transpose(whitened) @ (c @ (s @ (c @ whitened))))
    singular = xp.sqrt(xp.maximum(eigenvalues, SMALLEST_SQUARE * eigenvalues[:, -1:]))[:, None, :]
    queries = whitened @ axes
    # Libraries differ in the signs of eigenvectors (and in all of them where eigenvalues repeat, which nothing mends).
    queries = xp.where(xp.sum(queries**3, axis=1, keepdims=True) < 0, -queries, queries)
    return queries * xp.sqrt(singular), c @ queries / xp.sqrt(singular)


def with_ridge(xp: Namespace, moment: Array) -> Array:
    """Return a moment (G, d, d) with a little added to its diagonal, so that it is positive definite; 0 becomes 1."""
    d = int(moment.shape[1])
    size = xp.linalg.trace(moment)[:, None, None] / d
    return moment + xp.where(size > 0, RIDGE * size, 1.0) * xp.eye(d, dtype=moment.dtype, device=moment.device)
