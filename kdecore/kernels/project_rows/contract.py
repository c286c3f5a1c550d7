"""What every implementation of `project_rows` promises."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace


class ProjectRows(Protocol):
    """Multiply rows by a matrix.

    A kernel because NumPy's matrix product leaves threads that wait for more by spinning: on two cores they took a third
    of the time of all that followed (bench/NOTES.md).
    """

    def __call__(self, xp: Namespace, rows: Array, matrix: Array, less: Array | None = None) -> Array:
        """Return the products, less a row of each group.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        rows
            (G, n, d) floating-point, of half precision on accelerators only.
        matrix
            (G, d, p), float64 for float64 rows and float32 for others.
        less
            (G, 1, p) of the matrix's dtype; None for nothing.

        Returns
        -------
        Array
            (G, n, p) of the matrix's dtype, row by row in memory; what is not finite spoils its own row only. O(G n d p).
        """
