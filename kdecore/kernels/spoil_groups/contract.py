"""What every implementation of `spoil_groups` promises."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace


class SpoilGroups(Protocol):
    """Let a key or value that is not finite do what it does to its group, without telling the host."""

    def __call__(self, xp: Namespace, lse: Array, k: Array, v: Array) -> Array:
        """Return ``lse``, NaN where a group has a key or value that is not finite, but for −∞, of a query that sees no key.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        lse
            (G, n_q), of the dtype that is computed in.
        k, v
            (G, n_k, d) and (G, n_k, d_v), of one floating dtype.

        Returns
        -------
        Array
            (G, n_q), of the dtype of ``lse``. O(G (n_q + n_k (d + d_v))).
        """
