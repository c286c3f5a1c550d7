"""What every implementation of `gap_moments` promises."""

from typing import Protocol

from kdecore.namespaces import Array, Namespace


class GapMoments(Protocol):
    """Average products of what keys and their values differ by from means."""

    def __call__(self, xp: Namespace, keys: Array, values: Array, drawn: Array, mean: Array) -> tuple[Array, Array, Array]:
        """Return the means of κ νᵀ, ‖κ‖² and ‖κ‖² ‖ν‖², where κ and ν are the gaps of a key drawn and of its value.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        keys, values
            (G, R, d) and (G, R, d_v + 1), as `kdecore.kernels.node_summaries.contract.TreeNodes` has them; the last column
            of values is left out.
        drawn, mean
            (G, C, D) int64: rows of the keys drawn for each block, and of the means that they are compared with.

        Returns
        -------
        products, spreads, sizes
            (G, C, d, d_v), (G, C) and (G, C), of the dtype of keys, float32 for half precision. O(G C D d d_v).
        """
