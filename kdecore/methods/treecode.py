"""Treecode: near and important keys one by one, the others through the means of tree nodes (beyond the paper; derived).

1. Queries and keys are each ordered by a balanced tree of similar rows, or by one sort; consecutive queries form a block.
2. For each block the tree over the keys is opened where its closed nodes are estimated to err most, until the list is full.
3. A closed node is one key: the mean key, at log-weight ln(count) + spread, with the mean value. The keys of an open leaf
   are listed one by one, and exact.
4. To a closed node's mean value is added what its keys of larger logits make of it, to first order, by one matrix for all.
5. Where queries have keys of their own (`Problem.own`) these are exact too, and taken out of the nodes that hold
   them: out of their counts; taking them out of the means too erred no less on the data measured (bench/NOTES.md).

Rows are compared by what the other side sees of them, in few coordinates whose products add up to nearly the whole logit
(`balanced_view`). Nothing is random; the estimate is biased, by what nodes hide. With far_field="sample" a closed node is
replaced by one of its keys, drawn at random, and the estimate is unbiased in numerator and denominator.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from kdecore.inputs import Problem
from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.kernels.open_sweeps import contract as open_sweeps
from kdecore.kernels.open_tree import contract as open_tree
from kdecore.kernels.open_tree.contract import first_nodes
from kdecore.namespaces import (
    Array,
    Namespace,
    contiguous,
    from_host,
    host,
    invert_permutation,
    searchsorted_rows,
    take_along_rows,
    take_columns,
    without_gradient,
)
from kdecore.options import Treecode
from kdecore.planning import Plan
from kdecore.randomness import SAMPLES_STREAM
from kdecore.selection import Blocks, Selection, equal_blocks
from kdecore.stretches import Described, Span, Stretch
from kdecore.tree import depth, node_bounds, node_count

MOMENT_ROWS = 2048
"""Rows, evenly spaced, that moments are taken from, at least."""
DAMPING = 0.75
"""Of the first-order term; 0.7 to 0.85 err least on a vision transformer, 1 on all words (bench/NOTES.md)."""
GOLDEN_RATIO = (math.sqrt(5.0) - 1.0) / 2.0
CODE_BITS = 24
"""Of codes that rows are sorted by: two passes of a radix sort; 16 err as much (bench/NOTES.md)."""
START_SHARES = {"open_tree": open_tree.START_SHARE, "open_sweeps": open_sweeps.START_SHARE}
OWN_SHARE = 4
"""Own positions are listed where they take at most this part of the budget."""


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
    slope
        (G, d, d_v): `first_order_term`, or None for none.
    """

    view: "View"
    order: Array
    nodes: TreeNodes
    slope: Array | None


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
    own
        (G, B, b) int64, ascending: positions in the keys' tree of each block's own keys; None where queries have none.
    seen
        (level, first, end): the queries see the nodes first … end − 1 of a level.
    """

    keys: KeyTree
    coordinates: Array
    order: Array
    blocks: Blocks
    own: Array | None
    seen: tuple[int, int, int] = (0, 0, 1)


def select(problem: Problem, plan: Plan) -> Selection:
    """Select for each block of queries a list of tree nodes and single keys.

    Returns
    -------
    Selection
        ``budget`` slots a block, with the means of nodes and the keys in the tree's order as keys and values.
        O(G ((n_q + n_k) (d p + p log n) + n_q · budget · d + d² p)), with p = `Treecode.DIRECTIONS`.
    """
    return open_for(problem, plan, prepare(problem, plan))


def prepare(problem: Problem, plan: Plan) -> Prepared:
    """Build the tree over the keys, and the blocks of queries. O(G ((n_q + n_k) (d p + p log n) + d² p))."""
    moment = second_moment(problem, plan.kernels["cross_moment"].function, problem.q)
    return prepare_queries(problem, plan, build(problem, plan, moment))


def describe(problem: Problem, plan: Plan) -> Described:
    """Find coordinates of queries and keys, and sizes of values."""
    moment = second_moment(problem, plan.kernels["cross_moment"].function, problem.q)
    view, coordinates, sizes = described_keys(problem, plan, moment)
    of_queries = plan.kernels["project_rows"].function(problem.xp, without_gradient(problem.q), view.queries)
    return Described((of_queries,), (coordinates, sizes), (view.half_norm,), shared=view)


def prepare_in_order(problem: Problem, plan: Plan, level: int, described: Described) -> Prepared:
    """Build trees that have the 2**level equal stretches of keys, and of queries, as nodes."""
    (of_queries,), (coordinates, sizes), (half_norm,) = described.queries, described.keys, described.groups
    order, nodes = grow(problem, plan, coordinates, sizes, half_norm, level)
    queries = order_queries(problem, plan, of_queries, level)
    blocks = equal_blocks(problem.xp, queries, problem.n_q)
    # No first-order term: one for all stretches would tell queries of keys that they don't see.
    return Prepared(KeyTree(described.shared, order, nodes, None), of_queries, queries, blocks, None)


def select_stretch(problem: Problem, plan: Plan, prepared: Prepared, level: int, number: int, keys: Stretch) -> Selection:
    """Select for the queries of stretch ``number`` of 2**level, which see some stretches of the keys."""
    assert isinstance(plan.options, Treecode)
    queries = slice((number * problem.n_q) >> level, ((number + 1) * problem.n_q) >> level)
    blocks = equal_blocks(problem.xp, prepared.order[:, queries], plan.options.rows)
    seen = (keys.first * problem.n_k) >> level, (keys.end * problem.n_k) >> level
    own_keys = own_positions(problem, blocks, prepared.keys.order, (queries.start, queries.stop), seen)
    return open_for(problem, plan, replace(prepared, blocks=blocks, own=own_keys, seen=(level, *keys)))


def build(problem: Problem, plan: Plan, moment: Array) -> KeyTree:
    """Build the tree over a problem's keys for queries whose `second_moment` is ``moment``."""
    view, coordinates, sizes = described_keys(problem, plan, moment)
    order, nodes = grow(problem, plan, coordinates, sizes, view.half_norm)
    multiply = plan.kernels["cross_moment"].function
    return KeyTree(view, order, nodes, first_order_term(problem.xp, nodes, problem.n_k, multiply))


