"""`open_sweeps` in the array API: many blocks at once, sweep by sweep."""

import math

from kdecore.kernels.open_sweeps.contract import (
    GROWTH,
    HALVINGS,
    LARGEST_ERROR,
    LARGEST_SHARE,
    LEAST_SHARE,
    MORE_SWEEPS,
    OCTAVES,
    PART,
    SUMMED_SWEEPS,
)
from kdecore.kernels.open_tree.reference import frozen, gather
from kdecore.namespaces import Array, Namespace, quiet, spans, take_along_rows
from kdecore.tree import node_bounds


def open_sweeps(
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
    """Follow `kdecore.kernels.open_sweeps.contract.OpenSweeps`, in parts whose logits memory holds."""
    groups, blocks, rows = query_index.shape
    q, keys = (xp.astype(x, coordinates.dtype, copy=False) for x in (q, keys))
    queries = xp.where(xp.all(xp.isfinite(q), axis=-1, keepdims=True), q, 0.0) * scale
    squares = coordinates * coordinates
    squares = xp.where(xp.isfinite(squares), squares, 0.0)
    tree = keys, spread, variances, sizes
    found = [
        open_part(
            xp,
            gather(xp, queries, query_index[:, part, :]),
            gather(xp, squares, query_index[:, part, :]),
            *tree,
            None if own is None else own[:, part, :],
            slots,
            start,
        )
        for part in spans(blocks, max(1, PART // (groups * rows * slots)))
    ]
    if len(found) == 1:
        return found[0]
    return xp.concat([index for index, _ in found], axis=1), xp.concat([weight for _, weight in found], axis=1)


def open_part(
    xp: Namespace,
    queries: Array,
    squares: Array,
    keys: Array,
    spread: Array,
    variances: Array,
    sizes: Array,
    own: Array | None,
    slots: int,
    start: tuple[int, int, int],
) -> tuple[Array, Array]:
    """Return the lists of some blocks, of scaled queries (G, B, b, d) and squares of their coordinates (G, B, b, p)."""
    nodes, dtype, device = int(variances.shape[1]), queries.dtype, queries.device
    n, first_leaf, last = int(keys.shape[1]) - nodes, nodes // 2, ((nodes + 1) // 2).bit_length() - 1

    def weigh(node: Array, lse: Array | None = None) -> tuple[Array, Array, Array]:
        """Return ln w (G, B, b, f) of nodes (G, B, f), ranks beside ``lse`` or their own sum, and counts; −1 is none."""
        at = xp.maximum(node, xp.zeros_like(node))
        begin, end = node_bounds(xp, at, n)
        count = xp.astype(end - begin, dtype)
        log_count = xp.log(count)[:, :, None, :]
        sigma = frozen(xp, 0.5 * (squares @ xp.matrix_transpose(gather(xp, variances, at))), log_count)
        logits = queries @ xp.matrix_transpose(gather(xp, keys, at)) + sigma + log_count
        logits = xp.where((node < 0)[:, :, None, :], -xp.inf, logits)
        above = logits - (log_sum(xp, logits) if lse is None else lse)[..., None]
        size = gather(xp, sizes[:, :, None], at)[:, :, None, :, 0]
        with quiet():  # what is too large in float32 counts as the largest
            share = xp.exp(xp.clip(above, LEAST_SHARE, LARGEST_SHARE))
            errors = xp.sum((share * sigma * size) ** 4, axis=2)
        rank = xp.minimum(errors, xp.full_like(errors, LARGEST_ERROR)) ** (GROWTH / 4) / count
        return logits, xp.where(node < 0, 0.0, rank), xp.where(node < 0, 0.0, count)

    wanted = slots - (0 if own is None else int(own.shape[2]))
    level, first, end = start
    node = (1 << level) - 1 + xp.arange(first, end, dtype=xp.int64, device=device)
    node = xp.broadcast_to(node, (*queries.shape[:2], end - first))
    logits, rank, count = weigh(node)
    leaves = [node[:, :, :0]]
    leaves_lse = xp.full_like(logits[..., 0], -xp.inf)
    keys_listed = xp.zeros(queries.shape[:2], dtype=dtype, device=device)
    for sweep in range(last - level + 1 + MORE_SWEEPS):
        is_leaf = node >= first_leaf
        opened = rank > threshold(xp, rank, count, is_leaf, wanted - keys_listed)[..., None]
        if sweep < SUMMED_SWEEPS:
            lse = xp.logaddexp(log_sum(xp, logits), leaves_lse)
        whole, split = opened & is_leaf, opened & ~is_leaf
        leaves.append(xp.where(whole, node, -1))
        leaves_lse = xp.logaddexp(leaves_lse, log_sum(xp, xp.where(whole[:, :, None, :], logits, -xp.inf)))
        keys_listed = keys_listed + xp.sum(xp.where(whole, count, 0.0), axis=-1)
        children = xp.concat([xp.where(split, 2 * node + 1, -1), xp.where(split, 2 * node + 2, -1)], axis=-1)
        found = (
            (xp.where(opened, -1, node), xp.where(opened[:, :, None, :], -xp.inf, logits), rank, count),
            (
                children,
                *weigh(children, lse),
            ),
        )
        node, logits, rank, count = (xp.concat(pair, axis=-1) for pair in zip(*found, strict=True))
        # What counts comes first, no more than the slots do.
        place = xp.argsort(xp.astype(node < 0, xp.int64), axis=-1, stable=True)[:, :, : min(wanted, int(node.shape[2]))]
        node, logits, rank, count = (take_last(xp, x, place) for x in (node, logits, rank, count))
        rank, count = (xp.where(node < 0, 0.0, x) for x in (rank, count))
    norms = xp.mean(xp.sum(queries * queries, axis=-1), axis=-1)
    half_spread = gather(xp, spread[:, :, None], xp.maximum(node, xp.zeros_like(node)))[..., 0] * (
        norms[:, :, None] * (0.5 / int(queries.shape[3]))
    )
    return listed(xp, node, half_spread, xp.concat(leaves, axis=-1), own, slots, n, nodes)


def threshold(xp: Namespace, rank: Array, count: Array, is_leaf: Array, room: Array) -> Array:
    """Return the least threshold for which nodes of ranks and counts (G, B, f), 0 for none, need at most ``room``."""
    there, two = xp.astype(count > 0, rank.dtype), xp.full_like(rank, 2.0)
    top = xp.max(rank, axis=-1)
    high = xp.log2(xp.where(top > 0, top, 1.0)) + 1.0
    low = high - OCTAVES
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        limit = (2.0**middle)[..., None]
        predicted = xp.where(is_leaf, count, xp.minimum(count, xp.maximum(two, rank / limit)))
        fits = xp.sum(xp.where(rank > limit, predicted, there), axis=-1) <= room
        low, high = xp.where(fits, low, middle), xp.where(fits, middle, high)
    return 2.0**high


def log_sum(xp: Namespace, logits: Array) -> Array:
    """Return ln Σ exp over the last axis, −∞ of nothing."""
    top = xp.max(logits, axis=-1)
    top = xp.where(top == -xp.inf, 0.0, top)
    total = xp.sum(xp.exp(logits - top[..., None]), axis=-1)
    return xp.where(total > 0, xp.log(xp.where(total > 0, total, 1.0)) + top, -xp.inf)


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


def take_last(xp: Namespace, values: Array, index: Array) -> Array:
    """Take elements (G, B, r) of the last axis of (G, B, f) or (G, B, b, f)."""
    if values.ndim == 4:
        index = xp.broadcast_to(index[:, :, None, :], (*values.shape[:3], index.shape[2]))
    rows = math.prod(values.shape[:-1])
    flat = xp.reshape(values, (rows, values.shape[-1]))
    return xp.reshape(take_along_rows(xp, flat, xp.reshape(index, (rows, index.shape[-1]))), index.shape)
