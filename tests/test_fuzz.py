"""Any call with any inputs: 100 of each with the other tests, 2,000 by `make fuzz`."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn.attention.bias import causal_lower_right

from kdecore import KDEformer, KeyIndex, Treecode, attention, packed_attention
from kdecore.testing.strategies import problems
from kdecore_adapters.torch_adapter import scaled_dot_product_attention
from tests import oracles

METHOD = st.sampled_from(
    ("exact", "sortlsh", "hyper", "treecode", KDEformer(normaliser="sampled"), Treecode(far_field="sample"), "auto")
)


def converted(library, x):
    return torch.from_numpy(np.ascontiguousarray(x)) if library == "torch" else x


@given(problems(), METHOD, st.integers(1, 100), st.integers(0, 2**64 - 1), st.sampled_from(("numpy", "torch")))
def test_any_call_gives_means_of_what_is_seen(call, method, budget, seed, library):
    q, k, v, options, bias = call
    given_options = {name: converted(library, x) if name == "mask" else x for name, x in options.items()}
    arrays = [converted(library, x) for x in (q, k, v)]
    out, lse = attention(*arrays, method=method, budget=budget, seed=seed, return_lse=True, **given_options)
    out, lse = np.asarray(out), np.asarray(lse)
    seen = np.broadcast_to(bias > -np.inf, (*q.shape[:-1], k.shape[-2]))
    assert out.shape == (*q.shape[:-1], v.shape[-1])
    np.testing.assert_array_equal(np.isfinite(lse), seen.any(axis=-1))
    assert (out[~seen.any(axis=-1)] == 0).all()
    # Nobody leaves the range of the values that they see, but for treecode's first-order term.
    repeated = np.repeat(v, q.shape[1] // v.shape[1], axis=1)
    values = np.where(seen[..., None], repeated[:, :, None], np.nan)
    rows = seen.any(axis=-1)
    low, high = np.nanmin(values[rows], axis=1), np.nanmax(values[rows], axis=1)
    room = 1e-9 * np.abs(v).max() + (0.5 * np.ptp(v) if method in ("treecode", "auto") else 0.0)
    assert (out[rows] >= low - room).all()
    assert (out[rows] <= high + room).all()


@given(problems(), METHOD, st.sampled_from(("numpy", "torch")))
def test_any_call_at_full_budget_is_exact(call, method, library):
    q, k, v, options, _ = call
    given_options = {name: converted(library, x) if name == "mask" else x for name, x in options.items()}
    out = attention(*(converted(library, x) for x in (q, k, v)), method=method, budget=k.shape[-2], **given_options)
    close_to_exact(out, call.exact()[0], q, k, v)


def close_to_exact(found, truth, q, k, v):
    largest = np.abs(q).max() * np.abs(k).max() * np.sqrt(q.shape[-1])
    np.testing.assert_allclose(np.asarray(found), truth, atol=1e-12 * (1 + largest) * max(np.abs(v).max(), 1e-300))


@given(problems(), METHOD, st.sampled_from(("is_causal", "lower right", "none")))
def test_the_function_with_pytorchs_arguments_at_full_budget_is_exact(call, method, causal):
    q, k, v, options, bias = call
    n_q, n_k = q.shape[-2], k.shape[-2]
    more = {
        "method": method,
        "budget": n_k,
        **{name: options[name] for name in ("window", "key_lengths") if name in options},
    }
    # What windows and causal attention are aligned to is PyTorch's say.
    offset = {"is_causal": 0, "lower right": n_k - n_q, "none": options.get("diagonal", n_k - n_q)}[causal]
    distance = np.arange(n_q)[:, None] + offset - np.arange(n_k)
    seen = np.broadcast_to(distance >= 0 if causal != "none" else True, (q.shape[0], 1, n_q, n_k))
    if "window" in more:
        seen = seen & (np.abs(distance) < more["window"])
    if "key_lengths" in more:
        seen = seen & (np.arange(n_k) < more["key_lengths"][:, None])[:, None, None, :]
    bias, mask = np.where(seen, 0.0, -np.inf), None
    if causal == "none":
        mask = options.get("mask")
        more |= {"diagonal": offset}
        if mask is not None:
            bias = bias + (np.where(mask, 0.0, -np.inf) if mask.dtype == bool else mask)
            mask = torch.from_numpy(mask)
    elif causal == "lower right":
        # PyTorch makes NaN of rows that see no key, kdecore 0.
        assume(n_q <= n_k)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch, at making one
            mask = causal_lower_right(n_q, n_k)
    q_, k_, v_ = map(torch.from_numpy, (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q_, k_, v_, mask, is_causal=causal == "is_causal", enable_gqa=grouped, **more)
    close_to_exact(out, oracles.masked_attention(q, k, v, bias)[0], q, k, v)


@given(problems(), st.lists(st.integers(1, 60), max_size=4), st.integers(1, 60), st.booleans())
def test_an_index_that_grows_is_exact_at_full_budget_and_a_mean_of_values_below_it(call, steps, budget, sampled):
    q, k, v, _, _ = call
    edges = np.minimum(np.cumsum([max(1, k.shape[-2] // 3), *steps]), k.shape[-2])
    method = Treecode(far_field="sample" if sampled else "mean")
    index = KeyIndex(k[..., : edges[0], :], v[..., : edges[0], :], method=method, budget=budget)
    for first, end in pairwise(edges):
        if first < end:
            index.append(k[..., first:end, :], v[..., first:end, :])
    k, v = (x[..., : edges[-1], :] for x in (k, v))
    assert len(index) == edges[-1]
    truth, _ = oracles.masked_attention(q, k, v, np.zeros((1, 1)))
    close_to_exact(index.attend(q, budget=int(edges[-1])), truth, q, k, v)
    out, report = index.attend(q, rtol=1e-9, return_report=True)
    if report.method == "exact":
        close_to_exact(out, truth, q, k, v)
    else:
        # Of those compared none may be one of the few that are wrong (docs/certificate.md).
        assert report.certificate.upper("frobenius") <= 1e-9
    out, lse, report = index.attend(q, return_lse=True, return_report=True)
    assert np.isfinite(lse).all()
    assert np.isfinite(out).all()
    if sampled:
        # A first-order term leaves their range; by how much, follows from no bound here.
        room = 1e-9 * np.abs(v).max()
        repeated = np.repeat(v, q.shape[1] // v.shape[1], axis=1)
        assert (out >= repeated.min(axis=-2, keepdims=True) - room).all()
        assert (out <= repeated.max(axis=-2, keepdims=True) + room).all()
    if report.method == "exact":
        close_to_exact(out, truth, q, k, v)


@given(problems(), METHOD, st.lists(st.integers(0, 20), min_size=1, max_size=4), st.booleans())
def test_packed_samples_at_full_budget_are_exact(call, method, lengths, causal):
    q, k, v, _, _ = call
    edges = np.minimum(np.cumsum([0, *lengths]), min(q.shape[-2], k.shape[-2]))
    q, k, v = (x[..., : edges[-1], :] for x in (q, k, v))
    if edges[-1] == 0:
        return
    sample = np.searchsorted(edges, np.arange(edges[-1]), side="right")
    seen = (sample[:, None] == sample) & (~np.triu(np.ones((edges[-1],) * 2, bool), 1) | (not causal))
    out = packed_attention(q, k, v, edges, causal=causal, method=method, budget=int(edges[-1]))
    close_to_exact(out, oracles.masked_attention(q, k, v, np.where(seen, 0.0, -np.inf))[0], q, k, v)


@given(problems(), METHOD, st.sampled_from((np.nan, np.inf, -np.inf)), st.sampled_from("qkv"), st.integers(0, 2**32 - 1))
def test_numbers_that_are_not_finite_reach_the_rows_that_they_reach_exactly(call, method, number, argument, seed):
    q, k, v, options, _ = call
    arrays = {"q": q.copy(), "k": k.copy(), "v": v.copy()}
    spoilt = arrays[argument].reshape(-1)
    spoilt[np.random.default_rng(seed).integers(0, spoilt.size)] = number
    found = attention(**arrays, method=method, budget=20, **options)
    exact = attention(**arrays, method="exact", **options)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(exact))
    if argument == "v":
        np.testing.assert_array_equal(found[~np.isfinite(exact)], exact[~np.isfinite(exact)])


@given(problems(), METHOD, st.lists(st.integers(0, 20), min_size=1, max_size=4), st.booleans())
def test_packed_samples_are_what_they_are_alone(call, method, lengths, causal):
    q, k, v, _, _ = call
    edges = np.minimum(np.cumsum([0, *lengths]), min(q.shape[-2], k.shape[-2]))
    total = int(edges[-1])
    q, k, v = (x[..., :total, :] for x in (q, k, v))
    if total == 0:
        return
    out, lse = packed_attention(q, k, v, edges, causal=causal, method=method, budget=10, return_lse=True)
    for first, end in pairwise(edges):
        if first < end:
            one = attention(*(x[..., first:end, :] for x in (q, k, v)), causal=causal, method=method, budget=10)
            np.testing.assert_array_equal(out[..., first:end, :], one)
    assert np.isfinite(lse).all()


@pytest.mark.parametrize(
    ("edges", "words"),
    [
        ([0, 5], "cu_seqlens_q must ascend from 0 to 9"),
        ([0, 7, 5, 9], "cu_seqlens_q must ascend"),
        ([1, 9], "cu_seqlens_q must ascend"),
        ([0.0, 9.0], "cu_seqlens_q must hold integers"),
        ([9], r"cu_seqlens_q must have the shape \(B \+ 1,\)"),
    ],
)
def test_packed_lengths_that_do_not_fit_are_refused(edges, words):
    x = np.zeros((2, 9, 3))
    with pytest.raises((ValueError, TypeError), match=words):
        packed_attention(x, x, x, edges)
    with pytest.raises(ValueError, match="k must have q's last dimension"):
        packed_attention(x, x[:, :, :2], x, [0, 9])
    with pytest.raises(ValueError, match="method must be one of"):
        packed_attention(x, x, x, [0, 9], [0, 9], method="bogus")
    with pytest.raises(ValueError, match="mask can't be given to packed_attention"):
        packed_attention(x, x, x, [0, 9], mask=np.ones((9, 9), bool))
    with pytest.raises(ValueError, match="cu_seqlens_k must have as many entries as cu_seqlens_q, 2, got 3"):
        packed_attention(x, x, x, [0, 9], [0, 4, 9])


def test_a_packed_sample_without_keys_gives_nothing():
    x = np.ones((2, 9, 3))
    out, lse, reports = packed_attention(x, x[:, :5], x[:, :5], [0, 4, 9], [0, 0, 5], return_lse=True, return_report=True)
    assert (out[:, :4] == 0).all()
    assert np.isneginf(lse[:, :4]).all()
    assert reports[0] is None
    np.testing.assert_allclose(out[:, 4:], 1.0)
