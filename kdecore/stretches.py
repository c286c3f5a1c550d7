"""Stretches of rows that follow each other: cutting them, and making them groups of a smaller problem and rows again."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from kdecore.namespaces import Array, Namespace, spans

Span = tuple[int, int]
"""Numbers from the first to the one before the last."""


class Stretch(NamedTuple):
    """The stretches first … end − 1 of so many equal ones."""

    first: int
    end: int


def cut(n: int, parts: int) -> list[Span]:
    """Cut range(n) into so many stretches whose lengths differ by at most one: stretch i begins at ⌊i · n / parts⌋."""
    return list(pairwise(i * n // parts for i in range(parts + 1)))


def whole_stretches(keys: Span, n: int, level: int) -> tuple[Stretch, Span]:
    """Return the stretches of 2**level that lie within a span of range(n), and what they hold."""
    some = Stretch(-(-(keys[0] << level) // n), min(1 << level, (((keys[1] + 1) << level) - 1) // n))
    return some, ((some.first * n) >> level, (some.end * n) >> level)


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
    found = xp.reshape(found, (groups, -1, *found.shape[2:]))
    if covers(some, n):
        return found
    places = dict(zip(some, spans(int(found.shape[1]), some[0][1] - some[0][0]), strict=True))
    edges = sorted({0, n, *(edge for span in some for edge in span)})
    parts = [found[:, places[span], ...] if span in places else rows[:, span[0] : span[1], ...] for span in pairwise(edges)]
    return xp.concat(parts, axis=1)


@dataclass(frozen=True)
class Described:
    """What a method finds out about rows once, however they are cut and stacked.

    Attributes
    ----------
    queries, keys
        Arrays (G, n_q, …), (G, n_k, …).
    groups
        Arrays (G, …).
    parts
        Groups that were one before they were cut.
    shared
        What doesn't change with the groups.
    """

    queries: tuple[Array, ...]
    keys: tuple[Array, ...]
    groups: tuple[Array, ...] = ()
    parts: int = 1
    shared: Any = None

    def stacked(self, xp: Namespace, queries: list[Span], keys: list[Span], parts: int) -> "Described":
        """Return the same of stacked spans of queries and keys."""
        return Described(
            tuple(stacked(xp, x, queries, parts) for x in self.queries),
            tuple(stacked(xp, x, keys, parts) for x in self.keys),
            tuple(xp.repeat(x, parts, axis=0) for x in self.groups),
            self.parts * parts,
            self.shared,
        )
