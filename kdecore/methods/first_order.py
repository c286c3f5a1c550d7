"""The first-order term: what a closed node's keys of larger logits make of its mean value (derived).

A node's mean value leaves out that keys of larger logits weigh more: to first order its values' mean under attention is
v̄ + Cov_h(v, k) q. All nodes are taken to have covariances of one shape, in proportion to their spread. The shape is
measured where it is used: where the attention of some blocks meets closed nodes.
"""

from collections.abc import Callable
from typing import Any

from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.node_summaries.contract import TreeNodes

DAMPING = 0.85
"""Of the term, since nodes open along the directions that matter most, which leaves less of them within (bench/NOTES.md)."""
ALL_DRAWS, DRAWS, FEWEST_DRAWS = 2**15, 512, 64
"""Keys that the matrices of all blocks are measured with, and of one block, at most and at least: chunks of causal
attention have a pilot each."""


def first_order(
    xp: Namespace,
    nodes: TreeNodes,
    key_index: Array,
    share: Array,
    multiply: Callable[..., Any],
    shrink: Callable[..., Array],
    each_block: bool = True,
) -> Array:
    """Return for each of C blocks `DAMPING` times what the mean value of a node of unit spread gains for a unit of a query.

    Keys are drawn where attention meets closed nodes: nodes in proportion to their share, evenly spaced, and of a node one
    after another. What a block's matrix has in common with those of its group counts; of the rest, as of what they have in
    common, as much as is surely no chance.

    Parameters
    ----------
    xp
        Array namespace of the arrays.
    nodes
        Summaries of the tree, and the keys and values in its order.
    key_index, share
        (G, C, s), as `kdecore.kernels.open_tree` returns them.
    multiply, shrink
        The kernels `gap_moments` and `shrink_matrices`.
    each_block
        Whether each block has a matrix of its own, or what they have in common is that of all.

    Returns
    -------
    Array
        (G, C, d, d_v), or (G, 1, d, d_v). O(G C draws d d_v).
    """
    groups, blocks, _ = key_index.shape
    draws = key_draws(groups * blocks)
    matrices, chances = multiply(xp, nodes.keys, nodes.values, key_index, share, int(nodes.spread.shape[1]), draws)
    found: Array = shrink(xp, matrices, chances, each_block, DAMPING)
    return found


def key_draws(blocks: int) -> int:
    """Return how many keys the first-order matrices of so many blocks are measured with, each."""
    return max(FEWEST_DRAWS, min(DRAWS, ALL_DRAWS // blocks // 32 * 32))
