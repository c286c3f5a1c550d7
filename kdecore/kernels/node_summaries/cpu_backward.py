"""Gradients of `node_summaries` in Numba for the CPU: leaf by leaf, with what the nodes above it pass down."""

from functools import partial

import numpy as np

from kdecore.arrays.memory import host_view
from kdecore.arrays.namespace import Array
from kdecore.core.tree import depth
from kdecore.kernels.runtime.jit import kernel
from kdecore.kernels.runtime.threads import run_tasks

TASK_LEAVES = 256
"""Leaves in a task."""


def gradients(
    order: Array,
    half_norm: Array,
    keys: Array,
    spreads: Array,
    spread: Array,
    of_keys: Array,
    of_values: Array,
    leaf_size: int,
) -> tuple[Array, Array]:
    """Return the gradients of k and v, NumPy arrays (G, n, d) and (G, n, d_v).

    A key's spread round its node's mean has the slope 2 (k − mean) / count, in which the mean may be taken from any centre:
    near the keys, so that little cancels.

    Parameters
    ----------
    order, half_norm, leaf_size
        As `kdecore.kernels.node_summaries.contract.NodeSummaries` was given them.
    keys, spreads, spread
        Of what it returned, `TreeNodes.keys`, the last column of `TreeNodes.values` (G, N + n_k), and `TreeNodes.spread`.
    of_keys, of_values
        Gradients of its keys and values. O(G n (d + d_v)).
    """
    given = tuple(host_view(x) for x in (order, half_norm, keys, spreads, spread, of_keys, of_values))
    (groups, n), rows = given[0].shape, given[2]
    of_k, of_v = (np.empty((groups, n, width), rows.dtype) for width in (rows.shape[2], of_values.shape[2] - 1))
    last = depth(n, leaf_size)
    parts = -(-(1 << last) // TASK_LEAVES)
    run_tasks(partial(pass_down, *given, last, of_k, of_v), groups * parts, chunk=1)
    return of_k, of_v


@kernel()
def pass_down(order, half_norm, keys, spreads, spread, of_keys, of_values, last_level, of_k, of_v, first, last):
    """Write the gradients of the rows of tasks first … last − 1, counted through all groups."""
    n, d = of_k.shape[1:]
    d_v, nodes = of_v.shape[2], spread.shape[1]
    leaves = 1 << last_level
    parts = -(-leaves // TASK_LEAVES)
    # What each row under a node gets of it and of those above: for its key, its value, and its gap to the centre.
    passed = np.zeros((last_level + 2, d + d_v + 1), keys.dtype)
    for task in range(first, last):
        group, begin = task // parts, task % parts * TASK_LEAVES
        centre = keys[group, 0]
        for leaf in range(begin, min(leaves, begin + TASK_LEAVES)):
            # Nodes that the leaf before it lies under too are known already.
            level = 0
            while leaf > begin and level < last_level and leaf >> (last_level - level) == (leaf - 1) >> (last_level - level):
                level += 1
            for upper in range(level, last_level + 1):
                i = leaf >> (last_level - upper)
                node = (1 << upper) - 1 + i
                count = (((i + 1) * n) >> upper) - ((i * n) >> upper)
                share = keys.dtype.type(1.0 / count)
                size, within = np.log(np.float64(count)), of_values[group, node, d_v]
                if half_norm[group] * spread[group, node] > size:
                    within *= spreads[group, node] / (2 * spread[group, node])
                above, below = passed[upper], passed[upper + 1]
                for t in range(d):
                    gap = keys[group, node, t] - centre[t]
                    below[t] = above[t] + (of_keys[group, node, t] - 2 * within * gap) * share
                for t in range(d_v):
                    below[d + t] = above[d + t] + of_values[group, node, t] * share
                below[d + d_v] = above[d + d_v] + within * share
            found = passed[last_level + 1]
            within = 2 * found[d + d_v]
            for j in range((leaf * n) >> last_level, ((leaf + 1) * n) >> last_level):
                row = order[group, j]
                for t in range(d):
                    gap = keys[group, nodes + j, t] - centre[t]
                    of_k[group, row, t] = of_keys[group, nodes + j, t] + found[t] + within * gap
                for t in range(d_v):
                    of_v[group, row, t] = of_values[group, nodes + j, t] + found[d + t]
