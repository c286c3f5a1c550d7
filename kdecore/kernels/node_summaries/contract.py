"""What every implementation of `node_summaries` promises, and how much it takes."""

from typing import NamedTuple, Protocol

from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.site import Largest, beyond

NUMBERS = 2**12
"""Of a tile of rows or nodes in Triton, at most: 32 a thread, which leaves room for another program meanwhile."""
MOST_PLACES = 2**31 - 1
"""Nodes and keys of a tree together, at most, in Triton, which numbers them in 32 bits."""


def triton_limit(largest: Largest) -> str | None:
    """Return why the kernel in Triton doesn't take so much, or None where it does: a tile holds the rows of a leaf."""
    widest = NUMBERS // max(2, 1 << (largest.leaf_size - 1).bit_length())
    sizes = (
        ("d", widest, largest.d),
        ("d_v", widest, largest.d_v),
        ("directions", widest, largest.directions),
        ("nodes and keys", MOST_PLACES, largest.nodes + largest.n_k),
    )
    return next((said for size in sizes if (said := beyond(*size))), None)


LIMITS = {"triton": triton_limit}


class TreeNodes(NamedTuple):
    """Means and spreads of the N = `kdecore.core.tree.node_count` nodes of a tree over n keys.

    All are of the dtype computed in; on accelerators keys and values may be of that of k where it is bfloat16 (float16 might
    not hold a spread), and rows of values may lie further apart than they are wide.

    Attributes
    ----------
    keys
        (G, N + n, d): the mean key of each node, then the key at each position.
    values
        (G, N + n, d_v + 1): mean values and values likewise, and in a last column the spread s of each node, 0 for keys.
        Where half_norm · s exceeds ln c, for a node of c keys, √(s ln c / half_norm) takes its place: the largest of c
        logits is no further from their mean (the frozen phase of `kdecore.kernels.open_tree.contract.OpenTree`).
    spread
        (G, N): mean squared distance of a node's keys to their mean.
    variances
        (G, N, p): variance of each coordinate within a node.
    sizes
        (G, N): mean size of a node's values.
    """

    keys: Array
    values: Array
    spread: Array
    variances: Array
    sizes: Array


class NodeSummaries(Protocol):
    """Summarise the keys and values in every node of a tree (`kdecore.core.tree`)."""

    def __call__(
        self,
        xp: Namespace,
        k: Array,
        v: Array,
        coordinates: Array,
        sizes: Array,
        order: Array,
        leaf_size: int,
        half_norm: Array,
    ) -> TreeNodes:
        """Return the summaries of all nodes.

        Spreads and variances are merged from those of the children (Chan, Golub & LeVeque 1979), without the cancellation
        of a difference of squares.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        k, v
            (G, n, d) keys and (G, n, d_v) values, n ≥ 1, of one floating dtype; half precision on accelerators only. All
            other numbers are of the dtype that it is computed in, float64 for float64 and float32 for the others.
        coordinates
            (G, n, p) coordinates of the keys.
        sizes
            (G, n) sizes of the values.
        order
            (G, n) int64: the key at each position of the tree.
        leaf_size
            Keys in a leaf, at least 2, so that no leaf is empty.
        half_norm
            (G,) ≥ 0: what a spread is multiplied by to become half the variance of a typical query's logits.

        Returns
        -------
        TreeNodes
            In O(G n (d + d_v + p)).
        """
