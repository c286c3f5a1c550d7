"""`second_moment` and `shrink_matrices` in the simulator, against their references."""

import numpy as np
import pytest

from kdecore.arrays.namespace import host
from kdecore.kernels.second_moment import cuda as moment_cuda
from kdecore.kernels.second_moment import reference as moment_reference
from kdecore.kernels.shrink_matrices import cuda as shrink_cuda
from kdecore.kernels.shrink_matrices import reference as shrink_reference
from tests.simulated.rows import DTYPES, stored
from tests.tolerances import assert_close


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "step", "centred"), [(23, 7, 3, True), (6, 3, 1, False), (1, 1, 1, True), (11, 4, 2, False)]
)
def test_second_moments(rng, dtype, n, d, step, centred):
    rows = 30.0 + rng.standard_normal((2, n, d))
    rows[0, 0, 0], rows[1, -1, -1] = np.nan, np.inf
    xp, rows, wide = stored(rows, dtype)
    found = moment_cuda.second_moment(xp, rows, step, centred)
    expected = moment_reference.second_moment(host, wide, step, centred)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one), other, rtol=1e-12, atol=1e-12 * np.abs(other).max())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("each_block", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (3, 2, 1, 20)], ids=str)
def test_shrunk_matrices(rng, dtype, each_block, shape):
    matrices = rng.standard_normal(shape).astype(dtype)
    chances = (rng.random(shape[:2]) * shape[2] * shape[3]).astype(dtype)
    # One that is nothing, and one that chance makes all of.
    matrices[0, 0], chances[0, 0], chances[-1, -1] = 0.0, 0.0, np.inf
    found = shrink_cuda.shrink_matrices(host, matrices, chances, each_block, 0.85)
    expected = shrink_reference.shrink_matrices(host, *(x.astype(np.float64) for x in (matrices, chances)), each_block, 0.85)
    assert found.dtype == dtype
    assert_close(found, expected, dtype=dtype)
    assert bool(np.any(expected)) == (shape != (1, 1, 1, 1))
