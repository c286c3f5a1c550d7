"""Treecode: near and important keys one by one, the others through the means of tree nodes (beyond the paper; derived).

1. Queries and keys are each ordered by a balanced tree of similar rows, or by one sort; consecutive queries form a block.
2. Each block goes down the tree over the keys once, and opens the nodes that are estimated to err more than a threshold,
   one for all blocks: those that need more keys get more. A pilot of some blocks finds the threshold at which lists are as
   long as the budget in the mean (`kdecore.kernels.pick_threshold`, `open_tree`).
3. A closed node is one key: the mean key, at log-weight ln(count) + half the variance of its logits, with the mean value.
   The keys of an open leaf are listed one by one, and exact.
4. To a closed node's mean value is added what its keys of larger logits make of it, to first order, by matrices measured
   where the attention of the pilot's blocks meets closed nodes (`kdecore.methods.first_order`).
5. A query that has a key of its own (`Problem.own`) sees it beside its block's list.

Rows are compared by what the other side sees of them, in few coordinates whose products add up to nearly the whole logit
(`kdecore.methods.view`). Nothing is random; the estimate is biased, by what nodes hide. With far_field="sample" a closed
node is replaced by one of its keys, drawn at random, and the estimate is unbiased in numerator and denominator.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from kdecore.inputs import Problem
from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.kernels.open_tree.contract import BlockQueries, Tree, first_nodes
from kdecore.methods.first_order import first_order
from kdecore.methods.view import View, balanced_view, query_moment, unseen_share
from kdecore.namespaces import (
    Array,
    NamedDevice,
    Namespace,
    column_ranges,
    contiguous,
    from_host,
    host,
    invert_permutation,
    named_device,
    on_accelerator,
    outside_inference_mode,
    take_along_rows,
    take_columns,
    without_gradient,
)
from kdecore.options import Treecode
from kdecore.planning import FEWEST_NODES, WIDEST, Plan, longest_list, pilot_blocks
from kdecore.randomness import SAMPLES_STREAM
from kdecore.selection import Blocks, Opening, Selected, Selection, equal_blocks, in_order_of_queries
from kdecore.stretches import Described, Span, Stretch
from kdecore.tree import node_bounds

DEEPER = 0.15
"""An error of a level counts so many octaves more than one of the level above: nodes of fewer keys take fewer slots until
what they hide is found. 0 to 0.2: bench/NOTES.md. Not in trees whose first levels are stretches."""
GOLDEN_RATIO = (5.0**0.5 - 1.0) / 2.0
CODE_BITS = 24
"""Of codes that rows are sorted by: two passes of a radix sort; 16 err as much (bench/NOTES.md)."""


@dataclass(frozen=True)
class KeyTree:
    """What of the treecode follows from the keys and from how queries look: built once for any queries and budgets.

    Attributes
    ----------
    view
        Coordinates of queries and keys.
    order
        (G, n_k) int64: the key at each position of the tree.
    nodes
        Summaries of the tree's nodes, and the keys and values in its order.
    unseen
        (G, N): spreads of the nodes, times the part of it that coordinates don't see (`kdecore.methods.view.unseen_share`).
    sizes
        (G, N): sizes of the nodes' values, times 2^(`DEEPER` · level).
    limits
        (G, d_v) and (G, d_v), of the values' dtype: the least and the largest of each of their columns, beyond which no mean
        of them lies.
    """

    view: View
    order: Array
    nodes: TreeNodes
    unseen: Array
    sizes: Array
    limits: tuple[Array, Array]

    def without_gradient(self) -> "KeyTree":
        """Return the same tree, of whose nodes no gradients are recorded."""
        return replace(self, nodes=TreeNodes(*(without_gradient(x) for x in self.nodes)))


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
class Prepared:
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


def select(problem: Problem, plan: Plan) -> Selected:
    """Select for each block of queries tree nodes and single keys.

    Returns
    -------
    Selection or Opening
        Lists of ``budget`` slots in the mean, with the means of nodes and the keys in the tree's order as keys and values;
        or what they are made of while they are evaluated.
        O(G ((n_q + n_k) (d p + p log n) + n_q · budget · d + d² p)), with p = `Treecode.DIRECTIONS`.
    """
    return open_for(problem, plan, prepare(problem, plan))


def prepare(problem: Problem, plan: Plan) -> Prepared:
    """Build the tree over the keys, and the blocks of queries. O(G ((n_q + n_k) (d p + p log n) + d² p))."""
    moment = query_moment(problem.xp, problem.q, plan.kernels["second_moment"].function)
    return prepare_queries(problem, plan, build(problem, plan, moment))


def describe(problem: Problem, plan: Plan) -> Described:
    """Find coordinates of queries and keys, and sizes of values."""
    moment = query_moment(problem.xp, problem.q, plan.kernels["second_moment"].function)
    view, coordinates, sizes = described_keys(problem, plan, moment)
    of_queries = plan.kernels["project_rows"].function(problem.xp, without_gradient(problem.q), view.queries)
    return Described((of_queries,), (coordinates, sizes), (view.half_norm, view.queries, moment), shared=view)


def prepare_in_order(problem: Problem, plan: Plan, level: int, described: Described) -> Prepared:
    """Build trees that have the 2**level equal stretches of keys, and of queries, as nodes."""
    (of_queries,), (coordinates, sizes), (half_norm, queries, moment) = described.queries, described.keys, described.groups
    view = replace(described.shared, half_norm=half_norm, queries=queries)
    keys = grow(problem, plan, view, coordinates, sizes, moment, level)
    order = order_queries(problem, plan, of_queries, level)
    # Stretches have blocks, pilots and own keys of their own.
    return Prepared(keys, of_queries, order, equal_blocks(problem.xp, order, problem.n_q), None, None)


def select_stretch(problem: Problem, plan: Plan, prepared: Prepared, level: int, number: int, keys: Stretch) -> Selected:
    """Select for the queries of stretch ``number`` of 2**level, which see some stretches of the keys."""
    assert isinstance(plan.options, Treecode)
    queries = (number * problem.n_q) >> level, ((number + 1) * problem.n_q) >> level
    blocks = equal_blocks(problem.xp, prepared.order[:, slice(*queries)], plan.options.rows)
    seen = (keys.first * problem.n_k) >> level, (keys.end * problem.n_k) >> level
    stretch = replace(prepared, blocks=blocks, seen=(level, *keys))
    return open_for(problem, plan, with_queries(problem, plan, stretch, queries, seen))


def build(problem: Problem, plan: Plan, moment: Array) -> KeyTree:
    """Build the tree over a problem's keys for queries whose `query_moment` is ``moment``."""
    view, coordinates, sizes = described_keys(problem, plan, moment)
    return grow(problem, plan, view, coordinates, sizes, moment)


