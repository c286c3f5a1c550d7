"""Where queries stand among the keys: said once, adjusted by everything that cuts a call, and never taken from shapes."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kdecore
from kdecore import OptionError, Treecode
from kdecore.accuracy.metrics import errors
from kdecore.arrays.namespace import host
from kdecore.core.chunks import Remainder, cut, stacked
from kdecore.core.problem import canonicalise
from kdecore.engine.hierarchy import own_of_remainders
from kdecore.engine.restrictions import check_restrictions
from kdecore.engine.split import in_halves, subproblems
from kdecore.methods import treecode
from kdecore.methods.plan import make_plan
from tests import oracles


def owners(problem):
    """Return each query's own key by its label, the first coordinate of k, or −1: what every cut has to leave as it is."""
    if problem.own is None:
        return np.full((problem.groups, problem.n_q), -1.0)
    own = np.broadcast_to(problem.own, (problem.groups, problem.n_q))
    return np.where(own >= 0, np.take_along_axis(problem.k[:, :, 0], np.maximum(own, 0), axis=1), -1.0)


def labelled(n_q, n_k, repeats, diagonal, groups=2):
    """Return a problem whose queries and keys say in their first coordinate which they are."""
    q = np.tile(np.arange(n_q, dtype=float)[:, None], (groups * repeats, 1, 2))
    k = np.tile(np.arange(n_k, dtype=float)[:, None], (groups, 1, 2))
    return canonicalise(q, k, k).standing_at(diagonal)


@given(st.data(), st.integers(1, 20), st.integers(1, 20), st.integers(1, 3), st.integers(-25, 25))
def test_slices_keep_what_is_each_querys_own_key(data, n_q, n_k, repeats, diagonal):
    problem = labelled(n_q, n_k, repeats, diagonal)
    before = owners(problem)
    of_query = problem.q[:, :, 0]
    np.testing.assert_array_equal(
        before, np.where((of_query + diagonal >= 0) & (of_query + diagonal < n_k), of_query + diagonal, -1)
    )
    rows = sorted(data.draw(st.tuples(st.integers(0, n_q * repeats), st.integers(0, n_q * repeats))))
    keys = sorted(data.draw(st.tuples(st.integers(0, n_k), st.integers(0, n_k))))
    part = problem.rows(*rows).keys(*keys)
    expected = before[:, slice(*rows)]
    kept = (expected >= keys[0]) & (expected < keys[1])
    np.testing.assert_array_equal(owners(part), np.where(kept, expected, -1.0))
    assert (part.own is None) == (not kept.any())


@given(st.integers(2, 20), st.integers(1, 20), st.integers(1, 3), st.integers(-25, 25))
def test_halves_keep_it(n_q, n_k, repeats, diagonal):
    problem = labelled(n_q, n_k, repeats, diagonal, groups=1)
    (whole,) = subproblems(problem, check_restrictions(problem, False, None, diagonal, None, None, problem.q))
    halves = [half.problem for half in in_halves(whole)]
    np.testing.assert_array_equal(np.concatenate([owners(half) for half in halves], axis=1), owners(problem))


@given(st.data(), st.integers(1, 20), st.integers(1, 20), st.integers(1, 3), st.integers(-25, 25))
def test_lengths_windows_and_what_they_leave_keep_it(data, n_q, n_k, repeats, diagonal):
    problem = labelled(n_q, n_k, repeats, diagonal)
    window = data.draw(st.one_of(st.none(), st.integers(1, 10)))
    lengths = data.draw(st.lists(st.integers(0, n_k), min_size=2, max_size=2))
    before = owners(problem)
    for share in subproblems(problem, check_restrictions(problem, True, window, diagonal, lengths, None, problem.q)):
        if share.problem is None:
            continue
        expected = before[list(share.groups)]
        kept = np.isin(expected, share.problem.k[0, :, 0])
        np.testing.assert_array_equal(owners(share.problem), np.where(kept, expected, -1.0))
        for queries in cut(share.problem.n_q, 3):
            keys = sorted(data.draw(st.lists(st.integers(0, share.problem.n_k), min_size=4, max_size=4)))
            spans = tuple(span for span in (tuple(keys[:2]), tuple(keys[2:])) if span[0] < span[1])
            rest = Remainder(queries, spans, None)
            left = np.concatenate([np.arange(*span) for span in spans] or [np.arange(0)])
            k = share.problem.k[:, left, :]
            own = own_of_remainders(share.problem, [rest])
            part = replace(share.problem, q=share.problem.q[:, slice(*queries)], k=k, own=own)
            before_cut = owners(share.problem)[:, slice(*queries)]
            np.testing.assert_array_equal(owners(part), np.where(np.isin(before_cut, k[0, :, 0]), before_cut, -1.0))


