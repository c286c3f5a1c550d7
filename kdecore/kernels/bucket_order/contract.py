"""What every implementation of `bucket_order` promises."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace


class BucketOrder(Protocol):
    """Sort rows by bucket."""

    def __call__(self, xp: Namespace, codes: Array, bits: int) -> Array:
        """Return the stable ascending order of each group's codes.

        Parameters
        ----------
        xp
            Array namespace of ``codes``.
        codes
            (G, n) integers in [0, 2**bits).
        bits
            At most 30: how many of a code's bits tell, which spares a look at the codes.

        Returns
        -------
        Array
            (G, n) int64, a permutation in each row; rows of one bucket keep their order. At most O(G n log n).
        """
