"""`open_tree` in the array API: all blocks at once, round by round."""

import math

from kdecore.kernels.open_tree.contract import GROWTH, REFRESH
from kdecore.namespaces import Array, Namespace, take_along_rows, take_rows
from kdecore.tree import node_bounds


def open_tree(
    xp: Namespace,
    q: Array,
    scale: float,
    coordinates: Array,
    query_index: Array,
    keys: Array,
    spread: Array,
    variances: Array,
    sizes: Array,
    own: Array | None,
    slots: int,
    start: tuple[int, int, int],
) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.open_tree.contract.OpenTree`."""
    q = xp.astype(q, coordinates.dtype, copy=False)
    nodes = int(variances.shape[1])
    n, first_leaf = int(keys.shape[1]) - nodes, nodes // 2
    queries = gather(xp, xp.where(xp.all(xp.isfinite(q), axis=-1, keepdims=True), q, 0.0) * scale, query_index)
    squares = coordinates * coordinates
    squares = gather(xp, xp.where(xp.isfinite(squares), squares, 0.0), query_index)

    def weigh(node: Array) -> tuple[Array, Array]:
        """Return log-weights, and σ times sizes, (G, B, b, f) of nodes (G, B, f); −1 is an empty place."""
        at = xp.maximum(node, xp.zeros_like(node))
        begin, end = node_bounds(xp, at, n)
        log_count = xp.log(xp.astype(end - begin, q.dtype))[:, :, None, :]
        sigma = frozen(xp, 0.5 * (squares @ xp.matrix_transpose(gather(xp, variances, at))), log_count)
        logits = queries @ xp.matrix_transpose(gather(xp, keys, at)) + sigma + log_count
        empty = (node < 0)[:, :, None, :]
        size = gather(xp, sizes[:, :, None], at)[:, :, None, :, 0]
        return xp.where(empty, -xp.inf, logits), xp.where(empty, 0.0, sigma * size)

    wanted = slots - (0 if own is None else int(own.shape[2]))
    level, first, last = start
    used, refreshed = last - first, 0
    closed = (1 << level) - 1 + xp.arange(first, last, dtype=xp.int64, device=q.device)
    closed = xp.broadcast_to(closed, (*query_index.shape[:2], used))
    opened = closed[:, :, :0]
    logits, sigma = weigh(closed)
    error, is_new = xp.zeros(closed.shape, dtype=q.dtype, device=q.device), closed >= 0
    taken = xp.full(query_index.shape[:2], used, dtype=xp.int64, device=q.device)
    ended = taken < 0
    while used < wanted:
        refresh = used >= REFRESH * refreshed
        refreshed = used if refresh else refreshed
        top = xp.max(logits, axis=-1, keepdims=True)
        weights = xp.exp(logits - top)
        shares = weights / xp.sum(weights, axis=-1, keepdims=True)
        error = xp.where(is_new | refresh, xp.sum((shares * sigma) ** 4, axis=2), error)
        step = min(max(1, used // GROWTH), wanted - used)
        used += step
        worst_first = xp.argsort(xp.where(closed < 0, xp.inf, -error), axis=-1, stable=True)
        worst, kept = worst_first[:, :, :step], worst_first[:, :, step:]
        node, node_logits, node_sigma, node_error = (take_last(xp, x, worst) for x in (closed, logits, sigma, error))
        fits, taken = make_room(xp, node, taken, wanted, n, first_leaf, ended)
        ended = ended | ~xp.any(fits, axis=-1)
        leaf = node >= first_leaf
        split, whole = fits & ~leaf, fits & leaf
        opened = xp.concat([opened, xp.where(whole, node, -1)], axis=-1)
        # An opened leaf is no longer closed, but its weight stays.
        left, right = xp.where(split, 2 * node + 1, xp.where(whole, -1, node)), xp.where(split, 2 * node + 2, -1)
        (left_logits, left_sigma), (right_logits, right_sigma) = weigh(left), weigh(right)
        left_logits = xp.where(split[:, :, None, :], left_logits, node_logits)
        left_sigma = xp.where(split[:, :, None, :], left_sigma, node_sigma)
        closed = xp.concat([take_last(xp, closed, kept), left, right], axis=-1)
        logits = xp.concat([take_last(xp, logits, kept), left_logits, right_logits], axis=-1)
        sigma = xp.concat([take_last(xp, sigma, kept), left_sigma, right_sigma], axis=-1)
        error = xp.concat([take_last(xp, error, kept), node_error, node_error], axis=-1)
        is_new = xp.concat([xp.zeros_like(kept, dtype=xp.bool), split, split], axis=-1)
    norms = xp.mean(xp.sum(queries * queries, axis=-1), axis=-1)
    half_spread = gather(xp, spread[:, :, None], xp.maximum(closed, xp.zeros_like(closed)))[..., 0] * (
        norms[:, :, None] * (0.5 / int(q.shape[2]))
    )
    return listed(xp, closed, half_spread, opened, own, slots, n, nodes)


def make_room(
    xp: Namespace, node: Array, taken: Array, wanted: int, n: int, first_leaf: int, ended: Array
) -> tuple[Array, Array]:
    """Return which of the nodes (G, B, c), in this order, can be opened, and how many slots are taken then."""
    start, end = node_bounds(xp, xp.maximum(node, xp.zeros_like(node)), n)
    cost = xp.where(node >= first_leaf, end - start - 1, 1)
    fits = []
    for i in range(node.shape[2]):
        room = (node[:, :, i] >= 0) & ~ended & (taken + cost[:, :, i] <= wanted)
        taken = taken + xp.where(room, cost[:, :, i], 0)
        fits.append(room)
    return xp.stack(fits, axis=-1), taken


def listed(
    xp: Namespace, closed: Array, half_spread: Array, opened: Array, own: Array | None, slots: int, n: int, nodes: int
) -> tuple[Array, Array]:
    """Return rows and log-weights of own keys, closed nodes (G, B, f) and the keys of opened leaves (G, B, o)."""
    groups, blocks, _ = closed.shape
    dtype, device = half_spread.dtype, half_spread.device
    start, end = node_bounds(xp, xp.maximum(closed, xp.zeros_like(closed)), n)
    count = xp.where(closed < 0, 0, end - start)
    leaf_start, leaf_end = node_bounds(xp, xp.maximum(opened, xp.zeros_like(opened)), n)
    largest = -(-n // ((nodes + 1) // 2))
    position = leaf_start[..., None] + xp.arange(largest, dtype=xp.int64, device=device)
    held = (position < leaf_end[..., None]) & (opened >= 0)[..., None]
    position, held = xp.reshape(position, (groups, blocks, -1)), xp.reshape(held, (groups, blocks, -1))
    if own is not None:
        again = xp.concat([xp.zeros_like(own[:, :, :1], dtype=xp.bool), own[:, :, 1:] == own[:, :, :-1]], axis=-1)
        once = ~again[:, :, None, :]
        inside = (own[:, :, None, :] >= start[..., None]) & (own[:, :, None, :] < end[..., None]) & once
        count = xp.where(closed < 0, 0, count - xp.sum(xp.astype(inside, xp.int64), axis=-1))
        held = held & ~xp.any(position[..., None] == own[:, :, None, :], axis=-1)
    log_count = xp.log(xp.astype(xp.maximum(count, xp.ones_like(count)), dtype))
    several = end - start > 1
    weight = xp.where(count > 0, log_count + xp.where(several, frozen(xp, half_spread, log_count), 0.0), -xp.inf)
    row = xp.concat([xp.where(closed < 0, 0, closed), xp.where(held, position + nodes, 0)], axis=-1)
    zero = xp.zeros((1,), dtype=dtype, device=device)
    weight = xp.concat([weight, xp.where(held, zero, -xp.inf)], axis=-1)
    # What counts comes first; no more than the slots do.
    first = xp.argsort(xp.astype(weight == -xp.inf, xp.int64), axis=-1, stable=True)
    wanted = slots - (0 if own is None else int(own.shape[2]))
    if int(first.shape[2]) < wanted:
        missing = (groups, blocks, wanted - int(first.shape[2]))
        row = xp.concat([row, xp.zeros(missing, dtype=xp.int64, device=device)], axis=-1)
        weight = xp.concat([weight, xp.full(missing, -xp.inf, dtype=dtype, device=device)], axis=-1)
    else:
        row, weight = (take_last(xp, x, first[:, :, :wanted]) for x in (row, weight))
    if own is None:
        return row, weight
    return xp.concat([own + nodes, row], axis=-1), xp.concat([xp.where(again, -xp.inf, zero), weight], axis=-1)


def frozen(xp: Namespace, half_variance: Array, log_count: Array) -> Array:
    """Return ln of the mean of exp over so many normal numbers, as the contract has it."""
    beyond = 2.0 * xp.sqrt(half_variance * xp.where(log_count > 0, log_count, 0.0)) - log_count
    return xp.where(half_variance > log_count, beyond, half_variance)


def gather(xp: Namespace, values: Array, index: Array) -> Array:
    """Take rows (G, B, r) of (G, N, w): (G, B, r, w)."""
    groups = int(values.shape[0])
    group = xp.reshape(xp.arange(groups, dtype=xp.int64, device=values.device), (-1, 1, 1))
    return take_rows(xp, xp.reshape(values, (-1, *values.shape[2:])), index + group * values.shape[1])


def take_last(xp: Namespace, values: Array, index: Array) -> Array:
    """Take elements (G, B, r) of the last axis of (G, B, f) or (G, B, b, f)."""
    if values.ndim == 4:
        index = xp.broadcast_to(index[:, :, None, :], (*values.shape[:3], index.shape[2]))
    rows = math.prod(values.shape[:-1])
    flat = xp.reshape(values, (rows, values.shape[-1]))
    return xp.reshape(take_along_rows(xp, flat, xp.reshape(index, (rows, index.shape[-1]))), index.shape)