def described_keys(problem: Problem, plan: Plan, moment: Array) -> tuple["View", Array, Array]:
    """Return the view, the keys' coordinates (G, n_k, p) and the sizes of the values (G, n_k), relative to the largest."""
    xp, kernels = problem.xp, plan.kernels
    k, v = without_gradient(problem.k), without_gradient(problem.v)
    view = balanced_view(problem, plan, moment)
    coordinates = kernels["project_rows"].function(xp, k, view.keys) - view.centre
    norms = kernels["row_norms"].function(xp, v)
    top = xp.max(norms, axis=1, keepdims=True)
    return view, coordinates, xp.astype(norms / xp.where(top > 0, top, 1.0), problem.dtype)


def grow(
    problem: Problem, plan: Plan, coordinates: Array, sizes: Array, half_norm: Array, in_order: int = 0
) -> tuple[Array, TreeNodes]:
    """Order the keys by a tree, its first levels as they are, and summarise its nodes."""
    xp, kernels = problem.xp, plan.kernels
    order = similar_together(problem, plan, coordinates, Treecode.LEAF_SIZE, in_order)
    nodes: TreeNodes = kernels["node_summaries"].function(
        xp, problem.k, problem.v, coordinates, sizes, order, Treecode.LEAF_SIZE, half_norm
    )
    return order, nodes


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


def prepare_queries(problem: Problem, plan: Plan, keys: KeyTree) -> Prepared:
    """Put a problem's queries into blocks, and find each block's own keys."""
    xp, options = problem.xp, plan.options
    assert isinstance(options, Treecode)
    coordinates = plan.kernels["project_rows"].function(xp, without_gradient(problem.q), keys.view.queries)
    order = order_queries(problem, plan, coordinates)
    blocks = equal_blocks(xp, order, options.rows)
    own = own_positions(problem, blocks, keys.order, (0, problem.n_q), (0, problem.n_k))
    return Prepared(keys, coordinates, order, blocks, own)


