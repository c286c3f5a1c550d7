"""`Selection`: which keys each block of queries attends to, and with which log-weight.

Every estimator is a Selection. It is unbiased in numerator and denominator when, for every block and every key,
Σ (inclusion probability × exp(log_weight)) = 1; tests/test_unbiasedness.py checks that exactly, without sampling.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeAlias

from kdecore.arrays.kept import kept_on_device
from kdecore.arrays.namespace import Array, NamedDevice, Namespace, named_device
from kdecore.arrays.rows import first_places, take_along_rows, take_columns, take_rows
from kdecore.core.tree import Tree


@dataclass(frozen=True)
class Blocks:
    """Queries cut into blocks of nearly equal size, in some order.

    Attributes
    ----------
    index
        (G, B, b) int64: the query in each row of each block. Blocks one shorter than the longest repeat their last
        query; those rows are computed and dropped.
    starts
        B + 1 Python ints: block i holds starts[i + 1] − starts[i] queries, those from starts[i] on of the order.
    """

    index: Array
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Selection:
    """Blocks of queries, and each block's list of keys with log-weights.

    Attributes
    ----------
    blocks
        The query blocks, or None where no query is set apart from any other.
    key_index
        (G, B, s) int64 into the keys, or None for all keys at log-weight 0.
    log_weight
        (G, B, s), added to the logits: −log of the inclusion probability, or what a mean of keys counts for; −inf for a
        slot that does not count; None with ``key_index``.
    log_normaliser
        (G, n_q), natural log of each query's softmax denominator, where an estimator knows it better than the sum over
        its keys; None for that sum.
    keys, values
        (G, s_k, d) and (G, s_k, d_v) that ``key_index`` refers to, where they are not the problem's own; None for those.
    slope
        (G, m, d, d_v) matrices, of which block i of B takes number ⌊i · m / B⌋: the last of then d_v + 1 columns of
        ``values`` says how much of scale · q @ slope is added to a result; None for nothing.
    limits
        (G, d_v) and (G, d_v): no result of lists is less than the first or more than the second; or None.
    own
        (G, n_q) int64: a key of the problem that each query sees beside its block's list, −1 for none; or None.
    bias
        (1, b, s), or (G · B, b, s): what is added to the logit of each row of a block and each slot, −inf where it doesn't
        count; None for 0.
    """

    blocks: Blocks | None = None
    key_index: Array | None = None
    log_weight: Array | None = None
    log_normaliser: Array | None = None
    keys: Array | None = None
    values: Array | None = None
    slope: Array | None = None
    limits: tuple[Array, Array] | None = None
    own: Array | None = None
    bias: Array | None = None


@dataclass(frozen=True)
class Opening:
    """A Selection that is made block by block while it is evaluated: a tree opened down to a threshold.

    Attributes
    ----------
    blocks
        The query blocks.
    coordinates, apart, tree, threshold, most, start
        What `kdecore.kernels.open_tree` makes each block's list of.
    values
        (G, N + n_k, d_v + 1): as `kdecore.kernels.node_summaries.contract.TreeNodes` has them.
    slope, limits
        As in `Selection`.
    own
        (G, n_q) int64: the position in the tree of a key that each query sees beside its block's list, −1 for none; or None.
    first_query
        What the query is numbered in the problem that is number 0 here.
    """

    blocks: Blocks
    coordinates: Array
    apart: bool
    tree: Tree
    values: Array
    threshold: Array
    most: int
    start: tuple[int, int, int]
    slope: Array | None = None
    limits: tuple[Array, Array] | None = None
    own: Array | None = None
    first_query: int = 0


Selected: TypeAlias = Selection | Opening


class Slots(NamedTuple):
    """How many slots count: for all queries together, and in the longest list.

    Numbers, or 0-d arrays, which nothing waits for.
    """

    total: Array | int
    longest: Array | int


def slots_evaluated(xp: Namespace, selection: Selection) -> Slots:
    """Return how many slots of a Selection count. O(G B s)."""
    assert selection.blocks is not None
    counts = xp.sum(xp.astype(xp.isfinite(selection.log_weight), xp.int64), axis=-1)
    return slots_of(xp, counts, selection.blocks, selection.own)


def slots_of(xp: Namespace, counts: Array, blocks: Blocks, own: Array | None) -> Slots:
    """Return how many slots count, of lists of so many slots (G, B), with keys of queries' own beside them."""
    sizes = xp.asarray([end - start for start, end in pairwise(blocks.starts)], dtype=xp.int64, device=counts.device)
    total = xp.sum(counts * sizes)
    if own is not None:
        total = total + xp.sum(xp.astype(own >= 0, xp.int64))
    return Slots(total, xp.max(counts))


