"""`open_tree` in the array API: all blocks at once, round by round."""

import math

from kdecore.kernels.open_tree.contract import GROWTH
from kdecore.namespaces import Array, Namespace, take_along_rows, take_rows
from kdecore.tree import inner_nodes, levels


def open_tree(
    xp: Namespace,
    q: Array,
    query_index: Array,
    probes: Array,
    keys: Array,
    half_variances: Array,
    half_spread: Array,
    importance: Array,
    own: Array | None,
    slots: int,
) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.open_tree.contract.OpenTree`."""
    groups, blocks, rows = query_index.shape
    inner = int(half_variances.shape[1])
    n = int(keys.shape[1]) - inner
    device = q.device

    def gather(values: Array, index: Array) -> Array:
        flat = xp.reshape(values, (-1, *values.shape[2:]))
        group = xp.reshape(xp.arange(groups, dtype=xp.int64, device=device), (-1, 1, 1))
        return take_rows(xp, flat, index + group * values.shape[1])

    queries, block_probes = gather(q, query_index), gather(probes, query_index)

    def weigh(node: Array) -> tuple[Array, Array]:
        """Return log-weights and unnormalised errors (G, B, b, f) of nodes (G, B, f); −1 is an empty slot."""
        row, start, end = node_rows(xp, xp.maximum(node, xp.zeros_like(node)), n)
        size = xp.log(xp.astype(xp.maximum(end - start, xp.ones_like(end)), q.dtype))[:, :, None, :]
        if inner:
            parent = xp.minimum(row, xp.full_like(row, inner - 1))
            closed = (end - start > 1)[:, :, None, :]
            variances = xp.matrix_transpose(gather(half_variances, parent))
            spread = xp.where(closed, frozen(xp, block_probes @ variances, size), 0.0)
            value = gather(importance, parent)[:, :, None, :]
        else:
            spread = value = xp.zeros((1,), dtype=q.dtype, device=device)
        logits = queries @ xp.matrix_transpose(gather(keys, row)) + spread + size
        empty = (node < 0)[:, :, None, :]
        return xp.where(empty, -xp.inf, logits), xp.where(empty, 0.0, spread * value)

    node = xp.zeros((groups, blocks, 1), dtype=xp.int64, device=device)
    logits, errors = weigh(node)
    wanted = slots if own is None else slots - rows
    while node.shape[2] < wanted:
        used = int(node.shape[2])
        count = min(max(1, used // GROWTH), wanted - used)
        top = xp.max(logits, axis=-1, keepdims=True)
        weights = xp.exp(logits - top)
        shares = weights / xp.sum(weights, axis=-1, keepdims=True) * errors
        error = xp.where(node < 0, -1.0, xp.sum(shares**4, axis=2))
        worst_first = xp.argsort(-error, axis=-1, stable=True)
        kept = worst_first[:, :, count:]
        parents = take_last(xp, node, worst_first[:, :, :count])
        _, start, end = node_rows(xp, xp.maximum(parents, xp.zeros_like(parents)), n)
        single = (parents < 0) | (end - start == 1)
        left = xp.where(single, parents, 2 * parents + 1)
        right = xp.where(single, -1, 2 * parents + 2)
        left_logits, left_errors = weigh(left)
        right_logits, right_errors = weigh(right)
        node = xp.concat([take_last(xp, node, kept), left, right], axis=-1)
        logits = xp.concat([take_last(xp, logits, kept), left_logits, right_logits], axis=-1)
        errors = xp.concat([take_last(xp, errors, kept), left_errors, right_errors], axis=-1)
    return listed(xp, node, queries, half_spread, own, n)


def listed(xp: Namespace, node: Array, queries: Array, half_spread: Array, own: Array | None, n: int) -> tuple[Array, Array]:
    """Return rows and log-weights of the nodes (G, B, f) left closed, after those of own keys."""
    groups, blocks, used = node.shape
    row, start, end = node_rows(xp, xp.maximum(node, xp.zeros_like(node)), n)
    count = xp.where(node < 0, 0, end - start)
    if own is not None:
        again = xp.concat([xp.zeros_like(own[:, :, :1], dtype=xp.bool), own[:, :, 1:] == own[:, :, :-1]], axis=-1)
        inside = (own[:, :, None, :] >= start[..., None]) & (own[:, :, None, :] < end[..., None]) & ~again[:, :, None, :]
        count = xp.where(node < 0, 0, count - xp.sum(xp.astype(inside, xp.int64), axis=-1))
    inner = int(half_spread.shape[1])
    size = xp.log(xp.astype(xp.maximum(count, xp.ones_like(count)), queries.dtype))
    weight = size
    if inner:
        parent = xp.reshape(xp.minimum(row, xp.full_like(row, inner - 1)), (groups, blocks * used))
        spread = xp.reshape(take_along_rows(xp, half_spread, parent), node.shape)
        spread = spread * xp.mean(xp.sum(queries * queries, axis=-1), axis=-1)[:, :, None]
        weight = size + xp.where(end - start > 1, frozen(xp, spread, size), 0.0)
    weight = xp.where(count > 0, weight, -xp.inf)
    if own is None:
        return row, weight
    own_weight = xp.where(again, -xp.inf, xp.zeros(own.shape, dtype=queries.dtype, device=queries.device))
    return xp.concat([own + inner, row], axis=-1), xp.concat([own_weight, weight], axis=-1)


def frozen(xp: Namespace, half_variance: Array, log_size: Array) -> Array:
    """Return ln of the mean of exp over so many normal numbers, as the contract has it."""
    beyond = 2.0 * xp.sqrt(half_variance * xp.where(log_size > 0, log_size, 0.0)) - log_size
    return xp.where(half_variance > log_size, beyond, half_variance)


def node_rows(xp: Namespace, node: Array, n: int) -> tuple[Array, Array, Array]:
    """Return each node's row among means and keys, and where its positions begin and end; all int64, as ``node``."""
    level = xp.zeros_like(node)
    for depth in range(1, levels(n) + 1):
        level = level + xp.astype(node >= 2**depth - 1, xp.int64)
    place = node + 1 - (xp.ones_like(node) << level)
    start, end = (place * n) >> level, ((place + 1) * n) >> level
    return xp.where(node < inner_nodes(n), node, start + inner_nodes(n)), start, end


def take_last(xp: Namespace, values: Array, index: Array) -> Array:
    """Take elements (G, B, r) of the last axis of (G, B, f) or (G, B, b, f)."""
    if values.ndim == 4:
        index = xp.broadcast_to(index[:, :, None, :], (*values.shape[:3], index.shape[2]))
    rows = math.prod(values.shape[:-1])
    flat = xp.reshape(values, (rows, values.shape[-1]))
    return xp.reshape(take_along_rows(xp, flat, xp.reshape(index, (rows, index.shape[-1]))), index.shape)