def for_queries(problem: Problem, keys: KeyTree) -> KeyTree:
    """Return a tree for a problem's queries, which may be longer than those that it was built for: O(G n_q d).

    What its first-order term takes a node's spread for falls with 1 / √(mean ‖q‖²), where the spread is wide for a query's
    logits (`TreeNodes.values`). It was found for other queries: for longer ones the term shrinks so in all nodes.
    """
    if keys.slope is None:
        return keys
    xp, q, known = problem.xp, without_gradient(problem.q), keys.view.half_norm
    half_norm = xp.mean(xp.sum(q * q, axis=-1), axis=-1) * (0.5 * problem.scale**2 / problem.d)
    longer = half_norm > known
    factor = xp.sqrt(xp.where(longer, known, 1.0) / xp.where(longer, half_norm, 1.0))
    return replace(keys, slope=keys.slope * factor[:, None, None])


def own_positions(problem: Problem, blocks: Blocks, order: Array, queries: Span, seen: Span) -> Array | None:
    """Return the places of each block's own keys in ``order`` (G, n_k), int64 (G, B, b), ascending; None for none.

    Blocks hold queries of ``queries`` only, and the keys ``seen`` are looked at only.
    """
    if problem.own is None:
        return None
    own = problem.own[:, slice(*queries)]
    there = (seen[0] <= own) & (own < seen[1])
    if not bool(host.any(there)):
        return None
    xp, keys = problem.xp, own_on_device(problem, own, there, queries, seen)
    keys = xp.broadcast_to(keys, (problem.groups, own.shape[1]))
    mine = take_along_rows(xp, keys, blocks.index - queries[0])
    return xp.sort(take_along_rows(xp, invert_permutation(xp, order), mine), axis=-1)


def own_on_device(problem: Problem, own: Array, there: Array, queries: Span, seen: Span) -> Array:
    """Return ``own`` (1|G, n) where ``there``, as an array of the problem's library; any of the keys ``seen`` elsewhere.

    A query that has no own key among these may have any of them, which does no harm. Own keys that follow one another are
    counted on the device: a CUDA graph takes no copy from the host.
    """
    xp, position = problem.xp, host.arange(*queries, dtype=host.int64) // problem.repeats
    offset = int(own[there][0] - host.broadcast_to(position, own.shape)[there][0])
    if host.array_equal(own[there], host.broadcast_to(position + offset, own.shape)[there]):
        counted = xp.arange(*queries, dtype=xp.int64, device=problem.device) // problem.repeats
        return xp.clip(counted + offset, seen[0], seen[1] - 1)[None, :]
    return from_host(xp, host.where(there, own, seen[0]), dtype=None, device=problem.device)


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
    own = None if prepared.own is None else take_along_rows(xp, prepared.own, block)
    coordinates = take_along_rows(xp, prepared.coordinates, queries)
    return problem.with_queries(queries), Prepared(prepared.keys, coordinates, queries, blocks, own), rows


def open_for(problem: Problem, plan: Plan, prepared: Prepared) -> Selection:
    """Open the tree for every block of queries."""
    xp, options, nodes, blocks = problem.xp, plan.options, prepared.keys.nodes, prepared.blocks
    assert isinstance(options, Treecode)
    assert options.budget is not None
    own = prepared.own
    if own is not None and int(own.shape[2]) * OWN_SHARE > options.budget:
        own = None
    node_count = int(nodes.spread.shape[1])
    own_count = 0 if own is None else int(own.shape[2])
    key_index, log_weight = plan.kernels[options.opener].function(
        xp,
        without_gradient(problem.q),
        problem.scale,
        prepared.coordinates,
        blocks.index,
        *(without_gradient(x) for x in (nodes.keys, nodes.spread, nodes.variances, nodes.sizes)),
        own,
        options.budget,
        first_nodes(options.budget - own_count, node_count, *prepared.seen, START_SHARES[options.opener]),
    )
    if options.far_field == "sample":
        shape = (problem.groups, int(blocks.index.shape[1]))
        starts = plan.kernels["draw_uniform"].function(xp, plan.draw_seed, SAMPLES_STREAM, shape, problem.device)
        key_index, log_weight = draw(xp, key_index, log_weight, starts, own, problem.n_k, node_count)
        position = xp.maximum(key_index - node_count, xp.zeros_like(key_index))
        return Selection(blocks, take_along_rows(xp, prepared.keys.order, position), log_weight)
    values = nodes.values if prepared.keys.slope is not None else contiguous(nodes.values[:, :, :-1])
    # float16 might not hold a spread.
    stored = problem.k.dtype if problem.input_dtype == "bfloat16" else problem.dtype
    keys, values = (xp.astype(x, stored, copy=False) for x in (nodes.keys, values))
    return Selection(blocks, key_index, log_weight, keys=keys, values=values, slope=prepared.keys.slope)


