"""Gradients of `attend_tree` in Numba for the CPU: each block goes down the tree again, and its weights are made again.

With w the weights of a query's list and of its own key, g the gradient of its result, c = scale · q @ slope, v' a row of
values with its last column σ, and g' = (g, ⟨g, c⟩),

    ∂logit = w (⟨g', v'⟩ − Σ w ⟨g', v'⟩ + ∂lse)    ∂v' = w g'    ∂k = ∂logit · scale q
    ∂q = scale (Σ ∂logit k + (Σ w σ) slope @ g)    ∂slope = (Σ w σ) · scale q gᵀ

Which nodes are opened and how they are weighted are constants, and a result that limits hold has the gradient of one that
they don't: what lies beyond them is rounding, or an extrapolation that went too far.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from kdecore.arrays.memory import host_view
from kdecore.arrays.namespace import Array
from kdecore.core.tree import BlockQueries, Tree
from kdecore.kernels.attend_blocks.cpu import LN2, round_up
from kdecore.kernels.attend_tree.cpu import DEPTH, row_product, unlisted_own
from kdecore.kernels.runtime.descent import (
    AHEAD,
    descend,
    host_queries,
    host_tree,
    leaf_level,
    list_leaves,
    load_block,
    memory,
)
from kdecore.kernels.runtime.jit import helper, kernel
from kdecore.kernels.runtime.simd import (
    TILE_ROWS,
    VECTOR_BYTES,
    column_max,
    copy_rows,
    copy_vector,
    exp2_columns,
    multiply_tile,
    prefetch,
)
from kdecore.kernels.runtime.threads import run_tasks

PARTS = 4
"""Of few groups, so many sums of gradients in all: each is added to by one thread at a time, in the same order always."""


class Gradients(NamedTuple):
    """Gradients of what a result was made of, NumPy arrays of the dtype that is computed in.

    Attributes
    ----------
    q, keys, values
        Of `BlockQueries.q`, of `Tree.keys`, and of the values, each of the same shape.
    slope
        (G, m, d, d_v): of the first-order matrices; m is 0 where there are none.
    """

    q: Array
    keys: Array
    values: Array
    slope: Array


def gradients(
    queries: BlockQueries,
    tree: Tree,
    values: Array,
    threshold: Array,
    most: int,
    start: tuple[int, int, int],
    own: Array | None,
    slope: Array | None,
    lse: Array,
    of_out: Array,
    of_lse: Array,
) -> Gradients:
    """Return the gradients of `kdecore.kernels.attend_tree.contract.AttendTree` without ``before``.

    Parameters
    ----------
    queries, tree, values, threshold, most, start, own, slope
        As it was called with.
    lse
        (G, n_q): what it returned.
    of_out, of_lse
        (G, n_q, d_v) and (G, n_q): gradients of its results.

    Returns
    -------
    Gradients
        O(Σ counts · b · (d + d_v)), and memory for them, several times where there are few groups.
    """
    given, nodes, rows = host_queries(queries), host_tree(tree), host_view(values)
    (groups, _, d), d_v, dtype = given.q.shape, rows.shape[2] - 1, given.q.dtype
    parts = max(1, PARTS // groups)
    mine = np.empty((groups, 0), np.int64) if own is None else host_view(own)
    matrices = np.zeros((groups, 0, d, d_v), dtype) if slope is None else host_view(slope)
    # What the last tile of a product reads beyond the last number has to be there.
    slopes = np.zeros((*matrices.shape[:2], d * d_v + TILE_ROWS * max(d, d_v)), dtype)
    slopes[:, :, : d * d_v] = matrices.reshape(*matrices.shape[:2], d * d_v)
    of_q = np.zeros_like(given.q)
    sums = tuple(np.zeros((parts, *x.shape), dtype) for x in (nodes.keys, rows, matrices))
    opening = float(host_view(threshold).item()), most, start
    back = tuple(host_view(x) for x in (lse, of_out, of_lse))
    run_tasks(
        partial(add_gradients, given, nodes, rows, (mine, slopes), opening, back, (of_q, *sums)), groups * parts, chunk=1
    )
    return Gradients(of_q, *(x[0] if parts == 1 else x.sum(axis=0) for x in sums))


class Panels(NamedTuple):
    """Memory of a thread beside `descent.Work`, for blocks of ``filled`` rows and lists of ``width`` slots.

    Attributes
    ----------
    keys, values
        Rows of the list, one after another.
    products
        (panels, width, lanes): ⟨g', v'⟩, then gradients of logits.
    weights, of_logits
        (width, filled): both by slots.
    of_rows
        (panels, d_v + 1, lanes): g'.
    rows, of_results
        Scaled queries and g', (columns in panels, filled, lanes).
    long_rows
        (filled, d): scaled queries times Σ w σ.
    change, of_queries, tile
        A panel's columns: c or slope @ g; ∂q; and what is added to the gradients of some keys or values.
    """

    keys: Any
    values: Any
    products: Any
    weights: Any
    of_logits: Any
    of_rows: Any
    rows: Any
    of_results: Any
    long_rows: Any
    change: Any
    of_queries: Any
    tile: Any


@helper()
def panels_of(filled, width, d, wide, like):
    """Return `Panels` for these sizes."""
    dtype, lanes = like.dtype, VECTOR_BYTES // like.itemsize
    columns = round_up(max(d, wide), TILE_ROWS) * lanes
    return Panels(
        np.zeros((width + TILE_ROWS) * d, dtype),
        np.zeros((width + TILE_ROWS) * wide, dtype),
        np.zeros(filled * width, dtype),
        np.zeros((width + TILE_ROWS) * filled, dtype),
        np.zeros((width + TILE_ROWS) * filled, dtype),
        np.zeros(filled * wide, dtype),
        np.zeros(round_up(d, lanes) * filled, dtype),
        np.zeros(round_up(wide, lanes) * filled, dtype),
        np.zeros(filled * d + TILE_ROWS, dtype),
        np.zeros(columns, dtype),
        np.zeros(columns, dtype),
        np.zeros(TILE_ROWS * lanes, dtype),
    )


@kernel()
def add_gradients(queries, tree, values, more, opening, back, found, first, last):
    """Add the gradients of blocks of parts first … last − 1, counted through all groups."""
    q, scale, (own, slopes), (lse, of_out, of_lse) = queries.q, queries.scale, more, back
    of_q, of_keys, of_values, of_slopes = found
    (threshold, most, start), (_, blocks, b) = opening, queries.index.shape
    n_q, d = q.shape[1:]
    keys, parts, matrices = tree.keys, of_keys.shape[0], slopes.shape[1]
    nodes, rows, d_v = tree.spread.shape[1], keys.shape[1], values.shape[2] - 1
    n, last_level, lanes, wide = rows - nodes, leaf_level(nodes), VECTOR_BYTES // q.itemsize, d_v + 1
    filled, width = round_up(b, lanes), round_up(most, TILE_ROWS) + TILE_ROWS
    flat_q, flat_keys, flat_values, flat_of_out = q.reshape(-1), keys.reshape(-1), values.reshape(-1), of_out.reshape(-1)
    flat_of_q, flat_of_keys, flat_of_values = of_q.reshape(-1), of_keys.reshape(-1), of_values.reshape(-1)
    work, none = memory(filled, d, tree.variances.shape[2], width, q), np.zeros(TILE_ROWS, q.dtype)
    held = panels_of(filled, width, d, wide, q)
    own_rows, own_weights = np.full(filled, -1, np.int64), np.zeros(filled, q.dtype)
    along, spreads, counts = np.zeros(filled, q.dtype), np.zeros(filled, q.dtype), np.zeros(filled, np.bool_)
    for task in range(first, last):
        group, part = task // parts, task % parts
        top_row, added_row = group * rows, (part * keys.shape[0] + group) * rows
        for block in range(part * blocks // parts, (part + 1) * blocks // parts):
            load_block(queries, group * blocks + block, work)
            closed, opened, slots = descend(tree, group, start, threshold, most, b, queries.apart, work)
            list_leaves(n, last_level, nodes, closed, opened, work)
            for j in range(slots):
                prefetch(flat_keys, (top_row + work.node[min(j + AHEAD, slots - 1)]) * d, d)
                prefetch(flat_values, (top_row + work.node[min(j + AHEAD, slots - 1)]) * wide, wide)
                copy_rows(flat_keys, (top_row + work.node[j]) * d, held.keys, j * d, d)
                copy_rows(flat_values, (top_row + work.node[j]) * wide, held.values, j * wide, wide)
            matrix = block * matrices // blocks
            for r in range(filled):
                # A row that is there again doesn't count again.
                counts[r] = r < b and not (r > 0 and work.rows[r] == work.rows[r - 1])
                work.tops[r] = lse[group, work.rows[r] - group * n_q] * (1.0 / LN2)
                own_rows[r], own_weights[r] = -1, 0.0
                if own.shape[1] > 0 and counts[r]:
                    position = unlisted_own(own[group, work.rows[r] - group * n_q], work.leaves, opened, n, last_level)
                    if position >= 0:
                        own_rows[r] = nodes + position
                        at = (top_row + own_rows[r]) * d
                        logit = row_product(flat_q, work.rows[r] * d, flat_keys, at, d) * (scale / LN2)
                        own_weights[r] = np.exp2(logit - work.tops[r])
            load_rows(flat_of_out, d_v, work, counts, held)
            for lane in range(0, filled, lanes):
                at = lane * width
                to = at + closed * lanes
                for j in range(0, slots - closed, TILE_ROWS):
                    source = (closed + j) * d
                    multiply_tile(
                        held.keys, source, d, 1, work.queries, lane * d, d, none, 0, work.kept, to + j * lanes, True
                    )
                # Never more than all, but for rounding.
                column_max(work.kept, at, slots, work.tops, lane)
                work.totals[lane : lane + lanes] = 0.0
                exp2_columns(work.kept, at, slots, work.tops, lane, work.totals, lane)
                if matrices > 0:
                    follow_first_order(slopes[group, matrix], d, d_v, lane, work, held, none)
                for j in range(0, slots, TILE_ROWS):
                    multiply_tile(
                        held.values, j * wide, wide, 1, held.of_rows, lane * wide, wide, none, 0, held.products,
                        at + j * lanes, True,
                    )  # fmt: skip
                for i in range(lanes):
                    r = lane + i
                    along[r], spreads[r] = 0.0, 0.0
                    if own_rows[r] >= 0:
                        at_values = (top_row + own_rows[r]) * wide
                        along[r] = own_weights[r] * row_product(flat_of_out, work.rows[r] * d_v, flat_values, at_values, d_v)
                weigh(slots, wide, lane, width, filled, work, held, along, spreads)
                for i in range(lanes):
                    r = lane + i
                    known = of_lse[group, work.rows[r] - group * n_q] if counts[r] else 0.0
                    along[r] = known - along[r]
                follow_logits(slots, lane, width, filled, work, held, along)
                of_queries(slots, d, lane, width, held, none)
                if matrices > 0:
                    turn_first_order(slopes[group, matrix], d, d_v, lane, spreads, work, held, none)
                for i in range(lanes):
                    r = lane + i
                    if counts[r]:
                        target, result, factor = work.rows[r] * d, work.rows[r] * d_v, q.dtype.type(scale)
                        for t in range(d):
                            flat_of_q[target + t] = held.of_queries[t * lanes + i] * factor
                        if own_rows[r] >= 0:
                            mine, added = top_row + own_rows[r], added_row + own_rows[r]
                            product = row_product(flat_of_out, result, flat_values, mine * wide, d_v)
                            of_logit = own_weights[r] * (product + along[r]) * factor
                            add_row(flat_of_q, target, flat_keys, mine * d, d, of_logit)
                            add_row(flat_of_keys, added * d, flat_q, target, d, of_logit)
                            add_row(flat_of_values, added * wide, flat_of_out, result, d_v, own_weights[r])
            spread_rows(d, wide, scale, spreads, work, held)
            add_list(slots, d, held.of_logits, held.rows, added_row, filled, work, held, none, flat_of_keys)
            add_list(slots, wide, held.weights, held.of_results, added_row, filled, work, held, none, flat_of_values)
            if matrices > 0:
                add_slope(of_slopes[part, group, matrix], d, d_v, filled, held, none)


@helper()
def add_row(target, target0, row, row0, width, factor):
    """Add to a row another one times a factor."""
    for t in range(width):
        target[target0 + t] += factor * row[row0 + t]


@helper()
def load_rows(of_out, d_v, work, counts, held):
    """Load the gradients of a block's results; 0 where a row doesn't count, and for spreads."""
    lanes, wide, filled = VECTOR_BYTES // of_out.itemsize, d_v + 1, work.rows.shape[0]
    held.of_rows[:] = 0.0
    for r in range(filled):
        if counts[r]:
            lane, source = r // lanes * lanes, work.rows[r] * d_v
            for t in range(d_v):
                held.of_rows[lane * wide + t * lanes + r - lane] = of_out[source + t]


@helper()
def follow_first_order(matrix, d, d_v, lane, work, held, none):
    """Write ⟨g, c⟩ of a panel's queries, c = scale · q @ slope, where the gradients of spreads are."""
    lanes = VECTOR_BYTES // none.itemsize
    base = lane * (d_v + 1)
    for column in range(0, d_v, TILE_ROWS):
        multiply_tile(matrix, column, 1, d_v, work.queries, lane * d, d, none, 0, held.change, column * lanes, True)
    for i in range(lanes):
        total = none.dtype.type(0.0)
        for t in range(d_v):
            total += held.of_rows[base + t * lanes + i] * held.change[t * lanes + i]
        held.of_rows[base + d_v * lanes + i] = total * none.dtype.type(LN2)


