"""`open_tree` in Numba for the CPU: a block a task."""

from functools import partial

import numpy as np

from kdecore.arrays.memory import from_host_like, host_view
from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.tree import BlockQueries, Tree
from kdecore.kernels.attend_blocks.cpu import LN2, round_up
from kdecore.kernels.runtime.descent import descend, host_queries, host_tree, leaf_level, list_leaves, load_block, memory
from kdecore.kernels.runtime.jit import kernel
from kdecore.kernels.runtime.simd import TILE_ROWS, VECTOR_BYTES, exp2_columns
from kdecore.kernels.runtime.threads import fair_chunk, run_tasks

TASKS = 8
"""Blocks a thread takes at a time, at most."""


def open_tree(
    xp: Namespace,
    queries: BlockQueries,
    tree: Tree,
    threshold: Array,
    most: int,
    start: tuple[int, int, int],
) -> tuple[Array, Array, Array, Array]:
    """Follow `kdecore.kernels.open_tree.contract.OpenTree`."""
    blocks, nodes = host_queries(queries), host_tree(tree)
    shape, dtype = blocks.index.shape[:2], blocks.q.dtype
    key_index = np.zeros((*shape, most), np.int64)
    log_weight, share = np.full((*shape, most), -np.inf, dtype), np.zeros((*shape, most), dtype)
    counts, limit = np.zeros(shape, np.int64), float(host_view(threshold).item())
    lists = key_index, log_weight, share, counts
    run_tasks(
        partial(open_blocks, blocks, nodes, limit, most, start, lists),
        counts.size,
        chunk=fair_chunk(counts.size, TASKS),
    )
    longest = max(1, int(counts.max(initial=1)))
    cut = (np.ascontiguousarray(x[:, :, :longest]) for x in (key_index, log_weight, share))
    key_index, log_weight, share = (from_host_like(xp, x, queries.q) for x in cut)
    return key_index, log_weight, share, from_host_like(xp, counts, queries.q)


@kernel()
def open_blocks(queries, tree, threshold, most, start, lists, first, last):
    """Open the tree for blocks first … last − 1, counted through all groups."""
    key_index, log_weight, share, counts = lists
    _, blocks, b = queries.index.shape
    nodes, lanes = tree.spread.shape[1], VECTOR_BYTES // queries.q.itemsize
    n, filled, width = tree.keys.shape[1] - nodes, round_up(b, lanes), round_up(most, TILE_ROWS) + TILE_ROWS
    work = memory(filled, queries.q.shape[2], tree.variances.shape[2], width, queries.q)
    for task in range(first, last):
        group, block = task // blocks, task % blocks
        load_block(queries, task, work)
        closed, opened, slots = descend(tree, group, start, threshold, most, b, queries.apart, work)
        list_leaves(n, leaf_level(nodes), nodes, closed, opened, work)
        counts[group, block] = slots
        for c in range(slots):
            key_index[group, block, c] = work.node[c]
            log_weight[group, block, c] = work.log_weight[c] * LN2 if c < closed else 0.0
        for lane in range(0, filled, lanes):
            exp2_columns(work.kept, lane * width, closed, work.tops, lane, work.closed_totals, lane)
            for i in range(lanes):
                work.factors[i] = 1.0 / (work.totals[lane + i] * b) if lane + i < b else 0.0
            for c in range(closed):
                start_of_row, total = np.uintp(lane * width + c * lanes), queries.q.dtype.type(0.0)
                opened_by = np.exp2(work.less[c])
                for i in range(np.uintp(lanes)):
                    # Where nothing was left of what was closed before, it gets no more than all.
                    total += min(work.kept[start_of_row + i] * opened_by, work.totals[lane + i]) * work.factors[i]
                share[group, block, c] += total