def changed(xp: Namespace, q: Array, selection: Selection, multiply: Callable[..., Array], scale: float) -> Array:
    """Return scale · q @ slope for queries (G, n_q, d), each with the matrix of its block: (G, n_q, d_v)."""
    assert selection.slope is not None
    assert selection.blocks is not None
    index, count = selection.blocks.index, int(selection.slope.shape[1])
    groups, blocks, _ = index.shape
    n_q = int(q.shape[1])
    if count == 1:
        return multiply(xp, q, selection.slope[:, 0, ...] * scale)
    parts = []
    for i in range(count):
        rows = index[:, -(-i * blocks // count) : -(-(i + 1) * blocks // count), :]
        matrix = selection.slope[:, i, ...] * scale
        parts.append(multiply(xp, take_along_rows(xp, q, xp.reshape(rows, (groups, -1))), matrix))
    return in_order_of_queries(xp, index, xp.reshape(xp.concat(parts, axis=1), (*index.shape, -1)), n_q)


def in_order_of_queries(xp: Namespace, index: Array, rows: Array, n_q: int) -> Array:
    """Return what is known of the rows of blocks, (G, B, b, …), for each of the queries that they hold: (G, n_q, …)."""
    groups, rest = int(index.shape[0]), rows.shape[3:]
    offset = xp.arange(groups, dtype=xp.int64, device=index.device)[:, None, None] * n_q
    place, _ = first_places(xp, xp.reshape(index + offset, (-1,)), groups * n_q)
    return xp.reshape(take_rows(xp, xp.reshape(rows, (-1, *rest)), place), (groups, n_q, *rest))


def shifted(xp: Namespace, selection: Selected, query: int, key: int, n_q: int) -> Selected:
    """Turn a Selection of some queries and keys into one of all n_q: these begin with the query and the key given."""
    if isinstance(selection, Opening):
        return replace(selection, first_query=selection.first_query + query)
    assert selection.blocks is not None
    assert selection.key_index is not None
    blocks = Blocks(selection.blocks.index + query, selection.blocks.starts)
    key_index = selection.key_index if selection.keys is not None else selection.key_index + key
    own = selection.own
    if own is not None:
        before, after = (
            xp.full((int(own.shape[0]), count), -1, dtype=own.dtype, device=own.device)
            for count in (query, n_q - query - int(own.shape[1]))
        )
        own = xp.concat([before, xp.where(own < 0, -1, own + key), after], axis=1)
    return replace(selection, blocks=blocks, key_index=key_index, own=own)


def together(xp: Namespace, selections: list[Selection]) -> list[Selection]:
    """Make one Selection of several for different queries, with the same keys and values, where their blocks match.

    Shorter lists are filled with slots that don't count. With first-order matrices all must have as many blocks, and as many
    matrices, so that each block still has its own.
    """
    blocks = [one.blocks for one in selections if one.blocks is not None]
    sizes = {
        (int(one.blocks.index.shape[1]), 0 if one.slope is None else int(one.slope.shape[1]))
        for one in selections
        if one.blocks is not None
    }
    sloped = any(one.slope is not None for one in selections)
    if len(selections) < 2 or (sloped and len(sizes) > 1) or len({one.own is None for one in selections}) > 1:
        return selections

    def filled(arrays: list[Array], fill: float | None) -> Array:
        """Put arrays (G, B, r) one after another; shorter rows end with ``fill``, or with their last."""
        longest = max(int(x.shape[2]) for x in arrays)
        rows = []
        for x in arrays:
            more = (*x.shape[:2], longest - int(x.shape[2]))
            last = (
                xp.broadcast_to(x[:, :, -1:], more) if fill is None else xp.full(more, fill, dtype=x.dtype, device=x.device)
            )
            rows.append(xp.concat([x, last], axis=2) if more[2] else x)
        return xp.concat(rows, axis=1)

    starts = accumulate([end - start for one in blocks for start, end in pairwise(one.starts)], initial=0)
    slopes, owns = ([getattr(one, name) for one in selections] for name in ("slope", "own"))
    both = replace(
        selections[0],
        blocks=Blocks(filled([one.index for one in blocks], None), tuple(starts)),
        key_index=filled([one.key_index for one in selections], 0),
        log_weight=filled([one.log_weight for one in selections], -math.inf),
        slope=xp.concat(slopes, axis=1) if sloped else None,
        # A query has its key in one of them, −1 in the others.
        own=None if owns[0] is None else reduce(xp.maximum, owns),
    )
    return [both]


def block_count(n: int, block_size: int) -> int:
    """Return how many blocks of equal size n queries are cut into."""
    return -(-n // block_size)


def equal_blocks(xp: Namespace, order: Array, block_size: int) -> Blocks:
    """Cut ``order`` (G, n) into ⌈n / block_size⌉ blocks whose sizes differ by at most one."""
    n = int(order.shape[1])
    count = block_count(n, block_size)
    longest = -(-n // count)
    starts = tuple(i * n // count for i in range(count + 1))
    if count * longest == n:
        return Blocks(xp.reshape(order, (-1, count, longest)), starts)
    held = take_columns(xp, order, positions(xp, n, count, named_device(order)))
    return Blocks(xp.reshape(held, (-1, count, longest)), starts)


@kept_on_device(8)
def positions(xp: Namespace, n: int, count: int, on: NamedDevice) -> Array:
    """Return which of n ordered queries each row of ``count`` equal blocks holds: int64 (count · ⌈n / count⌉,).

    Made on the device, so that nothing is copied there. The last few are kept, as several steps make them.
    """
    edges = xp.arange(0, (count + 1) * n, n, dtype=xp.int64, device=on.device) // count
    row = xp.arange(-(-n // count), dtype=xp.int64, device=on.device)
    return xp.reshape(xp.minimum(edges[:-1, None] + row, edges[1:, None] - 1), (-1,))
