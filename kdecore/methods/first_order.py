"""The first-order term: what a closed node's keys of larger logits make of its mean value (derived).

A node's mean value leaves out that keys of larger logits weigh more: to first order its values' mean under attention is
v̄ + Cov_h(v, k) q. All nodes are taken to have covariances of one shape, in proportion to their spread. The shape is
measured where it is used: where the attention of some blocks meets closed nodes.
"""

from collections.abc import Callable
from typing import Any

from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.namespaces import Array, Namespace
from kdecore.planning import key_draws

DAMPING = 0.85
"""Of the term, since nodes open along the directions that matter most, which leaves less of them within (bench/NOTES.md)."""


def first_order(
    xp: Namespace, nodes: TreeNodes, key_index: Array, share: Array, multiply: Callable[..., Any], apart: bool = True
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
    multiply
        The kernel `gap_moments`.
    apart
        Whether each block has a matrix of its own, or what they have in common is that of all.

    Returns
    -------
    Array
        (G, C, d, d_v), or (G, 1, d, d_v). O(G C draws d d_v).
    """
    groups, blocks, _ = key_index.shape
    draws = key_draws(groups * blocks)
    products, spread, sizes = multiply(xp, nodes.keys, nodes.values, key_index, share, int(nodes.spread.shape[1]), draws)
    spread, sizes = spread[..., None, None], sizes[..., None, None]
    unit = 1.0 / xp.where(spread > 0, spread, 1.0)
    matrix = products * unit
    # Of rows that have nothing to do with each other, so much is left by chance.
    chance = sizes * unit**2 / draws
    common = certain(xp, xp.mean(matrix, axis=1, keepdims=True), xp.mean(chance, axis=1, keepdims=True) / blocks)
    return DAMPING * (common + certain(xp, matrix - common, chance) if apart else common)


def certain(xp: Namespace, matrix: Array, chance: Array) -> Array:
    """Return what of matrices (…, d, d_v) is more than chance, the expected sum of its squares, leaves."""
    signal = xp.sum(matrix * matrix, axis=(-2, -1), keepdims=True)
    above = signal > chance
    return matrix * (xp.where(above, signal - chance, 0.0) / xp.where(above, signal, 1.0))