def described_keys(problem: Problem, plan: Plan, moment: Array) -> tuple[View, Array, Array]:
    """Return the view, the keys' coordinates (G, n_k, p) and the sizes of the values (G, n_k), relative to the largest."""
    xp, kernels = problem.xp, plan.kernels
    k, v = without_gradient(problem.k), without_gradient(problem.v)
    view = balanced_view(problem, plan, moment)
    coordinates = kernels["project_rows"].function(xp, k, view.keys) - view.centre
    norms = kernels["row_norms"].function(xp, v)
    top = xp.max(norms, axis=1, keepdims=True)
    return view, coordinates, xp.astype(norms / xp.where(top > 0, top, 1.0), problem.dtype, copy=False)


def grow(
    problem: Problem, plan: Plan, view: View, coordinates: Array, sizes: Array, moment: Array, in_order: int = 0
) -> KeyTree:
    """Order the keys by a tree, its first levels as they are, and summarise its nodes."""
    xp, kernels = problem.xp, plan.kernels
    order = similar_together(problem, plan, coordinates, Treecode.LEAF_SIZE, in_order)
    nodes: TreeNodes = kernels["node_summaries"].function(
        xp, problem.k, problem.v, coordinates, sizes, order, Treecode.LEAF_SIZE, view.half_norm
    )
    still = TreeNodes(*(without_gradient(x) for x in nodes))
    unseen = still.spread * unseen_share(problem, view, moment, still, kernels["project_rows"].function)[:, None]
    # Stretches, whose nodes are the first levels, err more with it.
    sizes = (
        still.sizes if in_order else still.sizes * deeper(xp, still.sizes.shape[1], problem.dtype, named_device(problem.k))
    )
    return KeyTree(view, order, nodes, unseen, sizes, column_ranges(xp, without_gradient(problem.v)))


