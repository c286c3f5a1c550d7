"""`KernelDensity` and normalised densities: scikit-learn's checks, its own densities, and errors of estimates."""

import numpy as np
import pytest
from sklearn import neighbors
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from kdecore import OptionError, ShapeError
from kdecore.kde import log_gaussian_kde
from kdecore.neighbors import KernelDensity, density


@parametrize_with_checks([KernelDensity()])
def test_scikit_learns_checks(estimator, check):
    # They assert themselves; none is expected to fail.
    assert check(estimator) is None


def clouds(rng, n, d=3):
    """Return rows (n, d) in twenty clusters of unlike width, the same places every time."""
    places = np.random.default_rng(5)
    centres, widths = 3.0 * places.standard_normal((20, d)), places.uniform(0.2, 1.0, 20)
    cluster = rng.integers(0, 20, n)
    return centres[cluster] + widths[cluster, None] * rng.standard_normal((n, d))


def scikit_learns(X, queries, bandwidth, weights=None):
    # One leaf: bounds of several are added and subtracted again, which leaves errors of up to 3e-3.
    return (
        neighbors.KernelDensity(bandwidth=bandwidth, leaf_size=len(X)).fit(X, sample_weight=weights).score_samples(queries)
    )


@pytest.mark.parametrize("d", [1, 3, 20])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_normalised_densities_are_scikit_learns(rng, d, offset):
    x, y = clouds(rng, 700, d) + offset, clouds(rng, 50, d) + offset
    found = log_gaussian_kde(x, y, 0.7, normalised=True, primitive="exact")
    np.testing.assert_allclose(found, scikit_learns(x, y, 0.7), rtol=1e-11)
    plain = log_gaussian_kde(x, y, 0.7, primitive="exact")
    np.testing.assert_allclose(plain - found, d * np.log(0.7 * np.sqrt(2 * np.pi)), rtol=1e-11)


def test_normalised_densities_of_groups_and_of_float32(rng):
    x, y = clouds(rng, 600).reshape(2, 300, 3), clouds(rng, 40).reshape(2, 20, 3)
    found, report = log_gaussian_kde(
        x.astype(np.float32), y.astype(np.float32), 0.5, normalised=True, primitive="exact", return_report=True
    )
    assert found.dtype == np.float32
    assert report.groups == 2
    for group in range(2):
        np.testing.assert_allclose(found[group], scikit_learns(x[group], y[group], 0.5), rtol=1e-5, atol=1e-5)


def test_numbers_are_points_of_one_dimension(backend, rng):
    x, y = rng.standard_normal(300), rng.standard_normal(20)
    how = {"bandwidth": 0.3, "normalised": True, "primitive": "exact"}
    found = log_gaussian_kde(*backend.arrays(x, y), **how)
    assert found.shape == (20,)
    np.testing.assert_allclose(backend.numpy(found), scikit_learns(x[:, None], y[:, None], 0.3), rtol=1e-11)
    for one, other, name in ((x, y[:, None], "x"), (x[:, None], y, "y")):
        with pytest.raises(ShapeError, match=rf"{name} must have at least 2 dimensions"):
            log_gaussian_kde(*backend.arrays(one, other))
    with pytest.raises(OptionError, match="normalised must be True or False"):
        log_gaussian_kde(*backend.arrays(x, y), normalised=1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_densities_of_few_rows_are_scikit_learns(rng, weighted, dtype):
    X, queries = clouds(rng, 500).astype(dtype), clouds(rng, 60).astype(dtype)
    weights = rng.uniform(0.1, 3.0, 500) if weighted else None
    model = KernelDensity(0.6).fit(X, sample_weight=weights)
    expected = scikit_learns(X, queries, 0.6, weights)
    found, report = model.score_samples(queries, return_report=True)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-11)
    assert model.score(queries) == pytest.approx(expected.sum(), rel=1e-11)
    assert (report.method, report.certificate) == ("exact", None)
    # Far from all rows, where densities underflow, and with weights that do beside others.
    far = np.array([[1e3, -2e3, 10.0]])
    np.testing.assert_allclose(model.score_samples(far), scikit_learns(X, far, 0.6, weights), rtol=1e-11)


def test_weights_of_no_rows_and_of_any_size(rng):
    X, queries = clouds(rng, 300), clouds(rng, 20)
    weights = np.where(np.arange(300) < 100, 1e300, 0.0)
    found = KernelDensity(0.5).fit(X, sample_weight=weights).score_samples(queries)
    np.testing.assert_allclose(found, scikit_learns(X[:100], queries, 0.5), rtol=1e-11)


def off_by(found, exact):
    """Return the relative error of densities, the root of its mean square."""
    return np.sqrt(np.mean(np.expm1(found - exact) ** 2))