@kernel()
def weigh(slots, wide, lane, width, filled, work, held, along, spreads):
    """Copy a panel's weights by slots; add Σ w ⟨g', v'⟩ to ``along``, and Σ w σ to ``spreads``."""
    lanes = VECTOR_BYTES // along.itemsize
    at = lane * width
    for j in range(slots):
        spread = held.values[j * wide + wide - 1]
        source, first = np.uintp(at + j * lanes), np.uintp(lane)
        for i in range(np.uintp(lanes)):
            weight = work.kept[source + i]
            along[first + i] += weight * held.products[source + i]
            spreads[first + i] += weight * spread
        copy_vector(work.kept, at + j * lanes, held.weights, j * filled + lane)


@helper()
def follow_logits(slots, lane, width, filled, work, held, along):
    """Turn a panel's products into gradients of logits, and copy them by slots; ``along`` is ∂lse − Σ w ⟨g', v'⟩."""
    lanes = VECTOR_BYTES // along.itemsize
    at = lane * width
    for j in range(slots):
        source, first = np.uintp(at + j * lanes), np.uintp(lane)
        for i in range(np.uintp(lanes)):
            held.products[source + i] = work.kept[source + i] * (held.products[source + i] + along[first + i])
        copy_vector(held.products, at + j * lanes, held.of_logits, j * filled + lane)


