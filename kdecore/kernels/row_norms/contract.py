"""What every implementation of `row_norms` promises."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace


class RowNorms(Protocol):
    """Euclidean norms of rows, relative to the largest entry of their group."""

    def __call__(self, xp: Namespace, rows: Array) -> Array:
        """Return ‖row‖ divided by the largest finite absolute value in the group.

        Dividing first keeps squares from overflow and underflow, whatever the rows' units. No gradients.

        Parameters
        ----------
        xp
            Array namespace of ``rows``.
        rows
            (G, n, d) floating-point.

        Returns
        -------
        Array
            (G, n) float64, or of the dtype that rows are computed in; 0 for a row with a number that is not finite,
            and everywhere where the group's largest is 0. O(G n d).
        """