@given(st.data(), st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(-15, 15), st.booleans())
def test_masks_that_leave_out_keys_between_others_keep_it(data, n_q, n_k, repeats, diagonal, of_each_head):
    problem = labelled(n_q, n_k, repeats, diagonal)
    columns = st.lists(st.booleans(), min_size=n_k, max_size=n_k)
    masks = [data.draw(columns) for _ in range(2 if of_each_head else 1)]
    mask = np.repeat(np.array(masks), repeats if of_each_head else 1, axis=0)[:, None, :]
    before = owners(problem)
    for share in subproblems(problem, check_restrictions(problem, False, None, diagonal, None, mask, problem.q)):
        if share.problem is None:
            continue
        expected = before[list(share.groups)]
        labels = share.problem.k[:, :, 0]
        kept = np.stack([np.isin(own, left) for own, left in zip(expected, labels, strict=True)])
        np.testing.assert_array_equal(owners(share.problem), np.where(kept, expected, -1.0))


@given(st.integers(1, 20), st.integers(1, 3), st.integers(-10, 10))
def test_remainders_that_are_stacked_keep_it(half, repeats, diagonal):
    problem = labelled(2 * half, 2 * half, repeats, diagonal)
    of_queries, of_keys = cut(2 * half * repeats, 2), cut(2 * half, 2)
    some = [Remainder(queries, (keys,), None) for queries, keys in zip(of_queries, of_keys, strict=True)]
    q, k = stacked(host, problem.q, of_queries, 2), stacked(host, problem.k, of_keys, 2)
    before = owners(problem).reshape(len(q), -1)
    kept = np.stack([np.isin(own, left) for own, left in zip(before, k[:, :, 0], strict=True)])
    after = owners(replace(problem, q=q, k=k, own=own_of_remainders(problem, some)))
    np.testing.assert_array_equal(after, np.where(kept, before, -1.0))


def test_one_hidden_key_does_not_lose_the_others_queries_own_keys(rng):
    """Rows that attend to themselves: one padded key in the middle must not cost all of them their own."""
    x = rng.standard_normal((1, 2048, 32), dtype=np.float32) * 1.2
    mask = np.ones((1, 2048), dtype=bool)
    mask[0, 700] = False
    options = {"diagonal": 0, "certificate": 0.0}
    exact = kdecore.attention(x, x, x, mask=mask, method="exact")
    hidden = kdecore.attention(x, x, x, mask=mask, method="treecode", budget=256, **options)
    seen = kdecore.attention(x, x, x, method="treecode", budget=256, **options)
    rows = np.arange(2048) != 700
    of_all = errors(host, seen, kdecore.attention(x, x, x, method="exact")).frobenius
    assert errors(host, hidden[:, rows], exact[:, rows]).frobenius < 1.2 * of_all


@pytest.mark.parametrize(
    ("n_q", "diagonal"), [(600, 0), (600, 5), (600, -40), (599, 1), (599, 0), (300, 300), (300, 17), (700, 0), (700, -100)]
)
def test_treecode_finds_own_keys_where_they_are_said(rng, n_q, diagonal):
    q, k = rng.standard_normal((n_q, 16)), rng.standard_normal((600, 16))
    problem = canonicalise(q, k, k).standing_at(diagonal)
    prepared = treecode.prepare(problem, make_plan(problem, method="treecode", budget=64))
    own = np.arange(n_q) + diagonal
    there = (own >= 0) & (own < 600)
    np.testing.assert_array_equal(prepared.own[0] >= 0, there)
    np.testing.assert_array_equal(prepared.keys.order[0][prepared.own[0][there]], own[there])


def test_equal_shapes_say_nothing(rng):
    x = rng.standard_normal((2, 600, 16))
    problem = canonicalise(x, x, x)
    assert treecode.prepare(problem, make_plan(problem, method="treecode", budget=64)).own is None


