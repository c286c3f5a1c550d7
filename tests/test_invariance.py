"""What must not change a result, or must change it in a known way; and what the report says."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from kdecore import Exact, Hyper, KDEformer, KeyIndex, Report, SortLSH, Treecode, attention
from kdecore.arrays.text import LONGEST_LINE
from kdecore.core.options import DEFAULT_BUDGET
from kdecore.methods.sortlsh import DEFAULT_HASHES
from kdecore.testing import strategies
from tests import oracles
from tests.tolerances import assert_close

SAMPLING = {
    "sortlsh": {"method": "sortlsh", "budget": 12},
    "hyper": {"method": "hyper", "budget": 12},
    "no block": {"method": SortLSH(block_size=0, num_samples=6)},
    "kdeformer": {"method": "kdeformer", "budget": 12},
    "kdeformer, self-normalised": {"method": KDEformer(num_samples=6, normaliser="sampled", probabilities="paper")},
}
EVERY = {"exact": {"method": "exact"}, **SAMPLING}


def make(rng, G=2, n_q=33, n_k=47, d=8, d_v=4):
    return rng.standard_normal((G, n_q, d)), rng.standard_normal((G, n_k, d)), rng.standard_normal((G, n_k, d_v))


def call(backend, *arrays, **options):
    """Return out and lse as NumPy arrays."""
    return [backend.numpy(x) for x in attention(*backend.arrays(*arrays), return_lse=True, **options)]


@pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)
def test_a_seed_gives_the_same_bits_again(backend, rng, options):
    arrays = make(rng)
    for dtype in backend.dtypes:
        first, second = (attention(*backend.arrays(*arrays, dtype=dtype), seed=7, **options) for _ in range(2))
        np.testing.assert_array_equal(backend.numpy(first), backend.numpy(second))


@pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)
def test_every_backend_gives_the_same_result(backend, rng, options):
    arrays = make(rng, n_q=300, n_k=500)
    for found, expected in zip(
        call(backend, *arrays, **options), attention(*arrays, return_lse=True, **options), strict=True
    ):
        assert_close(found, expected, ulps=256)


@pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)
def test_a_single_group_is_the_first_of_many(rng, options):
    """For one seed, group 0 does not depend on the groups after it."""
    q, k, v = make(rng)
    assert_close(attention(q[:1], k[:1], v[:1], **options), attention(q, k, v, **options)[:1])
    assert_close(attention(q[0], k[0], v[0], **options), attention(q, k, v, **options)[0])


@pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)
def test_leading_dimensions_only_reshape(backend, rng, options):
    q, k, v = make(rng, G=6)
    flat = call(backend, q, k, v, **options)
    for lead in ((2, 3), (3, 1, 2)):
        nested = call(backend, *(x.reshape(*lead, *x.shape[1:]) for x in (q, k, v)), **options)
        for x, y in zip(nested, flat, strict=True):
            np.testing.assert_array_equal(x.reshape(y.shape), y)


@pytest.mark.parametrize("method", ["exact", SortLSH(4, 8, 30), Hyper(4, 8, 30)], ids=lambda method: str(method))
def test_the_order_of_keys_does_not_matter(backend, rng, method):
    """With 30 hyperplanes nearly every key has a bucket of its own, so that the hash order ignores the order given."""
    q, k, v = make(rng, n_q=32, n_k=40, d=16)
    order = rng.permutation(40)
    for x, y in zip(
        call(backend, q, k, v, method=method), call(backend, q, k[:, order], v[:, order], method=method), strict=True
    ):
        assert_close(x, y)


@pytest.mark.parametrize("method", ["exact", SortLSH(4, 8, 30), Hyper(4, 8, 30)], ids=lambda method: str(method))
def test_the_order_of_queries_carries_over(backend, rng, method):
    q, k, v = make(rng, n_q=32, n_k=40, d=16)
    order = rng.permutation(32)
    for x, y in zip(call(backend, q, k, v, method=method), call(backend, q[:, order], k, v, method=method), strict=True):
        assert_close(x[:, order], y)


@pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)
def test_a_constant_added_to_all_keys_only_moves_lse(backend, rng, options):
    q, k, v = make(rng)
    shift = 3.0 * rng.standard_normal(8)
    out, lse = call(backend, q, k, v, **options)
    moved, moved_lse = call(backend, q, k + shift, v, **options)
    np.testing.assert_allclose(moved, out, rtol=0, atol=1e-12)
    np.testing.assert_allclose(moved_lse - q @ shift / np.sqrt(8), lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("factor", [4.0, -0.125])
def test_values_scale_out(backend, rng, options, factor):
    """Powers of two round nothing, so the results are equal bit for bit."""
    q, k, v = make(rng)
    out, lse = call(backend, q, k, v, **options)
    scaled, same = call(backend, q, k, v * factor, **options)
    np.testing.assert_array_equal(scaled, out * factor)
    np.testing.assert_array_equal(same, lse)


@pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)
def test_scale_is_a_factor_on_queries(backend, rng, options):
    q, k, v = make(rng)
    for x, y in zip(
        call(backend, q, k, v, scale=0.5, **options), call(backend, q * 0.5, k, v, scale=1.0, **options), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)


@given(strategies.arrays())
@settings(max_examples=50, deadline=None)
def test_keys_given_twice_count_twice(problem):
    q, k, v = problem
    out, lse = attention(q, k, v, return_lse=True, method="exact")
    twice, twice_lse = attention(q, np.concat([k, k], -2), np.concat([v, v], -2), return_lse=True, method="exact")
    np.testing.assert_allclose(twice, out, rtol=0, atol=1e-13 * np.abs(v).max())
    np.testing.assert_allclose(twice_lse, lse + np.log(2), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("method", ["sortlsh", "hyper"])
def test_equal_keys_and_values_make_estimates_exact(backend, rng, method):
    """All keys alike: the estimated denominator is n_k times one term, whichever keys are drawn uniformly."""
    q, k, v = make(rng)
    k[...], v[...] = k[:, :1], v[:, :1]
    out, lse = call(backend, q, k, v, method=method, budget=12)
    true_out, true_lse = oracles.exact_attention(q, k, v)
    np.testing.assert_allclose(out, true_out, rtol=1e-12)
    np.testing.assert_allclose(lse, true_lse, rtol=1e-12)


def test_options_by_name_and_by_object_are_the_same(rng):
    arrays = make(rng)
    by_name = attention(*arrays, method="sortlsh", budget=12)
    np.testing.assert_array_equal(attention(*arrays, method=SortLSH(), budget=12), by_name)
    np.testing.assert_array_equal(attention(*arrays, method=SortLSH(4, 8)), by_name)
    np.testing.assert_array_equal(attention(*arrays, method=SortLSH(4, 8, DEFAULT_HASHES), budget=12), by_name)
    assert np.abs(attention(*arrays, method=SortLSH(4, 8, 2)) - by_name).max() > 1e-6
    assert np.abs(attention(*arrays, method="hyper", budget=12) - by_name).max() > 1e-6


# The report


def report_of(arrays, **options):
    return attention(*arrays, return_report=True, **options)[1]


def everywhere(backend):
    """Kernels of every call: on a device, one looks for numbers that are not finite."""
    return set() if backend.device == "cpu" else {"finite_rows", "spoil_groups", "spoil_rows"}


def test_the_report_of_a_sampling_method(backend, rng):
    arrays = backend.arrays(*make(rng))
    report = report_of(arrays, method="sortlsh", budget=12)
    assert isinstance(report, Report)
    assert (report.method, report.reason, report.budget) == ("sortlsh", "asked for by name", 12)
    assert report.options == {"block_size": 4, "num_samples": 8, "num_hashes": DEFAULT_HASHES}
    assert report.keys_per_query == 12.0
    assert report.shape == (2, 33, 47, 8, 4)
    assert report.dtype == "float64"
    assert report.library == re.sub("-(readonly|operations|cuda)$", "", backend.name)
    assert report.device == (backend.device if backend.device != "cpu" else str(arrays[0].device))
    drawn = {"bucket_windows", "draw_indices"}
    assert set(report.kernels) == {"row_norms", "hash_codes", "bucket_order", "attend_blocks"} | drawn | everywhere(backend)
    assert all(found.endswith(")") for found in report.kernels.values())
    assert report.temporary_bytes > 0
    assert report.seconds > 0


def test_the_report_of_exact(backend, rng):
    report = report_of(backend.arrays(*make(rng)), method="exact")
    assert (report.method, report.options, report.budget, report.keys_per_query) == ("exact", {}, None, 47.0)
    assert set(report.kernels) == {"attend_dense"} | everywhere(backend)


@pytest.mark.parametrize("budget", [1, 2, 5, 46])
@pytest.mark.parametrize("method", ["sortlsh", "hyper"])
def test_keys_per_query_are_the_budget(rng, method, budget):
    assert report_of(make(rng), method=method, budget=budget).keys_per_query == budget


@pytest.mark.parametrize(
    ("options", "method", "words"),
    [
        ({"method": "sortlsh", "budget": 47}, "exact", ["47", "covers all 47"]),
        ({"method": Hyper(), "budget": 100}, "exact", ["100", "covers all 47"]),
        ({"method": "hyper"}, "exact", [str(DEFAULT_BUDGET), "covers all 47"]),
        ({"method": "auto"}, "exact", ["auto", "covers all 47"]),
        ({"method": "auto", "budget": 5}, "exact", ["auto", "treecode is expected to be 0.", "× as fast as exact", "1.3 ×"]),
        ({"method": Exact()}, "exact", ["asked for by name"]),
        ({"method": "hyper", "budget": 5}, "hyper", ["asked for by name"]),
    ],
)
def test_the_report_says_why(rng, options, method, words):
    report = report_of(make(rng), **options)
    assert report.method == method
    assert all(word in report.reason for word in words)


def test_the_report_says_why_there_was_nothing_to_do(rng):
    report = report_of(make(rng, n_q=0), method="sortlsh", budget=5)
    assert (report.method, report.reason) == ("exact", "there are no queries")


def test_auto_takes_treecode_for_long_inputs(rng):
    arrays = make(rng, G=1, n_q=6000, n_k=6000, d=2, d_v=1)
    report = report_of(arrays, budget=32)
    assert report.method == "treecode"
    assert re.search(r"expected to be [\d.]+ × as fast as exact, where an estimate has to be 1.3 ×", report.reason)
    np.testing.assert_array_equal(attention(*arrays, budget=32), attention(*arrays, budget=32, method="treecode"))
    report = report_of(arrays, budget=32, kernels="array-api")
    assert report.method == "sortlsh"
    assert "no kernel opens trees here" in report.reason


@pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)
def test_reports_are_ready_for_json_and_for_reading(backend, rng, options):
    report = report_of(backend.arrays(*make(rng)), **options)
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == {**plain, "shape": [2, 33, 47, 8, 4]}
    short, long = str(report), report.details()
    assert len(short.splitlines()) <= 6
    assert max(map(len, short.splitlines())) <= LONGEST_LINE
    words = (report.method, f"{report.keys_per_query:.1f} of 47", "2 × 33", "d = 8", "d_v = 4", "float64", report.library)
    asked = "no budget asked for" if report.budget is None else f"budget asked for: {report.budget}"
    assert all(word in text for word in (*words, asked) for text in (short, long))
    assert all(word in long for word in (report.reason, *report.kernels, *report.options))


def test_the_budget_of_a_report_is_what_was_asked_for_and_what_was_used(rng):
    q, k, v = rng.standard_normal((3, 2, 600, 4))
    for options, asked, used in (
        ({"method": "sortlsh"}, None, 512),
        ({"method": "sortlsh", "budget": 64}, 64, 64),
        ({"method": SortLSH(block_size=16, num_samples=48)}, 64, 64),
        ({"method": SortLSH(num_samples=64)}, None, 512),
        ({"method": "sortlsh", "budget": 1000}, 1000, 600),
        ({"method": Treecode(num_slots=64)}, 64, 64),
        ({"rtol": 0.1}, None, 600),
    ):
        report = attention(q, k, v, **options, return_report=True)[1]
        assert report.budget == asked
        assert report.keys_per_query == pytest.approx(used, rel=0.1)
    index = KeyIndex(k, v, budget=64)
    assert [index.attend(q, **how, return_report=True)[1].budget for how in ({}, {"budget": 32}, {"rtol": 0.1})] == [
        64,
        32,
        None,
    ]


def test_queries_whose_chosen_keys_are_all_hidden_count_all_keys(rng):
    """They are evaluated exactly: the mean says so."""
    q, k, v = rng.standard_normal((3, 1, 600, 4))
    mask = np.ones((600, 600), dtype=bool)
    # Half of the queries see two keys that are no interval, and of which a list of few keys has none as a rule.
    mask[::2] = False
    rows = np.arange(0, 600, 2)
    for _ in range(2):
        mask[rows, rng.integers(0, 600, 300)] = True
    report = attention(q, k, v, method="sortlsh", budget=32, mask=mask, return_report=True)[1]
    # Of 300 such queries one in ten has a key among 32 of 600: between 0 and 60 of them but for one case in 10^6.
    assert 32 + 0.4 * 600 <= report.keys_per_query < 32 + 0.5 * 600
    assert report.longest_list == 600


def test_reports_in_a_notebook_are_escaped(rng):
    report = attention(*make(rng), method="sortlsh", budget=12, return_report=True)[1]
    page = replace(report, reason="<script>alert('a & b')</script>", kernels={"<b>": "<i>"})._repr_html_()
    assert "&lt;script&gt;alert(&#x27;a &amp; b&#x27;)&lt;/script&gt;" in page
    assert set(re.findall(r"<(\w+)>", page)) == {"table", "tr", "th", "td", "details", "summary", "pre"}
    assert all(f"<th>{line.split('  ')[0]}</th>" in page for line in str(report).splitlines())
    assert all(f"\n{name} " in page for name in ("num_samples", "longest list", "kernel &lt;b&gt;", "threads"))
