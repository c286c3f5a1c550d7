"""`bucket_order` in the simulator, in several chunks, tiles and passes, and `hash_codes`."""

import numpy as np
import pytest
import torch

from kdecore.arrays.namespace import host
from kdecore.kernels.bucket_order.cuda import bucket_order
from kdecore.kernels.hash_codes import reference
from kdecore.kernels.hash_codes.cuda import hash_codes
from tests.simulated.rows import DTYPES, stored


@pytest.mark.parametrize("dtype", ["int16", "int32"])
@pytest.mark.parametrize(("n", "bits"), [(1, 1), (7, 2), (40, 3), (33, 5), (50, 9), (16, 12)])
def test_bucket_order_is_the_stable_order(rng, n, bits, dtype):
    codes = rng.integers(0, 2**bits, (2, n)).astype(dtype)
    codes[1] = rng.integers(0, 2, n) * (2**bits - 1)
    order = bucket_order(host, codes, bits)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(order, np.argsort(codes, axis=-1, stable=True))


@pytest.mark.parametrize(
    ("n", "d", "bits", "dtype"),
    [*((14, 5, 7, dtype) for dtype in DTYPES), (1, 1, 1, "float32"), (13, 9, 17, "float32"), (5, 3, 30, "float64")],
)
def test_hash_codes(rng, n, d, bits, dtype):
    """Projections within 1e-5 of a plane may change side in float32; the seeded data has none."""
    xp, x, wide = stored(rng.standard_normal((2, n, d)), dtype)
    planes = rng.standard_normal((d, bits))
    if dtype != "float64":
        planes = planes.astype(np.float32)
    given = planes if xp is host else torch.tensor(planes)
    if n > 1:
        assert np.abs((wide - wide.mean(axis=1, keepdims=True)) @ planes).min() > 1e-5
    queries, found = (np.asarray(codes) for codes in hash_codes(xp, x[:, ::2], x, given))
    assert found.dtype == (np.int16 if bits <= 15 else np.int32)
    expected = reference.hash_codes(host, wide[:, ::2], wide, planes.astype(np.float64))
    np.testing.assert_array_equal(queries, expected[0])
    np.testing.assert_array_equal(found, expected[1])


def test_hash_codes_of_rows_far_away_and_not_finite(rng):
    """A float32 sum of the projections would be off by as much as they differ."""
    x = rng.standard_normal((1, 40, 4))
    x[0, :, 0] = 1e6 + rng.integers(-3, 4, 40)
    x[0, 5, 1], x[0, 9, 2], x[0, 30, 3] = np.nan, np.inf, -np.inf
    planes = np.eye(4)
    rows = x.astype(np.float32)
    found = hash_codes(host, rows, rows, planes.astype(np.float32))
    np.testing.assert_array_equal(found, reference.hash_codes(host, *[rows.astype(np.float64)] * 2, planes))
