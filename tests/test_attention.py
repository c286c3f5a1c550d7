"""The deterministic paths of `attention` on every backend, against float64 oracles."""

import array_api_compat
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from kdecore import Exact, Hyper, KDEformer, OptionError, SortLSH, attention, packed_attention
from kdecore.kernels.attend_blocks import reference as blocks_reference
from kdecore.kernels.attend_dense import reference as dense_reference
from kdecore.testing import strategies
from tests import oracles
from tests.tolerances import assert_accurate, assert_close

SHAPES = {
    "no lead": ((), 5, 7, 3, 4),
    "one lead": ((2,), 6, 6, 4, 4),
    "many leads": ((2, 1, 3), 4, 9, 2, 5),
    "d is 1": ((3,), 4, 5, 1, 2),
    "d_v is 1": ((2,), 4, 5, 6, 1),
    "one key": ((2,), 5, 1, 3, 4),
    "one query": ((2,), 1, 8, 3, 4),
    "all ones": ((1, 1), 1, 1, 1, 1),
    "more queries than keys": ((), 31, 3, 4, 2),
    "several tiles": ((2,), 300, 1031, 4, 3),
    "several groups a tile": ((70,), 40, 100, 3, 2),
}
COVERING = {
    "auto": lambda n_k: {"method": "auto", "budget": n_k},
    "exact": lambda n_k: {"method": "exact"},
    "exact, budget ignored": lambda n_k: {"method": "exact", "budget": 1},
    "sortlsh": lambda n_k: {"method": "sortlsh", "budget": n_k},
    "sortlsh, budget above": lambda n_k: {"method": "sortlsh", "budget": n_k + 5},
    "hyper": lambda n_k: {"method": "hyper", "budget": n_k},
    "default budget": lambda n_k: {"method": "hyper"},
    "Exact()": lambda n_k: {"method": Exact()},
    "SortLSH()": lambda n_k: {"method": SortLSH(), "budget": n_k},
    "SortLSH(…)": lambda n_k: {"method": SortLSH(block_size=n_k - 1, num_samples=1, num_hashes=3)},
    "SortLSH(0, …)": lambda n_k: {"method": SortLSH(block_size=0, num_samples=n_k)},
    "Hyper(…)": lambda n_k: {"method": Hyper(num_samples=1), "budget": n_k},
}
SAMPLING = {
    "sortlsh": {"method": "sortlsh", "budget": 9},
    "hyper": {"method": "hyper", "budget": 9},
    "no block": {"method": SortLSH(block_size=0, num_samples=6)},
    "one hash": {"method": Hyper(num_hashes=1, num_samples=1), "budget": 4},
    "kdeformer": {"method": KDEformer(num_samples=9, normaliser="sampled")},
}


def make(rng, lead, n_q, n_k, d, d_v):
    return tuple(rng.standard_normal((*lead, *tail)) for tail in ((n_q, d), (n_k, d), (n_k, d_v)))


def assert_exact(backend, q, k, v, dtype="float64", **options):
    """Round inputs to dtype, call, and compare out and lse by the tolerance rule."""
    q, k, v = (oracles.round_to(x, dtype) for x in (q, k, v))
    out, lse = attention(*backend.arrays(q, k, v, dtype=dtype), return_lse=True, **options)
    truth, true_lse = oracles.exact_attention(q, k, v, options.get("scale"))
    plain, _ = oracles.plain_attention(q, k, v, dtype, options.get("scale"))
    assert_accurate(backend.numpy(out), truth, plain, dtype, v)
    accumulation = "float64" if dtype == "float64" else "float32"
    _, plain_lse = oracles.plain_attention(q, k, v, accumulation, options.get("scale"))
    assert_accurate(backend.numpy(lse), true_lse, plain_lse, accumulation, np.append(true_lse, 1.0))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_exact_is_exact_for_any_shape(backend, rng, shape):
    assert_exact(backend, *make(rng, *shape), method="exact")


