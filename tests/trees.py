"""Trees for tests: an oracle that follows the contract of `tree_order` by recursion, and inputs of `open_tree`."""

import numpy as np

from kdecore.kernels.node_means.reference import node_means
from kdecore.kernels.open_tree.contract import GROWTH
from kdecore.kernels.tree_order.contract import ITERATIONS, SAMPLE
from kdecore.kernels.tree_order.reference import tree_order
from kdecore.namespaces import host
from kdecore.tree import inner_nodes


def recursive_order(x, leaf_size):
    """Order of the rows of one group, from the contract: rows are split by recursion, in float64."""
    n = len(x)

    def split(rows, level, i):
        rows = np.sort(rows)
        largest = max(-(-n // 2**level), 1)
        if largest <= leaf_size:
            return rows
        middle = (((2 * i + 1) * n) >> (level + 1)) - ((i * n) >> level)
        if len(rows) > 2:
            samples = min(SAMPLE, largest)
            sample = x[rows[np.arange(samples) * len(rows) // samples]]
            sample = sample - sample.mean(axis=0)
            direction = np.eye(x.shape[1])[np.argmax((sample**2).sum(axis=0))]
            for _ in range(ITERATIONS):
                direction = sample.T @ (sample @ direction)
                direction /= np.linalg.norm(direction) or 1.0
            rows = rows[np.argsort(x[rows] @ direction, kind="stable")]
        return np.concatenate([split(rows[:middle], level + 1, 2 * i), split(rows[middle:], level + 1, 2 * i + 1)])

    return split(np.arange(n), 0, 0)


def tree_problem(rng, groups=2, n=300, n_q=70, rows=16, d=6, p=3, slots=40, own=True, scale=1.0):
    """Arguments of `open_tree` for keys in clusters: blocks of queries as they come, own positions at random."""
    keys = rng.standard_normal((groups, n, d)) + 2.0 * rng.standard_normal((groups, 12, d))[:, rng.integers(0, 12, n)]
    q = rng.standard_normal((groups, n_q, d)) * scale
    order = tree_order(host, keys, 1)
    means, spread = node_means(host, keys, order)
    along = keys[:, :, :p]
    moments, _ = node_means(host, np.concatenate([along, along**2], axis=-1), order)
    inner = inner_nodes(n)
    half_variances = 0.5 * np.maximum(moments[:, :inner, p:] - moments[:, :inner, :p] ** 2, 0.0)
    blocks = n_q // rows
    query_index = np.stack([rng.permutation(n_q)[: blocks * rows].reshape(blocks, rows) for _ in range(groups)])
    own_positions = np.sort(rng.integers(0, n, (groups, blocks, rows)), axis=-1) if own else None
    importance = 0.5 + rng.random((groups, inner))
    probes = q[:, :, :p] ** 2
    return q, query_index, probes, means, half_variances, spread * 0.5 / d, importance, own_positions, slots


def opened_one_by_one(q, query_index, probes, keys, half_variances, half_spread, importance, own, slots):
    """What `open_tree` promises, from its contract, for one block and one node at a time."""
    groups, blocks, rows = query_index.shape
    inner = half_variances.shape[1]
    n = keys.shape[1] - inner
    index, weight = np.zeros((groups, blocks, slots), np.int64), np.full((groups, blocks, slots), -np.inf)

    def members(level, i):
        return range((i * n) >> level, ((i + 1) * n) >> level)

    def spread_of(variance, count):
        limit = np.log(count)
        return variance if variance <= limit else 2 * np.sqrt(variance * limit) - limit

    def row_of(level, i):
        node = 2**level - 1 + i
        return node if node < inner else inner + members(level, i)[0]

    for g, b in np.ndindex(groups, blocks):
        mine = query_index[g, b]

        def log_weights_and_spreads(level, i, g=g, mine=mine):
            count, row = len(members(level, i)), row_of(level, i)
            spreads = [spread_of(probes[g, j] @ half_variances[g, row], count) if count > 1 else 0.0 for j in mine]
            return q[g, mine] @ keys[g, row] + spreads + np.log(count), np.array(spreads)

        own_rows = [] if own is None else list(own[g, b])
        listed = [(0, 0)]
        while len(listed) < slots - len(own_rows):
            found = [log_weights_and_spreads(*node) if node else (np.full(rows, -np.inf), None) for node in listed]
            total = np.logaddexp.reduce([logs for logs, _ in found], axis=0)
            error = [
                (np.exp(logs - total) * spreads * (importance[g, row_of(*node)] if len(members(*node)) > 1 else 0)) ** 4
                if node
                else np.full(rows, -1.0)
                for node, (logs, spreads) in zip(listed, found, strict=True)
            ]
            count = min(max(1, len(listed) // GROWTH), slots - len(own_rows) - len(listed))
            for place in np.argsort([-e.sum() for e in error], kind="stable")[:count]:
                node = listed[place]
                if node and len(members(*node)) > 1:
                    level, i = node
                    listed[place] = (level + 1, 2 * i)
                    listed.append((level + 1, 2 * i + 1))
                else:
                    listed.append(None)
        norm = np.mean([q[g, j] @ q[g, j] for j in mine])
        for place, position in enumerate(own_rows):
            index[g, b, place] = inner + position
            weight[g, b, place] = -np.inf if position in own_rows[:place] else 0.0
        for place, node in enumerate(listed, start=len(own_rows)):
            count = len(set(members(*node)) - set(own_rows)) if node else 0
            if count:
                row = index[g, b, place] = row_of(*node)
                spread = spread_of(half_spread[g, row] * norm, count) if len(members(*node)) > 1 else 0.0
                weight[g, b, place] = np.log(count) + spread
    return index, weight


def assert_same_lists(found, expected):
    """Assert that two results of `open_tree` hold the same rows with the same log-weights, in any order."""
    for (index, weight), (true_index, true_weight) in zip(
        zip(*(x.reshape(-1, x.shape[-1]) for x in found), strict=True),
        zip(*(x.reshape(-1, x.shape[-1]) for x in expected), strict=True),
        strict=True,
    ):
        by, true_by = np.lexsort((weight, index)), np.lexsort((true_weight, true_index))
        counts, true_counts = np.isfinite(weight[by]), np.isfinite(true_weight[true_by])
        np.testing.assert_array_equal(index[by][counts], true_index[true_by][true_counts])
        np.testing.assert_allclose(weight[by][counts], true_weight[true_by][true_counts], rtol=1e-12, atol=1e-12)
