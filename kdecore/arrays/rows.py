"""Rows gathered, searched, measured and cut where the array API has no function for it, or a slow one; and polynomials."""

from collections.abc import Callable, Iterator

import array_api_compat
import numpy as np

from kdecore.arrays.namespace import Array, Namespace, namespace_name, on_accelerator

TILE_ELEMENTS = 2**18
"""Logits of a tile, 1 MiB in float32: measured best on two cores with 512 KiB of L2 each (bench/NOTES.md)."""
SMALL_PRODUCT = 2**18
"""Multiplications of one matrix product: of more, NumPy's threads would spin for long afterwards (bench/NOTES.md)."""
WIDE_ROW = 4096
"""Numbers that rows side by side have where their columns are compared."""
FEWEST_ROWS = 16
"""Rows of a product, below which one product of all is taken."""


def take_rows(xp: Namespace, rows: Array, index: Array) -> Array:
    """Gather ``rows[index]``: rows (n, …), index int64 ≥ 0 of any shape → index.shape + rows.shape[1:]."""
    places = xp.reshape(index, (-1,))
    # PyTorch's own gather: that of the array API looks for negative indices first, in three passes over the index.
    flat = rows.index_select(0, places) if array_api_compat.is_torch_array(rows) else xp.take(rows, places, axis=0)
    return xp.reshape(flat, (*index.shape, *rows.shape[1:]))


def take_along_rows(xp: Namespace, rows: Array, index: Array) -> Array:
    """Return rows[g, index[g, …], …] for every group g: (G, n, …) taken at int64 (G, …)."""
    groups, n, *rest = rows.shape
    if array_api_compat.is_torch_array(rows) and not rest:
        return xp.reshape(rows.gather(1, xp.reshape(index, (groups, -1))), index.shape)
    offset = xp.arange(groups, dtype=xp.int64, device=array_api_compat.device(rows)) * n
    # One flat gather: twice as fast in NumPy as take_along_axis.
    flat = xp.reshape(rows, (groups * n, *rest))
    return take_rows(xp, flat, index + xp.reshape(offset, (-1, *(1,) * (index.ndim - 1))))


def of_all_groups(xp: Namespace, index: Array, groups: int, n: int) -> Array:
    """Return which of all groups' rows, n a group, lists (G · B, s) of their numbers within a group are."""
    if groups == 1:
        return index
    offset = xp.arange(groups, dtype=xp.int64, device=array_api_compat.device(index)) * n
    return xp.reshape(xp.reshape(index, (groups, -1)) + offset[:, None], index.shape)


def take_columns(xp: Namespace, rows: Array, index: Array) -> Array:
    """Return rows[:, index]: (G, n, …) taken at int64 ≥ 0 (m,) → (G, m, …)."""
    return rows.index_select(1, index) if array_api_compat.is_torch_array(rows) else xp.take(rows, index, axis=1)


def invert_permutation(xp: Namespace, order: Array) -> Array:
    """Return ``inverse`` (G, n) with ``inverse[g, order[g, i]] = i``; order is int64 (G, n), one permutation a row."""
    if namespace_name(xp) == "array_api_strict":  # forbids assignment through integer arrays
        return xp.argsort(order, axis=-1)
    groups, n = order.shape
    device = array_api_compat.device(order)
    inverse = xp.empty((groups, n), dtype=order.dtype, device=device)
    if array_api_compat.is_torch_array(order):
        return inverse.scatter_(1, order, xp.broadcast_to(xp.arange(n, dtype=order.dtype, device=device), (groups, n)))
    inverse[xp.arange(groups, device=device)[:, None], order] = xp.arange(n, dtype=order.dtype, device=device)[None, :]
    return inverse