@given(strategies.arrays(), strategies.dtype)
@settings(max_examples=100, deadline=None)
def test_exact_is_exact_for_random_shapes(problem, dtype):
    q, k, v = (oracles.round_to(x, dtype) for x in problem)
    found, lse = attention(q, k, v, method="exact", return_lse=True)
    plain, plain_lse = oracles.plain_attention(q, k, v, dtype)
    truth, true_lse = oracles.exact_attention(q, k, v)
    assert_accurate(found, truth, plain, dtype, v)
    assert_accurate(lse, true_lse, plain_lse, dtype, np.append(true_lse, 1.0))


@pytest.mark.parametrize("options", COVERING.values(), ids=COVERING)
def test_a_covering_budget_is_exact(backend, rng, options):
    q, k, v = make(rng, (2,), 6, 10, 3, 4)
    assert_exact(backend, q, k, v, **options(10))


@pytest.mark.parametrize("method", [*COVERING, *SAMPLING])
@pytest.mark.parametrize("shape", [((2, 3), 0, 20, 3, 4), ((0,), 5, 20, 3, 4), ((2, 0), 5, 20, 3, 4), ((0,), 0, 20, 1, 1)])
def test_no_queries_or_no_groups_give_empty_results(backend, rng, method, shape):
    options = COVERING[method](20) if method in COVERING else SAMPLING[method]
    lead, n_q, _, _, d_v = shape
    out, lse, report = attention(*backend.arrays(*make(rng, *shape)), return_lse=True, return_report=True, **options)
    assert tuple(out.shape) == (*lead, n_q, d_v)
    assert tuple(lse.shape) == (*lead, n_q)
    assert str(report)


def test_auto_accepts_no_groups_of_any_length():
    q = np.zeros((0, 8192, 2))
    assert attention(q, q, q, method="auto").shape == q.shape


@pytest.mark.parametrize("options", [{"method": "exact"}, *SAMPLING.values()], ids=["exact", *SAMPLING])
def test_values_may_have_no_columns(rng, options):
    out, lse = attention(*make(rng, (2,), 6, 20, 3, 0), return_lse=True, **options)
    assert out.shape == (2, 6, 0)
    assert lse.shape == (2, 6)


@pytest.mark.parametrize("options", [{"method": "exact"}, *SAMPLING.values()], ids=["exact", *SAMPLING])
def test_results_have_the_inputs_library_dtype_and_device(backend, rng, options):
    for dtype in backend.dtypes:
        q, k, v = backend.arrays(*make(rng, (2,), 11, 23, 3, 4), dtype=dtype)
        out, lse = attention(q, k, v, return_lse=True, **options)
        assert type(out) is type(q)
        assert out.dtype == q.dtype
        assert lse.dtype == (q.dtype if dtype == "float64" else backend.xp.float32)
        assert array_api_compat.device(out) == array_api_compat.device(lse) == array_api_compat.device(q)
        assert tuple(out.shape) == (2, 11, 4)
        assert tuple(lse.shape) == (2, 11)
        assert np.isfinite(backend.numpy(out)).all()


def test_results_stay_on_a_device_that_is_not_the_default(rng):
    import array_api_strict

    device = array_api_strict.Device("device1")
    q, k, v = (array_api_strict.asarray(x, device=device) for x in make(rng, (2,), 11, 23, 3, 4))
    for options in ({"method": "exact"}, {"method": "sortlsh", "budget": 9}):
        out, lse = attention(q, k, v, return_lse=True, **options)
        assert out.device == lse.device == device


def test_every_dtype_is_as_accurate_as_a_plain_implementation(backend, rng):
    q, k, v = make(rng, (2,), 40, 60, 8, 5)
    for dtype in backend.dtypes:
        assert_exact(backend, q, k, v, dtype=dtype, method="exact")


@pytest.mark.parametrize("scale", [0.0, -0.7, 3, 1e-3, np.float32(0.25), np.array(0.5)])
def test_scale(backend, rng, scale):
    assert_exact(backend, *make(rng, (2,), 5, 9, 4, 3), method="exact", scale=scale)


