"""`open_tree` in the simulator: lists of the contract followed node by node, in float64."""

import numpy as np
import pytest

from kdecore.arrays.namespace import host
from kdecore.kernels.open_tree import cuda
from tests.trees import assert_lists, opened_by_a_threshold, pass_problem


def problem(rng, **given):
    """Return a problem of two groups of two blocks of 3 queries each, but for what is given."""
    return pass_problem(rng, **{"budget": 14, "n": 40, "n_q": 6, "rows": 3, "d": 3, "p": 2, **given})


def assert_lists_of_the_contract(arguments, threshold, most, start, true=None):
    """Assert that the kernel lists what the contract says, in order; return how long lists are."""
    given = np.asarray(threshold), most, start
    found = cuda.open_tree(host, *arguments, *given)
    assert all(x.shape == (*arguments[0].index.shape[:2], most) for x in found[:3])
    assert_lists(found, opened_by_a_threshold(true or arguments, *given))
    for index, count in zip(found[0].reshape(-1, most), found[3].reshape(-1), strict=True):
        assert (np.diff(index[:count]) > 0).all()
        assert (index[count:] == 0).all()
    return found[3]


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 1e3])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_lists(rng, threshold, scale):
    """Scale 6 has nodes in the frozen phase."""
    arguments, start = problem(rng, scale=scale, apart=threshold == 0.1)
    counts = assert_lists_of_the_contract(arguments, threshold, 40, start)
    assert (counts == {0.0: 40, 1e3: 1}.get(threshold, counts)).all()


@pytest.mark.parametrize("start", [(1, 0, 2), (2, 0, 4), (2, 1, 3), (3, 2, 7), (4, 0, 16)], ids=str)
def test_lists_that_begin_with_several_nodes(rng, start):
    """At any level, of leaves too, and with a part of the tree."""
    arguments, _ = problem(rng, n_q=3, groups=1)
    assert_lists_of_the_contract(arguments, 0.1, 50, start)


@pytest.mark.parametrize(
    "given",
    [{"n": 64, "rows": 6, "apart": True}, {"n": 5, "rows": 1}, {"n": 33, "rows": 5, "n_q": 10, "d": 5, "apart": True}],
    ids=str,
)
def test_blocks_of_any_size(rng, given):
    """Of several tiles of queries, and of one query."""
    arguments, start = problem(rng, **{"groups": 1, **given})
    assert_lists_of_the_contract(arguments, 0.05, 64, start)


@pytest.mark.parametrize(("most", "threshold"), [(1, 0.05), (4, 0.0), (15, 0.02), (30, 0.01)])
def test_lists_that_would_be_too_long_begin_anew(rng, most, threshold):
    """On inner levels, and where leaves are opened; with a threshold of 0 too, as a pilot of queries that are 0 finds."""
    arguments, start = problem(rng, n_q=2, rows=1, d=2, groups=1)
    counts = assert_lists_of_the_contract(arguments, threshold, most, start)
    assert counts.max() <= most


def test_first_nodes_that_have_two_children(rng):
    """All of them: no list of its length holds more nodes on the way."""
    arguments, _ = problem(rng, groups=1, scale=2.0)
    assert_lists_of_the_contract(arguments, 0.01, 16, (3, 0, 8))


def test_blocks_of_other_depth(rng):
    """Of queries that are 0 all is alike, and others need single keys; blocks are as many as thread blocks take in turns."""
    arguments, start = problem(rng, n_q=8, rows=2)
    arguments[0].q[:, ::2] *= 0.1
    counts = assert_lists_of_the_contract(arguments, 0.3, 40, start)
    assert len(np.unique(counts)) > 2


def test_logits_far_apart(rng):
    """Logits of thousands, as sums of weights relative to the largest hold them."""
    (queries, tree), start = problem(rng, groups=1)
    assert_lists_of_the_contract((queries._replace(q=1000.0 * queries.q), tree), 0.1, 50, start)


def test_queries_that_are_not_finite_count_as_nothing(rng):
    (queries, tree), start = problem(rng, groups=1)
    broken = queries._replace(q=queries.q.copy(), coordinates=queries.coordinates.copy())
    broken.q[0, 1, 2], broken.coordinates[0, 1] = np.nan, np.inf
    broken.q[0, 4, 0], broken.coordinates[0, 4] = -np.inf, np.nan
    for numbers in (queries.q, queries.coordinates):
        numbers[0, [1, 4]] = 0.0
    assert_lists_of_the_contract((broken, tree), 0.1, 50, start, true=(queries, tree))


@pytest.mark.parametrize("sizes", ["from 1e-90 to 1e60", "all 0"])
def test_errors_of_any_size(rng, sizes):
    """Nothing is opened where there are none."""
    (queries, tree), start = problem(rng, groups=1)
    shape = tree.sizes.shape
    tree = tree._replace(sizes=tree.sizes * 10.0 ** rng.integers(-90, 61, shape) if sizes != "all 0" else np.zeros(shape))
    assert_lists_of_the_contract((queries, tree), 1e-5, 40, start)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_lists_in_float32_hold_every_key_once(rng, dtype):
    """Rounding may open another node; what is listed covers all keys, each in one slot."""
    (queries, tree), start = problem(rng, n_q=3, d=2)
    single = queries._replace(q=queries.q.astype(dtype), coordinates=queries.coordinates.astype(np.float32))
    found = cuda.open_tree(host, single, type(tree)(*(x.astype(np.float32) for x in tree)), np.float32(0.2), 30, start)
    key_index, log_weight, share, counts = found
    assert log_weight.dtype == share.dtype == np.float32
    for at in np.ndindex(counts.shape):
        rows = key_index[at][: counts[at]]
        covered = np.zeros(tree.n, int)
        for row in rows:
            level = int(row + 1).bit_length() - 1
            i = row + 1 - (1 << level)
            single_key = row >= tree.nodes
            first, end = (i * tree.n) >> level, ((i + 1) * tree.n) >> level
            covered[row - tree.nodes if single_key else slice(first, end)] += 1
        np.testing.assert_array_equal(covered, 1)
        assert 0.0 < share[at].sum() <= 1.0 + 1e-5
