"""What every implementation of `node_means` promises."""

from typing import Protocol

from kdecore.namespaces import Array, Namespace


class NodeMeans(Protocol):
    """Summarise the rows of every node of a tree (`kdecore.tree`)."""

    def __call__(self, xp: Namespace, rows: Array, order: Array) -> tuple[Array, Array]:
        """Return means of all nodes and, after them, the rows themselves; and the nodes' spreads.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        rows
            (G, n, w) floating-point, n ≥ 1.
        order
            (G, n) int64: the row at each position of the tree.

        Returns
        -------
        means
            (G, N + n, w) of rows' dtype, N = `kdecore.tree.inner_nodes`: the mean of the rows of nodes 0 … N − 1, then
            the row at each position.
        spread
            (G, N): mean squared distance of a node's rows to their mean. Merged from the children's (Chan, Golub & LeVeque
            1979), without the cancellation of a difference of squares. O(G n w).
        """
