"""Threefry against its published vectors; distributions; and no global random state read or written."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdecore import attention
from kdecore.arrays.namespace import host
from kdecore.arrays.random import check_seed, normal, threefry2x32, uniform
from kdecore.methods.sortlsh import PLANES_STREAM, SAMPLES_STREAM

ONES = 0xFFFFFFFF
# Random123 1.14, tests/kat_vectors, threefry2x32 with 20 rounds: (key), (counter) → (result)
VECTORS = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((ONES, ONES), (ONES, ONES), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize(("key", "counter", "result"), VECTORS)
def test_threefry_gives_the_published_vectors(backend, key, counter, result):
    found = threefry2x32(key, *(backend.array(np.array([c], dtype=np.int64)) for c in counter))
    assert tuple(int(x[0]) for x in found) == result


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_uniform_is_threefry_of_the_index(seed, stream, count):
    """Number i is the top 53 bits of the encrypted counter (i, stream), key (low, high) half of the seed."""
    expected = []
    for i in range(count):
        high, low = threefry2x32((seed % 2**32, seed // 2**32), np.array([i]), np.array([stream]))
        expected.append(((int(high[0]) >> 5) * 2**26 + (int(low[0]) >> 6)) / 2**53)
    np.testing.assert_array_equal(uniform(host, seed, stream, count), expected)


def test_uniform_is_the_same_on_every_backend(backend):
    for seed, stream in ((0, 0), (2**64 - 1, 2**32 - 1), (123456789012345, 7)):
        found = uniform(backend.xp, seed, stream, 1000)
        assert found.dtype == backend.xp.float64
        np.testing.assert_array_equal(backend.numpy(found), uniform(host, seed, stream, 1000))


def test_uniform_starts_over_for_a_longer_count():
    np.testing.assert_array_equal(uniform(host, 5, 1, 100), uniform(host, 5, 1, 1000)[:100])


def test_uniform_numbers_are_uniform():
    """Kolmogorov–Smirnov: √n D < 1.95 has a false-alarm rate of 2 exp(−2 · 1.95²) = 0.1 %, for a seed now fixed."""
    n = 100_000
    u = np.sort(uniform(host, 1, 0, n))
    assert u[0] >= 0
    assert u[-1] < 1
    grid = np.arange(n + 1) / n
    assert np.sqrt(n) * max(np.abs(u - grid[1:]).max(), np.abs(u - grid[:-1]).max()) < 1.95


def test_uniform_numbers_in_a_row_are_uncorrelated():
    """Lag-1 correlation, of variance 1/n: |r| √n < 3.5 has a false-alarm rate of 0.05 %, for a seed now fixed."""
    u = uniform(host, 2, 0, 100_000)
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) * np.sqrt(100_000) < 3.5


def test_uniform_uses_all_53_bits():
    """Each of 53 bits is set in half of n = 4,096 numbers; 53 two-sided checks at 4.5σ: false-alarm rate 0.04 %."""
    bits = (uniform(host, 3, 0, 4096) * 2.0**53).astype(np.int64)
    for bit in range(53):
        assert abs(((bits >> bit) & 1).mean() - 0.5) < 4.5 * 0.5 / np.sqrt(4096)


def test_streams_and_seeds_are_unrelated():
    """Correlations of six sequences in pairs, 15 checks at 4σ: false-alarm rate 0.1 %, for seeds now fixed."""
    n = 20_000
    sequences = [uniform(host, seed, stream, n) for seed, stream in ((0, 0), (0, 1), (1, 0), (1, 1), (2**32, 0), (2**63, 0))]
    correlations = np.corrcoef(sequences)[np.triu_indices(6, 1)]
    assert np.abs(correlations).max() * np.sqrt(n) < 4


@pytest.mark.parametrize("shape", [(1,), (3, 5), (7,), (0, 4)])
def test_normal_has_its_shape(shape):
    found = normal(0, 0, shape)
    assert found.shape == shape
    assert found.dtype == np.float64
    assert np.isfinite(found).all()


def test_normal_numbers_are_normal():
    """Moments 1 to 4 of n = 100,001 (an odd count), each within 4 standard errors: false-alarm rate 0.03 %, seed fixed."""
    n = 100_001
    x = normal(4, 0, (n,))
    for power, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs((x**power).mean() - mean) < 4 * np.sqrt(variance / n)


def test_the_two_halves_of_normal_are_uncorrelated():
    """Sine and cosine of one angle: their correlation and that of their squares within 4σ, false-alarm rate 0.01 %."""
    first, second = normal(5, 0, (2, 50_000))
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(50_000)
    assert abs(np.corrcoef(first**2, second**2)[0, 1]) < 4 / np.sqrt(50_000)


def test_check_seed_takes_integers_of_any_kind():
    for seed in (0, 2**64 - 1, np.int8(3), np.uint64(2**64 - 1), np.array(3)):
        assert check_seed(seed) == int(seed)


# attention


def arrays(seed=0):
    return np.random.default_rng(seed).standard_normal((3, 2, 60, 4))


@pytest.mark.parametrize("method", ["sortlsh", "hyper"])
def test_seeds_matter_and_suffice(method):
    q, k, v = arrays()
    results = [attention(q, k, v, method=method, budget=12, seed=seed) for seed in (0, 1, 2**32, 2**63)]
    for i, result in enumerate(results):
        assert all(np.abs(result - other).max() > 1e-3 for other in results[:i])
    np.testing.assert_array_equal(results[0], attention(q, k, v, method=method, budget=12))


@pytest.mark.parametrize("method", ["exact", "sortlsh", "hyper"])
def test_global_random_state_is_neither_written_nor_read(method):
    q, k, v = arrays()
    tensors = [torch.tensor(x) for x in (q, k, v)]

    def states():
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002
        return random.getstate(), torch.get_rng_state().tolist(), (kind, keys.tolist(), *rest)

    results = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        before = states()
        results.append(attention(q, k, v, method=method, budget=12))
        results.append(attention(*tensors, method=method, budget=12).numpy())
        assert states() == before
    np.testing.assert_array_equal(results[0], results[2])
    np.testing.assert_array_equal(results[1], results[3])


def test_planes_and_samples_have_streams_of_their_own():
    assert PLANES_STREAM != SAMPLES_STREAM


def test_groups_and_blocks_draw_their_own_samples():
    """Equal groups share hash planes but not samples; with blocks alike in all but their start, starts all differ."""
    starts = uniform(host, 0, 1, 1000)
    assert len(np.unique(starts)) == 1000
    q, k, v = (np.repeat(x[:1], 2, axis=0) for x in arrays())
    out = attention(q, k, v, method="hyper", budget=12)
    assert np.abs(out[0] - out[1]).max() > 1e-3
