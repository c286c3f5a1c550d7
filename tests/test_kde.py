"""`kdecore.kde`: definitions, edge cases, errors, and every array library."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdecore import DeviceError, DTypeError, OptionError, ShapeError
from kdecore.arrays.namespace import host
from kdecore.kde import log_gaussian_kde, log_weighted_exponential_kde, wexpkde
from kdecore.kde.gaussian_map import exponential_form, gaussian_form, to_gaussian
from kdecore.kde.problem import Accuracy
from tests.kde_oracles import log_gaussian, log_sum_exp, log_weighted_exponential

PRIMITIVES = ("auto", "exact", "uniform", "hbe", "neighbours")


def data(n=50, m=7, d=3, seed=0, lead=()):
    generator = np.random.default_rng(seed)
    return (
        generator.standard_normal((*lead, n, d)),
        generator.standard_normal((*lead, m, d)),
        generator.uniform(size=(*lead, n)),
    )


@given(
    n=st.integers(1, 30),
    d=st.integers(1, 6),
    scale=st.sampled_from([0.01, 1.0, 5.0]),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_map_to_gaussian_is_exact(n, d, scale, spread, seed):
    generator = np.random.default_rng(seed)
    x, y = scale * generator.standard_normal((n, d)), scale * generator.standard_normal((5, d))
    logs = spread * generator.standard_normal(n)
    lifted, log_top = to_gaussian(host, x, logs)
    square = ((lifted[None, :, :-1] - y[:, None, :]) ** 2).sum(-1) + lifted[None, :, -1] ** 2
    got = log_top + 0.5 * (y**2).sum(-1) + log_sum_exp(-0.5 * square)
    expected = log_sum_exp(y @ x.T + logs)
    # 1e-12 of the largest number that the map subtracts again.
    size = 1.0 + np.abs(log_top) + 0.5 * (y**2).sum(-1)
    assert np.all(np.abs(got - expected) <= 1e-12 * size)


@given(n=st.integers(1, 30), offset=st.sampled_from([0.0, 3.0]), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_moved_forms_are_exact(n, offset, seed):
    generator = np.random.default_rng(seed)
    x, y = generator.standard_normal((n, 4)) + offset, 0.3 * generator.standard_normal((5, 4)) - offset
    logs = generator.standard_normal(n)
    for form, expected in (
        (exponential_form(x, y, logs), log_sum_exp(y @ x.T + logs)),
        (gaussian_form(x, y, 0.7), log_gaussian(x, y, 0.7)),
    ):
        square = ((form.x[None, :, :] - form.y[:, None, :]) ** 2).sum(-1)
        got = form.offset + log_sum_exp(form.height - 0.5 * square)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-11)
        assert form.height.max() <= 1e-14


@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_every_backend_and_leading_dimensions(backend, primitive):
    x, y, w = data(n=40, lead=(2, 3))
    for dtype in backend.dtypes:
        xb, yb, wb = backend.arrays(x, y, w, dtype=dtype)
        xs, ys, ws = (backend.numpy(a) for a in (xb, yb, wb))
        tolerance = 1e-10 if dtype == "float64" else 2e-4
        got = log_weighted_exponential_kde(xb, yb, wb, primitive=primitive, eps=0.01)
        assert type(got) is type(xb)
        assert tuple(got.shape) == (2, 3, 7)
        # So few points that every primitive is exact, or ends exact.
        np.testing.assert_allclose(backend.numpy(got), log_weighted_exponential(xs, ys, ws), atol=tolerance)
        got = log_gaussian_kde(xb, yb, 1.5, primitive=primitive, eps=0.01)
        np.testing.assert_allclose(backend.numpy(got), log_gaussian(xs, ys, 1.5), atol=tolerance)


@pytest.mark.parametrize("primitive", ["uniform", "neighbours", "hbe"])
def test_backends_agree_on_estimates(backend, primitive):
    generator = np.random.default_rng(3)
    centres = 4.0 * generator.standard_normal((40, 6))
    x = np.repeat(centres, 15, axis=0) + 0.2 * generator.standard_normal((600, 6))
    y = centres[:20] + 0.2 * generator.standard_normal((20, 6))
    expected, report = log_gaussian_kde(x, y, 2.0, eps=0.5, primitive=primitive, return_report=True)
    xb, yb = backend.arrays(x, y, dtype="float64")
    got, other = log_gaussian_kde(xb, yb, 2.0, eps=0.5, primitive=primitive, return_report=True)
    assert [level.asked for level in other.levels] == [level.asked for level in report.levels]
    np.testing.assert_allclose(backend.numpy(got), expected, atol=1e-9)


@pytest.mark.parametrize("primitive", PRIMITIVES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_inner_products_of_ten_thousand(primitive, dtype):
    x, y, _ = data(n=300, m=40, d=4)
    x, y = (100.0 * a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))
    x[0], y[0], y[1] = [100, 0, 0, 0], [100, 0, 0, 0], [-100, 0, 0, 0]
    x, y = x.astype(dtype), y.astype(dtype)
    got = log_weighted_exponential_kde(x, y, primitive=primitive)
    exact = log_weighted_exponential(x, y)
    assert np.all(np.isfinite(got))
    # One point outweighs all others by many nats: who finds it is right, and δ = 5 % may miss it.
    assert np.mean(np.abs(got - exact) > 0.2 + 1e-6 * np.abs(exact)) <= (0.05 if primitive == "neighbours" else 0.0)


@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_zero_weights_one_point_and_duplicates(primitive):
    x, y, w = data(n=60)
    w[::2] = 0.0
    got = log_weighted_exponential_kde(x, y, w, primitive=primitive)
    np.testing.assert_allclose(got, log_weighted_exponential(x, y, w), atol=0.2)
    assert np.all(log_weighted_exponential_kde(x, y, 0 * w, primitive=primitive) == -np.inf)
    one = log_weighted_exponential_kde(x[:1], y, w[1:2], primitive=primitive)
    np.testing.assert_allclose(one, log_weighted_exponential(x[:1], y, w[1:2]), atol=1e-12)
    np.testing.assert_allclose(log_gaussian_kde(x[:1], y, primitive=primitive), log_gaussian(x[:1], y), atol=1e-12)
    same = np.tile(x[:1], (200, 1))
    np.testing.assert_allclose(log_gaussian_kde(same, y, primitive=primitive), log_gaussian(same, y), atol=1e-9)


@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_empty(primitive):
    x, y, _ = data()
    assert log_weighted_exponential_kde(x, y[:0], primitive=primitive).shape == (0,)
    assert np.all(log_weighted_exponential_kde(x[:0], y, primitive=primitive) == -np.inf)
    assert log_gaussian_kde(x, y[:0], primitive=primitive).shape == (0,)
    assert log_weighted_exponential_kde(x[None][:0], y[None][:0], primitive=primitive).shape == (0, 7)
    with pytest.raises(ShapeError, match="x must have at least one row"):
        log_gaussian_kde(x[:0], y)


@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_log_weights_outside_the_range_of_floats(primitive):
    x, y, w = data(n=300)
    logs = 5000.0 * np.sign(w - 0.5) + w
    got = log_weighted_exponential_kde(x, y, log_weights=logs, primitive=primitive)
    np.testing.assert_allclose(got, log_sum_exp(y @ x.T + logs), atol=0.2)
    logs[:] = -np.inf
    assert np.all(log_weighted_exponential_kde(x, y, log_weights=logs, primitive=primitive) == -np.inf)


def test_one_seed_one_result_and_no_global_state():
    x, y, _ = data(n=3000, m=30, d=8)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    for primitive in PRIMITIVES:
        a, b = (log_gaussian_kde(x, y, 3.0, primitive=primitive, seed=7) for _ in range(2))
        assert np.array_equal(a, b)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    one, other = (log_gaussian_kde(x, y, 3.0, primitive="uniform", eps=0.5, seed=seed) for seed in (1, 2))
    assert not np.array_equal(one, other)


def test_report_adds_up():
    generator = np.random.default_rng(0)
    centres = 4.0 * generator.standard_normal((64, 8))
    x = np.repeat(centres, 32, axis=0) + 0.3 * generator.standard_normal((2048, 8))
    y = np.concatenate([centres + 0.3 * generator.standard_normal((64, 8)), 30.0 + generator.standard_normal((9, 8))])
    for primitive in PRIMITIVES:
        _, report = log_gaussian_kde(np.stack([x, x]), np.stack([y, y]), primitive=primitive, eps=0.3, return_report=True)
        assert sum(level.answered for level in report.levels) == 2 * 73
        total = sum(level.evaluations for level in report.levels)
        assert report.evaluations_per_query == pytest.approx(total / (2 * 73))
        assert report.exact_queries == sum(level.answered for level in report.levels if level.primitive == "exact")
        # What a primitive wastes on queries that it cannot answer is bounded.
        assert report.evaluations_per_query <= 3.0 * 2048
        assert json.loads(json.dumps(report.to_dict()))["n"] == 2048
        assert f"{report.exact_queries} of 146 queries done exactly" in str(report)
        if primitive == "hbe":
            # Queries far from everything lie below every level, and are done exactly.
            assert report.exact_queries >= 18


def test_canonical_core():
    x, y, w = data(lead=(4,))
    got, report = wexpkde(x, y, np.log(w), Accuracy(0.3, 0.05), primitive="exact")
    np.testing.assert_allclose(got, log_weighted_exponential(x, y, w), atol=1e-12)
    assert (report.groups, report.exact_queries) == (4, 28)


X, Y, W = data()
BAD = [
    ({"eps": 0.0}, OptionError, "eps must lie strictly between 0 and 1, got 0.0"),
    ({"eps": 1.0}, OptionError, "eps must lie"),
    ({"eps": math.nan}, OptionError, "eps must lie"),
    ({"eps": "small"}, OptionError, "eps must lie.*'small'"),
    ({"delta": 1.0}, OptionError, "delta must lie"),
    ({"primitive": "magic"}, OptionError, "primitive must be one of auto, exact, uniform, hbe, neighbours, got 'magic'"),
    ({"primitive": None}, OptionError, "primitive must be one of"),
    ({"seed": -1}, OptionError, "seed"),
    ({"weights": -W}, OptionError, "weights must be finite and at least 0, got 50"),
    ({"weights": np.where(W > 0.5, np.nan, W)}, OptionError, "weights must be finite"),
    ({"weights": np.where(W > 0.5, np.inf, W)}, OptionError, "weights must be finite"),
    ({"log_weights": np.where(W > 0.5, np.inf, W)}, OptionError, "log_weights must be numbers below"),
    ({"log_weights": np.where(W > 0.5, np.nan, W)}, OptionError, "log_weights must be numbers below"),
    ({"weights": W, "log_weights": W}, OptionError, "log_weights must be None"),
    ({"weights": W[:-1]}, ShapeError, r"weights must have the shape \(50,\).*got \(49,\)"),
    ({"weights": W[:, None]}, ShapeError, "weights must have the shape"),
    ({"weights": np.ones(50, dtype=int)}, DTypeError, "weights must have one of the dtypes"),
    ({"weights": [1.0] * 50}, DTypeError, "weights must be an array"),
    ({"x": X[:, :2]}, ShapeError, "y must have x's last dimension d = 2"),
    ({"x": X[:, :0], "y": Y[:, :0]}, ShapeError, "x must have a last dimension d of at least 1"),
    ({"x": X[0]}, ShapeError, "x must have at least 2 dimensions"),
    ({"x": X[None]}, ShapeError, "y must have the leading dimensions of x"),
    ({"x": X * math.inf}, OptionError, "x must be finite, got 150"),
    ({"y": Y.astype("float32")}, DTypeError, "y must have the same dtype as x"),
    ({"y": Y.astype(int)}, DTypeError, "y must have one of the dtypes"),
    ({"y": "queries"}, DTypeError, "y must be an array"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        log_weighted_exponential_kde(**{"x": X, "y": Y, **change})


def test_errors_of_the_gaussian_kde():
    for bandwidth in (0.0, -1.0, math.inf, math.nan, "wide"):
        with pytest.raises(OptionError, match="bandwidth must be a positive finite number"):
            log_gaussian_kde(X, Y, bandwidth)
    torch = pytest.importorskip("torch")
    with pytest.raises(DeviceError, match="y must come from the same library as x"):
        log_gaussian_kde(X, torch.tensor(Y))
