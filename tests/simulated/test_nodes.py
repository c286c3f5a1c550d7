"""`node_summaries` in the simulator, against its reference."""

import numpy as np
import pytest

from kdecore.arrays.namespace import host
from kdecore.kernels.node_summaries import cuda, reference
from tests.simulated.rows import DTYPES, stored
from tests.tolerances import assert_close


@pytest.mark.parametrize(
    ("n", "d", "d_v", "p", "leaf", "dtype"),
    [
        *((37, 3, 2, 2, 4, dtype) for dtype in DTYPES),
        (1, 1, 1, 1, 4, "float64"),
        (3, 2, 1, 1, 2, "float64"),
        (64, 1, 3, 1, 2, "float64"),
        (29, 2, 2, 1, 30, "float64"),
    ],
)
def test_node_summaries(rng, n, d, d_v, p, leaf, dtype):
    xp, k, wide_k = stored(rng.standard_normal((2, n, d)), dtype)
    _, v, wide_v = stored(rng.standard_normal((2, n, d_v)), dtype)
    number = "float64" if dtype == "float64" else "float32"
    coordinates, sizes = rng.standard_normal((2, n, p)).astype(number), rng.random((2, n)).astype(number)
    order = rng.permuted(np.tile(np.arange(n), (2, 1)), axis=1)
    half_norm = np.array([0.1, 5.0], number)
    given = [xp.asarray(x) for x in (coordinates, sizes, order)]
    found = cuda.node_summaries(xp, k, v, *given, leaf, xp.asarray(half_norm))
    wide = [x.astype(np.float64) for x in (coordinates, sizes)]
    expected = reference.node_summaries(host, wide_k, wide_v, *wide, order, leaf, half_norm.astype(np.float64))
    for name, one, other in zip(found._fields, found, expected, strict=True):
        one = np.asarray(one)
        assert one.dtype == number, name
        assert_close(one, other, dtype=number)
