"""`draw_uniform`, `bucket_windows` and `draw_indices` in the simulator: the numbers of their references."""

import numpy as np
import pytest

from kdecore.arrays.namespace import host
from kdecore.arrays.random import uniform
from kdecore.kernels.bucket_windows import cuda as windows_cuda
from kdecore.kernels.bucket_windows import reference as windows_reference
from kdecore.kernels.draw_indices import cuda as indices_cuda
from kdecore.kernels.draw_indices import reference as indices_reference
from kdecore.kernels.draw_indices.contract import Weights
from kdecore.kernels.draw_uniform.cuda import draw_uniform


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (2**64 - 1, 1), (0x123456789ABCDEF0, 2**32 - 1)])
def test_draw_uniform_has_the_bits_of_the_reference(seed, stream):
    found = draw_uniform(host, seed, stream, (3, 5), "cpu")
    np.testing.assert_array_equal(found, uniform(host, seed, stream, 15).reshape(3, 5))


@pytest.mark.parametrize(("n_q", "n_k", "blocks", "size"), [(1, 1, 1, 1), (37, 50, 9, 7), (50, 20, 12, 20), (30, 30, 30, 1)])
@pytest.mark.parametrize("buckets", [1, 5, 1000])
def test_bucket_windows(rng, n_q, n_k, blocks, size, buckets):
    """Of orders that leave some rows out."""
    given = []
    for n in (n_q, n_k):
        codes = rng.integers(0, buckets, (3, n + 4)).astype(np.int16)
        some = rng.permuted(np.tile(np.arange(n + 4), (3, 1)), axis=1)[:, :n]
        ascending = np.argsort(np.take_along_axis(codes, some, axis=1), axis=1, stable=True)
        given += [codes, np.take_along_axis(some, ascending, axis=1)]
    found = windows_cuda.bucket_windows(host, *given, blocks, size)
    np.testing.assert_array_equal(found, windows_reference.bucket_windows(host, *given, blocks, size))


SIZES = [(2, 1, 1), (60, 11, 7), (41, 0, 13), (200, 3, 9)]


def listed(rng, n, window, count, dtype, alike, blocks=5):
    """Arguments of `draw_indices`: of some keys in any order, with windows at both ends."""
    order = rng.permuted(np.tile(np.arange(n + 6), (2, 1)), axis=1)[:, :n]
    sizes = (rng.random((2, n + 6)) * (rng.random((2, n + 6)) < 0.7)).astype(dtype)
    sizes[1, ::9] *= 40
    first = rng.integers(0, n - window + 1, (2, blocks))
    first[:, 0], first[:, 1] = 0, n - window
    weights = None if alike else Weights(sizes, sizes.mean(axis=1))
    return order, weights, first, window, 2**63 + 9, 1, count, dtype


def assert_lists(given):
    """Assert that lists are the reference's."""
    found, expected = indices_cuda.draw_indices(host, *given), indices_reference.draw_indices(host, *given)
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1].dtype == given[-1]
    np.testing.assert_allclose(found[1], expected[1], rtol=2 * np.finfo(given[-1]).eps, atol=1e-12)


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("n", "window", "count"), SIZES)
def test_draw_indices(rng, n, window, count, dtype, alike):
    """In chunks of 16 keys, and of more where they are many."""
    assert_lists(listed(rng, n, window, count, dtype, alike))


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("start", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
def test_draw_indices_at_the_ends_of_a_start(rng, monkeypatch, start, alike):
    """Keys are distinct, in their order, and outside the window, whatever rounding does."""
    monkeypatch.setattr(indices_cuda, "random_number", lambda *_: start)
    order, weights, first, window, *rest = listed(rng, 40, 6, 30, "float64", alike)
    key_index, log_weight = indices_cuda.draw_indices(host, order, weights, first, window, *rest)
    place = np.argsort(np.where(np.arange(46) == order[:, :, None], 0, 1), axis=1)[:, 0, :]
    for group, block in np.ndindex(first.shape):
        own = slice(first[group, block], first[group, block] + window)
        np.testing.assert_array_equal(key_index[group, block, :window], order[group, own])
        drawn = place[group, key_index[group, block, window:]]
        assert (np.diff(drawn) > 0).all()
        assert not ((drawn >= own.start) & (drawn < own.stop)).any()
    assert (log_weight >= -1e-12).all()
