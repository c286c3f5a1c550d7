"""Trees for tests: oracles that follow the contracts of kernels node by node, and inputs of those that open trees."""

import numpy as np

from kdecore.kernels.node_summaries.reference import node_summaries
from kdecore.kernels.open_sweeps import contract as in_sweeps
from kdecore.kernels.open_tree.contract import ALONG, LEAST, BlockQueries, Tree, first_nodes
from kdecore.kernels.pick_threshold.contract import ABOVE
from kdecore.kernels.tree_order.contract import ITERATIONS, SAMPLE
from kdecore.kernels.tree_order.reference import tree_order
from kdecore.namespaces import host

LEAF_SIZE = 4


def recursive_order(x, leaf_size, in_order=0):
    """Order of the rows of one group, from the contract: rows are split by recursion, in float64."""
    n = len(x)

    def split(rows, level, i):
        rows = np.sort(rows)
        largest = max(-(-n // 2**level), 1)
        if largest <= leaf_size:
            return rows
        middle = (((2 * i + 1) * n) >> (level + 1)) - ((i * n) >> level)
        if len(rows) > 2 and level >= in_order:
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


def tree_problem(rng, groups=2, n=300, n_q=70, rows=16, d=6, p=3, slots=40, own=True, scale=1.0, seen=(0, 0, 1)):
    """Arguments of `open_sweeps` for clustered keys: blocks of queries as they come, own keys at random."""
    keys = rng.standard_normal((groups, n, d)) + 2.0 * rng.standard_normal((groups, 12, d))[:, rng.integers(0, 12, n)]
    q = rng.standard_normal((groups, n_q, d))
    order = tree_order(host, keys, LEAF_SIZE)
    sizes = 0.5 + rng.random((groups, n))
    nodes = node_summaries(host, keys, keys, keys[:, :, :p], sizes, order, LEAF_SIZE, np.ones(groups))
    blocks = n_q // rows
    query_index = np.stack([rng.permutation(n_q)[: blocks * rows].reshape(blocks, rows) for _ in range(groups)])
    own_positions = np.sort(rng.integers(0, n, (groups, blocks, rows)), axis=-1) if own else None
    coordinates = scale * q[:, :, :p]
    start = first_nodes(slots - (rows if own else 0), nodes.spread.shape[1], *seen)
    summaries = nodes.keys, nodes.spread, nodes.variances, nodes.sizes
    return q, scale, coordinates, query_index, *summaries, own_positions, slots, start


def far_key_problem(rng, length, n=256, slots=60):
    """The same for one block of queries that look like key 77, of logits about ``length``² beside those of all others."""
    q, scale, _, index, keys, spread, *_ = tree_problem(rng, groups=1, n=n, n_q=16, slots=slots, own=False)
    direction = rng.standard_normal(q.shape[2])
    ordered = keys[:, spread.shape[1] :, :]
    ordered[0, 77] = length * direction
    q[0] = length * direction + 0.1 * rng.standard_normal(q[0].shape)
    along, order = ordered[:, :, :3], np.arange(n)[None]
    nodes = node_summaries(host, ordered, ordered, along, np.ones((1, n)), order, LEAF_SIZE, np.ones(1))
    summaries = nodes.keys, nodes.spread, nodes.variances, nodes.sizes
    return q, scale, q[:, :, :3], index, *summaries, None, slots, first_nodes(slots, nodes.spread.shape[1])


def opened_in_sweeps(*arguments):
    """What `open_sweeps` promises, the same way."""
    return listed(sweep_by_sweep, *arguments)


def sweep_by_sweep(weigh, members, depth, wanted, start):
    """Return the same for `open_sweeps`."""
    top, first, end = start

    def rank(node, above):
        logs, errors = weigh(*node)
        share = np.exp(np.clip(logs - above, in_sweeps.LEAST_SHARE, in_sweeps.LARGEST_SHARE))
        error = min(((share * errors) ** 4).sum(), in_sweeps.LARGEST_ERROR)
        return error ** (in_sweeps.GROWTH / 4) / len(members(*node))

    def total(nodes):
        return np.logaddexp.reduce([weigh(*node)[0] for node in nodes], axis=0)

    begin = [(top, i) for i in range(first, end)]
    closed, opened = {node: rank(node, total(begin)) for node in begin}, []
    for sweep in range(depth - top + 1 + in_sweeps.MORE_SWEEPS):
        most = max(closed.values(), default=0.0)
        room = wanted - sum(len(members(*node)) for node in opened)

        def needed(limit, closed=closed):
            slots = 0.0
            for node, found in closed.items():
                keys = len(members(*node))
                predicted = keys if node[0] == depth else min(keys, max(2.0, found / limit))
                slots += predicted if found > limit else 1
            return slots

        high = 1.0 + (np.log2(most) if most > 0 else 0.0)
        low = high - in_sweeps.OCTAVES
        for _ in range(in_sweeps.HALVINGS):
            middle = 0.5 * (low + high)
            low, high = (low, middle) if needed(2.0**middle) <= room else (middle, high)
        if sweep < in_sweeps.SUMMED_SWEEPS:
            above = total([*closed, *opened])
        chosen = [node for node, found in closed.items() if found > 2.0**high]
        if not chosen:
            break
        for node in chosen:
            del closed[node]
        opened += [node for node in chosen if node[0] == depth]
        for level, i in (node for node in chosen if node[0] < depth):
            for child in ((level + 1, 2 * i), (level + 1, 2 * i + 1)):
                closed[child] = rank(child, above)
    return list(closed), opened


def listed(choose, q, scale, coordinates, query_index, keys, spread, variances, sizes, own, slots, start):
    """Return the lists of all blocks, of nodes and leaves that a function chooses."""
    groups, blocks, _ = query_index.shape
    nodes = spread.shape[1]
    n, depth = keys.shape[1] - nodes, (nodes + 1).bit_length() - 2
    index, weight = np.zeros((groups, blocks, slots), np.int64), np.full((groups, blocks, slots), -np.inf)

    def members(level, i):
        return range((i * n) >> level, ((i + 1) * n) >> level)

    def spread_of(half_variance, count):
        limit = np.log(count)
        return half_variance if half_variance <= limit else 2 * np.sqrt(half_variance * limit) - limit

    for g, b in np.ndindex(groups, blocks):
        mine = query_index[g, b]

        def weights_and_errors(level, i, g=g, mine=mine):
            count, h = len(members(level, i)), 2**level - 1 + i
            spreads = np.array([spread_of(0.5 * coordinates[g, j] ** 2 @ variances[g, h], count) for j in mine])
            return scale * (q[g, mine] @ keys[g, h]) + spreads + np.log(count), spreads * sizes[g, h]

        own_rows = [] if own is None else list(own[g, b])
        closed, opened = choose(weights_and_errors, members, depth, slots - len(own_rows), start)
        norm = scale**2 * np.mean([q[g, j] @ q[g, j] for j in mine])
        for place, position in enumerate(own_rows):
            index[g, b, place] = nodes + position
            weight[g, b, place] = -np.inf if position in own_rows[:place] else 0.0
        place = len(own_rows)
        for level, i in closed:
            h, count = 2**level - 1 + i, len(set(members(level, i)) - set(own_rows))
            if count:
                half_variance = 0.5 * spread[g, h] * norm / q.shape[2]
                several = len(members(level, i)) > 1
                index[g, b, place] = h
                weight[g, b, place] = np.log(count) + (spread_of(half_variance, count) if several else 0.0)
            place += 1
        for node in opened:
            for position in sorted(set(members(*node)) - set(own_rows)):
                index[g, b, place], weight[g, b, place] = nodes + position, 0.0
                place += 1
    return index, weight


def pass_problem(rng, budget=40, **given):
    """Arguments of `pick_threshold` up to the budget, and where lists begin, for the same keys and blocks."""
    *arguments, _, slots, start = tree_problem(rng, own=False, slots=budget, **given)
    queries, tree = BlockQueries(*arguments[:4]), Tree(*arguments[4:])
    return (queries, tree), start if "seen" in given else first_nodes(slots, tree.nodes)


class OneBlock:
    """A block of queries, and what `open_tree`'s contract says of nodes (level, i) for it; sums in the order of a set."""

    def __init__(self, arguments, g, b):
        (q, scale, coordinates, index), (keys, spread, variances, sizes) = arguments
        mine = index[g, b]
        self.queries, self.keys, self.nodes = scale * q[g, mine], keys[g], spread.shape[1]
        self.n, self.depth = len(self.keys) - self.nodes, (self.nodes + 1).bit_length() - 2
        self.m = 0.5 * (coordinates[g, mine] ** 2).mean(axis=0)
        self.norm = 0.5 * (self.queries**2).sum(axis=1).mean() / q.shape[2]
        self.spread, self.variances, self.sizes = spread[g], variances[g], sizes[g]

    def members(self, level, i):
        return range((i * self.n) >> level, ((i + 1) * self.n) >> level)

    def sigma(self, level, i):
        h, log = 2**level - 1 + i, np.log(len(self.members(level, i)))
        found = ALONG * self.m @ self.variances[h] + self.norm * self.spread[h]
        return found if found <= log else 2 * np.sqrt(found * log) - log

    def log_weight(self, level, i):
        return self.sigma(level, i) + np.log(len(self.members(level, i)))

    def logits(self, level, i):
        return self.queries @ self.keys[2**level - 1 + i] + self.log_weight(level, i)

    def errors(self, level, nodes, closed):
        """Errors of the nodes of a level where others are closed."""
        total = np.logaddexp.reduce([self.logits(*node) for node in (*closed, *((level, i) for i in nodes))], axis=0)
        found = [((np.exp(self.logits(level, i) - total) ** 4).sum()) ** 0.25 for i in nodes]
        return [x * self.sigma(level, i) * self.sizes[2**level - 1 + i] for x, i in zip(found, nodes, strict=True)]

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
        weights = [block.log_weight(*node) for node in closed]
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
