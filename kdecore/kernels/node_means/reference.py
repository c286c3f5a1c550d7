"""`node_means` in the array API: level by level, from the rows up."""

from kdecore.namespaces import Array, Namespace, host, take_rows
from kdecore.tree import bounds, levels


def node_means(xp: Namespace, rows: Array, order: Array) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.node_means.contract.NodeMeans`."""
    groups, n, width = rows.shape
    group = xp.arange(groups, dtype=xp.int64, device=rows.device)[:, None]
    sorted_rows = take_rows(xp, xp.reshape(rows, (groups * n, width)), order + group * n)
    depth = levels(n)
    starts = bounds(n, depth)
    # Slots of the lowest level hold one row or none.
    held = xp.asarray(host.minimum(starts[:-1], host.asarray(n - 1)), device=rows.device)
    mean = xp.take(sorted_rows, held, axis=1)
    spread = xp.zeros((groups, 2**depth), dtype=rows.dtype, device=rows.device)
    means, spreads = [sorted_rows], [spread[:, :0]]
    for level in range(depth - 1, -1, -1):
        starts = bounds(n, level + 1)
        count = xp.asarray(starts[1:] - starts[:-1], dtype=rows.dtype, device=rows.device)
        left = count[::2] / (count[::2] + count[1::2])
        right = 1.0 - left
        # An empty slot weighs nothing, even where its row's number is not finite.
        mean = xp.where(count[:, None] > 0, mean, 0.0)
        low, high = mean[:, ::2, :], mean[:, 1::2, :]
        mean = left[:, None] * low + right[:, None] * high
        between = left * right * xp.sum((low - high) ** 2, axis=-1)
        spread = left * spread[:, ::2] + right * spread[:, 1::2] + between
        means.append(mean)
        spreads.append(spread)
    return xp.concat(means[::-1], axis=1), xp.concat(spreads[::-1], axis=1)
