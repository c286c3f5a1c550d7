"""Hostile inputs, memory that is limited, threads, interrupts and numbers that are not finite."""

import re
import threading

import numpy as np
import pytest

import kdecore
from kdecore import KDEformer, KeyIndex, MemoryLimitError, OptionError, attention
from kdecore.engine.hierarchy import evaluate
from kdecore.testing import HOSTILE
from tests import oracles
from tests.features import METHODS

BUDGET = 60


def weighted_means(method):
    """Return the method in a form whose results are weighted means of values."""
    return KDEformer(normaliser="sampled") if method == "kdeformer" else method


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("causal", [False, True])
def test_hostile_inputs_give_means_of_values(rng, make, method, dtype, causal):
    """No crash, no NaN, no number outside the values' range."""
    q, k, v = (x.astype(dtype) for x in make(rng))
    if method in ("exact", "kdeformer") and q.shape[1] > 10_000:
        q = q[:, :2000]
    options = {"method": weighted_means(method), "budget": min(BUDGET, 2 * k.shape[1]), "causal": causal}
    out, lse, report = attention(q, k, v, return_lse=True, return_report=True, **options)
    sees = np.arange(q.shape[1]) + k.shape[1] - q.shape[1] >= 0 if causal else np.ones(q.shape[1], bool)
    assert (out[:, ~sees] == 0).all()
    assert np.isneginf(lse[:, ~sees]).all()
    assert np.isfinite(out).all()
    assert np.isfinite(lse[:, sees]).all()
    rounding = 1e-5 * np.abs(v).max(axis=1, keepdims=True)
    low, high = v.min(axis=1, keepdims=True), v.max(axis=1, keepdims=True)
    assert (out[:, sees] >= low - rounding).all()
    assert (out[:, sees] <= high + rounding).all()
    assert report.method == "exact" or report.certificate is not None


@pytest.mark.parametrize(
    "name", ["equal_keys", "equal_everything", "zero_queries", "zero_keys", "zero_values", "one_giant_key"]
)
@pytest.mark.parametrize("method", ["treecode", "exact"])
def test_where_nodes_hide_nothing_the_treecode_is_exact(rng, name, method):
    """Keys that are all alike, or queries that see no difference, leave nodes nothing to hide; nor does one giant key."""
    q, k, v = HOSTILE[name](rng)
    out = attention(q, k, v, method=method, budget=BUDGET)
    truth, _ = oracles.exact_attention(q, k, v)
    limit = 0.06 if name == "one_giant_key" else 1e-9
    assert np.linalg.norm(out - truth) <= limit * max(np.linalg.norm(truth), 1e-300)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"key_lengths": [300, 250]}, {"causal": True, "window": 100}])
def test_no_result_depends_on_the_number_of_threads(rng, method, options):
    q, k, v = rng.standard_normal((3, 2, 400, 8), dtype=np.float32)
    results = [
        attention(q, k, v, method=method, budget=50, threads=threads, return_lse=True, **options) for threads in (1, 2, 5)
    ]
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_concurrent_calls_are_right(rng):
    q, k, v = rng.standard_normal((3, 2, 400, 8), dtype=np.float32)
    calls = [
        {"method": method, "budget": 50, **options}
        for method in ("exact", "sortlsh", "treecode")
        for options in ({}, {"causal": True}, {"key_lengths": [300, 250]})
    ]
    expected = [attention(q, k, v, **call) for call in calls]
    found = [None] * len(calls)

    def work(number):
        found[number] = attention(q, k, v, **calls[number])

    workers = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", ["sortlsh", "treecode"])
@pytest.mark.parametrize("options", [{}, {"causal": True}])
def test_limited_memory_gives_the_same_kind_of_result(rng, method, options):
    q, k, v = rng.standard_normal((3, 4, 1500, 8))
    call = {"method": method, "budget": 100, "return_report": True, **options}
    _, plenty = attention(q, k, v, **call)
    two = [attention(*(x[g : g + 2] for x in (q, k, v)), **call) for g in (0, 2)]
    put_together = 3 * q.itemsize * 4 * 1500 * (8 + 1)
    limit = two[0][1].temporary_bytes + put_together
    halved, report = attention(q, k, v, max_memory=limit, **call)
    assert report.temporary_bytes == limit < plenty.temporary_bytes
    first, second = (out for out, _ in two)
    np.testing.assert_array_equal(halved[:2], first)
    # The other groups draw other numbers than the first ones did; treecode draws none.
    assert np.array_equal(halved[2:], second) == (method == "treecode")
    assert report.keys_per_query == pytest.approx(plenty.keys_per_query, rel=0.1 if method == "treecode" else 1e-6)


def test_queries_are_cut_where_one_group_is_too_large(rng):
    q, k, v = rng.standard_normal((3, 1, 3000, 8))
    call = {"method": "sortlsh", "budget": 100, "causal": True, "return_report": True}
    _, plenty = attention(q, k, v, **call)
    limit = int(plenty.temporary_bytes * 0.7)
    out, report = attention(q, k, v, max_memory=limit, **call)
    assert report.temporary_bytes <= limit
    assert np.isfinite(out).all()
    exact = attention(q, k, v, causal=True, method="exact", max_memory=limit)
    np.testing.assert_allclose(exact, attention(q, k, v, causal=True, method="exact"), rtol=1e-12, atol=1e-12)
    lengths = attention(q, k, v, method="exact", key_lengths=[2000], max_memory=limit)
    np.testing.assert_allclose(lengths, attention(q, k[:, :2000], v[:, :2000], method="exact"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"method": "treecode"}, {"rtol": 0.1}, {"method": "exact"}])
