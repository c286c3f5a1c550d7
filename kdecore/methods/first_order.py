"""The first-order term: what a closed node's keys of larger logits make of its mean value (derived).

A node's mean value leaves out that keys of larger logits weigh more: to first order its values' mean under attention is
v̄ + Cov_h(v, k) q. All nodes are taken to have covariances of one shape, in proportion to their spread. The shape is
measured where it is used: where the attention of some blocks meets closed nodes.
"""

import math
from collections.abc import Callable

from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.namespaces import Array, Namespace, searchsorted_rows, take_along_rows
from kdecore.planning import DRAWS
from kdecore.tree import node_bounds

DAMPING = 0.85
"""Of the term, since nodes open along the directions that matter most, which leaves less of them within (bench/NOTES.md)."""
GOLDEN_RATIO = (math.sqrt(5.0) - 1.0) / 2.0


def first_order(xp: Namespace, nodes: TreeNodes, key_index: Array, share: Array, multiply: Callable[..., Array]) -> Array:
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

    Returns
    -------
    Array
        (G, C, d, d_v). O(G C `DRAWS` d d_v).
    """
    groups, blocks, _ = key_index.shape
    count, dtype, device = int(nodes.spread.shape[1]), nodes.spread.dtype, nodes.spread.device
    n = int(nodes.keys.shape[1]) - count
    node = xp.where(key_index < count, key_index, 0)
    sums = xp.cumulative_sum(share, axis=-1)
    total = sums[..., -1:]
    number = xp.arange(DRAWS, dtype=dtype, device=device)
    wanted = (number + 0.5) / DRAWS * total
    flat, wanted = (xp.reshape(x, (groups * blocks, -1)) for x in (sums, wanted))
    slot = xp.clip(searchsorted_rows(xp, flat, wanted, side="left"), 0, int(key_index.shape[2]) - 1)
    drawn = xp.reshape(take_along_rows(xp, xp.reshape(node, (groups * blocks, -1)), slot), (groups, blocks, DRAWS))
    begin, end = node_bounds(xp, drawn, n)
    turn = (number + 1.0) * GOLDEN_RATIO
    place = xp.astype((turn - xp.floor(turn)) * xp.astype(end - begin, dtype), xp.int64)
    position = xp.minimum(begin + place, end - 1) + count

    products, spread, sizes = multiply(xp, nodes.keys, nodes.values, position, drawn)
    spread, sizes = spread[..., None, None], sizes[..., None, None]
    unit = 1.0 / xp.where(spread > 0, spread, 1.0)
    matrix = products * unit
    # Of rows that have nothing to do with each other, so much is left by chance.
    chance = sizes * unit * unit / DRAWS
    common = certain(xp, xp.mean(matrix, axis=1, keepdims=True), xp.mean(chance, axis=1, keepdims=True) / blocks)
    return DAMPING * (common + certain(xp, matrix - common, chance))


def certain(xp: Namespace, matrix: Array, chance: Array) -> Array:
    """Return what of matrices (…, d, d_v) is more than chance, the expected sum of its squares, leaves."""
    signal = xp.sum(matrix * matrix, axis=(-2, -1), keepdims=True)
    above = signal > chance
    return matrix * (xp.where(above, signal - chance, 0.0) / xp.where(above, signal, 1.0))
