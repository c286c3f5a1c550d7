"""`balanced_view` in the simulator, against its reference."""

import numpy as np
import pytest

from kdecore.arrays.namespace import host
from kdecore.kernels.balanced_view import cuda, reference
from tests.views import DEGENERATE, arguments, assert_same_view, graded_moments

DIMENSIONS = (1, 3, 5, 16, 20)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_coordinates(rng, d):
    given = graded_moments(rng, d)
    p = min(16, d)
    found, expected = (kernel.balanced_view(host, *arguments(given, p, -0.7)) for kernel in (cuda, reference))
    of_scaled = [(one.queries / -0.7, one.keys) for one in (found, expected)]
    assert_same_view(*of_scaled, 0.7**2 * given[0], given[1])
    assert [x.shape for x in found] == [(2, d, p), (2, d, p), (2, 1, p), (2,)]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-10 * np.abs(other).max())


def test_fewer_coordinates_than_threads_have_columns_for(rng):
    given = graded_moments(rng, 9)
    found, expected = (kernel.balanced_view(host, *arguments(given, 7)) for kernel in (cuda, reference))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-10 * np.abs(other).max())


@pytest.mark.parametrize("d", [3, 20])
@pytest.mark.parametrize("make", DEGENERATE.values(), ids=DEGENERATE)
def test_moments_without_full_rank_and_of_any_size(rng, make, d):
    given = make(rng, d)
    found, expected = (kernel.balanced_view(host, *arguments(given, min(16, d))) for kernel in (cuda, reference))
    assert_same_view(found, expected, *given)


def test_columns_of_equal_weight_are_taken_in_order():
    """Of the same numbers on the diagonal: the coordinates are the first columns, and iterations keep their span."""
    moment = np.eye(20)[None]
    queries, keys, *_ = cuda.balanced_view(host, *arguments((moment, moment), 16))
    np.testing.assert_allclose((queries @ keys.swapaxes(1, 2))[0], np.diag(np.arange(20) < 16), rtol=0, atol=1e-12)


def test_signs_leave_no_negative_sum_of_cubes(rng):
    """Where axes lie anyhow, so that some are turned, and what belongs to them with them."""
    turn, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    given = turn.T @ graded_moments(rng, 6) @ turn
    found, expected = (kernel.balanced_view(host, *arguments(given, 5)) for kernel in (cuda, reference))
    assert ((found.queries**3).sum(axis=1) >= 0).all()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-10 * np.abs(other).max())


def test_numbers_that_are_not_finite_end(rng):
    given = graded_moments(rng, 5)
    given[:, 0] = np.nan
    found = cuda.balanced_view(host, *arguments(given, 5))
    expected = reference.balanced_view(host, *arguments(given[:, 1:], 5))
    for one, other in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_allclose(one[1], other[0], rtol=0, atol=1e-10 * np.abs(other).max())


@pytest.mark.parametrize(("d", "p"), [(257, 4), (20, 17)])
def test_what_shared_memory_cannot_hold_is_not_taken(rng, d, p):
    with pytest.raises(AssertionError):
        cuda.balanced_view(host, *arguments(graded_moments(rng, d), p))
