"""`Selection`: which keys each block of queries attends to, and with which log-weight.

Every estimator is a Selection. It is unbiased in numerator and denominator when, for every block and every key,
Σ (inclusion probability × exp(log_weight)) = 1; tests/test_unbiasedness.py checks that exactly, without sampling.
"""

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from kdecore.namespaces import Array, Namespace, take_columns


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
        (G, d, d_v): the last of then d_v + 1 columns of ``values`` says how much of scale · q @ slope is added to a result;
        None for nothing.
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
    bias: Array | None = None


def slots_evaluated(xp: Namespace, selection: Selection) -> Array:
    """Return how many slots count, for all queries together: a 0-d float64 array, which nothing waits for. O(G B s)."""
    assert selection.blocks is not None
    counts = xp.sum(xp.astype(xp.isfinite(selection.log_weight), xp.float64), axis=-1)
    sizes = [end - start for start, end in pairwise(selection.blocks.starts)]
    return xp.sum(counts * xp.asarray(sizes, dtype=xp.float64, device=counts.device))


def shifted(selection: Selection, query: int, key: int) -> Selection:
    """Turn a Selection of some queries and keys into one of all: these begin with the query and the key given."""
    assert selection.blocks is not None
    assert selection.key_index is not None
    blocks = Blocks(selection.blocks.index + query, selection.blocks.starts)
    own_keys = selection.keys is not None
    return replace(selection, blocks=blocks, key_index=selection.key_index + (0 if own_keys else key))


def together(xp: Namespace, selections: list[Selection]) -> Selection:
    """Make one Selection of several for different queries, with lists of one length and the same keys and values."""
    if len(selections) == 1:
        return selections[0]
    blocks = [one.blocks for one in selections if one.blocks is not None]
    longest = max(int(one.index.shape[2]) for one in blocks)

    def filled(index: Array) -> Array:
        missing = longest - int(index.shape[2])
        last = index[:, :, -1:]
        return xp.concat([index, *[last] * missing], axis=2) if missing else index

    sizes = [end - start for one in blocks for start, end in pairwise(one.starts)]
    return replace(
        selections[0],
        blocks=Blocks(xp.concat([filled(one.index) for one in blocks], axis=1), tuple(accumulate(sizes, initial=0))),
        key_index=xp.concat([one.key_index for one in selections], axis=1),
        log_weight=xp.concat([one.log_weight for one in selections], axis=1),
    )


def equal_blocks(xp: Namespace, order: Array, block_size: int) -> Blocks:
    """Cut ``order`` (G, n) into ⌈n / block_size⌉ blocks whose sizes differ by at most one."""
    n = int(order.shape[1])
    count = -(-n // block_size)
    longest = -(-n // count)
    # Which ordered query each row holds: the same in every group. On the order's device, so that nothing is copied there.
    number, row = (xp.arange(size, dtype=xp.int64, device=order.device) for size in (count, longest))
    last = ((number + 1) * n // count - 1)[:, None]
    position = xp.minimum((number * n // count)[:, None] + row[None, :], last)
    held = take_columns(xp, order, xp.reshape(position, (-1,)))
    return Blocks(xp.reshape(held, (-1, count, longest)), tuple(i * n // count for i in range(count + 1)))