@pytest.mark.parametrize(("d", "bandwidth", "bound"), [(1, 0.2, 1e-4), (3, 0.5, 0.05), (8, 1.0, 0.2)])
@pytest.mark.parametrize("weighted", [False, True])
def test_estimates_err_little_and_a_report_says_how_much(rng, d, bandwidth, bound, weighted):
    X, queries = clouds(rng, 12_000, d), clouds(rng, 2000, d)
    weights = rng.uniform(0.1, 3.0, 12_000) if weighted else None
    model = KernelDensity(bandwidth, budget=512).fit(X, sample_weight=weights)
    exact = KernelDensity(bandwidth, budget=12_000).fit(X, sample_weight=weights).score_samples(queries)
    found, report = model.score_samples(queries, return_report=True)
    np.testing.assert_array_equal(found, model.score_samples(queries))
    assert report.method == "treecode"
    assert report.budget == 512
    assert 0.0 < off_by(found, exact) < bound
    low, high = report.certificate.frobenius_interval
    assert report.certificate.rows == 100
    # One of six such cases misses with a probability of a quarter; these seeds' don't.
    assert low <= off_by(found, exact) <= high
    # All of so few are compared.
    found, report = model.score_samples(queries[:30], return_report=True)
    assert report.certificate.frobenius == pytest.approx(off_by(found, exact[:30]), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("rtol", [0.2, 0.03, 1e-9])
def test_a_tolerance_is_kept(rng, rtol):
    """Of 95 % intervals' upper ends; by these seeds in every case."""
    X, queries = clouds(rng, 12_000, 4), clouds(rng, 2000, 4)
    model = KernelDensity(0.5, rtol=rtol).fit(X)
    exact = KernelDensity(0.5, budget=12_000).fit(X).score_samples(queries)
    found, report = model.score_samples(queries, return_report=True)
    assert off_by(found, exact) <= rtol
    assert report.budget is None
    assert (report.certificate is None) == (report.method == "exact") == (rtol < 1e-3)
    np.testing.assert_array_equal(found, model.score_samples(queries))
    # Few rows are exact.
    np.testing.assert_allclose(model.score_samples(queries[:64]), exact[:64], rtol=1e-11)


def test_batches_are_one(rng, monkeypatch):
    X, queries = clouds(rng, 3000), clouds(rng, 300)
    model = KernelDensity(0.5, budget=100).fit(X)
    exact = KernelDensity(0.5, budget=3000).fit(X)
    whole = exact.score_samples(queries)
    monkeypatch.setattr(density, "BATCH", 128)
    np.testing.assert_allclose(exact.score_samples(queries), whole, rtol=1e-11)
    found, report = model.score_samples(queries, return_report=True)
    parts = [model.score_samples(queries[i : i + 128], return_report=True) for i in (0, 128, 256)]
    np.testing.assert_array_equal(found, np.concatenate([scores for scores, _ in parts]))
    uppers = [one.certificate.upper("frobenius") for _, one in parts]
    assert report.certificate.upper("frobenius") == max(uppers)


@pytest.mark.parametrize("budget", [64, 4000])
def test_densities_integrate_to_one(rng, budget):
    X = clouds(rng, 4000, 1)
    grid = np.linspace(X.min() - 3.0, X.max() + 3.0, 4001)
    density = np.exp(KernelDensity("silverman", budget=budget).fit(X).score_samples(grid[:, None]))
    assert np.trapezoid(density, grid) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("rule", ["scott", "silverman"])
def test_rules_are_scikit_learns_times_the_deviation(rng, rule):
    X = rng.standard_normal((300, 3)) * np.array([1.0, 2.0, 3.0])
    theirs = neighbors.KernelDensity(bandwidth=rule).fit(X).bandwidth_
    assert KernelDensity(rule).fit(X).bandwidth_ == pytest.approx(theirs * np.sqrt(X.var(axis=0).mean()), rel=1e-12)


def test_bad_input_is_named(rng):
    X = clouds(rng, 50)
    for parameters, message in (
        ({"bandwidth": "scot"}, r'bandwidth must be a positive finite number, "scott" or "silverman".*did you mean'),
        ({"bandwidth": -1.0}, "bandwidth must be a positive finite number, got -1.0"),
        ({"budget": 0}, "budget must be an integer of at least 1"),
        ({"budget": 5, "rtol": 0.1}, "budget must be None with rtol"),
        ({"rtol": 0.0}, "rtol must be a positive"),
        ({"random_state": None}, "random_state must be an integer"),
    ):
        with pytest.raises(OptionError, match=message):
            KernelDensity(**parameters).fit(X)
    with pytest.raises(ValueError, match="sample_weight must be at least 0"):
        KernelDensity().fit(X, sample_weight=-np.ones(50))
    with pytest.raises(NotFittedError):
        KernelDensity().score_samples(X)
    with pytest.raises(OptionError, match="return_report must be True or False"):
        KernelDensity().fit(X).score_samples(X, return_report="yes")