def test_the_default_scale_is_one_over_root_d(backend, rng):
    q, k, v = backend.arrays(*make(rng, (2,), 30, 40, 7, 3))
    for method in ("exact", "sortlsh"):
        found = attention(q, k, v, method=method, budget=8)
        named = attention(q, k, v, method=method, budget=8, scale=1 / np.sqrt(7))
        np.testing.assert_array_equal(backend.numpy(found), backend.numpy(named))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_neither_overflow_nor_vanish(backend, rng, dtype, size):
    q, k, v = make(rng, (2,), 6, 12, 3, 4)
    q[..., 0], k[..., 0] = 100.0, size / 100.0  # logits size + O(1)
    assert_exact(backend, q, k, v, dtype=dtype, method="exact", scale=1.0)
    q, k = q * 100, k * 100  # logits spread over ± 1e4 and more: nearly one-hot rows
    assert_exact(backend, q, k, v, dtype=dtype, method="exact", scale=1.0)


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING)
def test_huge_logits_in_sampling_only_move_lse(backend, rng, options, offset):
    q, k, v = make(rng, (2,), 30, 40, 3, 4)
    q[..., 0], k[..., 0] = 0.0, 0.0
    out, lse = attention(*backend.arrays(q, k, v), return_lse=True, scale=1.0, **options)
    q[..., 0], k[..., 0] = 128.0, offset / 128.0
    moved, moved_lse = attention(*backend.arrays(q, k, v), return_lse=True, scale=1.0, **options)
    np.testing.assert_allclose(backend.numpy(moved), backend.numpy(out), atol=1e-9)
    np.testing.assert_allclose(backend.numpy(moved_lse) - offset, backend.numpy(lse), atol=1e-9)


@pytest.mark.parametrize("options", [{"method": "exact"}, *SAMPLING.values()], ids=["exact", *SAMPLING])
def test_values_that_are_all_the_same_come_back(backend, rng, options):
    """Softmax weights sum to 1, for estimates too."""
    q, k, v = make(rng, (2,), 17, 40, 3, 4)
    v[...] = v[:, :1]
    out = backend.numpy(attention(*backend.arrays(q, k, v), **options))
    np.testing.assert_allclose(out, np.broadcast_to(v[:, :1], out.shape), rtol=1e-13)


def test_equal_logits_give_the_mean_value(backend, rng):
    q, k, v = make(rng, (2,), 6, 12, 3, 4)
    k[...] = k[:, :1]
    out, lse = attention(*backend.arrays(q, k, v), method="exact", scale=1.0, return_lse=True)
    np.testing.assert_allclose(backend.numpy(out), np.broadcast_to(v.mean(1, keepdims=True), out.shape), rtol=1e-12)
    np.testing.assert_allclose(backend.numpy(lse), np.einsum("gqd,gd->gq", q, k[:, 0]) + np.log(12), rtol=1e-12)


@pytest.mark.parametrize("method", ["exact", "sortlsh", "hyper"])
def test_one_hot_rows_pick_their_value(backend, rng, method):
    """With q = k far apart from each other, each query's own key outweighs all others and lies in its window."""
    n = 64
    points = 40.0 * np.linalg.qr(rng.standard_normal((n, n)))[0]
    v = rng.standard_normal((n, 5))
    options = SortLSH(num_hashes=30) if method == "sortlsh" else Hyper(num_hashes=30) if method == "hyper" else "exact"
    out = attention(*backend.arrays(points, points, v), method=options, budget=24)
    np.testing.assert_allclose(backend.numpy(out), v, rtol=1e-12)


@pytest.mark.parametrize("options", [{"method": "exact"}, *SAMPLING.values()], ids=["exact", *SAMPLING])
def test_zero_values_give_zero(backend, rng, options):
    q, k, v = make(rng, (2,), 6, 40, 3, 4)
    assert not backend.numpy(attention(*backend.arrays(q, k, v * 0), **options)).any()


def test_values_of_every_size(backend, rng):
    q, k, v = make(rng, (2,), 6, 12, 3, 9)
    for dtype in backend.dtypes:
        assert_exact(backend, q, k, v * np.logspace(-4, 4, 9), dtype=dtype, method="exact")