def first_order_term(xp: Namespace, nodes: TreeNodes, n: int, multiply: Callable[..., Array]) -> Array:
    """Return `DAMPING` times what the mean value of a node of unit spread gains for each unit of a query (derived).

    A node's mean value leaves out that keys of larger logits weigh more: to first order its values' mean under attention is
    v̄ + Cov_h(v, k) q. All nodes are taken to have covariances of one shape, that within leaves, in proportion to their
    spread; the attention's mean spread comes with the values. `DAMPING` since nodes open along the directions that matter
    most, which leaves less of them within; and less of what may be chance. ``multiply`` is the kernel `cross_moment`.
    Returns (G, d, d_v), in O(G `MOMENT_ROWS` d d_v).
    """
    count, last = node_count(n, Treecode.LEAF_SIZE), depth(n, Treecode.LEAF_SIZE)
    # An odd step meets all places of a leaf.
    step = max(1, n // MOMENT_ROWS) | 1
    # Position j lies in leaf ⌊((j + 1) 2^last − 1) / n⌋, the node after 2^last − 1 others and as many more.
    first = ((n + 1) << last) - n - 1
    leaf = xp.arange(first, first + (n << last), step << last, dtype=xp.int64, device=nodes.keys.device) // n

    def within(x: Array, width: int) -> Array:
        """Return the first columns of rows less those of the mean of their leaf."""
        # Of x itself: where some of its columns are left out, NumPy copies all rows to take a few.
        rows, means = x[:, count::step, :width], take_columns(xp, x, leaf)[:, :, :width]
        return xp.astype(rows, nodes.spread.dtype, copy=False) - xp.astype(means, nodes.spread.dtype, copy=False)

    d, d_v = int(nodes.keys.shape[2]), int(nodes.values.shape[2]) - 1
    keys, values = within(nodes.keys, d), within(nodes.values, d_v)
    rows = int(keys.shape[1])
    size, value_size = (xp.sum(x * x, axis=(1, 2), keepdims=True) / rows for x in (keys, values))
    covariance = multiply(xp, keys, values)
    # Of rows that have nothing to do with each other, this much is left by chance.
    signal, noise = xp.sum(covariance * covariance, axis=(1, 2), keepdims=True), size * value_size / rows
    above = signal > noise
    certain = xp.where(above, signal - noise, 0.0) / xp.where(above, signal, 1.0)
    return covariance * (DAMPING * certain / xp.where(size > 0, size, 1.0))


def draw(
    xp: Namespace, key_index: Array, log_weight: Array, starts: Array, own: Array | None, n: int, nodes: int
) -> tuple[Array, Array]:
    """Replace each closed node of c keys by one of them, drawn with probability 1 / c, at log-weight ln c (derived).

    The larger a node's part of the attention, the further it was opened: these are samples without replacement, one
    from each of many strata of about equal importance. ``starts`` (G, B) is uniform in [0, 1); each node's number is its
    block's plus a multiple of the golden ratio, modulo 1, and so uniform too. A key drawn that its block lists as its own,
    at one of the positions ``own`` (G, B, s), ascending, does not count again.
    """
    closed = (key_index < nodes) & (log_weight > -xp.inf)
    node = xp.where(closed, key_index, 0)
    first, end = node_bounds(xp, node, n)
    count = xp.astype(end - first, xp.float64)
    number = starts[:, :, None] + xp.astype(node, xp.float64) * GOLDEN_RATIO
    place = xp.astype((number - xp.floor(number)) * count, xp.int64)
    position = xp.minimum(first + place, end - 1)
    weight = xp.astype(xp.log(count), log_weight.dtype)
    if own is not None:
        # Positions numbered through all blocks ascend in each group, so that one search finds them.
        block = xp.arange(int(own.shape[1]), dtype=xp.int64, device=own.device)[None, :, None] * n
        listed = xp.reshape(own + block, (int(own.shape[0]), -1))
        place = searchsorted_rows(xp, listed, position + block, side="left")
        last = int(listed.shape[1]) - 1
        mine = take_along_rows(xp, listed, xp.clip(place, 0, last)) == position + block
        weight = xp.where(mine, -xp.inf, weight)
    return xp.where(closed, nodes + position, key_index), xp.where(closed, weight, log_weight)


@dataclass(frozen=True)
class View:
    """How queries and keys see each other: in coordinates whose products add up to nearly the whole logit.

    Attributes
    ----------
    queries, keys
        (G, d, p): what turns queries and keys into coordinates.
    centre
        (G, 1, p): coordinates of the mean key.
    half_norm
        (G,): mean ‖scale q‖² / 2d, by which a spread becomes half the variance of a query's logits.
    """

    queries: Array
    keys: Array
    centre: Array
    half_norm: Array


def second_moment(problem: Problem, multiply: Callable[..., Array], rows: Array) -> Array:
    """Return the mean of x xᵀ over rows (G, n, d), from some of them where there are many: (G, d, d) float64.

    ``multiply`` is the kernel `cross_moment`.
    """
    rows = finite_rows(problem.xp, without_gradient(rows))
    return multiply(problem.xp, rows, rows)


def balanced_view(problem: Problem, plan: Plan, moment: Array) -> View:
    """Find the coordinates of queries of a second moment (G, d, d), and of a problem's keys, that hold most of the logits.

    They are the leading singular vectors of the matrix of logits with centred keys, the singular values shared evenly:
    queries and keys have the same second moment, a diagonal one (as in balanced truncation, Moore 1981). With C and S the
    second moments of scaled queries and centred keys, the leading eigenvectors of S C are found by orthogonal iteration from
    a fixed start, and balanced within their span (`kdecore.kernels.balanced_view`). Other scalings err more
    (bench/NOTES.md). O(G (d² p + `MOMENT_ROWS` · d²)).
    """
    xp, dtype, scale, d = problem.xp, problem.dtype, problem.scale, int(problem.k.shape[2])
    keys = finite_rows(xp, without_gradient(problem.k))
    centre = xp.mean(keys, axis=1, keepdims=True)
    keys = keys - centre
    of_scaled = moment * scale**2
    half_norm = xp.astype(xp.linalg.trace(of_scaled) * (0.5 / d), dtype)
    kernels = plan.kernels
    of_centred = kernels["cross_moment"].function(xp, keys, keys)
    queries, of_keys = kernels["balanced_view"].function(xp, of_scaled, of_centred, min(Treecode.DIRECTIONS, d))
    of_keys = xp.astype(of_keys, dtype)
    of_centre = kernels["project_rows"].function(xp, xp.astype(centre, dtype), of_keys)
    return View(xp.astype(queries * scale, dtype), of_keys, of_centre, half_norm)


def finite_rows(xp: Namespace, rows: Array) -> Array:
    """Return at least `MOMENT_ROWS` rows or all, evenly spaced, in float64, with 0 for numbers that are not finite."""
    rows = xp.astype(rows[:, :: max(1, int(rows.shape[1]) // MOMENT_ROWS), :], xp.float64)
    # Half as many operations as `isfinite` takes of PyTorch.
    return xp.where(xp.abs(rows) < math.inf, rows, 0.0)
