"""`kdecore.neighbors`: scikit-learn's own checks, Nadaraya–Watson written out, and errors at small budgets."""

import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

import kdecore
from kdecore import OptionError
from kdecore.arrays.namespace import host
from kdecore.methods.gaussian_tree import gaussian_keys, gaussian_queries
from kdecore.neighbors import KernelClassifier, KernelDensity, KernelRegressor, estimators
from kdecore.neighbors import index as index_module
from kdecore.neighbors.index import GaussianIndex
from tests import oracles


@parametrize_with_checks([KernelRegressor(), KernelClassifier()])
def test_scikit_learns_checks(estimator, check):
    # They assert themselves; none is expected to fail.
    assert check(estimator) is None


def rows_around(rng, n, d=6):
    """Return rows (n, d) in thirty clusters of unlike width, and two smooth functions of them (n, 2) with noise."""
    places = np.random.default_rng(5)
    centres, widths = 2.0 * places.standard_normal((30, d)), places.uniform(0.2, 1.0, 30)
    cluster = rng.integers(0, 30, n)
    X = centres[cluster] + widths[cluster, None] * rng.standard_normal((n, d))
    y = np.stack([np.sin(X[:, 0]) + X[:, -1], 100 + np.cos(X.sum(axis=1))], axis=1)
    return X, y + 0.1 * rng.standard_normal((n, 2))


def relative(found, exact, y):
    """Return the Frobenius error of predictions from the mean of y, each column in its standard deviations."""
    centre, spread = y.mean(axis=0), y.std(axis=0)
    return np.linalg.norm((found - exact) / spread) / np.linalg.norm((exact - centre) / spread)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("columns", [slice(0, 2), 0])
def test_few_rows_are_regressed_exactly(rng, dtype, weighted, columns):
    X, y = rows_around(rng, 500)
    X, y = X.astype(dtype), y[:, columns]
    weights = rng.integers(0, 3, 500) if weighted else None
    queries = rows_around(rng, 40)[0].astype(dtype)
    found = KernelRegressor(0.7).fit(X, y, weights).predict(queries)
    exact = oracles.nadaraya_watson(X, y.reshape(500, -1), queries, 0.7, weights)
    assert found.dtype == dtype
    assert found.shape == (40, *y.shape[1:])
    np.testing.assert_allclose(found.reshape(exact.shape), exact, rtol=2e-4 if dtype == "float32" else 1e-10)


@pytest.mark.parametrize("labels", [["no", "yes", "perhaps"], [7, -3, 20], [0.0, 1.0, 2.0], [True, False]])
def test_few_rows_are_classified_exactly(rng, labels):
    X, y = rows_around(rng, 500)
    code = np.digitize(y[:, 0], [0.0, 1.5]) % len(labels)
    model = KernelClassifier(0.7).fit(X, np.array(labels)[code])
    queries = rows_around(rng, 40)[0]
    np.testing.assert_array_equal(model.classes_, sorted(labels))
    votes = (np.array(labels)[code][:, None] == model.classes_).astype(float)
    exact = oracles.nadaraya_watson(X, votes, queries, 0.7)
    np.testing.assert_allclose(model.predict_proba(queries), exact, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(model.predict(queries), model.classes_[exact.argmax(axis=1)])


@pytest.mark.parametrize(("d", "weighted"), [(1, True), (2, False), (6, True), (6, False), (24, True)])
def test_estimates_err_little_and_less_with_more_rows(rng, d, weighted):
    X, y = rows_around(rng, 24_000, d)
    X, queries, y = X[:20_000].astype(np.float32), X[20_000:].astype(np.float32), y[:20_000]
    weights = rng.uniform(0.1, 2.0, 20_000) if weighted else None
    width = 0.5 * d**0.5
    exact = oracles.nadaraya_watson(X, y, queries[:100], width, weights)
    errors = []
    for budget in (512, 2048, 20_000):
        model = KernelRegressor(width, budget=budget).fit(X, y, weights)
        # Exact predictions are none of other queries'.
        some = queries if budget < len(X) else queries[:100]
        errors.append(relative(model.predict(some)[:100], exact, y))
    assert errors[0] < 0.1
    assert errors[2] < 2e-5
    assert errors[1] < max(0.5 * errors[0], 2e-5)


def test_estimated_probabilities_are_probabilities(rng):
    X, y = rows_around(rng, 8000)
    labels = np.digitize(y[:, 0], [-1.0, 0.0, 1.0])
    queries = rows_around(rng, 1500)[0]
    model = KernelClassifier(1.0, budget=1000).fit(X, labels)
    found = model.predict_proba(queries)
    exact = oracles.nadaraya_watson(X, np.eye(4)[labels], queries[:200], 1.0)
    np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-12)
    assert found.min() >= 0
    assert 1e-6 < np.linalg.norm(found[:200] - exact) / np.linalg.norm(exact) < 0.05


