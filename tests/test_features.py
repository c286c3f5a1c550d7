"""Every feature with every method on every backend: the cells of the table in docs/features.md."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from kdecore import Exact, KDEformer, KeyIndex, OptionError, Treecode, attention
from kdecore.accuracy.metrics import errors
from kdecore.api.run import assembled, run
from kdecore.arrays.namespace import host
from kdecore.core.problem import canonicalise
from kdecore.engine.attend import attend
from kdecore.engine.hierarchy import evaluate
from kdecore.engine.restrictions import check_restrictions
from kdecore.engine.split import in_halves, subproblems
from kdecore.methods.plan import make_plan
from tests import oracles
from tests.conftest import BACKENDS
from tests.features import FEATURES, METHODS
from tests.tolerances import assert_close

CELLS = pytest.mark.parametrize("feature", FEATURES.values(), ids=[make.__name__ for make in FEATURES.values()])


def call(backend, example, **options):
    """Return out and lse as NumPy arrays."""
    given = {
        name: backend.array(value) if isinstance(value, np.ndarray) else value for name, value in example.options.items()
    }
    arrays = backend.arrays(example.q, example.k, example.v)
    return [backend.numpy(x) for x in attention(*arrays, return_lse=True, **given, **options)]


def options_of(method):
    """Return a method whose weights add up to 1."""
    return KDEformer(normaliser="sampled") if method == "kdeformer" else method


def sees_a_key(example):
    """Return which queries see a key, (…, n_q)."""
    seen = np.broadcast_to(example.bias, (*example.q.shape[:-1], example.k.shape[-2])) > -np.inf
    return seen, seen.any(axis=-1)


@CELLS
@pytest.mark.parametrize("method", METHODS)
def test_a_full_budget_is_exact(backend, rng, feature, method):
    example = feature(rng)
    out, lse = call(backend, example, method=method, budget=example.k.shape[-2])
    truth = oracles.masked_attention(example.q, example.k, example.v, example.bias)
    assert_close(out, truth[0])
    assert_close(lse, truth[1])


@CELLS
@pytest.mark.parametrize("method", METHODS)
def test_a_small_budget_estimates_what_is_seen(backend, rng, feature, method):
    """Of values that are all alike any weights have the same mean; and nobody sees what is hidden."""
    example = feature(rng)
    _, any_seen = sees_a_key(example)
    alike = example._replace(v=np.ones_like(example.v))
    out, lse = call(backend, alike, method=options_of(method), budget=20)
    np.testing.assert_array_equal(np.isfinite(lse), any_seen)
    np.testing.assert_allclose(out[any_seen], 1.0, rtol=1e-12)
    assert (out[~any_seen] == 0).all()


@CELLS
@pytest.mark.parametrize("method", METHODS)
def test_every_library_gives_the_same_estimate(backend, rng, feature, method):
    example = feature(rng)
    # Accelerators have blocks and orders of their own.
    options = Treecode(block_size=16).at(False) if method == "treecode" else method
    for found, expected in zip(
        call(backend, example, method=options, budget=30), call(BACKENDS[0], example, method=options, budget=30), strict=True
    ):
        assert_close(found, expected, ulps=512)


@CELLS
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e4])
def test_what_nobody_sees_never_leaks(rng, feature, method, junk):
    """Keys that no query sees change nothing, bit for bit, whatever they hold."""
    example = feature(rng)
    seen, _ = sees_a_key(example)
    heads_k = example.k.shape[-3]
    hidden = ~seen.reshape(*seen.shape[:-3], heads_k, -1, seen.shape[-1]).any(axis=-2)
    if not hidden.any():
        pytest.skip("every key is seen")
    k, v = example.k.copy(), example.v.copy()
    k[hidden], v[hidden] = junk, -junk
    backend = BACKENDS[0]
    for found, expected in zip(
        call(backend, example._replace(k=k, v=v), method=method, budget=30),
        call(backend, example, method=method, budget=30),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("argument", ["k", "v"])
@pytest.mark.parametrize("kernels", ["auto", "array-api"])
def test_the_future_never_leaks_into_the_past(rng, method, junk, argument, kernels):
    """A key that isn't finite spoils the rows that see it, and no other: those are what they are without it."""
    q, k, v = rng.standard_normal((3, 2, 90, 6))
    spoilt = {"k": k.copy(), "v": v.copy()}
    spoilt[argument][0, 40, 2] = junk
    options = {"causal": True, "method": method, "budget": 24, "kernels": kernels}
    out, lse = attention(q, spoilt["k"], spoilt["v"], return_lse=True, **options)
    assert np.isfinite(out[0, :40]).all()
    assert np.isfinite(out[1]).all()
    exact = oracles.masked_attention(q, np.where(np.isfinite(spoilt["k"]), spoilt["k"], 0), v, oracles.causal_bias(90, 90))[
        0
    ]
    assert np.abs(out[:, :8] - exact[:, :8]).max() < 1e-12  # a tile, exact
    if argument == "v":
        np.testing.assert_array_equal(out[0, 40:, 2], np.full(50, junk))
        assert np.isfinite(np.delete(out[0, 40:], 2, axis=1)).all()
        assert np.isfinite(lse).all()
    elif np.isnan(junk):
        assert np.isnan(out[0, 40:]).all()
        assert np.isnan(lse[0, 40:]).all()
    else:
        upwards = q[0, 40:, 2] * junk > 0
        assert np.isnan(out[0, 40:][upwards]).all()
        assert np.isfinite(out[0, 40:][~upwards]).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_size_of_what_is_hidden_does_not_matter(rng, method):
    """Finite keys and values of the future, however large, may change which keys are chosen, but are not seen."""
    q, k, v = rng.standard_normal((3, 1, 1200, 8))
    exact = attention(q, k, v, method="exact", causal=True)[:, :600]
    options = {"causal": True, "method": options_of(method), "budget": 100}
    before = attention(q, k, v, **options)[:, :600]
    error = np.linalg.norm(before - exact)
    for key, value in ((1.0, 1e3), (30.0, 1e3), (1.0, 1e300)):
        other_k, other_v = k.copy(), v.copy()
        other_k[:, 600:] *= key
        other_v[:, -1] *= value
        after = attention(q, other_k, other_v, **options)[:, :600]
        assert np.abs(after).max() <= 1.5 * np.abs(v).max()
        assert np.linalg.norm(after - exact) <= 1.5 * error + 1e-9


