"""`draw_uniform` and `bucket_windows`: every implementation against what its contract says."""

from fractions import Fraction

import numpy as np
import pytest

from kdecore.arrays.random import uniform
from tests.implementations import implementations, run


@implementations("bucket_windows")
@pytest.mark.parametrize(("n_q", "n_k", "blocks", "size"), [(1, 1, 1, 1), (37, 50, 9, 7), (50, 20, 12, 20), (64, 64, 5, 3)])
@pytest.mark.parametrize("buckets", [1, 6, 2**30])
def test_bucket_windows_carry_the_middle_querys_place_over(backend, rng, implementation, n_q, n_k, blocks, size, buckets):
    codes = [np.sort(rng.integers(0, buckets, (2, n))).astype(np.int32) for n in (n_q, n_k)]
    order = [rng.permuted(np.tile(np.arange(n + 3), (2, 1)), axis=1)[:, :n] for n in (n_q, n_k)]
    unsorted = [rng.integers(0, buckets, (2, n + 3)).astype(np.int32) for n in (n_q, n_k)]
    for rows, places, some in zip(unsorted, order, codes, strict=True):
        np.put_along_axis(rows, places, some, axis=1)
    found = run(implementation, backend, unsorted[0], order[0], unsorted[1], order[1], blocks, size)
    assert found.dtype == np.int64
    for group, block in np.ndindex(2, blocks):
        queries, keys = (list(x[group]) for x in codes)
        middle = (block * n_q // blocks + (block + 1) * n_q // blocks) // 2
        code = queries[middle]
        share = Fraction(2 * (middle - queries.index(code)) + 1, 2 * queries.count(code))
        centre = sum(key < code for key in keys) + share * keys.count(code)
        assert found[group, block] == min(max((centre - Fraction(size, 2)).__floor__(), 0), n_k - size)


@implementations("draw_uniform")
def test_draw_uniform_has_the_numbers_of_randomness(backend, implementation):
    if implementation.target != "array-api":
        pytest.skip("needs a device; the simulator runs it")
    found = backend.numpy(implementation.function(backend.xp, 7, 3, (2, 5), None))
    np.testing.assert_array_equal(found.reshape(-1), uniform(np, 7, 3, 10))
