"""`finite_rows` and `row_norms` in the simulator, against their references on the same numbers."""

import numpy as np
import pytest

from kdecore.arrays.namespace import host
from kdecore.kernels.finite_rows import cuda as finite_cuda
from kdecore.kernels.finite_rows import reference as finite_reference
from kdecore.kernels.row_norms import cuda as norms_cuda
from kdecore.kernels.row_norms import reference as norms_reference
from tests.simulated.rows import DTYPES, stored
from tests.tolerances import assert_close


def rows_with_holes(rng, shape):
    rows = rng.standard_normal(shape)
    for place, number in zip(rng.integers(0, shape[1], 4), (np.nan, np.inf, -np.inf, np.inf), strict=True):
        rows[rng.integers(shape[0]), place, rng.integers(shape[2])] = number
    return rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 17, 5), (1, 1, 1), (2, 40, 33)], ids=str)
def test_finite_rows(rng, shape, dtype):
    xp, rows, wide = stored(rows_with_holes(rng, shape), dtype)
    found = finite_cuda.finite_rows(xp, rows)
    np.testing.assert_array_equal(found, finite_reference.finite_rows(host, wide))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 17, 5), (1, 1, 1), (2, 9, 33), (2, 5, 0)], ids=str)
def test_row_norms(rng, shape, dtype):
    rows = rows_with_holes(rng, shape) if shape[2] else np.zeros(shape)
    rows[-1, -1] = 0.0
    xp, rows, wide = stored(rows, dtype)
    found = np.asarray(norms_cuda.row_norms(xp, rows))
    assert found.dtype == np.float64
    expected = norms_reference.row_norms(host, wide)
    assert_close(found, expected, dtype="float64" if dtype == "float64" else "float32")


def test_row_norms_of_groups_of_any_size(rng):
    rows = rng.standard_normal((4, 9, 5)) * np.array([1e-300, 1e300, 0.0, 1.0])[:, None, None]
    assert_close(norms_cuda.row_norms(host, rows), norms_reference.row_norms(host, rows))
