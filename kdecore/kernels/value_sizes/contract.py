"""What every implementation of `value_sizes` promises."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace


class ValueSizes(Protocol):
    """Norms of values, relative to the largest of their group, and between what their columns lie."""

    def __call__(self, xp: Namespace, v: Array) -> tuple[Array, Array, Array]:
        """Return ‖v‖ divided by the largest norm of a finite row in the group, and each column's least and largest number.

        Norms are taken in units in which nothing overflows or underflows, whatever the units of the rows. No gradients.

        Parameters
        ----------
        xp
            Array namespace of ``v``.
        v
            (G, n, d_v) floating-point, n ≥ 1.

        Returns
        -------
        sizes
            (G, n) of the dtype computed in; 0 for a row with a number that is not finite, and everywhere where the group's
            finite rows are all 0.
        low, high
            (G, d_v) each, of the dtype of ``v``; NaN for a column that holds one. O(G n d_v).
        """
