"""What every implementation of `attend_tree` promises."""

from dataclasses import replace
from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.state import AttentionState
from kdecore.core.tree import BlockQueries, Tree
from kdecore.kernels.attend_blocks.contract import backward_limit
from kdecore.kernels.open_tree.contract import triton_limit as opening_limit
from kdecore.kernels.site import Largest

AT_ONCE = 2**24
"""Slots of lists that are in memory together, at most, but for one block's, where they are made in memory."""


def triton_limit(largest: Largest) -> str | None:
    """Return why the kernel in Triton doesn't take so much, or None where it does.

    As with gradients, tiles of wider rows do not fit the registers beside what changes results at the end.
    """
    return opening_limit(largest) or backward_limit(replace(largest, d_v=largest.d_v + 1))


LIMITS = {"triton": triton_limit}


class AttendTree(Protocol):
    """Attend to the lists that `kdecore.kernels.open_tree` would make, a block at a time: none is made in memory."""

    def __call__(
        self,
        xp: Namespace,
        queries: BlockQueries,
        tree: Tree,
        values: Array,
        threshold: Array,
        most: int,
        start: tuple[int, int, int],
        own: Array | None = None,
        slope: Array | None = None,
        limits: tuple[Array, Array] | None = None,
        before: AttentionState | None = None,
    ) -> tuple[AttentionState, Array]:
        """Return softmax attention of each query to its block's list, and how long the lists are.

        Parameters
        ----------
        xp, queries, tree, threshold, most, start
            As `kdecore.kernels.open_tree.contract.OpenTree` takes them.
        values
            (G, N + n_k, d_v + 1): as `kdecore.kernels.node_summaries.contract.TreeNodes` has them.
        own
            (G, n_q) int64: the position of each query's own key, −1 for none, which it sees beside its block's list unless
            that has it; or None.
        slope
            (G, m, d, d_v) matrices, of which block i of B takes number ⌊i · m / B⌋: the last column of values says how much
            of scale · q @ slope is added to a result; or None for nothing.
        limits
            (G, d_v) and (G, d_v): no result is less than the first or more than the second, as no mean of values is; or
            None.
        before
            (G, n_q, d_v) and (G, n_q): attention to other keys, which the result is merged with, and whose memory it may
            take. Queries in no block keep it; without it their rows mean nothing.

        Returns
        -------
        part
            out (G, n_q, d_v) and lse (G, n_q), of the dtype that it is computed in.
        counts
            (G, B) int64: how many slots each block's list has.
            O(Σ counts · b · (d + d_v)), and a block's list at a time of memory for each thread.
        """