@pytest.mark.parametrize(
    ("dtype", "size"), [("float64", x) for x in (1e-200, 1e-30, 1e30, 1e200)] + [("float32", x) for x in (1e-25, 1e25)]
)
def test_the_size_of_values_only_scales_estimates(rng, dtype, size):
    """Sampling goes by ‖v‖ / mean ‖v‖, so a v in other units draws the same keys: squares must not overflow or vanish."""
    q, k, v = (x.astype(dtype) for x in make(rng, (2,), 30, 40, 3, 4))
    out = attention(q, k, v, method="sortlsh", budget=9) * float(size)
    scaled = attention(q, k, v * v.dtype.type(size), method="sortlsh", budget=9)
    np.testing.assert_allclose(scaled, out, rtol=1e-4 if dtype == "float32" else 1e-12)


LAYOUTS = {
    "Fortran order": np.asfortranarray,
    "transposed": lambda x: np.ascontiguousarray(np.swapaxes(x, -1, -2)).swapaxes(-1, -2),
    "every other row": lambda x: np.repeat(x, 2, axis=-2)[..., ::2, :],
    "negative strides": lambda x: np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "heads in the middle": lambda x: np.ascontiguousarray(np.moveaxis(x, 0, 1)).swapaxes(0, 1),
}


@pytest.mark.parametrize("options", [{"method": "exact"}, *SAMPLING.values()], ids=["exact", *SAMPLING])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_memory_layout_does_not_matter(rng, layout, options):
    for dtype in (np.float32, np.float64):
        arrays = [x.astype(dtype) for x in make(rng, (2,), 33, 40, 3, 4)]
        moved = [layout(x) for x in arrays]
        for x, y in zip(arrays, moved, strict=True):
            np.testing.assert_array_equal(x, y)
        found = attention(*moved, **options)
        assert_close(found, attention(*arrays, **options), dtype=np.dtype(dtype).name)
        assert found.dtype == moved[0].dtype


@pytest.mark.parametrize("options", [{"method": "exact"}, *SAMPLING.values()], ids=["exact", *SAMPLING])
def test_torch_views_and_expanded_tensors(rng, options):
    q, k, v = (torch.tensor(x) for x in make(rng, (2,), 33, 40, 3, 4))
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert_close(attention(*views, **options).numpy(), attention(q, k, v, **options).numpy())
    shared = [x[:1].expand(2, -1, -1) for x in (q, k, v)]
    copied = [x.contiguous() for x in shared]
    assert_close(attention(*shared, **options).numpy(), attention(*copied, **options).numpy())


@pytest.mark.parametrize("options", [{"method": "exact"}, *SAMPLING.values()], ids=["exact", *SAMPLING])
def test_inputs_are_not_modified_nor_returned(backend, rng, options):
    for dtype in backend.dtypes:
        arrays = backend.arrays(*make(rng, (2,), 33, 40, 3, 4), dtype=dtype)
        before = [backend.numpy(x) for x in arrays]
        out = attention(*arrays, return_lse=True, return_report=True, **options)[0]
        for x, y in zip(arrays, before, strict=True):
            np.testing.assert_array_equal(backend.numpy(x), y)
        assert not any(np.shares_memory(np.asarray(out), np.asarray(x)) for x in arrays if backend.name == "numpy")


@pytest.mark.parametrize(("tile", "rows"), [(1, 1), (7, 2), (64, 5), (1000, 256)])
def test_tiles_change_nothing(backend, rng, monkeypatch, tile, rows):
    q, k, v = backend.arrays(*make(rng, (3,), 29, 41, 3, 4))
    calls = [{"method": "exact"}, *SAMPLING.values()]
    whole = [attention(q, k, v, kernels="array-api", return_lse=True, **options) for options in calls]
    monkeypatch.setattr(dense_reference, "TILE_ELEMENTS", tile)
    monkeypatch.setattr(dense_reference, "ROWS", rows)
    monkeypatch.setattr(blocks_reference, "TILE_ELEMENTS", tile)
    for options, results in zip(calls, whole, strict=True):
        for found, expected in zip(
            attention(q, k, v, kernels="array-api", return_lse=True, **options), results, strict=True
        ):
            assert_close(backend.numpy(found), backend.numpy(expected))


