"""Merging parts: commutative, associative, and equal to the whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdecore.arrays.namespace import host
from kdecore.core.state import AttentionState, merge_states, softmax_part
from kdecore.testing import strategies
from tests import oracles


def part_of(q, k, v):
    """Attention on some keys, the empty part for none."""
    if k.shape[0] == 0:
        return AttentionState(np.zeros((q.shape[0], v.shape[1])), np.full(q.shape[0], -np.inf))
    return AttentionState(*oracles.exact_attention(q, k, v, 1.0))


def assert_same(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a.out, b.out, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(a.lse, b.lse, rtol=tolerance, atol=tolerance)


@st.composite
def split_problems(draw):
    """q, k, v and two cuts of the keys; parts may be empty. Logits reach about ± 1000."""
    Q, K, D, V = draw(strategies.n_q), draw(strategies.n_k), draw(strategies.d), draw(strategies.d_v)
    q, k, v = (draw(strategies.normal_arrays(shape)) for shape in ((Q, D), (K, D), (K, V)))
    cuts = sorted(draw(st.lists(st.integers(0, K), min_size=2, max_size=2)))
    return q * draw(st.sampled_from((0.0, 1.0, 300.0))), k, v, cuts


@given(split_problems())
@settings(max_examples=200, deadline=None)
def test_merging_is_associative_commutative_and_gives_the_whole(problem):
    q, k, v, (first, second) = problem
    a, b, c = (part_of(q, k[cut], v[cut]) for cut in (slice(first), slice(first, second), slice(second, None)))
    left = merge_states(host, merge_states(host, a, b), c)
    assert_same(left, merge_states(host, a, merge_states(host, b, c)))
    assert_same(left, merge_states(host, c, merge_states(host, b, a)))
    assert_same(merge_states(host, a, b), merge_states(host, b, a))
    assert_same(left, part_of(q, k, v))


def test_merging_on_every_backend(backend, rng):
    q, k, v = rng.standard_normal((5, 3)), rng.standard_normal((9, 3)), rng.standard_normal((9, 2))
    parts = [AttentionState(*backend.arrays(x.out, x.lse)) for x in (part_of(q, k[:4], v[:4]), part_of(q, k[4:], v[4:]))]
    found = merge_states(backend.xp, *parts)
    assert_same(AttentionState(backend.numpy(found.out), backend.numpy(found.lse)), part_of(q, k, v))


def test_empty_parts_change_nothing_and_stay_empty(backend, rng):
    q, k, v = rng.standard_normal((5, 3)), rng.standard_normal((9, 3)), rng.standard_normal((9, 2))
    whole, empty = (AttentionState(*backend.arrays(x.out, x.lse)) for x in (part_of(q, k, v), part_of(q, k[:0], v[:0])))
    for found in (merge_states(backend.xp, whole, empty), merge_states(backend.xp, empty, whole)):
        np.testing.assert_array_equal(backend.numpy(found.out), backend.numpy(whole.out))
        np.testing.assert_array_equal(backend.numpy(found.lse), backend.numpy(whole.lse))
    nothing = merge_states(backend.xp, empty, empty)
    assert (backend.numpy(nothing.out) == 0).all()
    assert (backend.numpy(nothing.lse) == -np.inf).all()


def test_parts_with_an_infinite_denominator_are_not_emptied(rng):
    """lse = +∞ is an overflow upstream: it must not come out as a plausible number."""
    part = AttentionState(np.ones((1, 2)), np.array([np.inf]))
    with np.errstate(invalid="ignore"):
        merged = merge_states(host, part, AttentionState(np.ones((1, 2)), np.zeros(1)))
    assert not np.isfinite(merged.lse).any()


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4, 1e300])
def test_softmax_part_subtracts_the_maximum(backend, rng, offset):
    logits, v = rng.standard_normal((2, 5, 9)), rng.standard_normal((2, 9, 3))
    expected = np.exp(logits) @ v / np.exp(logits).sum(axis=-1, keepdims=True)
    if offset == 1e300:
        logits, expected = logits * 0, np.broadcast_to(v.mean(axis=1, keepdims=True), (2, 5, 3))
    found = softmax_part(backend.xp, backend.array(logits + offset).__mul__(1.0), backend.array(v))
    np.testing.assert_allclose(backend.numpy(found.out), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(backend.numpy(found.lse), np.log(np.exp(logits).sum(axis=-1)) + offset, rtol=1e-12)


def test_softmax_part_of_masked_rows_is_empty(backend, rng):
    logits, v = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 4, 3))
    logits[0] = -np.inf
    logits[1, 0, 1:] = -np.inf
    found = softmax_part(backend.xp, backend.array(logits) + 0.0, backend.array(v))
    out, lse = backend.numpy(found.out), backend.numpy(found.lse)
    assert (out[0] == 0).all()
    assert (lse[0] == -np.inf).all()
    np.testing.assert_allclose(out[1, 0], v[1, 0], rtol=1e-15)
    np.testing.assert_allclose(lse[1, 0], logits[1, 0, 0], rtol=1e-15)
    assert np.isfinite(out).all()
