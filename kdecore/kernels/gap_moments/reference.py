"""`gap_moments` in the array API."""

from kdecore.namespaces import Array, Namespace, accumulation_dtype, dtype_name, take_along_rows


def gap_moments(xp: Namespace, keys: Array, values: Array, drawn: Array, mean: Array) -> tuple[Array, Array, Array]:
    """Follow `kdecore.kernels.gap_moments.contract.GapMoments`."""
    count, dtype = int(drawn.shape[2]), accumulation_dtype(xp, dtype_name(keys))

    def gaps(rows: Array) -> Array:
        few, means = (xp.astype(take_along_rows(xp, rows, index), dtype, copy=False) for index in (drawn, mean))
        return few - means

    of_keys, of_values = gaps(keys), gaps(values)[..., :-1]
    spreads, sizes = xp.sum(of_keys * of_keys, axis=-1), xp.sum(of_values * of_values, axis=-1)
    products = xp.matrix_transpose(of_keys) @ of_values / count
    return products, xp.mean(spreads, axis=-1), xp.mean(spreads * sizes, axis=-1)
