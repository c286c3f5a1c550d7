"""`rank_codes` and `tree_order` in the simulator, in float64: the integers of their references."""

import numpy as np
import pytest

from kdecore.kernels.rank_codes import cuda as codes_cuda
from kdecore.kernels.rank_codes import reference as codes_reference
from kdecore.kernels.tree_order import cuda as order_cuda
from kdecore.kernels.tree_order import reference as order_reference
from kdecore.namespaces import host


@pytest.mark.parametrize(
    ("n", "p", "bits", "in_order"), [(1, 1, 5, 0), (40, 3, 12, 0), (37, 4, 9, 2), (11, 2, 30, 3), (9, 5, 3, 3)]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rank_codes(rng, n, p, bits, in_order, dtype):
    x = (rng.standard_normal((2, n, p)) * rng.random(p)).astype(dtype)
    x[1] = np.round(x[1])
    x[0, n // 2, 0] = np.nan
    found = codes_cuda.rank_codes(host, x, bits, in_order)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, codes_reference.rank_codes(host, x, bits, in_order))


@pytest.mark.parametrize(
    ("n", "d", "leaf", "in_order"),
    [(1, 2, 1, 0), (24, 3, 4, 0), (23, 16, 2, 0), (61, 5, 3, 0), (50, 2, 1, 2), (30, 3, 40, 0)],
)
def test_tree_order(rng, n, d, leaf, in_order):
    x = rng.standard_normal((2, n, d)) + 3.0 * rng.standard_normal((2, 5, d))[:, rng.integers(0, 5, n)]
    x[1, n // 2, 0] = np.inf
    found = order_cuda.tree_order(host, x, leaf, in_order)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, order_reference.tree_order(host, x, leaf, in_order))


def test_tree_order_of_equal_rows(rng):
    """Ties are cut in ascending order of rows."""
    x = np.repeat(rng.standard_normal((1, 3, 4)), 9, axis=1)[:, rng.permutation(27)]
    np.testing.assert_array_equal(order_cuda.tree_order(host, x, 2), order_reference.tree_order(host, x, 2))
