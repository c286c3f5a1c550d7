"""`project_rows` in the array API."""

from kdecore.arrays.namespace import Array, Namespace


def project_rows(xp: Namespace, rows: Array, matrix: Array) -> Array:
    """Follow `kdecore.kernels.project_rows.contract.ProjectRows`."""
    return xp.astype(rows, matrix.dtype, copy=False) @ matrix
