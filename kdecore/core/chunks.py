"""Chunks of rows that follow each other: cutting them, and making them groups of a smaller problem and rows again."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from kdecore.arrays.namespace import Array, Namespace
from kdecore.arrays.rows import spans
from kdecore.core.key_ranges import KeyRanges

Span = tuple[int, int]
"""Numbers from the first to the one before the last."""

LOSS = 2
"""Keys for each query that are left to the next level, at most, so that chunks are whole."""


class ChunkRange(NamedTuple):
    """The chunks first … end − 1 of so many equal ones."""

    first: int
    end: int


def cut(n: int, parts: int) -> list[Span]:
    """Cut range(n) into so many chunks whose lengths differ by at most one: chunk i begins at ⌊i · n / parts⌋."""
    return list(pairwise(i * n // parts for i in range(parts + 1)))


def whole_chunks(keys: Span, n: int, level: int) -> tuple[ChunkRange, Span]:
    """Return the chunks of 2**level that lie within a span of range(n), and what they hold."""
    some = ChunkRange(-(-(keys[0] << level) // n), min(1 << level, (((keys[1] + 1) << level) - 1) // n))
    return some, ((some.first * n) >> level, (some.end * n) >> level)


def inner_keys(seen: KeyRanges, n_k: int, level: int) -> tuple[ChunkRange | None, Span]:
    """Return the keys that are to be chosen from, of those that all of some queries see; (0, 0) for none.

    These are whole chunks of 2**level, which are returned too, where that leaves no more than `LOSS` keys for each query
    to the next level: remainders are alike then, and what is prepared for all chunks can be used. Otherwise all keys.
    """
    keys = seen.inner
    if keys[0] >= keys[1]:
        return None, (0, 0)
    some, inside = whole_chunks(keys, n_k, level)
    if keys[1] - keys[0] - max(0, inside[1] - inside[0]) > LOSS * len(seen.first):
        return None, keys
    return (some, inside) if inside[0] < inside[1] else (None, (0, 0))


@dataclass(frozen=True)
class Remainder:
    """What a level leaves of a chunk of queries to the next one.

    Attributes
    ----------
    queries
        These queries.
    keys
        The keys that some of them see, without those that all see and the method chose among: one span or two.
    visible
        What they see of these.
    """

    queries: Span
    keys: tuple[Span, ...]
    visible: KeyRanges

    @property
    def kind(self) -> tuple[int, bytes, bytes]:
        """The same for what can be evaluated together."""
        count = sum(end - first for first, end in self.keys)
        return count, self.visible.first.tobytes(), self.visible.end.tobytes()


def remainder(queries: Span, seen: KeyRanges, keys: Span) -> Remainder:
    """Return what is left of some queries besides keys that all of them see."""
    low, high = seen.outer
    first, end = keys
    if first == end:
        return Remainder(queries, ((low, high),), seen.within(low, high))
    left = tuple(span for span in ((low, first), (end, high)) if span[0] < span[1])
    return Remainder(queries, left, seen.within(low, high).without(first - low, end - low))


def covers(some: list[Span], n: int) -> bool:
    """Return whether spans follow each other from 0 to n."""
    edges = [0, *(edge for span in some for edge in span), n]
    return edges[::2] == edges[1::2]


def stacked(xp: Namespace, rows: Array, some: list[Span], parts: int) -> Array:
    """Make spans of rows (G, n, …), in so many parts of equal length, the rows of as many groups: (G · parts, …)."""
    if not covers(some, int(rows.shape[1])):
        rows = xp.concat([rows[:, first:end, ...] for first, end in some], axis=1)
    return xp.reshape(rows, (int(rows.shape[0]) * parts, int(rows.shape[1]) // parts, *rows.shape[2:]))


def put_back(xp: Namespace, rows: Array, found: Array, some: list[Span]) -> Array:
    """Put what `stacked` took out of rows (G, n, …), and was changed, back in its place."""
    groups, n = rows.shape[:2]
    found = xp.reshape(found, (groups, found.shape[0] // max(1, groups) * found.shape[1], *found.shape[2:]))
    if covers(some, n):
        return found
    places = dict(zip(some, spans(int(found.shape[1]), some[0][1] - some[0][0]), strict=True))
    edges = sorted({0, n, *(edge for span in some for edge in span)})
    parts = [found[:, places[span], ...] if span in places else rows[:, span[0] : span[1], ...] for span in pairwise(edges)]
    return xp.concat(parts, axis=1)


@dataclass(frozen=True)
class Features:
    """What a method finds out about rows once, however they are cut and stacked.

    Attributes
    ----------
    queries, keys
        Arrays (G, n_q, …), (G, n_k, …).
    groups
        Arrays (G, …).
    shared
        What doesn't change with the groups.
    """

    queries: tuple[Array, ...]
    keys: tuple[Array, ...]
    groups: tuple[Array, ...] = ()
    shared: Any = None

    def stacked(self, xp: Namespace, queries: list[Span], keys: list[Span], parts: int) -> "Features":
        """Return the same of stacked spans of queries and keys."""
        return Features(
            tuple(stacked(xp, x, queries, parts) for x in self.queries),
            tuple(stacked(xp, x, keys, parts) for x in self.keys),
            tuple(xp.repeat(x, parts, axis=0) for x in self.groups),
            self.shared,
        )
