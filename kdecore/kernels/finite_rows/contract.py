"""What every implementation of `finite_rows` promises."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace


class FiniteRows(Protocol):
    """Set the rows apart that hold a number that is not finite, without telling the host."""

    def __call__(self, xp: Namespace, rows: Array) -> tuple[Array, Array]:
        """Return the rows, 0 in place of those that are not finite throughout, and which are.

        Parameters
        ----------
        xp
            Array namespace of ``rows``.
        rows
            (G, n, d) of any floating dtype.

        Returns
        -------
        rows
            (G, n, d), of their dtype.
        finite
            (G, n) bool. O(G n d).
        """