def test_results_come_in_the_documented_order(rng):
    arrays = make(rng, (), 5, 9, 3, 4)
    out = attention(*arrays)
    assert out.shape == (5, 4)
    with_lse = attention(*arrays, return_lse=True)
    assert [x.shape for x in with_lse] == [(5, 4), (5,)]
    with_report = attention(*arrays, return_report=True)
    assert with_report[1].method == "exact"
    assert len(with_report) == 2
    everything = attention(*arrays, return_lse=True, return_report=True)
    assert everything[1].shape == (5,)
    assert everything[2].method == "exact"


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("edges", [([0, 20, 40], [0, 20, 40]), ([0, 40, 40], [0, 30, 40])], ids=["two", "no queries"])
def test_packed_samples_are_checked_in_the_arrays_that_were_given(backend, rng, edges, name):
    """The index is not that in a sample, and a sample without queries is looked at too."""
    arrays = dict(zip("qkv", make(rng, (2, 3), 40, 40, 6, 5), strict=True))
    arrays[name][1, 2, 37, 3] = np.nan
    q, k, v = backend.arrays(*arrays.values())
    with pytest.raises(OptionError, match=rf"^{name} must be finite, got nan at index \(1, 2, 37, 3\)"):
        packed_attention(q, k, v, *edges, method="sortlsh", budget=9, check_finite=True)


# PyTorch autograd


def torch_problem(rng, n_q=13, n_k=40):
    return [torch.tensor(x, requires_grad=True) for x in make(rng, (2,), n_q, n_k, 3, 4)]


@pytest.mark.parametrize("options", COVERING.values(), ids=COVERING)
def test_gradients_of_a_covering_budget_are_exact(rng, options):
    arrays = torch_problem(rng)
    upstream = torch.tensor(rng.standard_normal((2, 13, 4)))
    out, lse = attention(*arrays, return_lse=True, **options(40))
    found = torch.autograd.grad((out * upstream).sum() + lse.sum(), arrays)
    q, k, v = arrays
    logits = q @ k.mT / np.sqrt(3)
    expected = torch.autograd.grad((logits.softmax(-1) @ v * upstream).sum() + logits.logsumexp(-1).sum(), arrays)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


# kdeformer's probabilities change with every query and key, and are constants to autograd.
@pytest.mark.parametrize("options", [SAMPLING[name] for name in ("sortlsh", "hyper", "no block", "one hash")])
def test_gradients_of_estimates_match_finite_differences_in_queries_and_keys(rng, options):
    q, k, v = torch_problem(rng)
    upstream = torch.tensor(rng.standard_normal((2, 13, 4)))

    def loss(q, k):
        out, lse = attention(q, k, v.detach(), return_lse=True, **options)
        return (out * upstream).sum() + lse.sum()

    along_q, along_k = (torch.tensor(rng.standard_normal(x.shape)) for x in (q, k))
    slope_q, slope_k = torch.autograd.grad(loss(q, k), (q, k))
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (loss(q + s * along_q, k + s * along_k) for s in (step, -step))
    slope = (slope_q * along_q).sum() + (slope_k * along_k).sum()
    torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernels", ["auto", "array-api"])
@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING)
def test_gradients_in_values_are_the_weights_used(rng, options, kernels):
    """An estimate is linear in v given its sample, so ∂ out / ∂ v is its softmax weights, and those sum to 1 a query.

    A gradient that also ran through the sampling probabilities would be biased: the sample's own change is not seen.
    """
    q, k, v = torch_problem(rng)
    out = attention(q, k, v, kernels=kernels, **options)
    (slope,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(slope.sum(1), torch.full((2, 4), 13.0, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernels", ["auto", "array-api"])
@pytest.mark.parametrize("options", [{"method": "exact"}, *SAMPLING.values()], ids=["exact", *SAMPLING])
def test_gradients_in_values_stay_finite_where_values_are_zero(rng, options, kernels):
    q, k, v = torch_problem(rng)
    v = torch.zeros_like(v, requires_grad=True)
    out, report = attention(q, k, v, return_report=True, kernels=kernels, **options)
    for slope in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.isfinite(slope).all()
    assert report.dtype == "float64"


def test_no_graph_is_kept_where_none_is_needed(rng):
    arrays = [x.detach() for x in torch_problem(rng)]
    assert not attention(*arrays, method="sortlsh", budget=9).requires_grad
