"""Ring attention: which calls a rank makes of each shard of keys, and how these share the budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdecore.arrays.errors import OptionError
from kdecore.arrays.namespace import Array, host
from kdecore.arrays.random import piece_seed
from kdecore.core.key_ranges import KeyRanges, sliding
from kdecore.core.options import DEFAULT_BUDGET, Options
from kdecore_adapters.distributed.ranks import Layout, Shard, group_lengths

NEARER = 1.5
"""A shard that queries stand in, or see different keys of, gets so many times as much of the budget (bench/NOTES.md)."""


@dataclass(frozen=True)
class Part:
    """A call of `kdecore.attention` on one shard of keys.

    Attributes
    ----------
    groups
        Which groups it is about, all of which see alike.
    keys
        How many of the shard's keys there are for them.
    options
        Of the call.
    """

    groups: tuple[int, ...]
    keys: int
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """A call of ring attention on the whole sequence.

    Attributes
    ----------
    layout
        Rows of each rank.
    causal, window, diagonal
        As in `kdecore.attention`; ``diagonal`` is a number where the others go by it.
    lengths
        (G,) NumPy int64: keys there are in each group.
    seed
        Of the whole call.
    options
        All others, the same for every part, but for the budget.
    """

    layout: Layout
    causal: bool
    window: int | None
    diagonal: int | None
    lengths: Array
    seed: int
    options: Mapping[str, Any]

    def seen(self, rank: int) -> KeyRanges:
        """Return which keys of the whole sequence a rank's queries see, where all are there. O(n_q)."""
        n_q, first = self.layout.queries[rank], self.layout.first_query(rank)
        return sliding(n_q, sum(self.layout.keys), self.causal, self.window, (self.diagonal or 0) + first)

    def keys_left(self, source: int, length: int) -> int:
        """Return how many keys a shard has where the whole sequence has so many."""
        return max(0, min(length - self.layout.first_key(source), self.layout.keys[source]))


def asked(shard: Shard, layout: Layout) -> Asked:
    """Return a call as every rank makes it, checked for what concerns the whole sequence."""
    options = dict(shard.options)
    if options.pop("rtol", None) is not None:
        raise OptionError("rtol must be None in ring attention: errors of parts say little of the whole; give a budget")
    for name in ("rtol_norm", "certificate"):
        options.pop(name, None)
    causal, window, diagonal = options.pop("causal", False), options.pop("window", None), options.pop("diagonal", None)
    n_q, n_k = sum(layout.queries), sum(layout.keys)
    if diagonal is None and (causal or window is not None):
        diagonal = n_k - n_q
    lengths = group_lengths(options.pop("key_lengths", None), shard.shapes[1][:-2], n_k)
    return Asked(layout, causal, window, diagonal, lengths, options.pop("seed", 0), options)


def parts_of(call: Asked, rank: int) -> dict[int, list[Part]]:
    """Return a rank's calls for each shard that its queries see any of.

    Groups of one length are called together. Each query's budget is shared among the shards in proportion to their keys,
    `NEARER` times as much for some, so that its mean is that of a single call; what a short shard can't use the others get.
    """
    seen, found, n_q = call.seen(rank), dict[int, list[Part]](), call.layout.queries[rank]
    places = [call.layout.first_query(rank) - call.layout.first_key(source) for source in range(len(call.layout.keys))]
    diagonals = [None if call.diagonal is None else call.diagonal + place for place in places]
    for length in sorted(set(call.lengths.tolist())):
        groups = tuple(int(group) for group in host.nonzero(call.lengths == length)[0])
        sources, weights, sizes = [], [], []
        for source, diagonal in enumerate(diagonals):
            keys, first = call.keys_left(source, length), call.layout.first_key(source)
            visible = seen.within(first, first + keys)
            if visible.pairs:
                near = visible.pairs < n_q * keys or (diagonal is not None and -n_q < diagonal < keys)
                sources.append(source)
                sizes.append(keys)
                weights.append(NEARER * keys if near else keys)
        for source, keys, some in zip(sources, sizes, budgets(call.options, weights, sizes), strict=True):
            restricted = {
                "causal": call.causal,
                "window": call.window,
                "diagonal": diagonals[source],
                "seed": piece_seed(call.seed, (rank, source, groups[0])),
            }
            found.setdefault(source, []).append(Part(groups, keys, {**call.options, **some, **restricted}))
    return found


def budgets(options: Mapping[str, Any], weights: Sequence[float], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Return method and budget for each of some shards."""
    method, total = options.get("method", "auto"), options.get("budget")
    if not isinstance(method, Options):
        return [{"budget": part} for part in shared_out(total or DEFAULT_BUDGET, weights, sizes)]
    method = method.resolve(total)
    if method.budget is None:
        return [{}] * len(sizes)
    return [{"method": method.with_budget(part), "budget": None} for part in shared_out(method.budget, weights, sizes)]


def shared_out(budget: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """Return parts of a budget, at least 1 and at most so much each, and else in proportion to weights."""
    parts, left, weight = [0] * len(weights), budget, sum(weights)
    for i in sorted(range(len(weights)), key=lambda i: most[i] / weights[i]):
        parts[i] = min(most[i], max(1, round(left * weights[i] / weight)))
        left, weight = left - parts[i], weight - weights[i]
    return parts