@pytest.mark.parametrize("lowest", [np.finfo(np.float64).min, np.finfo(np.float32).min, -1e9])
@pytest.mark.parametrize("method", METHODS)
def test_masks_of_models_hide_with_large_numbers(backend, rng, lowest, method):
    """As Hugging Face's do; they are intervals like those of −inf, and give the same."""
    q, k, v = rng.standard_normal((3, 1, 2, 150, 6))
    mask = oracles.causal_bias(150, 150)
    arrays = backend.arrays(q, k, v)
    large = np.where(np.isneginf(mask), lowest, mask)
    for options in ({"budget": 40}, {"budget": 150}):
        found = attention(*arrays, method=method, mask=backend.array(large), **options)
        expected = attention(*arrays, method=method, causal=True, **options)
        np.testing.assert_array_equal(backend.numpy(found), backend.numpy(expected))
    uneven = np.where(rng.random((150, 150)) < 0.5, rng.standard_normal((150, 150)), lowest)
    out = backend.numpy(attention(*arrays, method=method, mask=backend.array(uneven), budget=150))
    truth, _ = oracles.masked_attention(q, k, v, np.where(uneven == lowest, -np.inf, uneven))
    assert_close(out, truth)


@pytest.mark.parametrize("window", [2**31, 2**62, 2**63 - 1, 10**30])
def test_a_window_may_be_of_any_size(rng, window):
    q, k, v = rng.standard_normal((3, 1, 50, 4))
    for causal in (False, True):
        np.testing.assert_array_equal(attention(q, k, v, window=window, causal=causal), attention(q, k, v, causal=causal))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": 20}, {"key_lengths": [150, 70]}, {"mask": np.tri(150) + np.eye(150)[::-1] > 0}],
)
@pytest.mark.parametrize("heads_k", [4, 2])
def test_values_may_have_no_columns(rng, method, options, heads_k):
    q, k = rng.standard_normal((2, 4, 150, 8)), rng.standard_normal((2, heads_k, 150, 8))
    out, lse = attention(q, k, k[..., :0], method=method, budget=40, return_lse=True, **options)
    assert out.shape == (2, 4, 150, 0)
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("method", ["sortlsh", "treecode", "exact"])
@pytest.mark.parametrize("threads", [1, 8, 64])
def test_a_query_that_fills_up_a_block_is_merged_once(rng, method, threads):
    """Blocks whose sizes differ are filled up with their last query, which may be the only one of a thread's task."""
    for n, budget in ((1155, 585), (771, 200), (385, 97)):
        q, k, v = rng.standard_normal((3, 1, n, 4))
        call = {"method": method, "budget": budget, "causal": True}
        found = attention(q, k, v, threads=threads, kernels="numba-cpu", **call)
        assert_close(found, attention(q, k, v, kernels="array-api", **call), ulps=4096)


