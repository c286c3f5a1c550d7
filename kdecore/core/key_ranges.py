"""Which keys each query sees: intervals, which methods get round without any mask, and masks of any other kind.

Causal attention, sliding windows, lengths of padded and packed sequences all let a query see an interval of the keys.
"""

from dataclasses import dataclass

from kdecore.arrays.namespace import Array, Namespace, host


@dataclass(frozen=True)
class KeyRanges:
    """An interval of keys for each query, the same in all groups.

    Attributes
    ----------
    first, end
        (n_q,) NumPy int64: query i sees the keys first[i] … end[i] − 1, none where the two are equal.
    """

    first: Array
    end: Array

    @property
    def pairs(self) -> int:
        """Number of pairs of a query and a key that it sees."""
        return int(host.sum(self.end - self.first))

    @property
    def inner(self) -> tuple[int, int]:
        """The keys that all queries see; none where the end is not larger."""
        return int(host.max(self.first)), int(host.min(self.end))

    @property
    def outer(self) -> tuple[int, int]:
        """An interval outside of which no query sees a key."""
        seeing = self.end > self.first
        if not bool(host.any(seeing)):
            return 0, 0
        return int(host.min(self.first[seeing])), int(host.max(self.end[seeing]))

    def bias(self, first: int, end: int) -> Array:
        """Return 0 where a query sees a key of first … end − 1, and −inf where not: NumPy float64 (1, n_q, end − first)."""
        key = host.arange(first, end)[None, :]
        return host.where((key >= self.first[:, None]) & (key < self.end[:, None]), 0.0, -host.inf)[None, ...]

    def rows(self, index: Array | slice) -> "KeyRanges":
        """Return the same for some of the queries."""
        return KeyRanges(self.first[index], self.end[index])

    def within(self, first: int, end: int) -> "KeyRanges":
        """Return the same where only the keys first … end − 1 are left, numbered from 0."""
        return normal(host.clip(self.first, first, end) - first, host.clip(self.end, first, end) - first)

    def without(self, first: int, end: int) -> "KeyRanges":
        """Return the same where the keys first … end − 1, seen by all, are left out: what is left are intervals again."""
        return normal(self.first, self.end - (end - first))

    def among(self, keys: Array) -> "KeyRanges":
        """Return the same where only some keys are left, ascending numbers, in that order."""
        return normal(host.searchsorted(keys, self.first), host.searchsorted(keys, self.end))


def normal(first: Array, end: Array) -> KeyRanges:
    """Return intervals as int64, those of no key as 0 … 0."""
    empty = end <= first
    first, end = (host.astype(host.where(empty, 0, x), host.int64) for x in (first, end))
    return KeyRanges(first, end)


def sliding(n_q: int, n_k: int, causal: bool, window: int | None, diagonal: int) -> KeyRanges:
    """Return what causal attention and a sliding window let each query see, query i standing at key i + diagonal."""

    def edge(of_first_query: int) -> Array:
        # Python's integers hold what any window and diagonal add up to.
        return host.clip(host.arange(n_q, dtype=host.int64) + max(-n_q, min(n_k, of_first_query)), 0, n_k)

    first = edge(-n_q) if window is None else edge(diagonal + 1 - window)
    if causal:
        return normal(first, edge(diagonal + 1))
    return normal(first, edge(n_k) if window is None else edge(diagonal + window))


def both(a: KeyRanges, b: KeyRanges) -> KeyRanges:
    """Return what is seen by both."""
    return normal(host.maximum(a.first, b.first), host.minimum(a.end, b.end))


def as_intervals(seen: Array) -> KeyRanges | None:
    """Return the intervals that a boolean NumPy array (n_q, n_k) says, or None where a row has a gap."""
    n_q, n_k = seen.shape
    if n_k == 0:
        return KeyRanges(*(host.zeros((n_q,), dtype=host.int64) for _ in range(2)))
    first = host.argmax(seen, axis=1)
    end = n_k - host.argmax(seen[:, ::-1], axis=1)
    count = host.count_nonzero(seen, axis=1)
    if bool(host.any((count > 0) & (count != end - first))):
        return None
    return normal(first, host.where(count > 0, end, first))


HIDING = -1e8
"""Numbers of a mask hide keys from here on, whatever its dtype."""


def hides(xp: Namespace, bias: Array) -> Array:
    """Return where a number added to a logit hides a key: −inf, and what stands for it in models.

    These are the lowest number of the mask's dtype and its half, −1e9 and the like: below −1e8, or half that lowest number.
    """
    return bias <= max(float(xp.finfo(bias.dtype).min) / 2, HIDING)


@dataclass(frozen=True)
class Mask:
    """A mask that is no interval: what is added to the logits, or which of them count.

    Attributes
    ----------
    values
        (M, R, C) boolean, True for what is seen, or floats to be added (see `hides`); R is the number of positions or 1, C
        of keys or 1.
    matrix
        (G, r) NumPy int64: which of the M matrices each group has for each of the r query heads that share its keys.
    """

    values: Array
    matrix: Array

    def groups(self, index: Array) -> "Mask":
        """Return the mask of some of the groups."""
        return Mask(self.values, self.matrix[index])

    def rows(self, xp: Namespace, index: Array) -> "Mask":
        """Return the mask of some queries, NumPy int64, of a single group; they are positions then, of one head each."""
        r = int(self.matrix.shape[1])
        matrix = xp.asarray(self.matrix[0][index % r], device=self.values.device)
        position = xp.asarray(index // r if int(self.values.shape[1]) > 1 else 0 * index, device=self.values.device)
        flat = xp.reshape(self.values, (-1, self.values.shape[2]))
        rows = xp.take(flat, matrix * int(self.values.shape[1]) + position, axis=0)
        return Mask(rows[None, ...], host.zeros((1, 1), dtype=host.int64))

    def keys(self, xp: Namespace, index: Array) -> "Mask":
        """Return the mask of some of the keys, NumPy int64, the same in every group."""
        if int(self.values.shape[2]) == 1:
            return self
        return Mask(xp.take(self.values, xp.asarray(index, device=self.values.device), axis=2), self.matrix)

    def bias(self, xp: Namespace, rows: Array, keys: Array, dtype: object) -> Array:
        """Return what is added to the logits.

        Parameters
        ----------
        xp
            Array namespace.
        rows
            (G, B, b) int64: queries, numbered so that the r heads of a position lie next to each other.
        keys
            (G, B, s) int64.
        dtype
            Of the result.

        Returns
        -------
        Array
            (G, B, b, s): numbers, −inf where a query does not see a key.
        """
        _, positions, columns = self.values.shape
        r = int(self.matrix.shape[1])
        table = xp.asarray(self.matrix, device=rows.device)
        group = xp.arange(rows.shape[0], dtype=xp.int64, device=rows.device)[:, None, None]
        matrix = xp.take(xp.reshape(table, (-1,)), xp.reshape(group * r + rows % r, (-1,)))
        row = xp.reshape(matrix, rows.shape) * positions + (rows // r if positions > 1 else 0)
        column = keys if columns > 1 else xp.zeros_like(keys)
        place = row[..., None] * columns + column[:, :, None, :]
        found = xp.reshape(xp.take(xp.reshape(self.values, (-1,)), xp.reshape(place, (-1,))), place.shape)
        if found.dtype != xp.bool:
            return xp.where(hides(xp, found), -xp.inf, xp.astype(found, dtype))
        zero = xp.zeros((1,), dtype=dtype, device=rows.device)
        return xp.where(found, zero, -xp.inf)