@lru_cache(maxsize=16)
@outside_inference_mode()
def deeper(xp: Namespace, nodes: int, dtype: Any, on: NamedDevice) -> Array:
    """Return 2^(`DEEPER` · level) for each of so many nodes: (nodes,). The last few are kept, as many steps make them."""
    number = xp.arange(1, nodes + 1, dtype=xp.float64, device=on.device)
    return xp.astype(2.0 ** (DEEPER * xp.floor(xp.log2(number))), dtype)


def order_queries(problem: Problem, plan: Plan, coordinates: Array, in_order: int = 0) -> Array:
    """Order the queries by a tree, its first levels as they are; a single block stays as it is."""
    xp, options = problem.xp, plan.options
    assert isinstance(options, Treecode)
    if problem.n_q <= options.rows:
        every = xp.arange(problem.n_q, dtype=xp.int64, device=problem.device)
        return xp.broadcast_to(every, (problem.groups, problem.n_q))
    return similar_together(problem, plan, coordinates, options.rows, in_order)


def similar_together(problem: Problem, plan: Plan, coordinates: Array, leaf_size: int, in_order: int) -> Array:
    """Return the order of a tree over rows, int64 (G, n), whose first levels are as they are.

    A sort of codes (`kdecore.kernels.rank_codes`) cuts all levels at once.
    """
    xp, kernels, options = problem.xp, plan.kernels, plan.options
    assert isinstance(options, Treecode)
    order: Array
    if options.ordering == "sort":
        codes = kernels["rank_codes"].function(xp, coordinates, CODE_BITS, in_order)
        order = kernels["bucket_order"].function(xp, codes, CODE_BITS)
    else:
        order = kernels["tree_order"].function(xp, coordinates, leaf_size, in_order)
    return order


def prepare_queries(problem: Problem, plan: Plan, keys: KeyTree, calibration: Calibration | None = None) -> Prepared:
    """Put a problem's queries into blocks."""
    xp, options = problem.xp, plan.options
    assert isinstance(options, Treecode)
    coordinates = plan.kernels["project_rows"].function(xp, without_gradient(problem.q), keys.view.queries)
    order = order_queries(problem, plan, coordinates)
    prepared = Prepared(keys, coordinates, order, equal_blocks(xp, order, options.rows), None, None, calibration=calibration)
    return with_queries(problem, plan, prepared, (0, problem.n_q), (0, problem.n_k))


def with_queries(problem: Problem, plan: Plan, prepared: Prepared, queries: Span, seen: Span) -> Prepared:
    """Find the pilot, and the own keys among those ``seen``, of blocks that hold some of the queries."""
    xp, blocks = problem.xp, prepared.blocks
    own = own_on_device(problem, queries, seen)
    if own is not None:
        place = invert_permutation(xp, prepared.keys.order)
        own = xp.broadcast_to(own, (problem.groups, problem.n_q))
        own = xp.where(own < 0, -1, take_along_rows(xp, place, xp.clip(own, 0, None)))
    if prepared.calibration is not None:
        return replace(prepared, own=own)
    groups, count, _ = blocks.index.shape
    some = pilot_blocks(groups, count)
    number = xp.arange(count, 2 * some * count, 2 * count, dtype=xp.int64, device=problem.device) // (2 * some)
    return replace(prepared, pilot=take_columns(xp, blocks.index, number), own=own)


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


def restrict(problem: Problem, prepared: Prepared, numbers: Array) -> tuple[Problem, Prepared, Array]:
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


