"""What every implementation of `second_moment` promises."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace


class SecondMoment(Protocol):
    """Multiply the columns of some rows with each other.

    A kernel because NumPy takes several passes over copies in float64, and because its matrix product leaves threads that
    wait for more by spinning, which slows all that follows and, beside another busy process, single calls by a factor of 20
    (bench/NOTES.md).
    """

    def __call__(self, xp: Namespace, rows: Array, step: int, centred: bool) -> tuple[Array, Array]:
        """Return the mean of x xᵀ over every ``step``-th row, and the mean row.

        Moments of rows that fill no space are not positive definite when they are rounded to float32.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        rows
            (G, n, d), n ≥ 1, of a floating-point dtype; numbers that are not finite count as 0.
        step
            At least 1.
        centred
            Whether x is a row less the mean row.

        Returns
        -------
        moment, mean
            (G, d, d) and (G, d) float64. O(G n d² / step).
        """
