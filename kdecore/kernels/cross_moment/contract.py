"""What every implementation of `cross_moment` promises."""

from typing import Protocol

from kdecore.namespaces import Array, Namespace


class CrossMoment(Protocol):
    """Multiply the columns of rows with each other.

    A kernel because NumPy's matrix product leaves threads that wait for more by spinning, which slows all that follows and,
    beside another busy process, single calls by a factor of 20 (bench/NOTES.md).
    """

    def __call__(self, xp: Namespace, x: Array, y: Array) -> Array:
        """Return the mean of x yᵀ over rows.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        x, y
            (G, n, d) and (G, n, e) of one dtype, float32 or float64, n ≥ 1.

        Returns
        -------
        Array
            (G, d, e) of that dtype. O(G n d e).
        """