def open_for(problem: Problem, plan: Plan, prepared: Prepared) -> Selected:
    """Open the tree for every block of queries: as lists where these are changed or recorded, else while it is evaluated."""
    xp, options, keys, blocks = problem.xp, plan.options, prepared.keys, prepared.blocks
    assert isinstance(options, Treecode)
    assert options.budget is not None
    sampled = options.far_field == "sample"
    threshold, most, start, slope = prepared.calibration or calibrate(problem, plan, prepared)
    limits = None if slope is None else keys.limits
    if "attend_tree" in plan.kernels:
        tree, values = summaries(keys)._replace(keys=keys.nodes.keys), keys.nodes.values
        how = prepared.coordinates, options.apart, tree, values, threshold, most, start
        return Opening(blocks, *how, slope, limits, prepared.own)
    queries = asking(problem, plan, prepared, blocks.index)
    key_index, log_weight, _, _ = plan.kernels["open_tree"].function(xp, queries, summaries(keys), threshold, most, start)
    if sampled:
        return drawn(problem, plan, prepared, key_index, log_weight)
    own = None if prepared.own is None else unlisted(problem, prepared, key_index, log_weight)
    return of_nodes(problem, keys, Selection(blocks, key_index, log_weight, slope=slope, limits=limits, own=own))


def asking(problem: Problem, plan: Plan, prepared: Prepared, index: Array) -> BlockQueries:
    """Return blocks of a problem's queries as kernels take them."""
    assert isinstance(plan.options, Treecode)
    return BlockQueries(without_gradient(problem.q), problem.scale, prepared.coordinates, index, plan.options.apart)


def summaries(keys: KeyTree) -> Tree:
    """Return what of a tree decides how it is opened."""
    still = keys.without_gradient().nodes
    return Tree(still.keys, keys.unseen, still.variances, keys.sizes)


def calibrated(problem: Problem, plan: Plan, prepared: Prepared) -> Prepared:
    """Return the same with what the pilot finds for a plan's budget, so that any of its blocks can be opened."""
    return replace(prepared, calibration=calibrate(problem, plan, prepared))


def calibrate(problem: Problem, plan: Plan, prepared: Prepared) -> Calibration:
    """Find out with the pilot how far to open trees, and what their closed nodes leave out."""
    found, key_index, share = open_pilot(problem, plan, prepared)
    sampled = isinstance(plan.options, Treecode) and plan.options.far_field == "sample"
    # Without values there is nothing that a matrix could lead to.
    if sampled or problem.d_v == 0:
        return found
    # From lists, queries would have to be gathered in the order of blocks for matrices of their own: not on accelerators.
    each_block = "attend_tree" in plan.kernels or not on_accelerator(problem.q)
    multiply = plan.kernels["gap_moments"].function
    slope = first_order(problem.xp, prepared.keys.nodes, key_index, share, multiply, each_block)
    return found._replace(slope=slope)


def open_pilot(problem: Problem, plan: Plan, prepared: Prepared) -> tuple[Calibration, Array, Array]:
    """Find the threshold at which lists are as long as the budget in the mean; return it, and the pilot's lists.

    Returns
    -------
    calibration
        Without first-order matrices.
    key_index, share
        (G, C, s) of the pilot's C blocks, as `kdecore.kernels.open_tree` returns them.
    """
    xp, pilot, tree, kernels = problem.xp, prepared.pilot, summaries(prepared.keys), plan.kernels
    assert pilot is not None
    assert plan.options.budget is not None
    budget = plan.options.budget - (prepared.own is not None and plan.options.budget > 1)
    start = first_nodes(budget, tree.nodes, *prepared.seen)
    most = max(start[2] - start[1], longest_list(kernels, budget, problem.n_k))
    given = xp, asking(problem, plan, prepared, pilot), tree
    threshold = kernels["pick_threshold"].function(*given, budget, max(WIDEST * budget, FEWEST_NODES), start)
    key_index, _, share, _ = kernels["open_tree"].function(*given, threshold, most, start)
    return Calibration(threshold, most, start), key_index, share


def for_queries(problem: Problem, keys: KeyTree, selected: Selected) -> Selected:
    """Return what was selected for a problem's queries, which may be longer than those that its tree was built for.

    What the first-order term takes a node's spread for falls with 1 / √(mean ‖q‖²), where the spread is wide for a query's
    logits (`TreeNodes.values`). It was found for other queries: for longer ones the term shrinks so in all nodes.
    O(G n_q d).
    """
    if selected.slope is None:
        return selected
    xp, q, known = problem.xp, without_gradient(problem.q), keys.view.half_norm
    norms = xp.sum(xp.astype(q, problem.dtype, copy=False) ** 2, axis=-1)
    half_norm = xp.mean(norms, axis=-1) * (0.5 * problem.scale**2 / problem.d)
    longer = half_norm > known
    factor = xp.sqrt(xp.where(longer, known, 1.0) / xp.where(longer, half_norm, 1.0))
    return replace(selected, slope=selected.slope * factor[:, None, None, None])


