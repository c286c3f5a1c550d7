"""Where queries stand among the keys: said once, adjusted by everything that cuts a call, and never taken from shapes."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kdecore
from kdecore import OptionError, Treecode
from kdecore.evaluate import left_diagonal
from kdecore.inputs import canonicalise
from kdecore.methods import SELECT, treecode
from kdecore.metrics import errors
from kdecore.namespaces import host
from kdecore.planning import make_plan
from kdecore.shares import check_restrictions, in_halves, shares
from kdecore.stretches import Remainder, cut
from tests import oracles


def owners(problem):
    """Return each query's own key by its label, the first coordinate of k, or −1: what every cut has to leave as it is."""
    if problem.diagonal is None or problem.n_k == 0:
        return np.full((problem.groups, problem.n_q), -1.0)
    key = (np.arange(problem.n_q) + problem.diagonal) // problem.repeats
    there = (key >= 0) & (key < problem.n_k)
    return np.where(there, problem.k[:, np.clip(key, 0, problem.n_k - 1), 0], -1.0)


def labelled(n_q, n_k, repeats, diagonal, groups=2):
    """Return a problem whose queries and keys say in their first coordinate which they are."""
    q = np.tile(np.arange(n_q, dtype=float)[:, None], (groups * repeats, 1, 2))
    k = np.tile(np.arange(n_k, dtype=float)[:, None], (groups, 1, 2))
    return canonicalise(q, k, k, diagonal=diagonal)


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
    span = problem.own_keys(*rows)
    there = expected[expected >= 0]
    assert (span is None) == (there.size == 0)
    if span is not None:
        np.testing.assert_array_equal((max(span[0], 0), min(span[1], n_k)), (there.min(), there.max() + 1))


@given(st.integers(2, 20), st.integers(1, 20), st.integers(1, 3), st.integers(-25, 25))
def test_halves_keep_it(n_q, n_k, repeats, diagonal):
    problem = labelled(n_q, n_k, repeats, diagonal, groups=1)
    (whole,) = shares(problem, check_restrictions(problem, False, None, None, None, problem.q))
    halves = [half.problem for half in in_halves(whole)]
    np.testing.assert_array_equal(np.concatenate([owners(half) for half in halves], axis=1), owners(problem))


@given(st.data(), st.integers(1, 20), st.integers(1, 20), st.integers(1, 3), st.integers(-25, 25))
def test_lengths_windows_and_what_they_leave_keep_it(data, n_q, n_k, repeats, diagonal):
    problem = labelled(n_q, n_k, repeats, diagonal)
    window = data.draw(st.one_of(st.none(), st.integers(1, 10)))
    lengths = data.draw(st.lists(st.integers(0, n_k), min_size=2, max_size=2))
    before = owners(problem)
    for share in shares(problem, check_restrictions(problem, True, window, lengths, None, problem.q)):
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
            part = replace(
                share.problem, q=share.problem.q[:, slice(*queries)], k=k, diagonal=left_diagonal(share.problem, rest)
            )
            own = owners(share.problem)[:, slice(*queries)]
            # Said where one span holds the own keys of all of these queries, and not said otherwise.
            all_left = any(np.isin(own, share.problem.k[0, slice(*span), 0]).all() for span in spans)
            np.testing.assert_array_equal(owners(part), own if all_left else np.full_like(own, -1.0))


def own_listed(problem, selection):
    """Return whether each query's own key is in its block's list: bool (G, n_q)."""
    tree_order = treecode.prepare(problem, make_plan(problem, method="treecode", budget=64)).keys.order
    nodes = selection.keys.shape[1] - problem.n_k
    listed = np.zeros((problem.groups, problem.n_q), dtype=bool)
    for group, block in np.ndindex(*selection.blocks.index.shape[:2]):
        index = selection.key_index[group, block][np.isfinite(selection.log_weight[group, block])]
        keys = tree_order[group][index[index >= nodes] - nodes]
        rows = selection.blocks.index[group, block]
        listed[group, rows] = np.isin((rows + (problem.diagonal or 0)) // problem.repeats, keys)
    return listed


@pytest.mark.parametrize(("n_q", "diagonal"), [(600, 0), (599, 1), (599, 0), (300, 300), (300, 17), (700, 0), (700, -100)])
def test_treecode_lists_own_keys_where_they_are_said(rng, n_q, diagonal):
    q, k = rng.standard_normal((n_q, 16)), rng.standard_normal((600, 16))
    problem = canonicalise(q, k, k, diagonal=diagonal)
    listed = own_listed(problem, SELECT["treecode"](problem, make_plan(problem, method="treecode", budget=64)))
    own = np.arange(n_q) + diagonal
    assert listed[0][(own >= 0) & (own < 600)].all()


def test_equal_shapes_say_nothing(rng):
    x = rng.standard_normal((2, 600, 16))
    problem = canonicalise(x, x, x)
    plan = make_plan(problem, method="treecode", budget=64)
    assert treecode.prepare(problem, plan).own is None
    assert not own_listed(problem, SELECT["treecode"](problem, plan)).all()


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


def test_a_sample_of_the_far_field_counts_own_keys_once(rng):
    """Own keys are listed, and a node's sample that hits one of its block's counts for nothing."""
    x = rng.standard_normal((1, 900, 8))
    problem = canonicalise(x[:, :800], x, x, diagonal=100)
    plan = make_plan(problem, method=Treecode(far_field="sample", block_size=8), budget=64)
    selection = SELECT["treecode"](problem, plan)
    for block in range(selection.key_index.shape[1]):
        counted = selection.key_index[0, block][np.isfinite(selection.log_weight[0, block])]
        own = selection.blocks.index[0, block] + 100
        assert np.isin(own, counted).all()
        assert all((counted == key).sum() == 1 for key in set(own.tolist()))


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
    original = kdecore.shares.repeated
    monkeypatch.setattr(kdecore.shares, "repeated", lambda *some: found.append(1) or original(*some))
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

    for module in (kdecore.outcomes, sys.modules["kdecore.attention"]):
        monkeypatch.setattr(module, "make_plan", counted)
    kdecore.attention(*rng.standard_normal((3, 3, 300, 5)), **options)
    assert len(made) == plans
