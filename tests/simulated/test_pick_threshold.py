"""`pick_threshold` in the simulator: the threshold of the contract, as far as bins tell bounds apart, in float64."""

import numpy as np
import pytest

from kdecore.arrays.namespace import host
from kdecore.kernels.open_tree.contract import STEP
from kdecore.kernels.pick_threshold import cuda
from kdecore.kernels.pick_threshold.contract import ABOVE, BINS, OCTAVES, STEPS, TOP_OCTAVE
from tests.trees import OneBlock, pass_problem, threshold_of


def binned_threshold(arguments, budget, most, start):
    """What the contract promises on accelerators, node by node."""
    blocks = [OneBlock(arguments, g, b) for g, b in np.ndindex(*arguments[0].index.shape[:2])]
    level, first, end = start
    current = [[(i, np.inf) for i in range(first, end)] for _ in blocks]
    closed = [[] for _ in blocks]
    gains, room = np.zeros(BINS, int), (budget - (end - first)) * len(blocks)
    while True:
        last = level == blocks[0].depth
        step = 1 if (blocks[0].depth - level) % STEP else STEP
        for number, block in enumerate(blocks):
            nodes = [i for i, _ in current[number]]
            found = block.errors(level, nodes, closed[number]) if nodes else []
            current[number] = [(i, min(x, above)) for (i, above), x in zip(current[number], found, strict=True)]
            for i, bound in current[number]:
                place = np.floor((np.log2(max(bound, 1e-300)) + OCTAVES - TOP_OCTAVE) * STEPS)
                gains[int(np.clip(place, 0, BINS - 1))] += (len(block.members(level, i)) if last else 1 << step) - 1
        beyond = np.flatnonzero(np.cumsum(gains[::-1]) > room)
        threshold = 2.0 ** ((BINS - beyond[0]) / STEPS - OCTAVES + TOP_OCTAVE) if len(beyond) else 0.0
        if last:
            return threshold * ABOVE
        for number, nodes in enumerate(current):
            above = [(i, bound) for i, bound in nodes if bound > threshold][: most >> step]
            closed[number] += [(level, i) for i, bound in nodes if (i, bound) not in above]
            current[number] = [(j, bound) for i, bound in above for j in range(i << step, (i + 1) << step)]
        level += step


def problem(rng, budget, **given):
    """Return a problem of two groups of two blocks of 3 queries each, but for what is given."""
    return pass_problem(rng, budget, **{"n": 50, "n_q": 6, "rows": 3, "d": 3, "p": 2, **given})


def assert_threshold_of_the_contract(arguments, budget, most, start):
    """Assert that the kernel finds it, and return it."""
    found = cuda.pick_threshold(host, *arguments, budget, most, start)
    assert found.shape == ()
    np.testing.assert_allclose(found, binned_threshold(arguments, budget, most, start), rtol=1e-12)
    return float(found)


@pytest.mark.parametrize(
    ("budget", "given"),
    [
        (14, {}),
        (26, {"n": 64, "scale": 3.0, "groups": 1, "apart": True}),
        (40, {"n": 64, "rows": 6, "groups": 1, "apart": True}),
        (9, {"n": 33, "n_q": 8, "rows": 1, "groups": 1}),
        (3, {"n": 5, "groups": 1}),
    ],
    ids=str,
)
def test_a_threshold(rng, budget, given):
    """It is that of bounds that are sorted, or up to a bin more: these cases cut no level between two bounds of a bin."""
    arguments, start = problem(rng, budget, **given)
    found = assert_threshold_of_the_contract(arguments, budget, 64, start)
    exact = threshold_of(arguments, budget, start)
    assert exact * (1 - 1e-12) <= found <= exact * 2.0 ** (1 / STEPS) * (1 + 1e-12)


@pytest.mark.parametrize("start", [(1, 0, 2), (2, 1, 3), (3, 2, 7), (4, 0, 16)], ids=str)
def test_lists_that_begin_with_several_nodes(rng, start):
    """At any level, of leaves too, and with a part of the tree."""
    arguments, _ = problem(rng, 14, groups=1)
    assert_threshold_of_the_contract(arguments, 18, 64, start)


@pytest.mark.parametrize("most", [1, 4, 9])
def test_levels_that_would_be_too_wide(rng, most):
    arguments, _ = problem(rng, 30)
    assert_threshold_of_the_contract(arguments, 30, most, (0, 0, 1))


def test_room_for_everything(rng):
    arguments, start = problem(rng, 50, groups=1)
    assert assert_threshold_of_the_contract(arguments, 50, 50, start) == 0.0


def test_room_for_nothing(rng):
    """What the first node's bin ends at is the threshold."""
    arguments, start = problem(rng, 1)
    assert assert_threshold_of_the_contract(arguments, 1, 50, start) > 0.0


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e30])
def test_bounds_beyond_the_bins(rng, factor):
    """They count in the first and last of them; those above the last one's end are opened all the same, and none of 0."""
    (queries, tree), start = problem(rng, 14, groups=1)
    found = assert_threshold_of_the_contract((queries, tree._replace(sizes=factor * tree.sizes)), 14, 50, start)
    ends = {0.0: 0.0, 1e-30: 2.0 ** (1 / STEPS + TOP_OCTAVE - OCTAVES), 1e30: 2.0**TOP_OCTAVE}
    np.testing.assert_allclose(found, ABOVE * ends[factor], rtol=1e-12)


def test_blocks_in_any_order(rng):
    """Counts are integers: the threshold is the same to the last bit, whichever thread block has which block of queries."""
    (queries, tree), start = problem(rng, 14, n_q=12, groups=1)
    found = [
        cuda.pick_threshold(host, queries._replace(index=queries.index[:, order]), tree, 14, 50, start)
        for order in ([0, 1, 2, 3], [3, 1, 0, 2])
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_threshold_in_float32(rng, dtype):
    """Rounding may move a bound to the next bin."""
    (queries, tree), start = problem(rng, 14)
    queries = queries._replace(q=queries.q.astype(dtype).astype(np.float64))
    single = queries._replace(q=queries.q.astype(dtype), coordinates=queries.coordinates.astype(np.float32))
    found = cuda.pick_threshold(host, single, type(tree)(*(x.astype(np.float32) for x in tree)), 14, 50, start)
    assert found.dtype == np.float32
    exact = binned_threshold((queries, tree), 14, 50, start)
    assert abs(np.log2(found / exact)) < 1.01 / STEPS