@pytest.mark.parametrize("rtol", [0.1, 0.003])
def test_a_tolerance_is_kept(rng, rtol):
    X, y = rows_around(rng, 6000)
    queries = rows_around(rng, 400)[0]
    model = KernelRegressor(0.5, rtol=rtol).fit(X, y)
    found, report = model.predict(queries, return_report=True)
    assert relative(found, oracles.nadaraya_watson(X, y, queries, 0.5), y) <= rtol
    assert report.certificate is None or report.certificate.upper("frobenius") <= rtol
    np.testing.assert_array_equal(found, model.predict(queries))


def test_a_report_says_how_far_off_predictions_are(rng):
    X, y = rows_around(rng, 6000)
    queries = rows_around(rng, 32)[0]
    found, report = KernelRegressor(0.5, budget=150).fit(X, y).predict(queries, return_report=True)
    error = relative(found, oracles.nadaraya_watson(X, y, queries, 0.5), y)
    # All of so few rows are compared.
    assert report.certificate.frobenius == pytest.approx(error, rel=1e-6)
    assert error > 1e-6
    _, report = KernelRegressor(0.5).fit(X[:100], y[:100]).predict(queries, return_report=True)
    assert report.method == "exact"
    assert report.certificate is None
    _, report = KernelClassifier(0.5, budget=150).fit(X, X[:, 0] > 0).predict_proba(queries, return_report=True)
    assert report.certificate.rows == 32


def test_a_report_is_that_of_the_batch_furthest_off(rng, monkeypatch):
    X, y = rows_around(rng, 3000)
    queries = rows_around(rng, 64)[0]
    # Of the training rows' own far-off places nothing is estimated.
    model = KernelRegressor(0.5, budget=100).fit(X, y)
    monkeypatch.setattr(estimators, "BATCH", 32)
    found, report = model.predict(queries, return_report=True)
    parts = [model.predict(some, return_report=True) for some in (queries[:32], queries[32:])]
    np.testing.assert_array_equal(found, np.concatenate([out for out, _ in parts]))
    assert report.certificate == max((one.certificate for _, one in parts), key=lambda one: one.upper("frobenius"))


def test_batches_of_exact_predictions_are_one(rng, monkeypatch):
    X, y = rows_around(rng, 400)
    model = KernelRegressor().fit(X, y)
    whole = model.predict(X)
    monkeypatch.setattr(estimators, "BATCH", 150)
    np.testing.assert_allclose(model.predict(X), whole, rtol=1e-12)


