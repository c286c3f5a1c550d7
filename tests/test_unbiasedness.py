"""Unbiasedness, exactly and without sampling: Σ over outcomes (probability × Σ exp(log_weight) of a key) = 1.

Once the hyperplanes are drawn, one uniform start for each block is all that is random, and a block's selection is a
step function of it. The steps follow from the sampling weights, which are computed here from the definition; so each
outcome is evaluated once, at a start inside its interval, and counts with the interval's length.
"""

from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdecore import Hyper, SortLSH, Treecode
from kdecore.arrays.namespace import host
from kdecore.core.problem import canonicalise
from kdecore.core.tree import BlockQueries, bounds, node_count
from kdecore.kernels.draw_indices.contract import Weights
from kdecore.kernels.draw_uniform import reference
from kdecore.kernels.registry import KERNELS
from kdecore.kernels.site import Site
from kdecore.methods import METHODS, key_tree, sortlsh, tree_lists, tree_pilot, treecode
from kdecore.methods.plan import make_plan
from kdecore.methods.sortlsh import hash_codes, sort_codes
from kdecore.methods.view import LEAF_SIZE
from kdecore.testing import strategies
from tests import oracles

TOLERANCE = 1e-9


def select_at(problem, plan, starts):
    """Selection with the given starts (G, B)."""

    def chosen(xp, seed, stream, count, *, device=None):
        assert (seed, stream, count) == (plan.seed, sortlsh.SAMPLES_STREAM, starts.size)
        return xp.asarray(starts.reshape(-1), dtype=xp.float64, device=device)

    with mock.patch.object(reference, "uniform", chosen):
        return METHODS[plan.method].select(problem, plan)


def steps_of_blocks(problem, plan, own, order):
    """For every block the starts at which its sample changes, (G, B) lists, from the definition of the weights."""
    options = plan.options
    ceiling = (problem.n_k - options.block_size) / options.num_samples
    steps = np.empty(own.shape[:2], dtype=object)
    for g, block in np.ndindex(*own.shape[:2]):
        raw = oracles.value_weights(problem.v[g]) if plan.method == "sortlsh" else np.ones(problem.n_k)
        others = [key for key in order[g] if key not in own[g, block]]
        steps[g, block] = oracles.systematic_breakpoints(np.minimum(raw[others], ceiling), options.num_samples)
    return steps


