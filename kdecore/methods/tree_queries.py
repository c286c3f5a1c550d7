"""Queries of the treecode: in blocks, with keys of their own, and some of them as a pilot."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from kdecore.arrays.kept import kept_on_device
from kdecore.arrays.memory import from_host
from kdecore.arrays.namespace import Array, NamedDevice, Namespace, host, named_device
from kdecore.arrays.rows import invert_permutation, take_along_rows, take_columns
from kdecore.core.chunks import Span
from kdecore.core.problem import Problem
from kdecore.core.selection import Blocks
from kdecore.methods.base import Plan
from kdecore.methods.key_tree import KeyTree

PILOT_BLOCKS = 64
"""Of the treecode: blocks of all groups that the threshold and first-order matrices come from."""
PILOT_SHARE, FEWEST_PILOT_BLOCKS = 8, 16
"""The pilot has at most one in so many of a group's blocks, or so many of all groups: lists differ in length, and the mean
of few says little."""


class Calibration(NamedTuple):
    """What a pilot found.

    Attributes
    ----------
    threshold, most, start
        What `kdecore.kernels.open_tree` opens a tree by.
    slope
        (G, C, d, d_v): first-order matrices, one for each block of the pilot; None for none.
    """

    threshold: Array
    most: int
    start: tuple[int, int, int]
    slope: Array | None = None


@dataclass(frozen=True)
class PreparedTree:
    """Everything that no budget changes.

    Attributes
    ----------
    keys
        The tree over the keys.
    coordinates
        (G, n_q, p) of the queries.
    order
        (G, n_q) int64: the query at each place of the queries' tree.
    blocks
        That order in blocks of `Treecode.block_size` queries.
    pilot
        (G, C, b) int64: the queries of some of the blocks, evenly spaced; None where there is a calibration.
    calibration
        What a pilot of other queries found; None where this pilot is to find it.
    own
        (G, n_q) int64: the position in the keys' tree of each query's own key, −1 for none; None where no query has one.
    seen
        (level, first, end): the queries see the nodes first … end − 1 of a level.
    """

    keys: KeyTree
    coordinates: Array
    order: Array
    blocks: Blocks
    pilot: Array | None
    own: Array | None
    seen: tuple[int, int, int] = (0, 0, 1)
    calibration: Calibration | None = None


def with_queries(problem: Problem, plan: Plan, prepared: PreparedTree, queries: Span, seen: Span) -> PreparedTree:
    """Find the pilot, and the own keys among those ``seen``, of blocks that hold some of the queries."""
    xp, blocks = problem.xp, prepared.blocks
    if own_in_order(problem, queries, seen):
        own = invert_permutation(xp, prepared.keys.order)
    elif (own := own_on_device(problem, queries, seen)) is not None:
        place = invert_permutation(xp, prepared.keys.order)
        own = xp.broadcast_to(own, (problem.groups, problem.n_q))
        own = xp.where(own < 0, -1, take_along_rows(xp, place, xp.clip(own, 0, None)))
    if prepared.calibration is not None:
        return replace(prepared, own=own)
    groups, count, _ = blocks.index.shape
    number = evenly_spaced(xp, count, pilot_blocks(groups, count), named_device(blocks.index))
    return replace(prepared, pilot=take_columns(xp, blocks.index, number), own=own)


@kept_on_device(8)
def evenly_spaced(xp: Namespace, count: int, some: int, on: NamedDevice) -> Array:
    """Return the numbers, int64 (some,), of so many of ``count`` blocks. The last few are kept."""
    return xp.arange(count, 2 * some * count, 2 * count, dtype=xp.int64, device=on.device) // (2 * some)


def own_in_order(problem: Problem, queries: Span, seen: Span) -> bool:
    """Return whether query i's own key is key i, for all queries and keys."""
    if problem.own is None or queries != (0, problem.n_q) or seen != (0, problem.n_k) or problem.n_q != problem.n_k:
        return False
    return bool(host.all(problem.own == host.arange(problem.n_k, dtype=host.int64)))


def own_on_device(problem: Problem, queries: Span, seen: Span) -> Array | None:
    """Return `Problem.own` (1|G, n_q) of some queries, among the keys ``seen``, as an array of the problem's library.

    −1 where there is none; None where no query has one. Own keys that follow one another are counted on the device: a CUDA
    graph takes no copy from the host.
    """
    if problem.own is None:
        return None
    xp, repeats = problem.xp, problem.repeats

    def if_seen(own: Array, query: Array, where: Callable[..., Array]) -> Array:
        inside = (seen[0] <= own) & (own < seen[1]) & (queries[0] <= query) & (query < queries[1])
        return where(inside, own, -1)

    query = host.arange(problem.n_q, dtype=host.int64)[None, :]
    own = if_seen(problem.own, query, host.where)
    group, first = (int(x) for x in host.unravel_index(host.argmax(own >= 0), own.shape))
    if own[group, first] < 0:
        return None
    offset = int(own[group, first]) - first // repeats
    if bool(host.all(own == if_seen(query // repeats + offset, query, host.where))):
        number = xp.arange(problem.n_q, dtype=xp.int64, device=problem.device)[None, :]
        counted = (number if repeats == 1 else number // repeats) + offset
        return counted if bool(host.all(own >= 0)) else if_seen(counted, number, xp.where)
    return from_host(xp, own, dtype=None, device=problem.device)


def restrict(problem: Problem, prepared: PreparedTree, numbers: Array) -> tuple[Problem, PreparedTree, Array]:
    """Leave only some blocks, all their queries, as they are among the others.

    Parameters
    ----------
    problem, prepared
        All queries.
    numbers
        (G, C) in [0, 1): number u stands for block ⌊u · B⌋ of the queries' tree.

    Returns
    -------
    problem, prepared
        For the C · b queries of these blocks.
    rows
        (G, C, b) int64: which queries these are; in blocks one shorter than the longest the last one again.
    """
    xp, index = problem.xp, prepared.blocks.index
    groups, count, b = index.shape
    block = xp.astype(numbers * count, xp.int64)
    rows = take_along_rows(xp, index, block)
    queries = xp.reshape(rows, (groups, -1))
    some = int(numbers.shape[1])
    place = xp.reshape(xp.arange(some * b, dtype=xp.int64, device=problem.device), (1, some, b))
    blocks = Blocks(xp.broadcast_to(place, (groups, some, b)), tuple(range(0, some * b + 1, b)))
    own = None if prepared.own is None else take_along_rows(xp, prepared.own, queries)
    calibration = prepared.calibration
    if calibration is not None and calibration.slope is not None and calibration.slope.shape[1] > 1:
        # Each block has the matrix that it has among the others.
        slope = calibration.slope
        number, matrices = block * int(slope.shape[1]) // count, xp.reshape(slope, (*slope.shape[:2], -1))
        mine = xp.reshape(take_along_rows(xp, matrices, number), (groups, some, *slope.shape[2:]))
        calibration = calibration._replace(slope=mine)
    coordinates = take_along_rows(xp, prepared.coordinates, queries)
    some_only = replace(
        prepared, coordinates=coordinates, order=queries, blocks=blocks, pilot=None, own=own, calibration=calibration
    )
    return problem.with_queries(queries), some_only, rows


def pilot_blocks(groups: int, blocks: int) -> int:
    """Return how many of the blocks of each group are the treecode's pilot."""
    share = max(-(-blocks // PILOT_SHARE), -(-FEWEST_PILOT_BLOCKS // groups))
    return max(1, min(PILOT_BLOCKS // groups, share, blocks))