def test_a_row_far_from_all_others_has_the_nearest_ones_value(rng):
    X, y = rows_around(rng, 3000, 2)
    model = KernelRegressor(0.05, budget=64).fit(X, y)
    far = 1e3 * np.array([[1.0, 0.2], [-1.0, 3.0]])
    nearest = np.argmin(np.sum((far[:, None] - X[None]) ** 2, axis=-1), axis=1)
    np.testing.assert_allclose(model.predict(far), y[nearest], rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("budget", [64, 4000])
def test_a_row_so_far_away_that_squares_leave_no_digits(rng, dtype, budget):
    X, y = (x.astype(dtype) for x in rows_around(rng, 3000, 2))
    model = KernelRegressor(0.05 if dtype == np.float64 else 0.5, budget=budget).fit(X, y)
    far = (3e6 if dtype == np.float64 else 3e3) * np.array([[1.0, 0.2], [-1.0, 3.0]], dtype)
    nearest = np.argmax((far.astype(float) - X.mean(0)) @ X.T.astype(float) - (X.astype(float) ** 2).sum(1) / 2, axis=1)
    rows = np.concatenate([X[:40], far, X[40:80]])
    found, report = model.predict(rows, return_report=True)
    np.testing.assert_allclose(found[40:42], y[nearest], rtol=1e-5)
    assert report.shape[1] == 80


def test_what_no_dtype_holds_is_refused_by_name(rng):
    X, y = rows_around(rng, 300, 2)
    outlier = np.concatenate([X, [[1e12, 0.0]]])
    with pytest.raises(
        OptionError, match=r"bandwidth must be at least \d.*a row of X lies 9.97e\+11 from the mean, got 0.1$"
    ):
        KernelRegressor(0.1).fit(outlier, np.vstack([y, y[:1]]))
    with pytest.raises(OptionError, match=r"bandwidth must be at least .*, got 1e-300$"):
        KernelRegressor(1e-300).fit(X, y)
    with pytest.raises(ValueError, match="X must have rows whose squares float64 can hold"):
        KernelRegressor(0.1).fit(1e200 * X, y)
    with pytest.raises(ValueError, match="X must have rows whose squares float64 can hold"):
        KernelRegressor(0.1).fit(X, y).predict(1e200 * X)
    with pytest.raises(ValueError, match="X must have rows whose squares float64 can hold"):
        KernelDensity(0.1).fit(X).score_samples(1e160 * X)
    with pytest.raises(ValueError, match="y must have numbers whose squares float64 can hold"):
        KernelRegressor(0.1).fit(X, 1e200 * y)
    with pytest.raises(
        ValueError, match=r"sample_weight must differ by less than float64 can hold, got 1e-310 of the largest"
    ):
        KernelRegressor(0.1).fit(X, y, np.append(np.ones(299), 1e-310))


@pytest.mark.parametrize("factor", [1e-305, 1e305])
def test_weights_are_relative_but_for_rules(rng, factor):
    X, y = rows_around(rng, 300, 2)
    weights = 1.0 + rng.random(300)
    found = KernelRegressor(0.3).fit(X, y, factor * weights).predict(X)
    np.testing.assert_allclose(found, KernelRegressor(0.3).fit(X, y, weights).predict(X), rtol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_small_bandwidths_and_rows_far_from_zero_round_nothing_away(rng, offset):
    """In float32 the logarithms of kernels would be off by tenths."""
    X = (rng.standard_normal((400, 3)) + offset).astype(np.float32)
    y = rng.standard_normal(400)
    queries = X[:50] + np.float32(1 / 64)
    found = KernelRegressor(2e-3).fit(X, y).predict(queries)
    exact = oracles.nadaraya_watson(X, y[:, None], queries, 2e-3)[:, 0]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)


def test_errors_mean_the_same_in_any_unit(rng):
    X, y = rows_around(rng, 5000)
    queries = rows_around(rng, 1100)[0]
    found = KernelRegressor(0.5, budget=150).fit(X, y).predict(queries)
    moved = KernelRegressor(0.5, budget=150).fit(X, 1e6 + 1e-3 * y).predict(queries)
    np.testing.assert_allclose((moved - 1e6) * 1e3, found, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("rule", "factor"), [("scott", 1.0), ("silverman", (5 / 4) ** (-1 / 7))])
def test_rules_for_the_bandwidth(rng, rule, factor):
    X = rng.standard_normal((300, 3)) * np.array([1.0, 2.0, 3.0])
    expected = factor * np.sqrt(X.var(axis=0).mean()) * 300 ** (-1 / 7)
    assert KernelRegressor(rule).fit(X, X[:, 0]).bandwidth_ == pytest.approx(expected, rel=1e-12)
    assert KernelRegressor(rule).fit(np.ones((3, 2)), [1.0, 2.0, 3.0]).predict([[5.0, 5.0]]) == pytest.approx(2.0)


def test_pickled_and_cloned(rng):
    X, y = rows_around(rng, 2000)
    model = KernelRegressor(0.5, budget=100, random_state=3).fit(X, y)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    with pytest.raises(NotFittedError):
        clone(model).predict(X)
    np.testing.assert_array_equal(clone(model).fit(X, y).predict(X), model.predict(X))


def test_bad_input_is_named(rng):
    X, y = rows_around(rng, 50)
    for parameters, message in (
        ({"bandwidth": "scot"}, r'bandwidth must be a positive finite number, "scott" or "silverman".*did you mean'),
        ({"bandwidth": 0.0}, "bandwidth must be a positive finite number, got 0.0"),
        ({"budget": 0}, "budget must be an integer of at least 1"),
        ({"budget": 5, "rtol": 0.1}, "budget must be None with rtol"),
        ({"rtol": -1.0}, "rtol must be a positive"),
        ({"rtol": 0.1, "rtol_norm": "max"}, "rtol_norm must be one of"),
        ({"random_state": None}, "random_state must be an integer"),
        ({"random_state": -1}, "random_state must lie in"),
        ({"threads": 0}, "threads must be"),
    ):
        with pytest.raises(OptionError, match=message):
            KernelRegressor(**parameters).fit(X, y)
        with pytest.raises(OptionError, match=message):
            KernelClassifier(**parameters).fit(X, y[:, 0] > 0)
    model = KernelRegressor()
    for arguments, error, message in (
        ((csr_array(X), y), TypeError, "[Ss]parse"),
        ((np.where(X > 1, np.nan, X), y), ValueError, "NaN"),
        ((X, y[:-1]), ValueError, "inconsistent numbers of samples"),
        ((X, y, -np.ones(50)), ValueError, "sample_weight must be at least 0"),
        ((X, y, np.zeros(50)), ValueError, "sample_weight must be at least 0, and not all zero"),
        ((X, y, np.ones(49)), ValueError, r"sample_weight must have shape \(50,\), .* got \(49,\)"),
    ):
        with pytest.raises(error, match=message):
            model.fit(*arguments)
    with pytest.raises(NotFittedError):
        KernelClassifier().predict(X)
    with pytest.raises(OptionError, match="return_report must be True or False"):
        model.fit(X, y).predict(X, return_report="yes")


def index_of(x, v, **options):
    return GaussianIndex(gaussian_keys(host, x, np.zeros(len(x))), v, **options)


def test_logits_are_distances(rng):
    x, y, v = rng.standard_normal((3, 60, 4))
    weights = rng.uniform(0.5, 2.0, 60)
    keys, queries = gaussian_keys(host, x, np.log(weights)), gaussian_queries(host, y)
    distances = np.sum((y[:, None] - x[None]) ** 2, axis=-1)
    np.testing.assert_allclose(queries @ keys.T, np.log(weights) - 0.5 * distances, rtol=0, atol=1e-12)
    _, lse = GaussianIndex(keys, v).attend(queries, return_lse=True)
    np.testing.assert_allclose(lse, np.log(np.exp(-0.5 * distances) @ weights), rtol=1e-12)


def test_a_closed_root_is_a_normal_distribution(rng, monkeypatch):
    """With one slot nothing is opened: the sum is that of a normal cloud, and of no more than there are points."""
    monkeypatch.setattr(index_module, "SPARSEST", 0)
    deviations = np.array([0.3, 1.0, 0.6])
    x, v = rng.standard_normal((20_000, 3)) * deviations, rng.standard_normal((20_000, 1))
    y = rng.uniform(-1.0, 1.0, (1100, 3))
    queries = gaussian_queries(host, y)
    _, lse = index_of(x, v, budget=1).attend(queries, return_lse=True)
    wide = 1.0 + deviations**2
    expected = np.log(20_000) - 0.5 * np.sum(np.log(wide) + y**2 / wide, axis=1)
    np.testing.assert_allclose(lse, expected, rtol=0, atol=0.05)
    # Far wider than the kernel, where half its variance exceeds the logarithm of its number.
    _, lse = index_of(100.0 * x, v, budget=1).attend(queries, return_lse=True)
    assert lse.max() < np.log(20_000)


def test_weights_of_any_size(rng):
    """Spread over eighty orders of magnitude, which no mean of them holds."""
    x, v, y = rng.standard_normal((3, 3000, 2))
    log_weight = rng.uniform(-100.0, 100.0, 3000)
    index = GaussianIndex(gaussian_keys(host, x, log_weight), v, budget=200)
    found = index.attend(gaussian_queries(host, y[:50]))
    exact = oracles.nadaraya_watson(x, v, y[:50], 1.0, np.exp(np.longdouble(log_weight)))
    assert np.linalg.norm(found - exact) < 0.05 * np.linalg.norm(exact)


def test_queries_with_fewest_points_around_are_exact(rng):
    x, v = rng.standard_normal((4000, 5)), rng.standard_normal((4000, 2))
    y = rng.standard_normal((1500, 5))
    y[::100] += 4.0
    index, queries = index_of(x, v, budget=40), gaussian_queries(host, y)
    out = index.attend(queries)
    exact = oracles.nadaraya_watson(x, v, y, 1.0)
    np.testing.assert_allclose(out[::100], exact[::100], rtol=0, atol=1e-10)
    off = np.abs(out - exact).max(axis=1) > 1e-6
    assert 0.85 < off.mean() < 0.97
    # Alone, and in no company of queries with more around them.
    np.testing.assert_allclose(index.attend(queries[100:101]), exact[100:101], rtol=0, atol=1e-10)
    np.testing.assert_allclose(index.attend(queries[::100]), exact[::100], rtol=0, atol=1e-10)
    _, report = index.attend(queries, return_report=True, certificate=0.0)
    assert report.keys_per_query == pytest.approx((~off).mean() * 4000 + 40, abs=15)
    assert report.longest_list == 4000


def test_distances_are_beyond_the_tree_of_plain_keys(rng):
    """Which takes logits within a node as normal: .43 to .51 where this errs .05 to .06."""
    X, y = rows_around(rng, 6000)
    x, v = X / 0.7, y - y.mean(axis=0)
    keys, queries = gaussian_keys(host, x, np.zeros(6000)), gaussian_queries(host, x[:1200] + 0.1)
    exact = kdecore.attention(queries, keys, v, scale=1.0, method="exact")
    plain, gaussian = (
        np.linalg.norm(index(keys, v, queries=queries, budget=300).attend(queries) - exact) / np.linalg.norm(exact)
        for index in (partial(kdecore.KeyIndex, scale=1.0), GaussianIndex)
    )
    assert gaussian < 0.15 * plain, (gaussian, plain)


def test_without_scikit_learn_it_says_what_to_install():
    program = "import sys; sys.modules['sklearn'] = None; import kdecore; import kdecore.neighbors"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert "ModuleNotFoundError: kdecore.neighbors needs scikit-learn: pip install 'kdecore[sklearn]'" in result.stderr
