"""`equal_blocks`, the windows, and that a selection evaluated naively is what `attention` returns."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdecore import Hyper, SortLSH, attention
from kdecore.arrays.namespace import host
from kdecore.arrays.rows import first_places, invert_permutation
from kdecore.core.problem import canonicalise
from kdecore.core.selection import equal_blocks
from kdecore.kernels import registry
from kdecore.kernels.bucket_windows.reference import bucket_windows
from kdecore.methods import METHODS, sortlsh
from kdecore.methods.plan import make_plan
from kdecore.methods.sortlsh import hash_codes, sort_codes
from tests import oracles


def make(rng, G=2, n_q=29, n_k=41, d=4, d_v=3):
    return rng.standard_normal((G, n_q, d)), rng.standard_normal((G, n_k, d)), rng.standard_normal((G, n_k, d_v))


def permutations(rng, groups, n):
    order = rng.permuted(np.broadcast_to(np.arange(n), (groups, n)), axis=1)
    return order, np.argsort(order, axis=1)


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 50), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_equal_blocks_cut_the_order_into_nearly_equal_parts(groups, n, size, seed):
    order, _ = permutations(np.random.default_rng(seed), groups, n)
    blocks = equal_blocks(host, order, size)
    sizes = [end - start for start, end in pairwise(blocks.starts)]
    assert len(sizes) == -(-n // size)
    assert sum(sizes) == n
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    assert blocks.index.shape == (groups, len(sizes), max(sizes))
    for g in range(groups):
        for block, (start, end) in enumerate(pairwise(blocks.starts)):
            np.testing.assert_array_equal(blocks.index[g, block, : end - start], order[g, start:end])
            assert (blocks.index[g, block, end - start :] == order[g, end - 1]).all()


def test_first_places_are_found(backend, rng):
    index = np.concat([rng.permutation(17), rng.integers(0, 17, 30)])
    index = np.concat([rng.integers(0, 17, 9), index])
    place, found = (backend.numpy(x) for x in first_places(backend.xp, backend.array(index), 19))
    np.testing.assert_array_equal(place[:17], [index.tolist().index(i) for i in range(17)])
    np.testing.assert_array_equal(found, [True] * 17 + [False] * 2)


def test_permutations_are_inverted(backend, rng):
    order, inverse = permutations(rng, 3, 17)
    found = backend.numpy(invert_permutation(backend.xp, backend.array(order)))
    np.testing.assert_array_equal(found, inverse)


@pytest.mark.parametrize("method", [("sortlsh", 12), ("hyper", 12), (SortLSH(0, 6), None), (Hyper(5, 1, 2), None)])
def test_attention_is_its_selection_evaluated_naively(backend, rng, method):
    q, k, v = make(rng)
    arrays = backend.arrays(q, k, v)
    problem = canonicalise(*arrays)
    plan = make_plan(problem, method=method[0], budget=method[1], seed=5)
    selection = METHODS[plan.method].select(problem, plan)
    index, keys, log_weight = (backend.numpy(x) for x in (selection.blocks.index, selection.key_index, selection.log_weight))
    out, lse = (backend.numpy(x) for x in attention(*arrays, method=method[0], budget=method[1], seed=5, return_lse=True))
    for g in range(2):
        true_out, true_lse = oracles.attend_blocks(q[g], k[g], v[g], index[g], keys[g], log_weight[g], 0.5)
        np.testing.assert_allclose(out[g], true_out, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(lse[g], true_lse, rtol=1e-11, atol=1e-12)


def windows(q_codes, k_codes, block_size, size):
    """Own windows for sorted codes of one group → starts."""
    q_codes, k_codes = np.array([q_codes]), np.array([k_codes])
    in_order = (np.arange(codes.shape[1])[None, :] for codes in (q_codes, k_codes))
    arrays = (x for pair in zip((q_codes, k_codes), in_order, strict=True) for x in pair)
    return bucket_windows(host, *arrays, -(-q_codes.shape[1] // block_size), size)[0].tolist()


@pytest.mark.parametrize(("n", "size"), [(32, 8), (32, 4), (60, 6), (35, 7), (64, 16), (9, 3)])
@pytest.mark.parametrize("buckets", [1, 2, 7, 1000])
def test_windows_of_equal_queries_and_keys_are_the_block_diagonal(rng, n, size, buckets):
    codes = np.sort(rng.integers(0, buckets, n)).tolist()
    assert windows(codes, codes, size, size) == list(range(0, n, size))


def test_blocks_of_equal_queries_and_keys_meet_themselves(rng):
    x = rng.standard_normal((2, 48, 4))
    problem = canonicalise(x, x, x)
    selection = METHODS["sortlsh"].select(problem, make_plan(problem, method=SortLSH(8, 4, 5)))
    np.testing.assert_array_equal(selection.key_index[..., :8], selection.blocks.index)


def test_windows_follow_the_bucket():
    """All in one bucket: the same relative place. In buckets of their own: the queries' bucket, wherever it lies."""
    centred = np.array([2, 10, 18, 26])  # up to half a query's share of the keys, 32 / 8 / 2
    assert np.abs(windows([0] * 8, [0] * 32, 2, 4) - centred).max() <= 2
    keys = [0] * 5 + [3] * 4 + [9] * 23
    assert windows([3] * 4, keys, 4, 4) == [5]
    assert windows([0] * 4, keys, 4, 5) == [0]
    assert windows([9] * 4, keys, 4, 23) == [9]