@pytest.mark.parametrize("method", METHODS)
def test_a_query_whose_chosen_keys_are_all_hidden_is_evaluated_exactly(backend, rng, method):
    """Every query sees two keys of 200, far apart; lists of 5 rarely hold one."""
    q, k, v = rng.standard_normal((3, 2, 200, 6))
    seen = np.zeros((2, 200, 200), bool)
    for group, row in np.ndindex(2, 200):
        seen[group, row, rng.choice(200, 2, replace=False)] = True
    call = {"method": method, "budget": 5, "mask": backend.array(seen), "return_lse": True}
    out, lse = (backend.numpy(x) for x in attention(*backend.arrays(q, k, v), **call))
    truth, _ = oracles.masked_attention(q, k, v, np.where(seen, 0.0, -np.inf))
    assert np.isfinite(lse).all()
    assert (np.abs(out - truth).max(axis=-1) < 1e-10).mean() > 0.8


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_hides_what_is_not_finite(backend, rng, method):
    q, k, v = rng.standard_normal((3, 1, 120, 6))
    seen = rng.random((1, 120, 120)) < 0.7
    k[0, 17, 0], v[0, 50, 1] = np.nan, np.inf
    out = backend.numpy(attention(*backend.arrays(q, k, v), method=method, budget=40, mask=backend.array(seen)))
    np.testing.assert_array_equal(np.isnan(out[0]).all(axis=1), seen[0, :, 17])
    rows = ~seen[0, :, 17]
    np.testing.assert_array_equal(np.isposinf(out[0, rows, 1]), seen[0, rows, 50])
    assert np.isfinite(np.delete(out[0, rows], 1, axis=1)).all()


@pytest.mark.parametrize("method", METHODS)
def test_an_infinite_value_is_seen_however_small_its_weight(rng, method):
    """Its logit lies 4,000 below the largest, and its weight is no number of the dtype."""
    q, k, v = np.ones((1, 100, 1)), np.zeros((1, 100, 1)), rng.standard_normal((1, 100, 2))
    k[0, 5], v[0, 30, 0] = 4e3, -np.inf
    out = attention(q, k, v, method=method, budget=20)
    assert np.isneginf(out[0, :, 0]).all()
    assert np.isfinite(out[0, :, 1]).all()


def test_a_query_that_is_not_finite_and_sees_no_key_gives_nothing(rng):
    q, k, v = rng.standard_normal((1, 50, 4)), *rng.standard_normal((2, 1, 40, 4))
    q[0, 3] = q[0, 20] = np.nan
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    assert (out[0, 3] == 0).all()
    assert np.isneginf(lse[0, 3])
    assert np.isnan(out[0, 20]).all()


