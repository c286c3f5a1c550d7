"""`node_summaries` in the array API: level by level, from the leaves up."""

from kdecore.arrays.namespace import Array, Namespace, host
from kdecore.arrays.rows import take_rows
from kdecore.core.tree import bounds, depth
from kdecore.kernels.node_summaries.contract import TreeNodes


def node_summaries(
    xp: Namespace,
    k: Array,
    v: Array,
    coordinates: Array,
    sizes: Array,
    order: Array,
    leaf_size: int,
    half_norm: Array,
) -> TreeNodes:
    """Follow `kdecore.kernels.node_summaries.contract.NodeSummaries`."""
    k, v = (xp.astype(x, coordinates.dtype, copy=False) for x in (k, v))
    keys, variances = means_and_variances(xp, k, order, leaf_size)
    values, _ = means_and_variances(xp, v, order, leaf_size)
    _, along = means_and_variances(xp, coordinates, order, leaf_size)
    means, _ = means_and_variances(xp, sizes[:, :, None], order, leaf_size)
    nodes = int(variances.shape[1])
    spread = xp.sum(variances, axis=-1)
    n = int(k.shape[1])
    counts = host.concat([host.diff(bounds(n, level)) for level in range(depth(n, leaf_size) + 1)])
    logs = xp.asarray(host.log(counts), dtype=spread.dtype, device=spread.device)
    frozen = half_norm[:, None] * spread > logs
    # Where nothing is frozen, 1: a root's slope at 0 is infinite, and 0 times it NaN.
    limited = xp.sqrt(xp.where(frozen, spread * logs / xp.where(frozen, half_norm[:, None], 1.0), 1.0))
    last = xp.concat([xp.where(frozen, limited, spread), xp.zeros_like(order, dtype=spread.dtype)], axis=1)
    return TreeNodes(keys, xp.concat([values, last[:, :, None]], axis=-1), spread, along, means[:, :nodes, 0])


def means_and_variances(xp: Namespace, rows: Array, order: Array, leaf_size: int) -> tuple[Array, Array]:
    """Return the means of all nodes and then the rows in order, (G, N + n, w), and the variances (G, N, w)."""
    groups, n, width = (int(size) for size in rows.shape)
    group = xp.arange(groups, dtype=xp.int64, device=rows.device)[:, None]
    ordered = take_rows(xp, xp.reshape(rows, (groups * n, width)), order + group * n)
    last = depth(n, leaf_size)
    starts = bounds(n, last)
    largest = int(host.max(starts[1:] - starts[:-1]))
    place = starts[:-1, None] + host.arange(largest)[None, :]
    held = xp.asarray(place < starts[1:, None], device=rows.device)[:, :, None]
    place = host.reshape(host.minimum(place, host.asarray(n - 1)), (-1,))
    # Leaves counted, and not left to reshape, which can't tell how many there are of rows without columns.
    leaves = (groups, len(starts) - 1, largest, width)
    members = xp.reshape(xp.take(ordered, xp.asarray(place, device=rows.device), axis=1), leaves)
    count = xp.asarray(starts[1:] - starts[:-1], dtype=rows.dtype, device=rows.device)[:, None]
    mean = xp.sum(xp.where(held, members, 0.0), axis=2) / count
    variance = xp.sum(xp.where(held, members - mean[:, :, None, :], 0.0) ** 2, axis=2) / count
    means, variances = [ordered, mean], [variance]
    for level in range(last - 1, -1, -1):
        starts = bounds(n, level + 1)
        count = xp.asarray(starts[1:] - starts[:-1], dtype=rows.dtype, device=rows.device)[:, None]
        left = count[::2, :] / (count[::2, :] + count[1::2, :])
        right = 1.0 - left
        gap = mean[:, ::2, :] - mean[:, 1::2, :]
        mean = left * mean[:, ::2, :] + right * mean[:, 1::2, :]
        variance = left * variance[:, ::2, :] + right * variance[:, 1::2, :] + left * right * gap**2
        means.append(mean)
        variances.append(variance)
    return xp.concat(means[::-1], axis=1), xp.concat(variances[::-1], axis=1)
