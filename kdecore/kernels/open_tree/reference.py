"""`open_tree` in the array API: all blocks at once, level by level. Widths of levels are read from the arrays."""

from typing import NamedTuple

from kdecore.arrays.namespace import Array, Namespace
from kdecore.arrays.rows import take_rows
from kdecore.core.tree import BlockQueries, Tree, depth_of
from kdecore.kernels.open_tree.contract import ALONG, LEAST, SHORT, STEP


class Loaded(NamedTuple):
    """Queries of blocks.

    Attributes
    ----------
    scaled
        (G, B, b, d).
    squares, half_norms
        (G, B, b, p), `ALONG` / 2 of their squared coordinates; (G, B, b), ‖q‖² / 2d.
    apart
        As in `BlockQueries`.
    """

    scaled: Array
    squares: Array
    half_norms: Array
    apart: bool


class Sums(NamedTuple):
    """Each query's largest logit so far, and the sum of weights of closed nodes relative to it, (G, B, b)."""

    top: Array
    closed: Array


def open_tree(
    xp: Namespace,
    queries: BlockQueries,
    tree: Tree,
    threshold: Array,
    most: int,
    start: tuple[int, int, int],
) -> tuple[Array, Array, Array, Array]:
    """Follow `kdecore.kernels.open_tree.contract.OpenTree`."""
    loaded = load(xp, queries)
    last, n = depth_of(tree.nodes), tree.n
    limit = xp.broadcast_to(threshold, queries.index.shape[:2])
    while True:
        level = start[0]
        current, sums = first_level(xp, start, loaded)
        closed: list[tuple[Array, Array, Array]] = []
        while True:
            sums, logits, listed, error = weigh(xp, tree, loaded, level, current, sums)
            opened = (current >= 0) & (error > limit[..., None])
            shut = (current >= 0) & ~opened
            weights = xp.where(shut[:, :, None, :], xp.exp(logits - sums.top[..., None]), 0.0)
            total = sums.closed + xp.sum(xp.exp(logits - sums.top[..., None]), axis=-1)
            sums = Sums(sums.top, sums.closed + xp.sum(weights, axis=-1))
            closed.append((xp.where(shut, current + (1 << level) - 1, -1), listed, logits))
            if level == last:
                break
            step = STEP - (last - level) % STEP
            (current,) = compact(xp, descendants(xp, xp.where(opened, current, -1), step))
            level += step
        leaves = xp.where(opened, current, -1)
        node, log_weights, all_logits = (xp.concat([one[i] for one in closed], axis=-1) for i in range(3))
        begin, end = (leaves * n) >> last, ((leaves + 1) * n) >> last
        counts = xp.sum(xp.astype(node >= 0, xp.int64), axis=-1) + xp.sum(xp.where(leaves >= 0, end - begin, 0), axis=-1)
        if int(xp.max(counts)) <= most:
            break
        limit = xp.where(counts > most, 2.0 * xp.where(limit > LEAST, limit, LEAST), limit)
    # Where nothing was left of what was closed before, it gets no more than all.
    share = xp.exp(xp.minimum(all_logits - sums.top[..., None], xp.log(total)[..., None])) / total[..., None]
    share = xp.where(node >= 0, xp.mean(share, axis=2), 0.0)
    largest = -(-n // (1 << last))
    position = begin[..., None] + xp.arange(largest, dtype=xp.int64, device=share.device)
    held = (position < end[..., None]) & (leaves >= 0)[..., None]
    single = xp.reshape(xp.where(held, position + tree.nodes, -1), (*queries.index.shape[:2], -1))
    row = xp.concat([node, single], axis=-1)
    zeros = xp.zeros(single.shape, dtype=share.dtype, device=share.device)
    weight, share = xp.concat([log_weights, zeros], axis=-1), xp.concat([share, zeros], axis=-1)
    # What counts comes first; no more than the longest list has.
    longest = max(1, int(xp.max(counts)))
    first = xp.argsort(xp.astype(row < 0, xp.int64), axis=-1, stable=True)[:, :, :longest]
    row, weight, share = (take_last(xp, x, first) for x in (row, weight, share))
    return xp.where(row < 0, 0, row), xp.where(row < 0, -xp.inf, weight), xp.where(row < 0, 0.0, share), counts


def load(xp: Namespace, queries: BlockQueries) -> Loaded:
    """Gather the queries of blocks."""
    q, scale, coordinates, query_index, apart = queries
    q = xp.astype(q, coordinates.dtype, copy=False)
    finite = xp.all(xp.isfinite(q), axis=-1, keepdims=True)
    scaled = gather(xp, xp.where(finite, q, 0.0) * scale, query_index)
    squares = coordinates * coordinates
    squares = gather(xp, xp.where(xp.isfinite(squares) & finite, squares, 0.0), query_index)
    return Loaded(scaled, 0.5 * ALONG * squares, xp.sum(scaled * scaled, axis=-1) * (0.5 / int(q.shape[2])), apart)


def first_level(xp: Namespace, start: tuple[int, int, int], queries: Loaded) -> tuple[Array, Sums]:
    """Return the nodes that all blocks begin with, numbered within their level, (G, B, m), and sums of nothing."""
    _, first, end = start
    shape, like = queries.scaled.shape[:3], queries.half_norms
    node = xp.arange(first, end, dtype=xp.int64, device=like.device)
    top = xp.full(shape, -1e30, dtype=like.dtype, device=like.device)
    return xp.broadcast_to(node, (*shape[:2], end - first)), Sums(top, xp.zeros_like(top))


def weigh(
    xp: Namespace, tree: Tree, queries: Loaded, level: int, current: Array, sums: Sums
) -> tuple[Sums, Array, Array, Array]:
    """Weigh nodes (G, B, m) of a level, −1 for none: return sums, logits (G, B, b, m), log-weights, errors (G, B, m)."""
    at = xp.maximum(current, xp.zeros_like(current))
    begin, end = (at * tree.n) >> level, ((at + 1) * tree.n) >> level
    node = at + ((1 << level) - 1)
    log_count = xp.log(xp.astype(end - begin, queries.scaled.dtype))
    variances, spread = gather(xp, tree.variances, node), gather(xp, tree.spread[:, :, None], node)[..., 0]
    norm = xp.mean(queries.half_norms, axis=-1, keepdims=True)
    along = xp.mean(queries.squares, axis=2)[:, :, None, :] @ xp.matrix_transpose(variances)
    half = along[:, :, 0, :] + spread * norm
    sigma = frozen(xp, half, log_count)
    listed = frozen(xp, half, reached(log_count)) + log_count
    if queries.apart:
        along = queries.squares @ xp.matrix_transpose(variances)
        own = along + spread[:, :, None, :] * queries.half_norms[..., None]
        sigmas = frozen(xp, own, log_count[:, :, None, :])
    else:
        ratio = xp.where(norm > 0, queries.half_norms / xp.where(norm > 0, norm, 1.0), 1.0)
        sigmas = sigma[:, :, None, :] * ratio[..., None]
    logits = queries.scaled @ xp.matrix_transpose(gather(xp, tree.keys, node)) + (sigma + log_count)[:, :, None, :]
    logits = xp.where((current < 0)[:, :, None, :], -xp.inf, logits)
    largest = xp.max(logits, axis=-1)
    top = xp.maximum(sums.top, largest)
    closed = sums.closed * xp.exp(sums.top - top)
    # Of a node that was opened and weighed so much more than what is left that nothing is left of that.
    lost = (closed + xp.sum(xp.exp(logits - top[..., None]), axis=-1) == 0) & (largest > -xp.inf)
    top, closed = xp.where(lost, largest, top), xp.where(lost, 0.0, closed)
    weights = xp.exp(logits - top[..., None])
    total = closed + xp.sum(weights, axis=-1)
    shares = weights / xp.where(total > 0, total, 1.0)[..., None]
    error = xp.sum((shares * sigmas) ** 4, axis=2) ** 0.25 * gather(xp, tree.sizes[:, :, None], node)[..., 0]
    return Sums(top, closed), logits, listed, xp.where(current < 0, 0.0, error)


def descendants(xp: Namespace, node: Array, step: int) -> Array:
    """Return the descendants of nodes (G, B, m), so many levels down, numbered within their level; −1 of −1."""
    below = xp.arange(1 << step, dtype=xp.int64, device=node.device)
    found = xp.where(node[..., None] < 0, -1, (node[..., None] << step) + below)
    return xp.reshape(found, (*node.shape[:2], -1))


def compact(xp: Namespace, node: Array, *others: Array) -> list[Array]:
    """Return nodes (G, B, m), and others of that shape, without places that no block needs; −1 is empty, and stands last."""
    held = node >= 0
    longest = int(xp.max(xp.sum(xp.astype(held, xp.int64), axis=-1)))
    first = xp.argsort(xp.astype(~held, xp.int64), axis=-1, stable=True)[:, :, : max(1, longest)]
    return [take_last(xp, x, first) for x in (node, *others)]


def reached(log_count: Array) -> Array:
    """Return half variances whose mean of exp so many draws, their logarithm given, are expected to reach."""
    return log_count * log_count / (log_count + SHORT)


def frozen(xp: Namespace, half_variance: Array, limit: Array) -> Array:
    """Return ln of the mean of exp over normal numbers, whose half variance counts in full up to a limit."""
    beyond = 2.0 * xp.sqrt(half_variance * xp.where(limit > 0, limit, 0.0)) - limit
    return xp.where(half_variance > limit, beyond, half_variance)


def gather(xp: Namespace, values: Array, index: Array) -> Array:
    """Take rows (G, B, r) of (G, N, w): (G, B, r, w)."""
    groups = int(values.shape[0])
    group = xp.reshape(xp.arange(groups, dtype=xp.int64, device=values.device), (-1, 1, 1))
    return take_rows(xp, xp.reshape(values, (-1, *values.shape[2:])), index + group * values.shape[1])


def take_last(xp: Namespace, values: Array, index: Array) -> Array:
    """Take elements (G, B, r) of the last axis of (G, B, f)."""
    return xp.take_along_axis(values, index, axis=-1)