@helper()
def of_queries(slots, d, lane, width, held, none):
    """Write Σ ∂logit k of a panel's queries: (d, lanes)."""
    lanes = VECTOR_BYTES // none.itemsize
    for begin in range(0, slots, DEPTH):
        depth = min(DEPTH, slots - begin)
        for t in range(0, d, TILE_ROWS):
            source, weight = begin * d + t, lane * width + begin * lanes
            multiply_tile(
                held.keys, source, 1, d, held.products, weight, depth, none, 0, held.of_queries, t * lanes, begin == 0
            )


@helper()
def turn_first_order(matrix, d, d_v, lane, spreads, work, held, none):
    """Add (Σ w σ) slope @ g to the gradients of a panel's queries."""
    lanes = VECTOR_BYTES // none.itemsize
    for t in range(0, d, TILE_ROWS):
        source = lane * (d_v + 1)
        multiply_tile(matrix, t * d_v, d_v, 1, held.of_rows, source, d_v, none, 0, held.change, t * lanes, True)
    for t in range(d):
        for i in range(lanes):
            held.of_queries[t * lanes + i] += spreads[lane + i] * held.change[t * lanes + i]


@helper()
def spread_rows(d, wide, scale, spreads, work, held):
    """Write a block's scaled queries and g' by columns, and queries times Σ w σ."""
    filled = work.rows.shape[0]
    lanes = VECTOR_BYTES // spreads.itemsize
    factor = spreads.dtype.type(LN2)
    for r in range(filled):
        lane = r // lanes * lanes
        for t in range(d):
            value = work.queries[lane * d + t * lanes + r - lane] * factor
            held.rows[(t // lanes * filled + r) * lanes + t % lanes] = value
            held.long_rows[r * d + t] = value * spreads[r]
        for t in range(wide):
            value = held.of_rows[lane * wide + t * lanes + r - lane]
            held.of_results[(t // lanes * filled + r) * lanes + t % lanes] = value


@helper()
def add_list(slots, columns, factors, rows, added_row, filled, work, held, none, found):
    """Add to the gradients of a list's keys, or values, the sums of rows times factors (slots, filled)."""
    lanes = VECTOR_BYTES // none.itemsize
    for j in range(0, slots, TILE_ROWS):
        for r in range(min(TILE_ROWS, slots - j)):
            prefetch(found, (added_row + work.node[j + r]) * columns, columns)
        for t in range(0, columns, lanes):
            multiply_tile(factors, j * filled, filled, 1, rows, t * filled, filled, none, 0, held.tile, 0, True)
            for r in range(min(TILE_ROWS, slots - j)):
                target, source = np.uintp((added_row + work.node[j + r]) * columns + t), np.uintp(r * lanes)
                for i in range(np.uintp(min(lanes, columns - t))):
                    found[target + i] += held.tile[source + i]


@helper()
def add_slope(found, d, d_v, filled, held, none):
    """Add (Σ w σ) · scale q gᵀ of a block's queries to the gradient of its first-order matrix (d, d_v)."""
    lanes = VECTOR_BYTES // none.itemsize
    for t in range(0, d, TILE_ROWS):
        for u in range(0, d_v, lanes):
            multiply_tile(held.long_rows, t, 1, d, held.of_results, u * filled, filled, none, 0, held.tile, 0, True)
            for r in range(min(TILE_ROWS, d - t)):
                for i in range(min(lanes, d_v - u)):
                    found[t + r, u + i] += held.tile[r * lanes + i]