def test_windows_stay_inside_the_keys():
    keys = [5] * 10
    assert windows([0] * 4, keys, 4, 4) == [0]  # a bucket below all keys'
    assert windows([9] * 4, keys, 4, 4) == [6]  # above
    assert windows([5] * 4, keys, 4, 9) in ([0], [1])  # one bucket, nearly as wide as the row


def test_value_weights_follow_their_definition(backend, rng):
    v = rng.standard_normal((2, 41, 3)) * np.exp(rng.standard_normal((2, 41, 1)))
    v[1, 3] = 0.0
    q, k, _ = make(rng)
    problem = canonicalise(*backend.arrays(q, k, v))
    weights = sortlsh.value_weights(problem, make_plan(problem, method="sortlsh", budget=9))
    found = 1.0 + backend.numpy(weights.sizes) / backend.numpy(weights.mean)[:, None]
    np.testing.assert_allclose(found, [oracles.value_weights(x) for x in v], rtol=1e-14)


def test_hyper_samples_uniformly_and_sortlsh_by_value(rng):
    q, k, v = make(rng)
    v[:, 7] *= 1e3
    problem = canonicalise(q, k, v)
    hyper = METHODS["hyper"].select(problem, make_plan(problem, method=Hyper(5, 4)))
    np.testing.assert_allclose(hyper.log_weight[..., 5:], np.log((41 - 5) / 4), rtol=1e-12)
    by_value = METHODS["sortlsh"].select(problem, make_plan(problem, method=SortLSH(5, 4)))
    large = by_value.log_weight[by_value.key_index == 7]
    assert len(large) >= 6  # of 12 blocks; of an inclusion probability of 0.8, against 0.1 for uniform sampling
    assert large.max() < np.log(2)


def test_queries_and_keys_are_sorted_by_the_same_planes(rng):
    x = rng.standard_normal((2, 41, 4))
    problem = canonicalise(x, x[:, ::-1, :], x)
    plan = make_plan(problem, method=SortLSH(4, 8, 6), seed=9)
    queries, keys = sort_codes(problem, plan, *hash_codes(problem, plan))
    in_order = [np.take_along_axis(found.codes, found.order, axis=1) for found in (queries, keys)]
    np.testing.assert_array_equal(*in_order)
    assert (np.diff(in_order[0], axis=1) >= 0).all()
    unsorted = registry.KERNELS["hash_codes"][-1].function(host, problem.q, problem.k, planes_of(plan, 4, 6))
    np.testing.assert_array_equal([x.codes for x in (queries, keys)], unsorted)


def test_queries_and_keys_are_sorted_together_as_each_by_itself(backend, rng):
    """In one go where there are as many of each, by themselves where there are not."""
    problem = canonicalise(*backend.arrays(*make(rng, n_q=41)))
    plan = make_plan(problem, method=SortLSH(4, 8, 3))
    codes = [*hash_codes(problem, plan)]
    codes.append(codes[1][:, :17])
    alone = [sort_codes(problem, plan, one)[0] for one in codes]
    for some in ((0, 1), (0, 2), (2, 1)):
        found = sort_codes(problem, plan, *(codes[i] for i in some))
        for i, one in zip(some, found, strict=True):
            np.testing.assert_array_equal(*(backend.numpy(x.order) for x in (one, alone[i])))
            np.testing.assert_array_equal(*(backend.numpy(x) for x in (one.codes, codes[i])))


def planes_of(plan, d, hashes):
    from kdecore.arrays.random import normal
    from kdecore.methods.sortlsh import PLANES_STREAM

    return normal(plan.seed, PLANES_STREAM, (d, hashes))
