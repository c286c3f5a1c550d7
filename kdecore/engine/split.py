"""Shares of a call: groups whose queries all see the same intervals of as many keys, so that one plan serves them.

Lengths, masks that are intervals, and keys that hold numbers that are not finite end here: hidden keys are left out, and
what is left are plain problems, or problems whose queries see intervals.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kdecore.arrays.gradients import gradient_mode
from kdecore.arrays.memory import contiguous, from_host, to_host
from kdecore.arrays.namespace import Array, host
from kdecore.arrays.rows import take_along_rows
from kdecore.core.chunks import Span
from kdecore.core.key_ranges import KeyRanges, Mask, as_intervals, both, hides, sliding
from kdecore.core.problem import Problem
from kdecore.engine.nonfinite import not_finite_keys
from kdecore.engine.restrictions import Restrictions


@dataclass(frozen=True)
class Subproblem:
    """Some groups of a call, and some of their queries.

    Attributes
    ----------
    groups
        Which groups, ascending.
    queries
        Which queries.
    problem
        These groups and queries, and the keys that may be seen and are finite; None where there are none.
    apart
        The same with the keys that are not finite; None where there are none.
    """

    groups: tuple[int, ...]
    queries: Span
    problem: Problem | None
    apart: Problem | None = None


def subproblems(problem: Problem, restrictions: Restrictions) -> list[Subproblem]:
    """Cut a problem into shares: every group is in one of them, with all of its queries.

    O(G n_k (d + d_v)) to look for numbers that are not finite among the keys that are seen, and a pass over the mask if
    there is one.
    """
    return [part for one in seen_alike(problem, restrictions) for part in finite_apart(one)]


def seen_alike(problem: Problem, restrictions: Restrictions) -> list[Subproblem]:
    """Put groups together whose queries see the same intervals of as many keys, and leave out keys that none sees."""
    everything = tuple(range(problem.groups))
    lengths, mask = restrictions.lengths, restrictions.mask
    whole = mask is None and not restrictions.causal and restrictions.window is None
    if not everything or (whole and bool(host.all(lengths == problem.n_k))):
        return [Subproblem(everything, (0, problem.n_q), problem)]
    positions = problem.n_q // problem.repeats
    seen = sliding(positions, problem.n_k, restrictions.causal, restrictions.window, restrictions.diagonal or 0)
    intervals = {} if mask is None else mask_intervals(problem, mask)
    # To cut intervals takes O(n), and most groups are alike: once for each length and mask.
    alike: dict[tuple[int, ...], list[int]] = {}
    for group in everything:
        row = () if mask is None else mask.matrix[group].tolist()
        alike.setdefault((int(lengths[group]), *row), []).append(group)
    kinds: dict[tuple[object, ...], tuple[list[int], list[Array], KeyRanges, bool]] = {}
    for (length, *row), groups in alike.items():
        found = intervals.get(tuple(row))
        masked = mask is not None and found is None
        visible, keys = seen, host.arange(length)
        if found is not None:
            visible, keys = both(seen, found.visible), keys[found.columns[:length]]
        of_keys = repeated(visible.among(keys), problem.repeats)
        if not masked:
            low, high = of_keys.outer
            keys, of_keys = keys[low:high], of_keys.within(low, high)
        # A mask goes by the numbers of keys, which must be the same then; otherwise as many will do.
        kind = (masked, keys.tobytes() if masked else len(keys), of_keys.first.tobytes(), of_keys.end.tobytes())
        entry = kinds.setdefault(kind, ([], [], of_keys, masked))
        entry[0].extend(groups)
        entry[1].extend([keys] * len(groups))
    return [
        subproblem_of(problem, some, keys, visible, mask if masked else None)
        for some, keys, visible, masked in kinds.values()
    ]


def subproblem_of(
    problem: Problem, groups: list[int], keys: list[Array], visible: KeyRanges, mask: Mask | None
) -> Subproblem:
    """Return the subproblem of some groups, in their order, and of as many keys of each."""
    order = sorted(range(len(groups)), key=groups.__getitem__)
    groups, keys = [groups[i] for i in order], [keys[i] for i in order]
    return Subproblem(tuple(groups), (0, problem.n_q), part_of(problem, groups, keys, visible, mask))


def finite_apart(subproblem: Subproblem) -> list[Subproblem]:
    """Cut a subproblem into those whose keys that are not finite are the same ones, and set these apart."""
    problem = subproblem.problem
    bad = None if problem is None else not_finite_keys(problem)
    if problem is None or bad is None:
        return [subproblem]
    everything = KeyRanges(host.zeros((problem.n_q,), dtype=host.int64), host.full((problem.n_q,), problem.n_k))
    visible = everything if problem.visible is None else problem.visible
    kinds: dict[bytes, list[int]] = {}
    for group in range(problem.groups):
        kinds.setdefault(bad[group].tobytes(), []).append(group)
    parts = []
    for some in kinds.values():
        finite, apart = (
            part_of(problem, some, [keys] * len(some), visible.among(keys), problem.mask)
            for keys in (host.flatnonzero(~bad[some[0]]), host.flatnonzero(bad[some[0]]))
        )
        parts.append(Subproblem(tuple(subproblem.groups[group] for group in some), subproblem.queries, finite, apart))
    return parts


def part_of(problem: Problem, groups: list[int], keys: list[Array], visible: KeyRanges, mask: Mask | None) -> Problem | None:
    """Return the problem of some groups and, of each, as many keys; None where no query sees any."""
    xp = problem.xp
    if visible.pairs == 0:
        return None

    def some_groups(x: Array) -> Array:
        if groups == list(range(groups[0], groups[-1] + 1)):
            return x[groups[0] : groups[-1] + 1, ...]
        return xp.take(x, xp.asarray(groups, dtype=xp.int64, device=problem.device), axis=0)

    count = len(keys[0])
    # Where all groups have the same keys in a row, the first of them.
    firsts = {int(one[0]) if bool(host.all(one == host.arange(one[0], one[0] + count))) else -1 for one in distinct(keys)}
    first = firsts.pop() if len(firsts) == 1 else -1
    if first >= 0:

        def some_keys(x: Array) -> Array:
            return contiguous(x[:, first : first + count, :])
    else:
        index = xp.asarray(host.stack(keys), dtype=xp.int64, device=problem.device)

        def some_keys(x: Array) -> Array:
            return take_along_rows(xp, x, index)

    q, k, v = some_groups(problem.q), some_keys(some_groups(problem.k)), some_keys(some_groups(problem.v))
    sees_all = bool(host.all(visible.first == 0)) and bool(host.all(visible.end == count))
    if mask is not None:
        mask = mask.groups(host.asarray(groups)).keys(xp, keys[0])
    # Of each group the first keys, or some: either is a copy, unless they are all.
    copied = {*problem.copied, *(("k", "v") if count < problem.n_k else ())}
    return replace(
        problem,
        q=q,
        k=k,
        v=v,
        visible=None if sees_all else visible,
        mask=mask,
        copied=tuple(sorted(copied)),
        own=own_of_part(problem.own, groups, keys),
    )


def own_of_part(own: Array | None, groups: list[int], keys: list[Array]) -> Array | None:
    """Return `Problem.own` of some groups where of each only some keys, ascending, are left."""
    if own is None:
        return None
    if len(own) == 1 and len(distinct(keys)) == 1:
        groups, keys = [0], keys[:1]
    rows = []
    for group, left in zip(groups, keys, strict=True):
        mine = own[group % len(own)]
        place = host.clip(host.searchsorted(left, mine), 0, len(left) - 1)
        rows.append(host.where(left[place] == mine, place, -1))
    found = host.stack(rows)
    return found if bool(host.any(found >= 0)) else None


def distinct(arrays: list[Array]) -> list[Array]:
    """Return each array once, however often it is there."""
    return list({id(one): one for one in arrays}.values())


def repeated(visible: KeyRanges, times: int) -> KeyRanges:
    """Return the intervals of positions for each of so many query heads of theirs."""
    return visible if times == 1 else KeyRanges(host.repeat(visible.first, times), host.repeat(visible.end, times))


@dataclass(frozen=True)
class SeenColumns:
    """A mask that is intervals once the keys that no query sees are left out.

    Attributes
    ----------
    visible
        The intervals, among all keys.
    columns
        (n_k,) NumPy bool: the keys that are seen.
    """

    visible: KeyRanges
    columns: Array


def mask_intervals(problem: Problem, mask: Mask) -> dict[tuple[int, ...], SeenColumns | None]:
    """Return, for each row of ``mask.matrix``, what it says as intervals, or None where it can't be said so."""
    xp, values = problem.xp, mask.values
    rows = {tuple(row) for row in mask.matrix.tolist()}
    additive = values.dtype != xp.bool
    if additive and gradient_mode(values):
        return dict.fromkeys(rows)
    found: dict[int, SeenColumns | None] = {}
    for number in {number for row in rows for number in row}:
        found[number] = None
        seen_there = values[number, ...]
        if additive:
            seen_there = ~hides(xp, values[number, ...])
            if bool(xp.any(seen_there & (values[number, ...] != 0))):
                continue
        matrix = to_host(seen_there)
        seen = host.broadcast_to(matrix, (matrix.shape[0], problem.n_k))
        columns = host.any(seen, axis=0)
        numbers = host.flatnonzero(columns)
        inside = as_intervals(seen if len(numbers) == problem.n_k else seen[:, columns])
        if inside is not None:
            positions = problem.n_q // problem.repeats
            edges = host.concat([numbers, host.asarray([problem.n_k])])
            first = edges[inside.first]
            end = host.where(inside.end > inside.first, edges[host.maximum(inside.end - 1, 0)] + 1, first)
            one = (host.broadcast_to(x, (positions,)) for x in (first, end))
            found[number] = SeenColumns(KeyRanges(*one), columns)
    result: dict[tuple[int, ...], SeenColumns | None] = {}
    for row in rows:
        first_head = found[row[0]]
        alike = all(found[number] is first_head or _same(found[number], first_head) for number in row)
        result[row] = first_head if alike else None
    return result


