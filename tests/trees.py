"""Trees for tests: oracles that follow the contracts of kernels node by node, and inputs of those that open trees."""

from functools import cache
from itertools import pairwise

import numpy as np

from kdecore.arrays.namespace import host
from kdecore.core.tree import BlockQueries, Tree, leaves
from kdecore.kernels.node_summaries.reference import node_summaries
from kdecore.kernels.open_tree.contract import ALONG, LEAST, SHORT, first_nodes
from kdecore.kernels.pick_threshold.contract import ABOVE
from kdecore.kernels.tree_order.contract import ITERATIONS, SAMPLE
from kdecore.kernels.tree_order.reference import tree_order

LEAF_SIZE = 4


def recursive_order(x, parts, in_order=0):
    """Order of the rows of one group, from the contract: rows are split by recursion, in float64."""
    n = len(x)

    def edge(part):
        return part * n // parts

    @cache
    def largest_of(level):
        edges = [edge((j * parts) // 2**level) for j in range(2**level + 1)]
        return max(end - begin for begin, end in pairwise(edges))

    def split(rows, level, i):
        rows = np.sort(rows)
        first, end = (i * parts) // 2**level, ((i + 1) * parts) // 2**level
        if end - first <= 1:
            return rows
        middle = edge(((2 * i + 1) * parts) // 2 ** (level + 1)) - edge(first)
        if len(rows) > 2 and level >= in_order:
            samples = min(SAMPLE, largest_of(level))
            sample = x[rows[np.arange(samples) * len(rows) // samples]]
            sample = sample - sample.mean(axis=0)
            direction = np.eye(x.shape[1])[np.argmax((sample**2).sum(axis=0))]
            for _ in range(ITERATIONS):
                direction = sample.T @ (sample @ direction)
                direction /= np.linalg.norm(direction) or 1.0
            rows = rows[np.argsort(x[rows] @ direction, kind="stable")]
        return np.concatenate([split(rows[:middle], level + 1, 2 * i), split(rows[middle:], level + 1, 2 * i + 1)])

    return split(np.arange(n), 0, 0)


def pass_problem(rng, budget=40, groups=2, n=300, n_q=70, rows=16, d=6, p=3, scale=1.0, seen=None, apart=False):
    """Arguments of `pick_threshold` up to the budget, and where lists begin: clustered keys, blocks of queries as they come.

    ``seen`` is what lists begin with; all keys' first nodes if None.
    """
    keys = rng.standard_normal((groups, n, d)) + 2.0 * rng.standard_normal((groups, 12, d))[:, rng.integers(0, 12, n)]
    q = rng.standard_normal((groups, n_q, d))
    order = tree_order(host, keys, leaves(n, LEAF_SIZE))
    sizes = 0.5 + rng.random((groups, n))
    nodes = node_summaries(host, keys, keys, keys[:, :, :p], sizes, order, LEAF_SIZE, np.ones(groups))
    blocks = n_q // rows
    query_index = np.stack([rng.permutation(n_q)[: blocks * rows].reshape(blocks, rows) for _ in range(groups)])
    tree = Tree(nodes.keys, nodes.spread, nodes.variances, nodes.sizes)
    start = first_nodes(budget, tree.nodes) if seen is None else first_nodes(budget, tree.nodes, *seen)
    return (BlockQueries(q, scale, scale * q[:, :, :p], query_index, apart), tree), start


def scaling_problem(rng, n, d=6, p=3, groups=2, octaves=0.15):
    """Arguments of `scaled_nodes`: keys in the order of a tree, and coordinates that hold most of the logits."""
    keys = rng.standard_normal((groups, n, d)) + 2.0 * rng.standard_normal((groups, 12, d))[:, rng.integers(0, 12, n)]
    sizes, half_norm, scale = 0.5 + rng.random((groups, n)), 0.05 + 0.1 * rng.random(groups), 0.4
    order = tree_order(host, keys, leaves(n, LEAF_SIZE))
    nodes = node_summaries(host, keys, keys[:, :, :1], keys[:, :, :p], sizes, order, LEAF_SIZE, half_norm)
    q = rng.standard_normal((groups, 50, d)) * np.geomspace(1.5, 0.7, d) + 0.3 * rng.standard_normal((groups, 1, d))
    directions = np.tile(scale * np.eye(d)[:, :p], (groups, 1, 1))
    return nodes, q.swapaxes(1, 2) @ q / 50, directions, half_norm, scale, octaves


class OneBlock:
    """A block of queries, and what `open_tree`'s contract says of nodes (level, i) for it; sums in the order of a set."""

    def __init__(self, arguments, g, b):
        (q, scale, coordinates, index, self.apart), (keys, spread, variances, sizes) = arguments
        mine = index[g, b]
        self.queries, self.keys, self.nodes = scale * q[g, mine], keys[g], spread.shape[1]
        self.n, self.depth = len(self.keys) - self.nodes, (self.nodes + 1).bit_length() - 2
        self.squares = 0.5 * coordinates[g, mine] ** 2
        self.norms = 0.5 * (self.queries**2).sum(axis=1) / q.shape[2]
        self.spread, self.variances, self.sizes = spread[g], variances[g], sizes[g]

    def members(self, level, i):
        return range((i * self.n) >> level, ((i + 1) * self.n) >> level)

    def sigma(self, level, i):
        return self.spread_of(level, i, self.squares.mean(axis=0), self.norms.mean())

    def spread_of(self, level, i, squares, norm):
        h, log = 2**level - 1 + i, np.log(len(self.members(level, i)))
        found = ALONG * squares @ self.variances[h] + norm * self.spread[h]
        return found if found <= log else 2 * np.sqrt(found * log) - log

    def sigmas(self, level, i):
        """Half variances of each query, its own or in proportion to its squared norm."""
        if self.apart:
            return np.array([self.spread_of(level, i, *one) for one in zip(self.squares, self.norms, strict=True)])
        mean = self.norms.mean()
        return self.sigma(level, i) * (self.norms / mean if mean > 0 else np.ones(len(self.norms)))

    def log_weight(self, level, i):
        return self.sigma(level, i) + np.log(len(self.members(level, i)))

    def listed(self, level, i):
        """The log-weight in a list: by how large the largest of so few draws is expected to be."""
        h, log = 2**level - 1 + i, np.log(len(self.members(level, i)))
        half = ALONG * self.squares.mean(axis=0) @ self.variances[h] + self.norms.mean() * self.spread[h]
        reached = log**2 / (log + SHORT)
        return log + (half if half <= reached else 2 * np.sqrt(half * reached) - reached)

    def logits(self, level, i):
        return self.queries @ self.keys[2**level - 1 + i] + self.log_weight(level, i)

    def errors(self, level, nodes, closed):
        """Errors of the nodes of a level where others are closed."""
        total = np.logaddexp.reduce([self.logits(*node) for node in (*closed, *((level, i) for i in nodes))], axis=0)
        shares = [np.exp(self.logits(level, i) - total) * self.sigmas(level, i) for i in nodes]
        return [(x**4).sum() ** 0.25 * self.sizes[2**level - 1 + i] for x, i in zip(shares, nodes, strict=True)]

    def below(self, level, i):
        step = 1 if (self.depth - level) % 2 else 2
        return level + step, range(i << step, (i + 1) << step)

    def descend(self, start, threshold, most):
        """Return the closed nodes and the leaves opened, both as (level, i)."""
        level, first, end = start
        nodes, closed = list(range(first, end)), []
        while True:
            opened = []
            found = self.errors(level, nodes, closed)
            for i, error in zip(nodes, found, strict=True):
                (opened if error > threshold else closed).append((level, i))
            if level == self.depth:
                break
            children = [self.below(*node) for node in opened]
            level, nodes = (children[0][0] if children else self.depth), [i for _, below in children for i in below]
        if len(closed) + sum(len(self.members(*leaf)) for leaf in opened) > most:
            return self.descend(start, 2 * max(threshold, LEAST), most)
        return closed, opened


def opened_by_a_threshold(arguments, threshold, most, start):
    """What `open_tree` promises, from its contract, node by node: lists, log-weights and shares, of uneven lengths."""
    groups, blocks, _ = arguments[0].index.shape
    lists = []
    for g, b in np.ndindex(groups, blocks):
        block = OneBlock(arguments, g, b)
        closed, opened = block.descend(start, threshold, most)
        total = np.logaddexp.reduce([block.logits(*node) for node in (*closed, *opened)], axis=0)
        rows = [2**level - 1 + i for level, i in closed]
        weights = [block.listed(*node) for node in closed]
        shares = [np.exp(block.logits(*node) - total).mean() for node in closed]
        singles = [block.nodes + position for leaf in opened for position in block.members(*leaf)]
        more = [0.0] * len(singles)
        lists.append((np.array(rows + singles), np.array(weights + more), np.array(shares + more)))
    return lists


def threshold_of(arguments, budget, start):
    """What `pick_threshold` promises, from its contract, where no level of a block is too long."""
    blocks = [OneBlock(arguments, g, b) for g, b in np.ndindex(*arguments[0].index.shape[:2])]
    level, first, end = start
    states = [([(i, np.inf) for i in range(first, end)], []) for _ in blocks]
    met, room = [], (budget - (end - first)) * len(blocks)
    while True:
        levels = []
        for block, (nodes, closed) in zip(blocks, states, strict=True):
            found = block.errors(level, [i for i, _ in nodes], closed) if nodes else []
            bounds = [min(error, above) for error, (_, above) in zip(found, nodes, strict=True)]
            leaf = level == block.depth
            more = [len(block.members(level, i)) if leaf else len(block.below(level, i)[1]) for i, _ in nodes]
            met += [(-bound, count - 1) for bound, count in zip(bounds, more, strict=True)]
            levels.append(bounds)
        taken, threshold = 0, 0.0
        for bound, more in sorted(met):
            taken += more
            if taken > room:
                threshold = -bound
                break
        if leaf:
            return threshold * ABOVE
        for number, (block, (nodes, closed)) in enumerate(zip(blocks, states, strict=True)):
            kept = [(i, bound) for (i, _), bound in zip(nodes, levels[number], strict=True)]
            closed += [(level, i) for i, bound in kept if bound <= threshold]
            below = [(j, bound) for i, bound in kept if bound > threshold for j in block.below(level, i)[1]]
            states[number] = below, closed
        level = blocks[0].below(level, 0)[0]


def assert_lists(found, expected):
    """Assert that the lists of `open_tree` are those of an oracle, in any order, and as long as it says."""
    index, weight, share, counts = found
    by_block = zip(*(x.reshape(-1, index.shape[2]) for x in (index, weight, share)), strict=True)
    for mine, count, (rows, weights, shares) in zip(by_block, counts.reshape(-1), expected, strict=True):
        assert count == len(rows)
        assert (mine[1][count:] == -np.inf).all()
        assert (mine[2][count:] == 0).all()
        order, true_order = np.argsort(mine[0][:count]), np.argsort(rows)
        np.testing.assert_array_equal(mine[0][:count][order], rows[true_order])
        np.testing.assert_allclose(mine[1][:count][order], weights[true_order], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(mine[2][:count][order], shares[true_order], rtol=1e-9, atol=1e-12)


def assert_same_lists(found, expected):
    """Assert that two results hold the same rows with the same log-weights, in any order."""
    for (index, weight), (true_index, true_weight) in zip(
        zip(*(x.reshape(-1, x.shape[-1]) for x in found), strict=True),
        zip(*(x.reshape(-1, x.shape[-1]) for x in expected), strict=True),
        strict=True,
    ):
        by, true_by = np.lexsort((weight, index)), np.lexsort((true_weight, true_index))
        counts, true_counts = np.isfinite(weight[by]), np.isfinite(true_weight[true_by])
        np.testing.assert_array_equal(index[by][counts], true_index[true_by][true_counts])
        np.testing.assert_allclose(weight[by][counts], true_weight[true_by][true_counts], rtol=1e-12, atol=1e-12)