def of_nodes(problem: Problem, keys: KeyTree, selection: Selection) -> Selection:
    """Return a Selection of nodes and keys in the tree's order as one that has these as its keys and values."""
    # float16 might not hold a spread.
    stored = problem.k.dtype if problem.input_dtype == "bfloat16" else problem.dtype
    values = keys.nodes.values if selection.slope is not None else contiguous(keys.nodes.values[:, :, :-1])
    rows = (problem.xp.astype(x, stored, copy=False) for x in (keys.nodes.keys, values))
    return replace(selection, **dict(zip(("keys", "values"), rows, strict=True)))


def unlisted(problem: Problem, prepared: Prepared, key_index: Array, log_weight: Array) -> Array:
    """Return each query's own key, int64 (G, n_q), −1 where its block lists it or there is none."""
    xp, own, index = problem.xp, prepared.own, prepared.blocks.index
    assert own is not None
    nodes = int(prepared.keys.unseen.shape[1])
    place = take_along_rows(xp, own, index)
    # Slots that a list does not have are its last, and no key
    ascending = xp.where(log_weight == -xp.inf, nodes + problem.n_k, key_index)
    again = among(xp, ascending, place + nodes, nodes + problem.n_k)
    mine = xp.where(
        again | (place < 0), -1, take_along_rows(xp, prepared.keys.order, xp.maximum(place, xp.zeros_like(place)))
    )
    # Queries in no block have none here.
    return xp.where(own < 0, -1, in_order_of_queries(xp, index, mine, problem.n_q))


def among(xp: Namespace, ascending: Array, wanted: Array, n: int) -> Array:
    """Return which numbers below n, int64 (G, B, r), are among those of their block (G, B, s), ascending: bool (G, B, r)."""
    groups, blocks, slots = ascending.shape
    # Numbered through all blocks they ascend, so that one search finds them.
    first = xp.reshape(xp.arange(groups * blocks, dtype=xp.int64, device=ascending.device), (groups, blocks, 1)) * n
    every = xp.reshape(ascending + first, (-1,))
    slot = xp.clip(xp.searchsorted(every, xp.reshape(wanted + first, (-1,))), 0, groups * blocks * slots - 1)
    return xp.reshape(xp.take(every, slot), wanted.shape) == wanted + first


def drawn(problem: Problem, plan: Plan, prepared: Prepared, key_index: Array, log_weight: Array) -> Selection:
    """Replace each closed node of c keys by one of them, drawn with probability 1 / c, at log-weight ln c (derived).

    The larger a node's part of the attention, the further it was opened: these are samples without replacement, one
    from each of many strata of about equal importance. A block's number is uniform in [0, 1); each node's number is its
    block's plus a multiple of the golden ratio, modulo 1, and so uniform too.
    """
    xp, n, blocks = problem.xp, problem.n_k, prepared.blocks
    shape, nodes = (problem.groups, int(blocks.index.shape[1])), int(prepared.keys.nodes.spread.shape[1])
    starts = plan.kernels["draw_uniform"].function(xp, plan.draw_seed, SAMPLES_STREAM, shape, problem.device)
    closed = (key_index < nodes) & (log_weight > -xp.inf)
    node = xp.where(closed, key_index, 0)
    first, end = node_bounds(xp, node, n)
    count = xp.astype(end - first, xp.float64)
    number = starts[:, :, None] + xp.astype(node, xp.float64) * GOLDEN_RATIO
    place = xp.astype((number - xp.floor(number)) * count, xp.int64)
    position = xp.minimum(first + place, end - 1)
    weight = xp.astype(xp.log(count), log_weight.dtype)
    position = xp.where(closed, position, xp.maximum(key_index - nodes, xp.zeros_like(key_index)))
    return Selection(blocks, take_along_rows(xp, prepared.keys.order, position), xp.where(closed, weight, log_weight))