@pytest.mark.parametrize("restriction", ["causal", "mask", "not finite", "plain"])
def test_halves_of_a_share_are_the_share(rng, restriction):
    """Of groups, and of the queries of a single group."""
    for groups in (3, 1):
        q, k, v = rng.standard_normal((3, groups, 77, 5))
        options = {"causal": {"causal": True}, "mask": {"mask": rng.random((groups, 77, 77)) < 0.5}}.get(restriction, {})
        if restriction == "not finite":
            k[:, 9, 2] = np.inf
        problem = canonicalise(q, k, v)
        found = check_restrictions(problem, options.get("causal", False), None, None, None, options.get("mask"), q)
        (whole,) = subproblems(problem, found)
        plan_for = partial(make_plan, method="exact")
        halves = [outcome for half in in_halves(whole) for outcome in run(half, plan_for, np.inf, count=False)]
        assert len(halves) == 2
        with np.errstate(all="ignore"):
            part = assembled(problem, halves, finite=False)
            expected = attention(q, k, v, method="exact", **options)
        assert_close(np.nan_to_num(part.out), np.nan_to_num(expected))
        np.testing.assert_array_equal(np.isfinite(part.out), np.isfinite(expected))


def test_rows_of_a_certificate_are_paid_by_what_they_see(rng):
    q, k, v = rng.standard_normal((3, 1, 6000, 8), dtype=np.float32)
    call = {"method": "treecode", "budget": 256, "return_report": True, "certificate": 2.0}
    _, report = attention(q, k, v, key_lengths=[3000], **call)
    _, alone = attention(q, k[:, :3000], v[:, :3000], **call)
    assert report.certificate.rows == alone.certificate.rows > 32


@pytest.mark.parametrize("lengths", [[15000, 8000], [8000, 15000]])
@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_the_report_has_the_certificate_of_largest_limit(rng, lengths, norm):
    centres = rng.standard_normal((2, 1, 60, 24))
    q, k, v = (
        (centres[:, 0][:, rng.integers(0, 60, 16000)] + 0.3 * rng.standard_normal((2, 16000, 24))).astype(np.float32)
        for _ in range(3)
    )
    _, report = attention(0.5 * q, k, v + 2, rtol=0.2, rtol_norm=norm, key_lengths=lengths, return_report=True)
    kept = [one.upper for one in report.rounds if one.step == "certified" and one.upper <= 0.2]
    assert len(kept) == 2
    assert report.certificate.upper(norm) == max(kept)


WEIGHING = {"causal": FEATURES["`causal=True`, n_q = n_k"], "window": FEATURES["`causal=True, window=`"]}


@pytest.mark.parametrize("name", WEIGHING)
@pytest.mark.parametrize("method", ["sortlsh", "hyper", "treecode", "exact"])
def test_every_key_seen_counts_once_in_the_mean(rng, monkeypatch, name, method):
    """The weights of a query's keys, averaged over 200 seeds, are 1 for what it sees and 0 for what it doesn't.

    Treecode draws nothing with far_field="mean" and is tested with "sample". A mean of 200 lies within 5.5 standard errors,
    which the draws themselves tell, for all of some 5,000 pairs but in one case of 5,000; where draws are too rare to tell,
    within 0.25. The mean gap is 0.8 standard errors, where there are any.
    """
    example = WEIGHING[name](rng)
    problem = canonicalise(example.q[0], example.k[0], example.v[0])
    one = subproblems(
        problem, check_restrictions(problem, True, example.options.get("window"), None, None, None, example.q)
    )[0]
    options = Treecode(far_field="sample") if method == "treecode" else method
    total, square = np.zeros((2, problem.groups, problem.n_q, problem.n_k))
    seeds = 200 if method != "exact" else 1
    pieces = []

    def attend_and_keep(problem, plan, selection, *others, **more):
        pieces.append((problem, selection))
        return attend(problem, plan, selection, *others, **more)

    monkeypatch.setattr("kdecore.engine.hierarchy.attend", attend_and_keep)
    for seed in range(seeds):
        pieces.clear()
        evaluate(one.problem, make_plan(one.problem, method=options, budget=20, seed=seed))
        weights = sum(weights_of(one.problem, *piece) for piece in pieces)
        total += weights
        square += weights**2
    mean = total / seeds
    error = np.sqrt(np.maximum(square / seeds - mean**2, 0) / seeds)
    seen = example.bias > -np.inf
    assert (mean[:, ~seen] == 0).all()
    gap = np.abs(mean - 1.0)[:, seen]
    assert (gap <= np.maximum(5.5 * error[:, seen], 0.25)).all()
    assert gap.mean() <= error[:, seen].mean()


