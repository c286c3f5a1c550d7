"""What every implementation of `hash_codes` promises."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace


class HashCodes(Protocol):
    """Hash rows by the signs of their centred projections, and number the buckets along the Gray code."""

    def __call__(self, xp: Namespace, x: Array, planes: Array) -> Array:
        """Return each row's bucket.

        Bit i of the sign pattern is ⟨x − mean(x), planes[:, i]⟩ > 0, the mean taken over each group's rows
        whose projection is finite. The bucket is the pattern's rank in Gray order (its inverse Gray code), so buckets r and
        r + 1 differ in one bit.

        Parameters
        ----------
        xp
            Array namespace of ``x``.
        x
            (G, n, d) floating-point, of half precision on accelerators only.
        planes
            (d, r) hyperplane normals, float64 for float64 rows and float32 for others, r ≤ 30.

        Returns
        -------
        Array
            (G, n) int16 for r ≤ 15, else int32, in [0, 2**r). O(G n d r).
        """