def _same(a: SeenColumns | None, b: SeenColumns | None) -> bool:
    if a is None or b is None:
        return False
    pairs = ((a.visible.first, b.visible.first), (a.visible.end, b.visible.end), (a.columns, b.columns))
    return all(bool(host.all(x == y)) for x, y in pairs)


def in_halves(subproblem: Subproblem) -> Iterator[Subproblem]:
    """Cut a subproblem into two: of its groups, or of its queries where it has but one group."""
    problem = subproblem.problem
    assert problem is not None
    count = len(subproblem.groups)
    if count > 1:
        for some in (slice(0, -(-count // 2)), slice(-(-count // 2), count)):
            yield replace(
                subproblem,
                groups=subproblem.groups[some],
                problem=_groups_of(problem, some),
                apart=None if subproblem.apart is None else _groups_of(subproblem.apart, some),
            )
        return
    # The larger half first: if that fits, so does the other.
    middle = -(-problem.n_q // 2)
    for first, end in ((0, middle), (middle, problem.n_q)):
        yield replace(
            subproblem,
            queries=(subproblem.queries[0] + first, subproblem.queries[0] + end),
            problem=_queries_of(problem, first, end),
            apart=None if subproblem.apart is None else _queries_of(subproblem.apart, first, end),
        )


def _groups_of(problem: Problem, some: slice) -> Problem:
    q, k, v = (x[some, ...] for x in (problem.q, problem.k, problem.v))
    own = problem.own if problem.own is None or len(problem.own) == 1 else problem.own[some, :]
    return replace(problem, q=q, k=k, v=v, own=own, mask=None if problem.mask is None else problem.mask.groups(some))


def _queries_of(problem: Problem, first: int, end: int) -> Problem:
    index = host.arange(first, end)
    visible = None if problem.visible is None else problem.visible.rows(index)
    mask = None if problem.mask is None else problem.mask.rows(problem.xp, index)
    return replace(problem.rows(first, end), visible=visible, mask=mask)


def single(problem: Problem, group: int, rows: Sequence[int]) -> Problem:
    """Return some queries of one group, NumPy int64, with what they see."""
    one = _groups_of(problem, slice(group, group + 1))
    xp = problem.xp
    index = from_host(xp, host.asarray(rows), dtype=xp.int64, device=problem.device)
    visible = None if one.visible is None else one.visible.rows(rows)
    mask = None if one.mask is None else one.mask.rows(xp, rows)
    return replace(one, q=xp.take(one.q, index, axis=1), visible=visible, mask=mask, own=None)
