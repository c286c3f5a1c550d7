"""`kdecore.accuracy.metrics` against NumPy's SVD."""

import array_api_compat.torch as torch
import array_api_strict
import numpy as np
import pytest

import kdecore
from kdecore.accuracy.metrics import errors
from kdecore.arrays.namespace import host


def by_svd(estimate: np.ndarray, exact: np.ndarray) -> tuple[float, float, float]:
    estimate, exact = (x.astype(np.float64).reshape(-1, *x.shape[-2:]) for x in (estimate, exact))
    spectral, frobenius, worst = [], [], []
    for a, b in zip(estimate, exact, strict=True):
        spectral.append(np.linalg.svd(a - b, compute_uv=False)[0] / np.linalg.svd(b, compute_uv=False)[0])
        frobenius.append(np.sqrt(((a - b) ** 2).sum() / (b**2).sum()))
        worst.append(max(np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)))
    return float(np.mean(spectral)), float(np.mean(frobenius)), float(np.mean(worst))


def as_tuple(found: object) -> tuple[float, float, float]:
    return found.spectral, found.frobenius, found.worst_row


@pytest.mark.parametrize("shape", [(40, 7), (5, 30), (1, 1), (3, 20, 4), (2, 3, 10, 5)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_against_svd(shape, dtype):
    random = np.random.default_rng(0)
    exact = random.standard_normal(shape).astype(dtype)
    estimate = exact + 0.1 * random.standard_normal(shape).astype(dtype)
    np.testing.assert_allclose(as_tuple(errors(host, estimate, exact)), by_svd(estimate, exact), rtol=1e-9)


@pytest.mark.parametrize("xp", [torch, array_api_strict], ids=["torch", "strict"])
def test_every_library_agrees(xp):
    random = np.random.default_rng(1)
    exact, estimate = random.standard_normal((2, 3, 12, 5))
    found = errors(xp, xp.asarray(estimate), xp.asarray(exact))
    np.testing.assert_allclose(as_tuple(found), by_svd(estimate, exact), rtol=1e-9)


def test_perfect_estimate_has_no_error():
    exact = np.random.default_rng(2).standard_normal((9, 4))
    assert as_tuple(errors(host, exact.copy(), exact)) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_no_overflow_or_underflow(scale):
    random = np.random.default_rng(3)
    exact, estimate = random.standard_normal((2, 12, 5))
    found = errors(host, estimate * scale, exact * scale)
    np.testing.assert_allclose(as_tuple(found), by_svd(estimate, exact), rtol=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_give_nan(bad):
    exact = np.ones((2, 6, 3))
    estimate = exact.copy()
    estimate[1, 2, 0] = bad
    assert np.isnan(as_tuple(errors(host, estimate, exact))).all()


def test_zero_exact_row():
    exact = np.ones((4, 3))
    exact[1] = 0.0
    estimate = exact.copy()
    assert as_tuple(errors(host, estimate, exact)) == (0.0, 0.0, 0.0)
    estimate[1] = 0.5
    found = errors(host, estimate, exact)
    assert found.worst_row == np.inf
    assert 0 < found.spectral < 1
    assert 0 < found.frobenius < 1


def test_zero_exact_matrix():
    assert as_tuple(errors(host, np.zeros((4, 3)), np.zeros((4, 3)))) == (0.0, 0.0, 0.0)
    assert as_tuple(errors(host, np.ones((4, 3)), np.zeros((4, 3)))) == (np.inf, np.inf, np.inf)


@pytest.mark.parametrize(
    "shapes", [((4, 3), (4, 2)), ((3,), (3,)), ((0, 3), (0, 3)), ((4, 0), (4, 0)), ((0, 4, 3), (0, 4, 3))]
)
def test_wrong_shapes(shapes):
    with pytest.raises(kdecore.ShapeError, match="estimate and exact"):
        errors(host, np.ones(shapes[0]), np.ones(shapes[1]))
