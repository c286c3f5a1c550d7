"""A tree opened down to a threshold: its kernels against their contracts followed node by node."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kdecore
from kdecore.arrays.namespace import host
from kdecore.core.state import AttentionState
from kdecore.core.tree import bounds, depth, node_count
from kdecore.kernels.gap_moments.contract import TURN
from kdecore.kernels.gap_moments.reference import gap_moments
from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.kernels.open_tree.contract import first_nodes
from kdecore.kernels.registry import KERNELS
from kdecore.kernels.shrink_matrices.reference import shrink_matrices
from kdecore.methods.first_order import DAMPING, first_order
from kdecore.methods.treecode import Treecode
from tests import oracles
from tests.implementations import implementations, on_host, run
from tests.tolerances import assert_close
from tests.trees import assert_lists, opened_by_a_threshold, pass_problem, threshold_of

SIZES = [(120, 40), (120, 12), (120, 119), (7, 6), (2, 1), (700, 200)]


@pytest.mark.parametrize(("n", "budget"), SIZES)
@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("apart", [False, True])
@implementations("open_tree")
def test_lists(backend, rng, implementation, n, budget, scale, apart):
    """Scale 3 has nodes in the frozen phase."""
    arguments, start = pass_problem(rng, budget, n=n, n_q=33, scale=scale, apart=apart)
    for threshold in (0.0, 0.02, 0.3, 100.0):
        given = np.asarray(threshold), 10 * n, start
        assert_lists(run(implementation, backend, *arguments, *given), opened_by_a_threshold(arguments, *given))


@pytest.mark.parametrize("most", [30, 55])
@pytest.mark.parametrize("threshold", [0.001, 0.0])
@implementations("open_tree")
def test_lists_that_would_be_too_long_begin_anew(backend, rng, implementation, threshold, most):
    """A threshold of 0 too, as a pilot of queries that are 0 finds."""
    arguments, start = pass_problem(rng, n=300, n_q=33)
    given = np.asarray(threshold), most, start
    found = run(implementation, backend, *arguments, *given)
    assert_lists(found, opened_by_a_threshold(arguments, *given))
    assert 10 < found[3].max() <= most


@pytest.mark.parametrize("seen", [(2, 0, 3), (2, 1, 2), (3, 2, 8), (1, 1, 2)])
@implementations("open_tree")
def test_lists_of_a_part(backend, rng, implementation, seen):
    """They hold the keys under the nodes seen, each once, and no others."""
    arguments, start = pass_problem(rng, 60, n=300, n_q=33, seen=seen)
    given = np.asarray(0.05), 300, start
    assert_lists(run(implementation, backend, *arguments, *given), opened_by_a_threshold(arguments, *given))
    queries, tree = arguments
    variances = np.zeros_like(tree.variances)
    variances[:, ::2] = 1e-9
    tree = tree._replace(spread=np.zeros_like(tree.spread), variances=variances)
    _, log_weight, _, _ = run(implementation, backend, queries, tree, np.asarray(1e-12), 300, start)
    level, first, end = seen
    held = ((end * 300) >> level) - ((first * 300) >> level)
    np.testing.assert_allclose(np.exp(log_weight).sum(axis=-1), held, rtol=1e-6)


@pytest.mark.parametrize(("n", "budget"), SIZES)
@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("apart", [False, True])
@implementations("pick_threshold")
def test_a_threshold(backend, rng, implementation, n, budget, scale, apart):
    arguments, start = pass_problem(rng, budget, n=n, n_q=33, scale=scale, apart=apart)
    found = run(implementation, backend, *arguments, budget, 10 * n, start)
    np.testing.assert_allclose(found, threshold_of(arguments, budget, start), rtol=1e-9, atol=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(2, 400), st.floats(0.02, 1.0), st.sampled_from((0.3, 1.0, 5.0)))
@settings(max_examples=60, deadline=None)
def test_lists_are_as_long_as_the_budget_in_the_mean(seed, n, part, scale):
    """Of the blocks that the threshold is found from: no longer; and as long, but for one node, unless all is open.

    Sums of weights move a little while a tree is opened: a tenth of the budget is left to that.
    """
    budget = max(1, int(part * n))
    arguments, start = pass_problem(np.random.default_rng(seed), budget, n=n, n_q=64, scale=scale)
    counts = {}
    for pick, opens in zip(*(KERNELS[name][-2:] for name in ("pick_threshold", "open_tree")), strict=True):
        threshold = pick.function(host, *arguments, budget, 4 * n, start)
        counts[pick.target] = opens.function(host, *arguments, threshold, 4 * n, start)[3]
    np.testing.assert_array_equal(counts["numba-cpu"], counts["array-api"])
    mean = counts["array-api"].mean()
    assert mean <= 1.1 * budget + 1
    assert mean >= 0.85 * budget - 5 or mean == n


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("slope", [0, 1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@implementations("attend_tree")
def test_attention_to_lists(backend, rng, implementation, own, slope, dtype):
    """Against exact attention to each block's list, with keys of queries' own, and matrices of blocks."""
    arguments, start = pass_problem(rng, n=300, n_q=70, d=17, apart=own)
    (q, scale, _, index, _), tree = arguments
    keys, nodes, (groups, blocks, _) = tree.keys, tree.nodes, index.shape
    values = rng.standard_normal((groups, keys.shape[1], 20))
    values[:, nodes:, -1] = 0.0
    places = rng.integers(-1, 300, q.shape[:2]) if own else None
    matrices = rng.standard_normal((groups, slope, 17, 19)) if slope else None
    given = np.asarray(0.05), 300, start
    lists = opened_by_a_threshold(arguments, *given)
    true_out, true_lse = np.zeros((groups, 70, 19)), np.full((groups, 70), -np.inf)
    for number, (rows, weights, _) in enumerate(lists):
        g, block = divmod(number, blocks)
        for i in index[g, block]:
            row, weight = list(rows), list(weights)
            if own and places[g, i] >= 0 and nodes + places[g, i] not in row:
                row, weight = [*row, nodes + places[g, i]], [*weight, 0.0]
            logits = scale * keys[g, row] @ q[g, i] + weight
            true_lse[g, i] = np.logaddexp.reduce(logits)
            found = np.exp(logits - true_lse[g, i]) @ values[g, row]
            true_out[g, i] = found[:-1]
            if slope:
                true_out[g, i] += found[-1] * scale * q[g, i] @ matrices[g, block * slope // blocks]
    inside = np.isfinite(true_lse)

    def narrowed(numbers):
        return numbers.astype(dtype) if getattr(numbers, "dtype", None) == np.float64 else numbers

    numbers = [type(x)(*map(narrowed, x)) for x in arguments]
    call = (*numbers, narrowed(values), narrowed(given[0]), *given[1:], places, narrowed(matrices))
    (out, lse), counts = attended(implementation, backend, call, dtype)
    assert out.dtype == lse.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(counts.reshape(-1), [len(rows) for rows, _, _ in lists])
    assert_close(out[inside], true_out[inside], ulps=256, dtype=dtype)
    assert_close(lse[inside], true_lse[inside], ulps=64, dtype=dtype)
    before = rng.standard_normal((groups, 70, 19)).astype(dtype), rng.standard_normal((groups, 70)).astype(dtype)
    (merged, both), _ = attended(implementation, backend, call, dtype, before)
    true_both = np.logaddexp(true_lse, before[1])
    old, new = (np.exp(x - true_both)[..., None] for x in (before[1], true_lse))
    assert_close(both, true_both, ulps=64, dtype=dtype)
    assert_close(merged, old * before[0] + new * true_out, ulps=256, dtype=dtype)


@implementations("attend_tree")
def test_results_stay_within_limits(backend, rng, implementation):
    """As means of values do, wherever the first-order term would lead."""
    arguments, start = pass_problem(rng, n=300, n_q=70)
    values = rng.standard_normal((2, arguments[1].keys.shape[1], 4))
    slope, limits = (
        100.0 * rng.standard_normal((2, 1, 6, 3)),
        (np.array([[-0.5, 0.1, -9.0]] * 2), np.array([[0.2, 0.3, 9.0]] * 2)),
    )
    call = (*arguments, values, np.asarray(0.05), 300, start, None, slope)

    class Flat:
        """Returns out alone, of limits that come one by one."""

        target, unsupported = implementation.target, implementation.unsupported

        @staticmethod
        def function(xp, *arrays):
            *arrays, low, high = arrays
            return implementation.function(xp, *arrays, (low, high))[0].out

    inside = np.unique(arguments[0].index[0])
    free, held = (run(Flat, backend, *call, *given)[0, inside] for given in ((limits[0] - 1e9, limits[1] + 1e9), limits))
    np.testing.assert_allclose(held, np.clip(free, limits[0][0], limits[1][0]), rtol=0, atol=1e-12)
    assert (held != free).any()


def attended(implementation, backend, arguments, dtype, before=None):
    """Call an implementation of `attend_tree` on a backend; out and lse, and counts, as NumPy arrays."""
    function = implementation.function

    class Flat:
        """Returns the parts of results one by one, as `run` takes them."""

        target, unsupported = implementation.target, implementation.unsupported

        @staticmethod
        def function(xp, *arrays):
            *arrays, out, lse = arrays
            part, counts = function(xp, *arrays, None, None if out is None else AttentionState(out, lse))
            return part.out, part.lse, counts

    kept = (None, None) if before is None else tuple(x.copy() for x in before)
    out, lse, counts = run(Flat, backend, *arguments, *kept, dtype=dtype)
    return (out, lse), counts


def test_lists_begin_with_one_node_in_twelve_slots():
    nodes = node_count(1000, 4)
    assert first_nodes(12, nodes) == (0, 0, 1)
    assert first_nodes(23, nodes) == (0, 0, 1)
    assert first_nodes(24, nodes) == (1, 0, 2)
    assert first_nodes(1 << 20, nodes) == (8, 0, 256)
    assert first_nodes(48, nodes, 2, 1, 2) == (4, 4, 8)
    assert first_nodes(60, nodes, 2, 0, 3) == (2, 0, 3)


@pytest.mark.parametrize(("n", "d", "d_v", "slots"), [(40, 3, 1, 7), (500, 17, 33, 130), (90, 64, 64, 31), (5, 1, 20, 1)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@implementations("gap_moments")
def test_gap_moments(backend, rng, implementation, n, d, d_v, slots, dtype):
    """Against keys drawn one by one: nodes with no share are passed over, and so are slots that hold no node."""
    nodes = node_count(n, 4)
    edges = [pair for level in range(depth(n, 4) + 1) for pair in pairwise(bounds(n, level).tolist())]
    keys, values = (rng.standard_normal((2, nodes + n, width)).astype(dtype) for width in (d, d_v + 1))
    key_index = rng.integers(0, nodes + n, (2, 3, slots))
    share = np.where((rng.random((2, 3, slots)) < 0.7) & (key_index < nodes), rng.random((2, 3, slots)), 0.0)
    key_index[..., 0], share[..., 0] = 0, 0.5
    matrices, chances = run(implementation, backend, keys, values, key_index, share.astype(dtype), nodes, 96, dtype=dtype)
    for g, c in np.ndindex(2, 3):
        rows, means, sums = [], [], np.cumsum(share[g, c].astype(dtype).astype(float))
        for i in range(96):
            node = key_index[g, c, np.argmax(sums >= (i + 0.5) / 96 * sums[-1])]
            begin, end = edges[node]
            means.append(node)
            rows.append(nodes + begin + int((end - begin) * ((i + 1) * TURN % 2**32 / 2**32)))
        gap = (keys[g, rows] - keys[g, means]).astype(np.float64)
        value = (values[g, rows, :-1] - values[g, means, :-1]).astype(np.float64)
        squares, value_squares = ((x**2).sum(axis=1) for x in (gap, value))
        assert_close(matrices[g, c], gap.T @ value / squares.sum(), dtype=dtype)
        assert_close(chances[g, c], (squares * value_squares).sum() / squares.sum() ** 2, dtype=dtype, ulps=512)


@implementations("gap_moments")
def test_keys_without_gaps_have_no_matrix(backend, rng, implementation):
    """Keys that are all alike."""
    keys, values = np.ones((1, 11, 3)), rng.standard_normal((1, 11, 3))
    given = keys, values, np.zeros((1, 1, 1), np.int64), np.ones((1, 1, 1)), 7, 32
    for found in run(implementation, backend, *given):
        np.testing.assert_array_equal(found, 0.0)


def flat_tree(rng, n, v):
    """Summaries of a tree of Gaussian keys as they come, and one block whose closed nodes are all leaves, alike."""
    k = rng.standard_normal((1, n, 6))
    order, ones = np.arange(n)[None], np.ones((1, n))
    nodes = KERNELS["node_summaries"][-1].function(host, k, v(k), k[:, :, :4], ones, order, 4, 1e-3 * np.ones(1))
    leaves = (nodes.spread.shape[1] + 1) // 2
    index = np.arange(leaves - 1, 2 * leaves - 1)[None, None]
    return TreeNodes(*nodes), index, np.full((1, 1, leaves), 1.0 / leaves)


def test_the_matrix_is_the_map_from_keys_to_values(rng):
    """Values linear in the keys: a node of unit spread gains Cov(v, k) q, the map over d where keys are isotropic."""
    linear = rng.standard_normal((6, 3))
    found = first_order(host, *flat_tree(rng, 4096, lambda k: k @ linear), gap_moments, shrink_matrices)
    assert found.shape == (1, 1, 6, 3)
    # 512 keys drawn: their covariance is off by some √(1/512) of its size.
    np.testing.assert_allclose(found[0, 0], DAMPING * linear / 6, atol=0.25 * np.abs(linear).max() / 6)


def test_no_matrix_is_read_from_chance(rng):
    """Values that have nothing to do with the keys: what 512 keys show is chance, most of it dropped."""
    norms = [
        np.linalg.norm(first_order(host, *flat_tree(rng, 4096, v), gap_moments, shrink_matrices))
        for v in (lambda k: rng.standard_normal((1, k.shape[1], 6)), lambda k: k @ np.eye(6))
    ]
    # Chance alone would leave √(36 / 512) against √6 / 6 times 6: 0.26 of 2.4.
    assert norms[0] < 0.1 * norms[1]


@on_host("attend_tree")
def test_attention_is_exact_where_all_is_open(rng, implementation):
    arguments, start = pass_problem(rng, n=90, n_q=33)
    (q, scale, _, index, _), tree = arguments
    keys, nodes = tree.keys, tree.nodes
    values = np.concatenate([rng.standard_normal((2, keys.shape[1], 5)), np.zeros((2, keys.shape[1], 1))], axis=2)
    call = (*arguments, values, np.asarray(0.0), 300, start)
    part, counts = implementation.function(host, *call)
    exact, lse = oracles.exact_attention(q, keys[:, nodes:], values[:, nodes:, :5], scale)
    assert (counts == 90).all()
    for g in range(2):
        rows = np.unique(index[g])
        np.testing.assert_allclose(part.out[g, rows], exact[g, rows], rtol=0, atol=1e-12)
        np.testing.assert_allclose(part.lse[g, rows], lse[g, rows], rtol=0, atol=1e-12)


def test_what_is_left_open_follows_from_where_the_arrays_are(rng):
    x = rng.standard_normal((600, 8))
    _, report = kdecore.attention(x, x, x, method="treecode", budget=64, return_report=True)
    assert (report.options["ordering"], report.options["block_size"]) == ("tree", 16)
    on_accelerators = Treecode().at(True)
    assert (on_accelerators.ordering, on_accelerators.rows) == ("sort", 64)
    assert {"open_tree", "rank_codes"} <= set(on_accelerators.kernels) <= set(KERNELS)
    assert Treecode(block_size=8, ordering="tree").at(True).rows == 8