def assert_unbiased(q, k, v, method, budget=None, seed=0, kernels="auto"):
    """Enumerate every outcome of every block, and check each of them and their weighted sum."""
    problem = canonicalise(q, k, v)
    plan = make_plan(problem, method=method, budget=budget, seed=seed, kernels=kernels)
    assert plan.method in ("sortlsh", "hyper")
    own_size = plan.options.block_size
    blocks = -(-problem.n_q // plan.options.rows)
    own = np.asarray(select_at(problem, plan, np.full((problem.groups, blocks), 0.5)).key_index[..., :own_size])
    _, keys = sort_codes(problem, plan, *hash_codes(problem, plan))
    steps = steps_of_blocks(problem, plan, own, np.asarray(keys.order))

    expected = np.zeros((problem.groups, blocks, problem.n_k))
    longest = max(len(found) for found in steps.flat)
    for step in range(longest - 1):
        length, starts = np.zeros((2, problem.groups, blocks))
        for at, found in np.ndenumerate(steps):
            if step + 1 < len(found):
                length[at], starts[at] = found[step + 1] - found[step], (found[step] + found[step + 1]) / 2
        selection = select_at(problem, plan, starts)
        index, log_weight = np.asarray(selection.key_index), np.asarray(selection.log_weight)
        assert index.shape == log_weight.shape == (problem.groups, blocks, plan.options.budget)
        assert ((index >= 0) & (index < problem.n_k)).all()
        assert np.isfinite(log_weight).all()
        ordered = np.sort(index, axis=-1)
        assert (ordered[..., 1:] > ordered[..., :-1]).all(), "a key counts twice"
        np.testing.assert_array_equal(index[..., :own_size], own)
        assert (log_weight[..., :own_size] == 0).all()
        assert (log_weight >= -1e-12).all(), "an inclusion probability above 1"
        for at in np.ndindex(problem.groups, blocks):
            np.add.at(expected[at], index[at], length[at] * np.exp(log_weight[at]))
    np.testing.assert_allclose(expected, 1.0, rtol=0, atol=TOLERANCE)


def make(rng, G=2, n_q=23, n_k=37, d=3, d_v=4):
    return rng.standard_normal((G, n_q, d)), rng.standard_normal((G, n_k, d)), rng.standard_normal((G, n_k, d_v))


OPTIONS = {
    "sortlsh 9": ("sortlsh", 9),
    "hyper 9": ("hyper", 9),
    "sortlsh 1": ("sortlsh", 1),
    "sortlsh 2": ("sortlsh", 2),
    "hyper 1": ("hyper", 1),
    "hyper 2": ("hyper", 2),
    "sortlsh n_k − 1": ("sortlsh", 36),
    "hyper n_k − 1": ("hyper", 36),
    "sortlsh, no block": (SortLSH(block_size=0, num_samples=7), None),
    "hyper, no block": (Hyper(block_size=0, num_samples=7), None),
    "no block, all keys but one": (SortLSH(block_size=0, num_samples=36), None),
    "one sample": (SortLSH(num_samples=1), 12),
    "one hash": (SortLSH(num_hashes=1), 12),
    "thirty hashes": (SortLSH(num_hashes=30), 12),
}


@pytest.mark.parametrize("kernels", ["auto", "array-api"])
@pytest.mark.parametrize(("method", "budget"), OPTIONS.values(), ids=OPTIONS)
def test_every_method_is_unbiased(rng, method, budget, kernels):
    assert_unbiased(*make(rng), method, budget, kernels=kernels)


VALUES = {
    "heavy tails": lambda rng, v: v * np.exp(4 * rng.standard_normal((*v.shape[:2], 1))),
    "one huge": lambda rng, v: np.where(np.arange(v.shape[1])[:, None] == 5, 1e9, v),
    "some huge": lambda rng, v: np.where(np.arange(v.shape[1])[:, None] % 9 == 5, 1e6, v),
    "all zero": lambda rng, v: v * 0,
    "one not zero": lambda rng, v: np.where(np.arange(v.shape[1])[:, None] == 7, v, 0.0),
    "one infinite": lambda rng, v: np.where(np.arange(v.shape[1])[:, None] == 7, np.inf, v),
    "one NaN": lambda rng, v: np.where(np.arange(v.shape[1])[:, None] == 7, np.nan, v),
    "all infinite": lambda rng, v: np.full_like(v, np.inf),
}


@pytest.mark.parametrize("budget", [2, 9, 36])
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_sortlsh_is_unbiased_whatever_the_values(rng, values, budget):
    q, k, v = make(rng)
    assert_unbiased(q, k, values(rng, v), "sortlsh", budget)


SHAPES = {
    "q is k": (1, 30, 30),
    "few queries": (3, 2, 30),
    "one query": (2, 1, 30),
    "many queries": (1, 90, 12),
    "two keys": (2, 5, 2),
}


@pytest.mark.parametrize("method", ["sortlsh", "hyper"])
@pytest.mark.parametrize(("G", "n_q", "n_k"), SHAPES.values(), ids=SHAPES)
def test_every_shape_is_unbiased(rng, method, G, n_q, n_k):
    q, k, v = make(rng, G=G, n_q=n_q, n_k=n_k)
    if n_q == n_k:
        k = q
    for budget in {1, n_k // 2, n_k - 1}:
        assert_unbiased(q, k, v, method, budget)


def test_keys_in_one_bucket_and_queries_in_another_are_unbiased(rng):
    q, k, v = make(rng)
    k[:] = k[:, :1]
    assert_unbiased(q, k, v, "sortlsh", 9)


@st.composite
def sampled_problems(draw):
    """q, k, v (G, n, ·) with heavy tails, zeros and numbers that are not finite among v, and a budget below n_k."""
    g, Q, D, V = draw(st.integers(1, 3)), draw(strategies.n_q), draw(strategies.d), draw(strategies.d_v)
    K = draw(st.integers(2, 24))
    q, k, v = (draw(strategies.normal_arrays((g, *tail))) for tail in ((Q, D), (K, D), (K, V)))
    heavy = draw(strategies.normal_arrays((g, K, 1)))
    kind = draw(st.sampled_from(("plain", "heavy", "zero", "one", "infinite", "nan")))
    if kind == "heavy":
        v = v * np.exp(4 * heavy)
    elif kind == "zero":
        v = v * 0.0
    elif kind == "one":
        v[:, 1:] = 0.0
    elif kind in ("infinite", "nan"):
        v[:, 0, 0] = np.inf if kind == "infinite" else np.nan
    # Budgets that leave some key out, with both ends likely.
    return q, k, v, draw(st.one_of(st.just(1), st.just(K - 1), st.integers(1, K - 1)))


@given(sampled_problems(), st.sampled_from(("sortlsh", "hyper")), strategies.seed)
@settings(max_examples=100, deadline=None)
def test_unbiased_for_random_problems(problem, method, seed):
    q, k, v, budget = problem
    assert_unbiased(q, k, v, method, budget, seed)


@st.composite
def draws(draw):
    """Sizes, windows and counts within the contract of draw_indices; sizes of None are all alike."""
    n = draw(st.integers(2, 20))
    window = draw(st.integers(0, n - 1))
    count = draw(st.integers(1, n - window))
    first = draw(st.integers(0, n - window))
    sizes = np.exp(2 * draw(strategies.normal_arrays(n))) if draw(st.booleans()) else None
    return sizes, n, first, window, count


@pytest.mark.parametrize("implementation", KERNELS["draw_indices"], ids=lambda found: found.target)
@given(draws())
@settings(max_examples=100, deadline=None)
def test_draw_indices_is_unbiased(implementation, problem):
    reason = implementation.unsupported(Site("numpy", "cpu", "float64"))
    if reason is not None:
        pytest.skip(reason)
    sizes, n, first, window, count = problem
    weights = np.ones(n) if sizes is None else np.minimum(1.0 + sizes / 1.5, (n - window) / count)
    order = np.random.default_rng(n).permutation(n)
    own, outside = order[first : first + window], np.delete(order, slice(first, first + window))
    steps = oracles.systematic_breakpoints(weights[outside], count)
    middles, lengths = (steps[1:] + steps[:-1]) / 2, np.diff(steps)
    blocks = len(middles)
    given = None if sizes is None else Weights(sizes[None, :], np.asarray([1.5]))
    with mock.patch.object(reference, "uniform", return_value=middles):
        key_index, log_weight = implementation.function(
            host, order[None, :], given, np.full((1, blocks), first), window, 5, 1, count, "float64"
        )
    expected = np.zeros(len(weights))
    for block in range(blocks):
        naive = outside[oracles.systematic_sample(weights[outside], middles[block], count)]
        np.testing.assert_array_equal(key_index[0, block], np.r_[own, naive])
        np.add.at(expected, naive, lengths[block] * np.exp(log_weight[0, block, window:]))
        assert not log_weight[0, block, :window].any()
    np.testing.assert_allclose(expected[outside], 1.0, atol=TOLERANCE)
    assert not expected[own].any(), "a key of the window was drawn"


@pytest.mark.parametrize("kernels", ["auto", "array-api"])
@pytest.mark.parametrize(("n_q", "budget", "block_size"), [(61, 30, 5), (40, 30, 5), (61, 10, 5), (61, 1, 7), (61, 60, 4)])
def test_treecode_with_a_sampled_far_field_is_unbiased(rng, n_q, budget, block_size, kernels):
    """A block's keys change where its start takes a node's number over a multiple of 1 / (keys in the node).

    Closed nodes don't depend on the start: the lists of `open_tree` say which they are.
    """
    q, k, v = make(rng, n_q=n_q, n_k=61)
    problem = canonicalise(q, k, v)

    method = Treecode(block_size=block_size, far_field="sample")
    plan = make_plan(problem, method=method, budget=budget, kernels=kernels)

    def select(start):
        chosen = mock.patch.object(reference, "uniform", lambda xp, seed, stream, count, device: np.full(count, start))
        with chosen:
            return METHODS["treecode"].select(problem, plan)

    prepared = treecode.prepare(problem, plan)
    known = tree_pilot.calibrate(problem, plan, prepared)
    where = known.threshold, known.most, known.start
    key_index, _, _, _ = plan.kernels["open_tree"].function(
        host,
        BlockQueries(q, problem.scale, prepared.coordinates, prepared.blocks.index),
        key_tree.summaries(prepared.keys),
        *where,
    )
    nodes = node_count(61, LEAF_SIZE)
    steps = {0.0, 1.0}
    for node in np.unique(key_index[key_index < nodes]):
        level = int(node + 1).bit_length() - 1
        edges = bounds(61, level)
        count = np.diff(edges)[node + 1 - 2**level]
        steps |= set((np.arange(count) / count - node * tree_lists.GOLDEN_RATIO) % 1.0)
    steps = np.array(sorted(steps))
    expected = np.zeros((*key_index.shape[:2], 61))
    for low, high in pairwise(steps):
        selection = select((low + high) / 2)
        counts = np.isfinite(selection.log_weight)
        assert selection.keys is None
        for at in np.ndindex(expected.shape[:2]):
            listed = selection.key_index[at][counts[at]]
            assert len(set(listed)) == len(listed), "a key counts twice"
            np.add.at(expected[at], listed, (high - low) * np.exp(selection.log_weight[at][counts[at]]))
    np.testing.assert_allclose(expected, 1.0, rtol=0, atol=TOLERANCE)
