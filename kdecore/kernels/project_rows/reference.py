"""`project_rows` in the array API."""

from kdecore.arrays.namespace import Array, Namespace


def project_rows(xp: Namespace, rows: Array, matrix: Array, less: Array | None = None) -> Array:
    """Follow `kdecore.kernels.project_rows.contract.ProjectRows`."""
    found = xp.astype(rows, matrix.dtype, copy=False) @ matrix
    return found if less is None else found - less