def first_places(xp: Namespace, index: Array, n: int) -> tuple[Array, Array]:
    """Return where each of 0 … n − 1 first stands in ``index`` (m,), m ≥ 1, and whether it does: int64 and bool (n,)."""
    order = xp.argsort(index, stable=True)
    every = xp.arange(n, dtype=index.dtype, device=array_api_compat.device(index))
    place = xp.clip(xp.searchsorted(xp.take(index, order), every), 0, int(index.shape[0]) - 1)
    first = xp.take(order, place)
    return first, xp.take(index, first) == every


def searchsorted_rows(xp: Namespace, ascending: Array, values: Array, *, side: str) -> Array:
    """Search each row of ``values`` (G, …) in the same row of ``ascending`` (G, n) → int64 (G, …)."""
    found = [
        xp.reshape(xp.searchsorted(ascending[g, :], xp.reshape(values[g, ...], (-1,)), side=side), values.shape[1:])
        for g in range(values.shape[0])
    ]
    return xp.astype(xp.stack(found), xp.int64, copy=False)


def searchsorted_integers(xp: Namespace, ascending: Array, values: Array, *, side: str) -> Array:
    """Do what `searchsorted_rows` does for integers in [0, 2**31), in one search for all rows."""
    groups, n = ascending.shape
    group = xp.arange(groups, dtype=xp.int64, device=array_api_compat.device(ascending))[:, None]
    rows, wanted = (xp.reshape(xp.astype(x, xp.int64) + group * 2**31, (-1,)) for x in (ascending, values))
    return xp.reshape(xp.astype(xp.searchsorted(rows, wanted, side=side), xp.int64), values.shape) - group * n


def row_norms(xp: Namespace, rows: Array) -> Array:
    """Return Euclidean norms over the last axis, (…, d) → (…)."""
    return xp.linalg.vector_norm(rows, axis=-1)


def spans(length: int, step: int) -> Iterator[slice]:
    """Cut ``range(length)`` into slices of ``step``, the last one ragged."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def cross_moment(xp: Namespace, x: Array, y: Array) -> Array:
    """Return the mean of x yᵀ over rows (G, n, d) and (G, n, e): (G, d, e)."""
    # Of so wide rows, small products would be mostly sums of their results.
    rows = SMALL_PRODUCT // max(1, int(x.shape[2]) * int(y.shape[2]))
    step = rows if rows >= FEWEST_ROWS and not on_accelerator(x) else max(1, int(x.shape[1]))
    parts = [xp.matrix_transpose(x[:, part, :]) @ y[:, part, :] for part in spans(int(x.shape[1]), step)]
    return sum(parts[1:], start=parts[0]) / int(x.shape[1])


def column_ranges(xp: Namespace, x: Array) -> tuple[Array, Array]:
    """Return the least and the largest of each column of rows (G, n, d), n ≥ 1: (G, d) each.

    On the CPU of rows put side by side first: NumPy takes a fifth of the time where it compares more numbers in a go.
    """
    groups, n, d = x.shape
    if on_accelerator(x) or d == 0:
        return xp.min(x, axis=1), xp.max(x, axis=1)
    beside = max(1, min(n, WIDE_ROW // d))
    whole = n // beside * beside
    parts = [(xp.reshape(x[:, :whole, :], (groups, whole // beside, beside * d)), beside)]
    if whole < n:
        parts.append((x[:, whole:, :], 1))

    def of_all(reduce: Callable[..., Array]) -> Array:
        return reduce(xp.concat([xp.reshape(reduce(rows, axis=1), (groups, m, d)) for rows, m in parts], axis=1), axis=1)

    return of_all(xp.min), of_all(xp.max)


def chebyshev_coefficients(function: Callable[[Array], Array], degree: int) -> tuple[float, ...]:
    """Return the polynomial, lowest power first, that interpolates ``function`` on [-1/2, 1/2] in the Chebyshev points."""
    polynomial = np.polynomial.Chebyshev.interpolate(function, degree, domain=[-0.5, 0.5])
    return tuple(float(c) for c in polynomial.convert(kind=np.polynomial.Polynomial, domain=[-1, 1]).coef)