def test_recorded_calls_see_own_keys_as_others_do():
    """Once each, whether or not their blocks list them."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 300, 8)))
    options = {"method": Treecode(block_size=8), "budget": 60, "diagonal": 0}
    expected = kdecore.attention(x, x, x, **options)
    found = kdecore.attention(*(x.clone().requires_grad_() for _ in range(3)), **options)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-9, atol=1e-9)


def test_parts_for_want_of_memory_err_as_the_whole_does(rng):
    """Rows that attend to themselves: without own keys the error is several times as large."""
    x = rng.standard_normal((1, 4096, 32), dtype=np.float32) * 1.2
    exact = kdecore.attention(x, x, x, method="exact")
    options = {"method": "treecode", "budget": 256, "diagonal": 0, "return_report": True, "certificate": 0.0}

    def error(n, **more):
        out, report = kdecore.attention(x[:, :n], x, x, **{**options, **more})
        return errors(host, out, exact[:, :n]).frobenius, report

    whole, report = error(4096)
    parts, _ = error(4096, max_memory=int(0.9 * report.temporary_bytes))
    fewer, _ = error(4095)
    not_said, _ = error(4096, diagonal=None)
    assert parts < 1.2 * whole
    assert fewer < 1.2 * whole
    assert not_said > 2.0 * whole


@pytest.mark.parametrize("n_q", [40, 60, 90])
@pytest.mark.parametrize("diagonal", [-30, 0, 11, 20, 55, 100])
@pytest.mark.parametrize("window", [None, 13])
@pytest.mark.parametrize("causal", [False, True])
def test_causal_attention_and_windows_are_aligned_by_it(rng, n_q, diagonal, window, causal):
    q, k, v = (rng.standard_normal((2, n, 5)) for n in (n_q, 60, 60))
    lengths = np.array([60, 45])
    distance = np.arange(n_q)[:, None] + diagonal - np.arange(60)
    seen = (distance >= 0) | (not causal)
    seen = seen & ((np.abs(distance) < window) if window is not None else True)
    seen = seen[None] & (np.arange(60) < lengths[:, None, None])
    truth, _ = oracles.masked_attention(q, k, v, np.where(seen, 0.0, -np.inf))
    options = {"causal": causal, "window": window, "diagonal": diagonal, "key_lengths": lengths}
    for method in ("exact", "treecode"):
        out = kdecore.attention(q, k, v, method=method, budget=60, **options)
        np.testing.assert_allclose(out, truth, atol=1e-10)
    estimate = kdecore.attention(q, k, v, method="treecode", budget=12, **options)
    assert (estimate[~seen.any(axis=-1)] == 0).all()


@pytest.mark.parametrize("diagonal", [0.0, "0", [0]])
def test_other_diagonals_are_refused(rng, diagonal):
    with pytest.raises(OptionError, match="diagonal must be an integer, got"):
        kdecore.attention(*rng.standard_normal((3, 9, 2)), diagonal=diagonal)


def test_reports_say_it(rng):
    x = rng.standard_normal((20, 2))
    assert kdecore.attention(x, x, x, diagonal=3, return_report=True)[1].diagonal == 3
    assert kdecore.attention(x, x, x, causal=True, return_report=True)[1].diagonal == 0
    assert kdecore.attention(x, x, x, return_report=True)[1].diagonal is None


def test_groups_that_are_alike_are_cut_once(rng, monkeypatch):
    """What a query sees takes O(n) on the host to find: once for all groups of one length, not once for each."""
    found = []
    original = kdecore.engine.split.repeated
    monkeypatch.setattr(kdecore.engine.split, "repeated", lambda *some: found.append(1) or original(*some))
    x = rng.standard_normal((8, 50, 3))
    kdecore.attention(x, x, x, method="exact", causal=True)
    assert len(found) == 1
    lengths = [50, 9, 50, 50, 9, 0, 9, 50]
    out = kdecore.attention(x, x, x, method="exact", causal=True, key_lengths=lengths)
    assert len(found) == 1 + 3
    bias = oracles.causal_bias(50, 50) + np.where(np.arange(50) < np.array(lengths)[:, None], 0.0, -np.inf)[:, None]
    np.testing.assert_allclose(out, oracles.masked_attention(x, x, x, bias)[0], atol=1e-12)


@pytest.mark.parametrize(
    ("options", "plans"),
    [
        ({"method": "treecode", "budget": 40}, 1),
        ({"budget": 40, "causal": True}, 1),
        ({"method": "sortlsh", "budget": 40, "return_report": True}, 1),
        ({"method": "sortlsh", "budget": 40, "return_report": True, "key_lengths": [300, 200, 300]}, 2),
        ({"rtol": 1e-9}, 1),
    ],
)
def test_what_is_done_is_planned_once(rng, monkeypatch, options, plans):
    made = []

    def counted(*arguments, **named):
        made.append(named)
        return make_plan(*arguments, **named)

    for module in (kdecore.api.run, sys.modules["kdecore.api.attention"]):
        monkeypatch.setattr(module, "make_plan", counted)
    kdecore.attention(*rng.standard_normal((3, 3, 300, 5)), **options)
    assert len(made) == plans