def test_what_cannot_fit_says_how_much_it_needs(rng, options):
    arrays = rng.standard_normal((3, 1, 3000, 8))
    with pytest.raises(MemoryLimitError, match=r"max_memory must be at least \d+ bytes here .*got 1000") as caught:
        attention(*arrays, max_memory=1000, **options)
    needed = int(str(caught.value).split("at least ")[1].split(" bytes")[0])
    attention(*arrays, max_memory=needed, **options)
    assert isinstance(caught.value, MemoryError)


def test_auto_takes_exact_where_nothing_else_fits(rng):
    arrays = rng.standard_normal((3, 2, 12000, 16), dtype=np.float32)
    call = {"budget": 64, "return_report": True, "certificate": 0.0}
    _, plenty = attention(*arrays, **call)
    assert plenty.method == "treecode"
    limit = plenty.temporary_bytes // 9
    out, report = attention(*arrays, max_memory=limit, **call)
    assert report.method == "exact"
    assert report.temporary_bytes <= limit
    assert re.search(r"auto: treecode takes at least \d+ bytes here, of which max_memory leaves \d+", report.reason)
    np.testing.assert_allclose(out, attention(*arrays, method="exact"), rtol=1e-4, atol=1e-5)
    with pytest.raises(MemoryLimitError):
        attention(*arrays, max_memory=limit, **{**call, "method": "treecode"})


def test_parts_of_a_call_draw_numbers_of_their_own(rng):
    """Four equal heads, cut for want of memory: their errors are not alike."""
    q, k, v = (np.tile(x[:1], (4, 1, 1)) for x in rng.standard_normal((3, 1, 1500, 8)))
    _, plenty = attention(q, k, v, method="sortlsh", budget=100, return_report=True)
    out, report = attention(q, k, v, method="sortlsh", budget=100, max_memory=plenty.temporary_bytes, return_report=True)
    cut = attention(q, k, v, method="sortlsh", budget=100, max_memory=int(plenty.temporary_bytes * 0.9))
    assert report.temporary_bytes == plenty.temporary_bytes
    for heads in (out, cut):
        for i, j in ((0, 1), (0, 2), (1, 3), (2, 3)):
            assert not np.array_equal(heads[i], heads[j])


def test_a_tolerance_is_kept_in_parts_where_memory_is_short(rng):
    arrays = rng.standard_normal((3, 8, 512, 64))
    _, plenty = attention(*arrays, method="exact", causal=True, return_report=True)
    limit = int(plenty.temporary_bytes * 0.9)
    out, report = attention(*arrays, rtol=0.1, causal=True, max_memory=limit, return_report=True)
    assert report.temporary_bytes <= limit
    np.testing.assert_allclose(out, attention(*arrays, method="exact", causal=True), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("name", "at"), [("q", (1, 7, 2)), ("k", (0, 0, 0)), ("v", (1, 99, 3)), ("mask", (3, 4))])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_check_finite_names_the_argument_and_the_place(backend, rng, name, at, number):
    arrays = dict(zip("qkv", rng.standard_normal((3, 2, 100, 4)), strict=True)) | {"mask": np.zeros((100, 100))}
    arrays["mask"][0, 1] = -np.inf
    attention(**{key: backend.array(x) for key, x in arrays.items()}, check_finite=True)
    arrays[name][at] = number
    place = str(at).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(OptionError, match=f"{name} must be finite, got {number} at index {place}"):
        attention(**{key: backend.array(x) for key, x in arrays.items()}, check_finite=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_query_spoils_its_own_row_only(backend, rng, method):
    q, k, v = rng.standard_normal((3, 2, 100, 4))
    clean = attention(*backend.arrays(q, k, v), method="exact", causal=True)
    q[0, 50, 1] = np.nan
    out = backend.numpy(attention(*backend.arrays(q, k, v), method=method, budget=40, causal=True))
    assert np.isnan(out[0, 50]).all()
    assert np.isfinite(np.delete(out[0], 50, axis=0)).all()
    assert np.isfinite(out[1]).all()
    assert np.isfinite(backend.numpy(clean)).all()


def test_all_keys_bad():
    q = k = np.ones((1, 50, 3))
    v = np.full((1, 50, 2), np.nan)
    for options in ({}, {"causal": True}, {"rtol": 0.1}):
        assert np.isnan(attention(q, k, v, **options)).all()
        assert np.isnan(attention(q, np.full_like(k, np.nan), q, **options)).all()


@pytest.mark.parametrize("stage", ["evaluate", "attend"])
def test_an_interrupt_leaves_nothing_broken(rng, monkeypatch, stage):
    arrays = rng.standard_normal((3, 2, 600, 8))
    call = {"method": "treecode", "budget": 60, "causal": True}
    expected = attention(*arrays, **call)
    threads = threading.active_count()

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        target = kdecore.api.run if stage == "evaluate" else evaluate.__globals__
        if stage == "evaluate":
            patch.setattr(target, "evaluate", interrupted)
        else:
            patch.setitem(target, "attend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            attention(*arrays, **call)
    assert threading.active_count() == threads
    np.testing.assert_array_equal(attention(*arrays, **call), expected)


def test_an_interrupted_append_leaves_the_index_as_it_was(rng, monkeypatch):
    k, v = rng.standard_normal((2, 1, 500, 4))
    index = KeyIndex(k, v, budget=64)
    q = rng.standard_normal((1, 5, 4))
    expected = index.attend(q)

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KeyIndex, "_build", staticmethod(interrupted))
        with pytest.raises(KeyboardInterrupt):
            index.append(k, v)
    assert index.n_k == 500
    np.testing.assert_array_equal(index.attend(q), expected)
