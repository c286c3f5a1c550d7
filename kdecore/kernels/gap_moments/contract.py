"""What every implementation of `gap_moments` promises."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.site import Largest, beyond

TURN = round((5**0.5 - 1.0) / 2.0 * 2**32)
"""Of 2**32: the golden ratio, whose multiples fall evenly."""
WIDEST, MOST_NODES = 128, 2**24 - 1
"""Columns of keys and of values, and nodes, at most, in Triton."""


def triton_limit(largest: Largest) -> str | None:
    """Return why the kernel in Triton doesn't take so much, or None where it does."""
    sizes = ("d", WIDEST, largest.d), ("d_v", WIDEST, largest.d_v), ("nodes", MOST_NODES, largest.nodes)
    return next((said for size in sizes if (said := beyond(*size))), None)


LIMITS = {"triton": triton_limit}


class GapMoments(Protocol):
    """Average products of what keys and their values differ by from means, where attention meets closed nodes."""

    def __call__(
        self, xp: Namespace, keys: Array, values: Array, key_index: Array, share: Array, nodes: int, draws: int
    ) -> tuple[Array, Array]:
        """Return Σ κ νᵀ / Σ ‖κ‖², where κ and ν are the gaps of a key drawn and of its value, and what chance leaves of it.

        The i-th of the keys is drawn from the first node of a list at which the sum of shares reaches (i + ½) / ``draws`` of
        all; of its c keys it is number ⌊c · ((i + 1) `TURN` mod 2³²) / 2³²⌋. Gaps are to the node's means. Of a block
        without shares, any nodes are drawn from.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        keys, values
            (G, N + n, d) and (G, N + n, d_v + 1), as `kdecore.kernels.node_summaries.contract.TreeNodes` has them; the last
            column of values is left out.
        key_index, share
            (G, C, s): lists of C blocks and the shares of their closed nodes, as `kdecore.kernels.open_tree` returns them.
        nodes
            N.
        draws
            Keys drawn for each block, a multiple of 32.

        Returns
        -------
        matrices
            (G, C, d, d_v), of the dtype of keys, float32 for half precision; 0 where no key drawn has a gap.
        chances
            (G, C), of that dtype: Σ ‖κ‖² ‖ν‖² / (Σ ‖κ‖²)², the expected sum of a matrix's squares where gaps of keys and of
            values have nothing to do with each other; 0 where no key drawn has a gap. O(G C draws d d_v).
        """
