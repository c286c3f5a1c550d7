"""What every implementation of `finite_rows` promises."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace


class FiniteRows(Protocol):
    """Find the rows that hold a number that is not finite, without telling the host."""

    def __call__(self, xp: Namespace, rows: Array) -> Array:
        """Return which rows are finite throughout.

        Parameters
        ----------
        xp
            Array namespace of ``rows``.
        rows
            (G, n, d) of any floating dtype.

        Returns
        -------
        Array
            (G, n) bool. O(G n d).
        """