def weights_of(problem, small, some):
    """Weights (G, n_q, n_k) of the keys of a Selection. Problems of stacked groups carry their positions in their arrays."""
    weights = np.zeros((problem.groups, problem.n_q, problem.n_k))
    parts = small.groups // problem.groups
    queries, keys = (
        [places(problem_rows[group // parts], rows[group]) for group in range(small.groups)]
        for problem_rows, rows in ((problem.q, small.q), (problem.k, small.k))
    )
    bias = 0.0 if some.bias is None else some.bias
    slot = np.broadcast_to(
        np.exp(some.log_weight[:, :, None, :] + bias), (*some.blocks.index.shape, some.key_index.shape[2])
    )
    for group, block in np.ndindex(*some.blocks.index.shape[:2]):
        index, first = np.unique(some.blocks.index[group, block], return_index=True)
        at = queries[group][index][:, None], keys[group][some.key_index[group, block]][None, :]
        np.add.at(weights[group // parts], at, slot[group, block, first])
    return weights


def places(whole, rows):
    """Return where rows of random numbers stand in the whole."""
    where = {row.tobytes(): number for number, row in enumerate(np.ascontiguousarray(whole))}
    return np.array([where[row.tobytes()] for row in np.ascontiguousarray(rows)])


def test_the_table_in_the_docs_has_these_cells():
    text = (Path(__file__).parent.parent / "docs" / "features.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    header, body = rows[0], [row for row in rows[1:] if not re.fullmatch("[-|: ]+", "|".join(row))]
    assert header[1:] == [f"`{method}`" for method in METHODS]
    table = {row[0]: row[1:] for row in body}
    assert set(FEATURES) <= set(table)
    assert "untested" not in text
    for name in FEATURES:
        assert len(table[name]) == len(METHODS)


@CELLS
def test_a_tolerance_is_kept(rng, feature):
    example = feature(rng)
    out = attention(example.q, example.k, example.v, rtol=0.2, **example.options)
    truth, _ = oracles.masked_attention(example.q, example.k, example.v, example.bias)
    assert errors(host, out, truth).frobenius <= 0.2


@pytest.mark.parametrize(
    ("n", "options"), [(40000, {"causal": True}), (20000, {"key_lengths": [15000, 8000]}), (40000, {"window": 30000})]
)
def test_a_tolerance_is_kept_by_an_estimate_where_one_is_cheaper(rng, n, options):
    centres = rng.standard_normal((2, 1, 60, 24))
    q, k, v = (
        centres[np.arange(2)[:, None, None], 0, rng.integers(0, 60, (2, 1, n))] + 0.3 * rng.standard_normal((2, 1, n, 24))
        for _ in range(3)
    )
    arrays = [x.astype(np.float32) for x in (0.5 * q, k, v + 2.0)]
    out, report = attention(*arrays, rtol=0.2, return_report=True, **options)
    assert report.method != "exact"
    assert report.certificate.upper("frobenius") <= 0.2
    assert errors(host, out, attention(*arrays, method="exact", **options)).frobenius <= 0.2


@CELLS
@pytest.mark.parametrize("method", METHODS[1:])
def test_a_certificate_of_all_rows_is_the_error(rng, feature, method):
    example = feature(rng)
    out, report = attention(
        example.q, example.k, example.v, method=method, budget=24, certificate=1e9, return_report=True, **example.options
    )
    truth = attention(example.q, example.k, example.v, method="exact", **example.options)
    if report.certificate is None:
        np.testing.assert_allclose(out, truth, rtol=1e-12)
        return
    heads_k = example.k.shape[-3]

    def by_key_head(x):
        return x.reshape(-1, heads_k, x.shape[-3] // heads_k * x.shape[-2], x.shape[-1])

    found, expected = by_key_head(out), by_key_head(truth)
    assert report.certificate.frobenius == pytest.approx(errors(host, found, expected).frobenius, rel=1e-9)


def test_grouped_heads_are_repeated_keys(backend, rng):
    q, k, v = rng.standard_normal((2, 6, 80, 4)), *rng.standard_normal((2, 2, 3, 80, 4))
    for options in ({}, {"causal": True}, {"method": "exact"}):
        found = attention(*backend.arrays(q, k, v), budget=200, **options)
        expected = attention(q, *(np.repeat(x, 2, axis=1) for x in (k, v)), budget=200, **options)
        assert_close(backend.numpy(found), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(backend, rng, dtype, size, method):
    """Computed in float32 from the rounded inputs: the result is that one, rounded."""
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")
    q, k, v = rng.standard_normal((3, 2, 90, 8))
    half = backend.arrays(q, k, v * size, dtype=dtype)
    rounded = [backend.numpy(x).astype(np.float32) for x in half]
    for options in ({}, {"causal": True}):
        out = backend.numpy(attention(*half, method=method, budget=30, **options)).astype(np.float64)
        expected = attention(*rounded, method=method, budget=30, **options)
        assert np.isfinite(out).all()
        precision = 2.0**-10 if dtype == "float16" else 2.0**-7
        smallest = 2.0**-24 if dtype == "float16" else 0.0
        np.testing.assert_allclose(out, expected, rtol=2 * precision, atol=2e-6 * size + smallest)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"causal": True}])
def test_logits_up_to_ten_thousand(rng, dtype, method, options):
    q, k, v = rng.standard_normal((3, 2, 90, 8))
    q *= 1e4 / np.abs(q @ k.swapaxes(1, 2)).max() * np.sqrt(8)
    arrays = [x.astype(dtype) for x in (q, k, v)]
    out, lse = attention(*arrays, method=method, budget=30, return_lse=True, **options)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()
    if method != "kdeformer":  # whose denominators are not the sums of its weights
        assert np.abs(out).max() <= 4 * np.abs(v).max()
    exact = attention(*arrays, method="exact", **options)
    truth = oracles.masked_attention(
        *(x.astype(np.float64) for x in arrays), oracles.causal_bias(90, 90) if options else 0.0
    )
    # A logit of 1e4 is known to 5e-4 in float32, and its weight with it.
    np.testing.assert_allclose(exact, truth[0], atol=4e-3 if dtype == "float32" else 1e-9)


def test_an_index_of_grouped_heads_and_of_what_comes_next(backend, rng):
    q, k, v = rng.standard_normal((2, 6, 300, 4)), *rng.standard_normal((2, 2, 3, 300, 4))
    arrays = backend.arrays(q, k, v)
    index = KeyIndex(*(x[:, :, :200, :] for x in arrays[1:]), budget=400)
    chunks = [index.attend(arrays[0][:, :, :50, :])]
    truth, _ = oracles.masked_attention(q[:, :, :50], k[:, :, :200], v[:, :, :200], 0.0)
    assert_close(backend.numpy(chunks[0]), truth)
    out, lse = index.attend_and_append(*(x[:, :, 200:, :] for x in arrays), return_lse=True)
    truth = oracles.masked_attention(q[:, :, 200:], k, v, oracles.causal_bias(100, 300))
    assert_close(backend.numpy(out), truth[0])
    assert_close(backend.numpy(lse), truth[1])
    assert index.n_k == 300
    assert (
        index.attend_and_append(*(x[:, :, :0, :] if i == 0 else x[:, :, :3, :] for i, x in enumerate(arrays))).shape[2] == 0
    )


@pytest.mark.parametrize(("argument", "number"), [("k", np.nan), ("v", np.inf)])
def test_what_comes_later_does_not_spoil_what_comes_with_it_in_an_index(rng, argument, number):
    q, k, v = rng.standard_normal((3, 1, 105, 4))
    index = KeyIndex(k[:, :100], v[:, :100], budget=200)
    new = {"k": k[:, 100:].copy(), "v": v[:, 100:].copy()}
    new[argument][0, 3, 1] = number
    out = index.attend_and_append(q[:, 100:], **new)
    truth, _ = oracles.masked_attention(q[:, 100:], k, v, oracles.causal_bias(5, 105))
    assert_close(out[:, :3], truth[:, :3])
    assert not np.isfinite(out[0, 3:, 1]).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"causal": 1}, "causal must be True or False, got 1"),
        ({"causal": None}, "causal must be True or False"),
        ({"window": 0}, "window must be an integer of at least 1, got 0"),
        ({"window": 2.5}, "window must be an integer"),
        ({"window": True}, "window must be an integer of at least 1, got True"),
        ({"key_lengths": [[5], [6, 7]]}, "key_lengths must hold integers in rows of one length"),
        ({"key_lengths": [3, 4, 5]}, r"key_lengths must have the leading dimensions of k.*\(2, 3\), got \(3,\)"),
        ({"key_lengths": [3, 11]}, "key_lengths must lie in 0 … n_k = 10, got"),
        ({"key_lengths": [-1, 4]}, "key_lengths must lie in"),
        ({"key_lengths": [1.0, 4.0]}, "key_lengths must hold integers, got float64"),
        ({"mask": np.ones((9, 10), bool)}, r"mask must be broadcastable .*\(2, 3, 12, 10\), got shape \(9, 10\)"),
        ({"mask": np.ones((1, 1, 1, 1, 10), bool)}, "mask must be broadcastable"),
        ({"mask": np.ones((12, 10), int)}, "mask must be boolean or have one of the dtypes"),
        ({"mask": [[True] * 10]}, "mask must be an array"),
        ({"max_memory": 0}, "max_memory must be an integer of at least 1"),
    ],
)
def test_restrictions_that_do_not_fit_are_refused(rng, options, words):
    q, k, v = (rng.standard_normal((2, 3, n, 4)) for n in (12, 10, 10))
    with pytest.raises((OptionError, ValueError, TypeError), match=words):
        attention(q, k, v, **options)


def test_the_report_tells_of_groups_that_were_treated_differently(rng):
    arrays = rng.standard_normal((3, 2, 300, 4))
    _, report = attention(*arrays, method="treecode", budget=64, key_lengths=[300, 40], return_report=True)
    assert report.method == "treecode"
    assert "otherwise for 300 of 600 queries" in report.reason
    assert "Frobenius" in str(report)
    _, report = attention(*arrays, budget=64, method="sortlsh", key_lengths=[60, 300], return_report=True)
    assert report.method == "sortlsh"
    assert "exact up to rounding" not in str(report)
    assert isinstance(report.options, dict)
    assert report.keys_per_query == pytest.approx((64 + 60) / 2, abs=3)


@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"window": 1000}, {"causal": True, "window": 1500}, {"key_lengths": [3000], "causal": True}],
)
@pytest.mark.parametrize("method", ["sortlsh", "treecode"])
@pytest.mark.parametrize("budget", [64, 256, 512])
@pytest.mark.parametrize("n_q", [4096, 1000])
def test_budgets_hold_in_the_mean(rng, options, method, budget, n_q):
    q, k, v = (rng.standard_normal((1, n, 8), dtype=np.float32) for n in (n_q, 4096, 4096))
    _, report = attention(q, k, v, method=method, budget=budget, return_report=True, certificate=0, **options)
    # Treecode's lists are as long as the budget in the mean over a pilot's blocks.
    assert 0.85 * budget <= report.keys_per_query <= (1.05 if method == "sortlsh" else 1.1) * budget


def test_exact_options_are_unchanged_by_budgets():
    assert Exact().with_budget(5) == Exact()
