"""`KeyIndex`: the one-shot call when built for the same queries, exact for few keys, and right while keys are appended."""

import copy
import pickle
import threading
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional

import kdecore
from kdecore import DeviceError, DTypeError, KeyIndex, OptionError, ShapeError, Treecode
from kdecore.accuracy.metrics import errors
from kdecore.arrays.namespace import host
from kdecore.methods import first_order, tree_pilot
from tests import oracles


def clustered(rng, groups, n, d=12):
    centres = rng.standard_normal((groups, 40, d))
    return centres[:, rng.integers(0, 40, n)] + 0.3 * rng.standard_normal((groups, n, d))


@pytest.mark.parametrize("method", ["treecode", Treecode(block_size=32), Treecode(far_field="sample")])
@pytest.mark.parametrize("n_q", [1, 16, 300, 700])
def test_built_for_the_same_queries_it_is_the_one_shot_call(backend, rng, method, n_q):
    q, k, v = (backend.array(clustered(rng, 2, n)) for n in (n_q, 700, 700))
    call = {"method": method, "budget": 150, "scale": 0.7, "seed": 5}
    expected, expected_lse = kdecore.attention(q, k, v, return_lse=True, **call)
    out, lse = KeyIndex(k, v, queries=q, **call).attend(q, return_lse=True)
    assert out.shape == expected.shape
    np.testing.assert_allclose(backend.numpy(out), backend.numpy(expected), rtol=0, atol=1e-12)
    np.testing.assert_allclose(backend.numpy(lse), backend.numpy(expected_lse), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_few_keys_are_attended_to_exactly(rng, dtype):
    q, k, v = (rng.standard_normal((3, 2, n, 8)).astype(dtype) for n in (5, 60, 60))
    index = KeyIndex(k[:, :, :1], v[:, :, :1], budget=60)
    for i in range(1, 60):
        index.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
    out = index.attend(q)
    assert (index.n_k, out.dtype, out.shape) == (60, np.dtype(dtype), (3, 2, 5, 8))
    np.testing.assert_allclose(
        out, kdecore.attention(q, k, v, method="exact"), rtol=0, atol=2e-3 if dtype == "float16" else 1e-5
    )


@pytest.mark.parametrize("steps", [[2000], [1, 999, 1000], [700] + [100] * 13, [1500] + [1] * 500])
def test_errors_stay_small_while_keys_are_appended(rng, steps):
    q, k, v = (clustered(rng, 2, n) for n in (40, 2000, 2000))
    v += 1.0
    index, at = KeyIndex(k[:, : steps[0]], v[:, : steps[0]], budget=256), steps[0]
    for step in steps[1:]:
        index.append(k[:, at : at + step], v[:, at : at + step])
        at += step
    assert index.n_k == at == 2000
    out, lse = index.attend(q, return_lse=True)
    exact, exact_lse = oracles.exact_attention(q, k, v)
    assert errors(host, out, exact).frobenius < 0.05
    assert np.sqrt(((lse - exact_lse) ** 2).mean()) < 0.2
    sizes = [segment.problem.n_k for segment in index._segments]
    assert sum(sizes) == 2000
    assert all(later < former for former, later in pairwise(sizes))
    assert all(segment.tree is not None for segment in index._segments[:-1])


def test_tensors_on_the_cpu_are_computed_as_arrays_are(rng):
    """Whatever is asked of an index, also of keys that are appended."""
    arrays = [clustered(rng, 2, n).astype(np.float32) for n in (90, 700, 700, 200, 200)]
    found = []
    for convert in (np.array, torch.from_numpy):
        q, k, v, more_k, more_v = map(convert, arrays)
        index = KeyIndex(k, v, budget=100, queries=q)
        outs = [*index.attend_and_append(q, more_k, more_v, return_lse=True), index.attend(q, rtol=0.3)]
        index.append(more_k, more_v)
        *last, report = index.attend(q, return_lse=True, return_report=True)
        found.append([np.asarray(x) for x in (*outs, *last)])
        assert all(type(x) is type(q) for x in (*outs, *last))
        assert (report.library, report.method) == ({np.array: "numpy"}.get(convert, "torch"), "treecode")
    for x, y in zip(*found, strict=True):
        np.testing.assert_array_equal(x, y)


ROWS = {"q": 30, "k": 150, "v": 150, "more_k": 30, "more_v": 30}


def slopes(recorded, budget):
    """Return what an index says while keys are appended, and the gradients of what is recorded."""
    rng = np.random.default_rng(0)
    x = {name: torch.from_numpy(clustered(rng, 2, n)).requires_grad_(name in recorded) for name, n in ROWS.items()}
    index = KeyIndex(x["k"], x["v"], budget=budget, seed=3)
    outs = [index.attend(x["q"]), index.attend_and_append(x["q"], x["more_k"], x["more_v"]), index.attend(x["q"])]
    index.append(x["more_k"], x["more_v"])
    outs.append(index.attend(x["q"]))
    loss = sum((out * torch.linspace(-1, 1, 12)).sum() for out in outs)
    return [out.detach() for out in outs], torch.autograd.grad(loss, [x[name] for name in recorded]), x


@pytest.mark.parametrize("budget", [1000, 40], ids=["exact", "estimated"])
@pytest.mark.parametrize("name", ROWS)
def test_gradients_of_any_input_arrive(name, budget):
    """Where one input alone is recorded, the others were NumPy arrays before."""
    outs, (found,), _ = slopes([name], budget)
    expected_outs, expected, _ = slopes(list(ROWS), budget)
    for x, y in zip(outs, expected_outs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found, expected[list(ROWS).index(name)], rtol=1e-9, atol=1e-11)
    assert (found != 0).any()


def test_gradients_of_an_exact_index_are_pytorchs():
    _, found, x = slopes(list(ROWS), 1000)
    q, k, v, more_k, more_v = x.values()
    keys = [k, torch.cat([k, more_k], -2), torch.cat([k, more_k, more_k], -2)]
    values = [v, torch.cat([v, more_v], -2), torch.cat([v, more_v, more_v], -2)]
    seen = torch.ones(30, 180, dtype=torch.bool).tril(150)
    sdpa = functional.scaled_dot_product_attention
    outs = [sdpa(q, k, v) for k, v in zip(keys, values, strict=True)]
    outs.append(sdpa(q, keys[1], values[1], seen))
    loss = sum((out * torch.linspace(-1, 1, 12)).sum() for out in outs)
    for ours, theirs in zip(found, torch.autograd.grad(loss, list(x.values())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_keys_that_come_while_nothing_is_recorded_are_constants(monkeypatch):
    """As on a GPU, where nothing becomes a NumPy array: also leaves, and beside others that are recorded."""
    monkeypatch.setattr("kdecore.core.problem.host_views", lambda *arrays, **more: None)
    k, more = (torch.zeros(2, n, 4, requires_grad=True) for n in (60, 5))
    with torch.no_grad():
        assert not KeyIndex(k, k, budget=20)._segments[0].problem.k.requires_grad
    for budget in (20, 100):
        index = KeyIndex(k, k, budget=budget)
        with torch.no_grad():
            index.append(more, more)
        index.attend(k.detach()).sum().backward()
        assert k.grad is not None
        assert more.grad is None
        assert index._segments[-1].problem.k.requires_grad == (budget == 100)


UNRECORDED = {"no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("mode", UNRECORDED.values(), ids=UNRECORDED)
@pytest.mark.parametrize("with_queries", [False, True])
@pytest.mark.parametrize("more", [5, 60, 200])
@pytest.mark.parametrize("budget", [1000, 40], ids=["exact", "estimated"])
def test_keys_that_are_recorded_stay_so_beside_others_that_are_appended(mode, with_queries, more, budget):
    """Also where they are joined with these, or get a tree together: as where these record nothing in any mode."""
    rng = np.random.default_rng(0)
    q, k, v = (torch.from_numpy(clustered(rng, 2, n)).requires_grad_() for n in (30, 150, 150))
    added = torch.from_numpy(clustered(rng, 2, more))

    def slopes(mode):
        index = KeyIndex(k, v, budget=budget)
        (first,) = index._segments
        with mode():
            if with_queries:
                index.attend_and_append(q.detach(), added, added)
            else:
                index.append(added, added)
        assert (index._segments[0] is first) == (budget == 40 and more < 150)
        return torch.autograd.grad((index.attend(q) * torch.linspace(-1, 1, 12)).sum(), (q, k, v))

    for ours, theirs in zip(slopes(mode), slopes(nullcontext), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_no_groups_have_an_index_of_any_length(backend):
    q, k = (backend.array(np.zeros((0, n, 8), dtype=np.float32)) for n in (70, 90))
    index = KeyIndex(k, k, budget=20)
    index.append(k, k)
    for out in (
        index.attend(q),
        index.attend(q, rtol=0.1),
        index.attend(q, return_report=True)[0],
        index.attend_and_append(q, k, k),
    ):
        assert out.shape == (0, 70, 8)
    assert index.attend(q, return_lse=True)[1].shape == (0, 70)
    assert len(index) == 270


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
@pytest.mark.parametrize("convert", [np.array, torch.from_numpy], ids=["numpy", "torch"])
def test_values_without_columns_are_within_any_tolerance(rng, convert, norm):
    q, k = (convert(clustered(rng, 2, n)) for n in (90, 400))
    out, report = KeyIndex(k, k[..., :0], budget=20).attend(q, rtol=0.1, rtol_norm=norm, return_report=True)
    assert out.shape == (2, 90, 0)
    assert report.certificate is None


def test_more_budget_errs_less_and_all_keys_are_exact(rng):
    q, k, v = (clustered(rng, 1, n) for n in (100, 1500, 1500))
    exact, _ = oracles.exact_attention(q, k, v)
    found = [errors(host, KeyIndex(k, v, budget=budget).attend(q), exact).frobenius for budget in (64, 512, 1500)]
    assert found[0] > found[1] > found[2]
    assert found[2] < 1e-12


def test_it_may_be_asked_from_several_threads_while_it_grows(rng):
    q, k, v = (clustered(rng, 2, n).astype(np.float32) for n in (64, 900, 900))
    index = KeyIndex(k, v, budget=128)
    expected = index.attend(q)
    found = [None] * 8

    def ask(place):
        found[place] = index.attend(q)

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in found:
        np.testing.assert_array_equal(out, expected)


def test_queries_of_any_number(rng):
    k, v = (clustered(rng, 1, 800) for _ in range(2))
    index = KeyIndex(k, v, budget=100)
    assert index.attend(k[:, :0]).shape == (1, 0, 12)
    whole = index.attend(k[:, :17])
    assert np.isfinite(whole).all()


def test_reports_say_how_far_off_it_is(rng):
    """The certificate is of the whole index: its segments, and the keys without a tree."""
    q, k, v = (clustered(rng, 2, n) for n in (400, 3000, 3000))
    index = KeyIndex(k[:, :2000], v[:, :2000], budget=64)
    index.append(k[:, 2000:2950], v[:, 2000:2950])
    index.append(k[:, 2950:], v[:, 2950:])
    exact = oracles.exact_attention(q, k, v)[0]
    out, report = index.attend(q, return_report=True, certificate=100.0)
    np.testing.assert_array_equal(out, index.attend(q))
    assert (report.method, report.budget, report.shape) == ("treecode", 64, (2, 400, 3000, 12, 12))
    assert "segments: 3" in report.reason
    assert report.keys_per_query > 64
    found, true = report.certificate, errors(host, out, exact)
    assert found.rows == 400
    assert found.frobenius == pytest.approx(true.frobenius, rel=1e-9)
    assert found.spectral == pytest.approx(true.spectral, rel=1e-9)
    out, _, report = index.attend(q, return_lse=True, return_report=True)
    assert report.certificate.rows == 32
    assert report.certificate.frobenius == pytest.approx(true.frobenius, rel=0.6)
    assert index.attend(q, return_report=True, certificate=0.0)[1].certificate is None
    assert index.attend(q[:, :0], return_report=True)[1].certificate is None


@pytest.mark.parametrize("longer", [1.0, 30.0, 1e4, 1e30])
def test_queries_longer_than_those_it_was_laid_out_for(rng, longer):
    """The first-order term of a node reaches no further than its keys do: results stay near the values."""
    k, v = (clustered(rng, 2, 900) for _ in range(2))
    index = KeyIndex(k, v, budget=40)
    out = index.attend(longer * clustered(rng, 2, 50))
    assert np.abs(out).max() < 2 * np.abs(v).max()


def test_a_budget_for_one_call(rng):
    q, k, v = (clustered(rng, 1, n) for n in (100, 1500, 1500))
    index, other = KeyIndex(k, v, budget=64), KeyIndex(k, v, budget=300)
    np.testing.assert_allclose(index.attend(q, budget=300), other.attend(q), rtol=0, atol=1e-12)
    exact = oracles.exact_attention(q, k, v)[0]
    np.testing.assert_allclose(index.attend(q, budget=1500), exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
@pytest.mark.parametrize("n_q", [20, 900])
def test_a_tolerance_is_kept(rng, norm, n_q):
    q, k, v = (clustered(rng, 2, n) for n in (n_q, 4000, 4000))
    index = KeyIndex(k[:, :3000], v[:, :3000], budget=64)
    index.append(k[:, 3000:], v[:, 3000:])
    exact = oracles.exact_attention(q, k, v)[0]
    methods = set()
    for rtol in (0.2, 0.02, 1e-6):
        out, report = index.attend(q, rtol=rtol, rtol_norm=norm, return_report=True)
        assert getattr(errors(host, out, exact), norm) <= rtol
        np.testing.assert_array_equal(out, index.attend(q, rtol=rtol, rtol_norm=norm))
        methods.add(report.method)
        if report.method != "exact":
            assert report.certificate.upper(norm) <= rtol
            assert report.rounds[-1].step == "certified"
    assert methods == ({"exact", "treecode"} if n_q == 900 else {"exact"})


@pytest.mark.parametrize("copied", [lambda index: pickle.loads(pickle.dumps(index)), copy.deepcopy])
def test_copies_are_indices_of_their_own(backend, rng, copied):
    q, k, v = (backend.array(clustered(rng, 2, n)) for n in (30, 500, 500))
    index = KeyIndex(k, v, budget=100)
    expected = backend.numpy(index.attend(q))
    other = copied(index)
    np.testing.assert_array_equal(backend.numpy(other.attend(q)), expected)
    other.append(k[:, :7, :], v[:, :7, :])
    assert (len(index), len(other)) == (500, 507)
    np.testing.assert_array_equal(backend.numpy(index.attend(q)), expected)


def test_it_says_what_it_is(rng):
    k, v = rng.standard_normal((2, 3, 50, 8)).astype(np.float32)
    index = KeyIndex(k, v, budget=20)
    assert repr(index) == "KeyIndex(3 × 50 keys, d = 8, d_v = 8, float32, numpy on cpu, budget 20, segments: 1)"
    assert len(index) == 50


def test_the_first_order_term_shrinks_for_queries_longer_than_examples(rng, monkeypatch):
    """So that it does no harm; as large as for the examples it would raise the error by a sixth."""
    q, k = (clustered(rng, 1, n) for n in (400, 3000))
    v = k @ rng.standard_normal((k.shape[2], 5)) + 0.3 * rng.standard_normal((1, 3000, 5))
    exact, _ = oracles.exact_attention(10.0 * q, k, v, 0.35)
    off = {}
    for damping in (0.0, first_order.DAMPING):
        monkeypatch.setattr(first_order, "DAMPING", damping)
        index = KeyIndex(k, v, budget=100, queries=q, scale=0.35)
        off[damping] = np.linalg.norm(index.attend(10.0 * q) - exact)
    assert off[first_order.DAMPING] < 1.05 * off[0.0]


def test_what_was_found_out_is_kept_for_every_library(rng, monkeypatch):
    """Calls on arrays, and those that record gradients, have one calibration."""
    k, v = (torch.from_numpy(rng.standard_normal((1, 900, 8))) for _ in range(2))
    index = KeyIndex(k, v, budget=40)
    calls = []
    calibrate = tree_pilot.calibrate
    monkeypatch.setattr(tree_pilot, "calibrate", lambda *arguments: calls.append(1) or calibrate(*arguments))
    q = torch.from_numpy(rng.standard_normal((1, 5, 8)))
    expected = index.attend(q)
    found = index.attend(q.requires_grad_())
    torch.testing.assert_close(found.detach(), expected, rtol=1e-9, atol=1e-9)
    assert len(calls) == 1


def test_queries_of_any_length_follow_examples_that_are_zero(rng):
    """Which leave nothing to open, so that their threshold is 0."""
    k, v = rng.standard_normal((2, 1, 900, 8))
    out = KeyIndex(k, v, budget=40, queries=np.zeros((1, 10, 8))).attend(3.0 * rng.standard_normal((1, 5, 8)))
    assert np.isfinite(out).all()


def test_what_does_not_fit_is_refused_and_changes_nothing(rng):
    k, v = rng.standard_normal((2, 3, 50, 8))
    index = KeyIndex(k, v, budget=20)
    before = index.attend(k[:, :4])
    for call, error, message in (
        (lambda: index.attend(k[:2]), ShapeError, "leading dimensions"),
        (lambda: index.attend(k[..., :5]), ShapeError, "or a multiple of the last, and last dimension 8, got shape"),
        (lambda: index.attend(k, budget=0), OptionError, "budget must be an integer of at least 1"),
        (lambda: index.attend(k, budget=5, rtol=0.1), OptionError, "budget must be None with rtol"),
        (lambda: index.attend(k, rtol=-1), OptionError, "rtol must be a positive"),
        (lambda: index.attend(k, rtol=0.1, rtol_norm="max"), OptionError, "rtol_norm must be one of"),
        (lambda: index.attend(k, certificate=-1), OptionError, "certificate must be"),
        (lambda: index.attend(k, return_report="yes"), OptionError, "return_report must be True or False"),
        (
            lambda: index.attend(k.astype(np.float32)),
            DTypeError,
            "q must have the same dtype as the index's keys",
        ),
        (lambda: index.attend([1.0]), DTypeError, "q must be an array"),
        (lambda: index.attend(k[0, 0]), ShapeError, "q must have at least 2 dimensions"),
        (lambda: index.attend(torch.from_numpy(k)), DeviceError, r"q must come from the same library as the index's keys"),
        (lambda: index.append(k.astype(np.float32), v), DTypeError, r"k must have the same dtype as the index's keys"),
        (lambda: index.append(k[:2], v[:2]), ShapeError, "leading dimensions"),
        (lambda: index.append(k, v[..., :5]), ShapeError, "leading dimensions .* and last dimension 8, got"),
        (lambda: index.append(k[:, :3], v), ShapeError, "as many rows"),
        (lambda: index.append(k[:, :0], v[:, :0]), ShapeError, "at least one row"),
        (lambda: KeyIndex(k, v, queries=k[..., :5]), ShapeError, "last dimension"),
        (
            lambda: KeyIndex(k, v, queries=k[:, :0]),
            ShapeError,
            r"queries must have at least one row, .* shape \(3, 0, 8\)",
        ),
        (lambda: KeyIndex(k, v, queries=k[:2]), ShapeError, r"queries must have the index's leading dimensions \(3,\)"),
        (lambda: KeyIndex(k, v, method="sortlsh"), OptionError, 'method must be "treecode"'),
        (lambda: KeyIndex(k, v, budget=0), OptionError, "budget"),
        (lambda: KeyIndex(k, v, budget=5, method=Treecode(num_slots=6)), OptionError, "budget must be"),
        (lambda: KeyIndex(k, v, scale=np.inf), OptionError, "scale must be"),
        (lambda: KeyIndex(k, v, seed=-1), OptionError, "seed must"),
        (lambda: KeyIndex(list(k), v), DTypeError, "k must be an array"),
        (lambda: KeyIndex(k[0, 0], v), ShapeError, "k must have at least 2 dimensions"),
        (lambda: KeyIndex(k.astype(int), v), DTypeError, "k must have one of the dtypes"),
        (lambda: KeyIndex(k, v.astype(np.float32)), DTypeError, r"v must have the same dtype as k \(float64\), got float32"),
        (lambda: KeyIndex(k, v, queries=k.astype(np.float32)), DTypeError, "queries must have the same dtype"),
        (lambda: KeyIndex(k, v[:, :3]), ShapeError, "as many rows"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert index.n_k == 50
    np.testing.assert_array_equal(index.attend(k[:, :4]), before)
