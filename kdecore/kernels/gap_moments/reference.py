"""`gap_moments` in the array API."""

from kdecore.arrays.namespace import Array, Namespace, accumulation_dtype, dtype_name
from kdecore.arrays.rows import take_along_rows
from kdecore.core.tree import node_bounds
from kdecore.kernels.gap_moments.contract import TURN


def gap_moments(
    xp: Namespace, keys: Array, values: Array, key_index: Array, share: Array, nodes: int, draws: int
) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.gap_moments.contract.GapMoments`."""
    drawn, mean = draw(xp, key_index, share, nodes, int(keys.shape[1]) - nodes, draws)
    dtype = accumulation_dtype(xp, dtype_name(keys))

    def gaps(rows: Array) -> Array:
        few, means = (xp.astype(take_along_rows(xp, rows, index), dtype, copy=False) for index in (drawn, mean))
        return few - means

    of_keys, of_values = gaps(keys), gaps(values)[..., :-1]
    spreads, sizes = xp.sum(of_keys * of_keys, axis=-1), xp.sum(of_values * of_values, axis=-1)
    spread = xp.sum(spreads, axis=-1)
    unit = xp.where(spread > 0, 1.0 / xp.where(spread > 0, spread, 1.0), 0.0)
    matrices = xp.matrix_transpose(of_keys) @ of_values * unit[..., None, None]
    return matrices, xp.sum(spreads * sizes, axis=-1) * unit * unit


def draw(xp: Namespace, key_index: Array, share: Array, nodes: int, n: int, draws: int) -> tuple[Array, Array]:
    """Return the rows of the keys drawn, and the nodes that they are drawn from: int64 (G, C, draws)."""
    groups, blocks, _ = key_index.shape
    device = share.device
    sums = xp.cumulative_sum(share, axis=-1, dtype=xp.float64)
    total, number = sums[..., -1:], xp.arange(draws, dtype=xp.int64, device=device)
    # Numbered through all blocks they ascend, so that one search finds them.
    block = xp.reshape(xp.arange(groups * blocks, dtype=xp.float64, device=device), (groups, blocks, 1))
    ascending = xp.reshape(sums / xp.where(total > 0, total, 1.0) + block, (-1,))
    wanted = xp.reshape((xp.astype(number, xp.float64) + 0.5) / draws + block, (-1,))
    slot = xp.searchsorted(ascending[:-1], wanted)
    # What has no share may be no node.
    node = xp.clip(xp.reshape(xp.take(xp.reshape(key_index, (-1,)), slot), (groups, blocks, draws)), 0, nodes - 1)
    begin, end = node_bounds(xp, node, n)
    return nodes + begin + (((end - begin) * ((number + 1) * TURN % 2**32)) >> 32), node
