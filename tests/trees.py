"""Trees for tests: an oracle that follows the contract of `tree_order` by recursion, and inputs of `open_tree`."""

import numpy as np

from kdecore.kernels.node_means.reference import node_means
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
