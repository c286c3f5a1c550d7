"""What every implementation of `tree_order` promises."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace

SAMPLE = 256
"""Rows of a node, evenly spaced, that its direction is found from."""
ITERATIONS = 1
"""Power iterations for it."""


class TreeOrder(Protocol):
    """Order rows by a balanced tree of median splits along each node's leading principal direction."""

    def __call__(self, xp: Namespace, x: Array, parts: int, in_order: int = 0) -> Array:
        """Return the order in which the tree holds the rows, whose nodes are those of `kdecore.core.tree.cuts`.

        Every node of more than one part is cut where its children meet, by the projection on its direction (ties: the lower
        row first); its children hold their rows in ascending order. The direction is found from
        S = min(`SAMPLE`, size of the level's largest node) rows, the ⌊j · size / S⌋-th of the node: started from the
        coordinate of largest variance, `ITERATIONS` power iterations on the sample's covariance. Nodes of one or two rows
        are cut as they are.

        Parameters
        ----------
        xp
            Array namespace of ``x``.
        x
            (G, n, d) floating-point rows, n ≥ 1; numbers that are not finite count as 0.
            Of any size whose fourth power, summed over the sample, the dtype can hold.
        parts
            Equal parts that the rows end up in, at least 1: as many as the leaves of a tree over keys, as the blocks of
            queries. No part's rows lie on both sides of a cut.
        in_order
            Levels whose nodes are cut as they are, so that a node of level ``in_order`` holds the rows of its own positions.

        Returns
        -------
        Array
            (G, n) int64: the row at each position. O(G n (d log parts + ITERATIONS · d · log SAMPLE)).
        """
