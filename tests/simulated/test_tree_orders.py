"""`rank_codes` in the simulator: the integers of its reference."""

import numpy as np
import pytest

from kdecore.arrays.namespace import host
from kdecore.kernels.rank_codes import cuda, reference


@pytest.mark.parametrize(
    ("n", "p", "bits", "in_order"), [(1, 1, 5, 0), (40, 3, 12, 0), (37, 4, 9, 2), (11, 2, 30, 3), (9, 5, 3, 3)]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rank_codes(rng, n, p, bits, in_order, dtype):
    x = (rng.standard_normal((2, n, p)) * rng.random(p)).astype(dtype)
    x[1] = np.round(x[1])
    x[0, n // 2, 0] = np.nan
    found = cuda.rank_codes(host, x, bits, in_order)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, reference.rank_codes(host, x, bits, in_order))
