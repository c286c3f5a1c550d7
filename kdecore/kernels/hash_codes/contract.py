"""What every implementation of `hash_codes` promises."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace


class HashCodes(Protocol):
    """Hash rows by the signs of their centred projections, and number the buckets along the Gray code."""

    def __call__(self, xp: Namespace, q: Array, k: Array, planes: Array) -> tuple[Array, Array]:
        """Return the buckets of queries and of keys.

        Bit i of a row's sign pattern is ⟨x − mean(x), planes[:, i]⟩ > 0, the mean taken over those of each group's queries,
        or keys, whose projection is finite. The bucket is the pattern's rank in Gray order (its inverse Gray code), so
        buckets r and r + 1 differ in one bit.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        q, k
            (G, n_q, d) and (G, n_k, d) of one floating dtype, half precision on accelerators only.
        planes
            (d, r) hyperplane normals, float64 for float64 rows and float32 for others, r ≤ 30.

        Returns
        -------
        tuple
            (G, n_q) and (G, n_k) int16 for r ≤ 15, else int32, in [0, 2**r). O(G (n_q + n_k) d r).
        """
