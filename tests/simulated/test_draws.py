"""`draw_uniform`, `bucket_windows` and `draw_indices` in the simulator: the numbers of their references."""

import numpy as np
import pytest

from kdecore.arrays.namespace import host
from kdecore.arrays.random import uniform
from kdecore.kernels.bucket_windows import cuda as windows_cuda
from kdecore.kernels.bucket_windows import reference as windows_reference
from kdecore.kernels.draw_indices import cuda as indices_cuda
from kdecore.kernels.draw_indices import reference as indices_reference
from kdecore.kernels.draw_uniform.cuda import draw_uniform


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (2**64 - 1, 1), (0x123456789ABCDEF0, 2**32 - 1)])
def test_draw_uniform_has_the_bits_of_the_reference(seed, stream):
    found = draw_uniform(host, seed, stream, (3, 5), "cpu")
    np.testing.assert_array_equal(found, uniform(host, seed, stream, 15).reshape(3, 5))


@pytest.mark.parametrize(("n_q", "n_k", "blocks", "size"), [(1, 1, 1, 1), (37, 50, 9, 7), (50, 20, 12, 20), (30, 30, 30, 1)])
@pytest.mark.parametrize("buckets", [1, 5, 1000])
def test_bucket_windows(rng, n_q, n_k, blocks, size, buckets):
    queries, keys = (np.sort(rng.integers(0, buckets, (3, n))).astype(np.int16) for n in (n_q, n_k))
    found = windows_cuda.bucket_windows(host, queries, keys, blocks, size)
    np.testing.assert_array_equal(found, windows_reference.bucket_windows(host, queries, keys, blocks, size))


@pytest.mark.parametrize(("n", "window", "count"), [(2, 1, 1), (60, 11, 7), (41, 0, 13)])
def test_draw_indices(rng, n, window, count):
    weights = 1.0 + rng.random((2, n))
    first = rng.integers(0, n - window + 1, (2, 5))
    first[:, 0], first[:, 1] = 0, n - window
    starts = rng.random((2, 5))
    starts[:, 2] = 0.0
    found = indices_cuda.draw_indices(host, weights, first, window, starts, count)
    expected = indices_reference.draw_indices(host, weights, first, window, starts, count)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-12)
    assert found[1].dtype == np.float64
