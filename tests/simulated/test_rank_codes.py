"""`rank_codes` in the simulator where a sample is not all rows, and where coordinates vary equally or not at all."""

import numpy as np
import pytest

from kdecore.arrays.namespace import host
from kdecore.kernels.rank_codes import cuda, reference


@pytest.fixture(autouse=True)
def small_samples(monkeypatch):
    for module in (cuda, reference):
        monkeypatch.setattr(module, "SAMPLE", 7)


@pytest.mark.parametrize("n", [6, 7, 8, 45])
def test_rows_between_those_sampled(rng, n):
    x = rng.standard_normal((2, n, 3))
    x[0, 1:6:3] *= 100.0
    np.testing.assert_array_equal(cuda.rank_codes(host, x, 12), reference.rank_codes(host, x, 12))


@pytest.mark.parametrize("in_order", [0, 2])
def test_coordinates_of_equal_variance(rng, in_order):
    x = rng.standard_normal((3, 20, 4))
    x[0, :, 1:3] = x[0, :, 3:]
    x[1] = 3.0
    x[2, :, 1] = -x[2, :, 0]
    np.testing.assert_array_equal(cuda.rank_codes(host, x, 9, in_order), reference.rank_codes(host, x, 9, in_order))
