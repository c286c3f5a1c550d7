"""`tree_order` in the array API: level by level, all nodes of a level at once."""

from kdecore.arrays.namespace import Array, Namespace, host
from kdecore.arrays.rows import row_norms, take_along_rows, take_rows
from kdecore.core.tree import cuts
from kdecore.kernels.tree_order.contract import ITERATIONS, SAMPLE


def tree_order(xp: Namespace, x: Array, parts: int, in_order: int = 0) -> Array:
    """Follow `kdecore.kernels.tree_order.contract.TreeOrder`."""
    groups, n, d = x.shape
    x = xp.where(xp.isfinite(x), x, 0.0)
    flat = xp.reshape(x, (groups * n, d))
    group = xp.arange(groups, dtype=xp.int64, device=x.device)[:, None]
    order = xp.broadcast_to(xp.arange(n, dtype=xp.int64, device=x.device), (groups, n))
    for level in range(in_order, (parts - 1).bit_length()):
        starts = cuts(n, parts, level)
        sizes = starts[1:] - starts[:-1]
        samples = min(SAMPLE, int(host.max(sizes)))
        place = starts[:-1, None] + host.arange(samples)[None, :] * sizes[:, None] // samples
        sampled = xp.take(order, xp.asarray(host.reshape(place, (-1,)), device=x.device), axis=1)
        rows = xp.reshape(take_rows(xp, flat, sampled + group * n), (groups * 2**level, samples, d))
        directions = xp.reshape(leading_directions(xp, rows), (groups, 2**level, d))
        node = nodes_of(xp, starts, x.device)
        along = xp.sum(take_rows(xp, flat, order + group * n) * xp.take(directions, node, axis=1), axis=-1)
        along = xp.where(xp.take(xp.asarray(sizes, device=x.device), node) > 2, along, 0.0)
        child = nodes_of(xp, cuts(n, parts, level + 1), x.device)
        order = sort_nodes(xp, sort_nodes(xp, order, along, node), None, child)
    return order


def leading_directions(xp: Namespace, rows: Array) -> Array:
    """Return the leading principal direction of each set of rows, (N, s, d) → (N, d), of length 1, or 0 for equal rows."""
    rows = rows - xp.mean(rows, axis=1, keepdims=True)
    widest = xp.argmax(xp.sum(rows * rows, axis=1), axis=1)
    first = widest[:, None] == xp.arange(rows.shape[2], dtype=widest.dtype, device=rows.device)[None, :]
    direction = xp.astype(first, rows.dtype)
    for _ in range(ITERATIONS):
        along = rows @ direction[:, :, None]
        direction = xp.matrix_transpose(rows) @ along
        direction = direction[:, :, 0] / length_or_one(xp, direction[:, :, 0])
    return direction


def length_or_one(xp: Namespace, vectors: Array) -> Array:
    """Return each vector's length, 1 for those of length 0, (N, d) → (N, 1)."""
    length = row_norms(xp, vectors)[:, None]
    return xp.where(length > 0, length, 1.0)


def nodes_of(xp: Namespace, starts: Array, device: object) -> Array:
    """Return the node of a level that each position lies in, int64 (n,)."""
    return xp.asarray(host.repeat(host.arange(len(starts) - 1), host.diff(starts)), device=device)


def sort_nodes(xp: Namespace, order: Array, key: Array | None, node: Array) -> Array:
    """Sort the rows of every node by ``key`` (G, n), ties and None by row; node is (n,), ascending."""
    by = xp.argsort(order, axis=1, stable=True)
    if key is not None:
        by = take_along_rows(xp, by, xp.argsort(take_along_rows(xp, key, by), axis=1, stable=True))
    by = take_along_rows(xp, by, xp.argsort(take_rows(xp, node, by), axis=1, stable=True))
    return take_along_rows(xp, order, by)
