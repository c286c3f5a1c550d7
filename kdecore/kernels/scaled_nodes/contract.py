"""What every implementation of `scaled_nodes` promises, and how much it takes."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.kernels.site import Largest, beyond

LEAF_ROWS, FEWEST_LEAF_ROWS, MOST_LEAF_ROWS = 8192, 64, 1024
"""Rows of all groups that spreads within leaves are taken from, and of each group at least, and about as many at most:
chunks of causal attention are many groups."""
MOST_DIRECTIONS = 32
"""Coordinates, at most, in Numba CUDA, which multiplies the directions of all as a tile of rows."""


def numba_cuda_limit(largest: Largest) -> str | None:
    """Return why the kernel in Numba CUDA doesn't take so much, or None where it does."""
    return beyond("directions", MOST_DIRECTIONS, largest.directions)


LIMITS = {"numba-cuda": numba_cuda_limit}


def spacing(n: int, groups: int) -> int:
    """Return how far apart those of n rows in the order of a tree are, from the first one, that gaps are taken from."""
    rows = max(FEWEST_LEAF_ROWS, min(MOST_LEAF_ROWS, LEAF_ROWS // groups))
    # An odd step meets all places of a leaf.
    return max(1, n // rows) | 1


class ScaledNodes(Protocol):
    """Scale what `node_summaries` finds to what trees are opened by."""

    def __call__(
        self,
        xp: Namespace,
        nodes: TreeNodes,
        moment: Array,
        directions: Array,
        half_norm: Array,
        scale: float,
        octaves: float,
    ) -> tuple[Array, Array]:
        """Return the nodes' spreads times the part of them that coordinates don't see, and their sizes by level.

        The half variance of a leaf's logits, over queries of second moment C, is the mean of ½ κᵀ C κ over the gaps κ
        between keys and their mean. `open_tree` takes `ALONG` of what coordinates see of it, and the rest in proportion to
        the spread: spreads are multiplied by what makes half variances right in the mean over leaves (derived), at least 0
        and at most d, which it is if leaves are as wide along all directions as along one. The means are over rows in the
        order of the tree that are `spacing` apart, and over their leaves.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        nodes
            Of a tree; without gradients, as all others are.
        moment
            (G, d, d) float64, symmetric, positive semidefinite: mean x xᵀ of queries.
        directions
            (G, d, p), of the dtype that is computed in: what turns queries into coordinates, ``scale`` included.
        half_norm
            (G,) ≥ 0, of that dtype: what a spread is multiplied by to become half the variance of a typical query's logits.
        scale
            Finite factor on ⟨q, k⟩.
        octaves
            Sizes are multiplied by 2^(octaves · level).

        Returns
        -------
        spread, sizes
            (G, N) each, of that dtype. O(G (N + `MOST_LEAF_ROWS` · d²)).
        """
