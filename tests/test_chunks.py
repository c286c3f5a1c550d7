"""Intervals of keys, and chunks of rows, against boolean matrices and plain loops."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kdecore.arrays.namespace import host
from kdecore.core.chunks import covers, cut, put_back, stacked, whole_chunks
from kdecore.core.key_ranges import Mask, as_intervals, both, normal, sliding
from tests import oracles


def matrix(visible, n_k):
    """Return what is seen as a boolean matrix (n_q, n_k)."""
    key = np.arange(n_k)
    return (key >= visible.first[:, None]) & (key < visible.end[:, None])


@st.composite
def intervals(draw):
    n_q, n_k = draw(st.integers(1, 12)), draw(st.integers(1, 15))
    edges = [sorted(draw(st.tuples(st.integers(0, n_k), st.integers(0, n_k)))) for _ in range(n_q)]
    first, end = np.array(edges).T
    return normal(first, end), n_k


@given(intervals(), st.data())
def test_intervals_do_what_matrices_do(found, data):
    visible, n_k = found
    seen = matrix(visible, n_k)
    assert visible.pairs == seen.sum()
    low, high = visible.outer
    assert not seen[:, :low].any()
    assert not seen[:, high:].any()
    first, end = visible.inner
    if first < end:
        assert seen[:, first:end].all()
        np.testing.assert_array_equal(
            matrix(visible.without(first, end), n_k - end + first), np.delete(seen, slice(first, end), axis=1)
        )
    assert seen.all(axis=0).sum() == max(0, end - first)
    a, b = sorted(data.draw(st.tuples(st.integers(0, n_k), st.integers(0, n_k))))
    np.testing.assert_array_equal(matrix(visible.within(a, b), b - a), seen[:, a:b])
    keys = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=n_k, max_size=n_k)))
    np.testing.assert_array_equal(matrix(visible.among(keys), len(keys)), seen[:, keys])
    rows = data.draw(st.lists(st.integers(0, len(seen) - 1), min_size=1))
    np.testing.assert_array_equal(matrix(visible.rows(np.array(rows)), n_k), seen[rows])
    back = as_intervals(seen)
    np.testing.assert_array_equal(matrix(back, n_k), seen)
    np.testing.assert_array_equal(matrix(both(visible, back), n_k), seen)


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_rows_with_gaps_are_no_intervals(rows):
    seen = np.array(rows)
    gaps = [np.diff(np.flatnonzero(row)).max(initial=1) > 1 for row in seen]
    assert (as_intervals(seen) is None) == any(gaps)


FAR = st.sampled_from((-(10**30), -(2**63), 2**62, 10**30))


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 15), FAR.map(abs)),
    st.one_of(st.integers(-15, 15), FAR),
)
def test_sliding_windows_follow_their_definition(n_q, n_k, causal, window, diagonal):
    distance = np.arange(n_q).astype(object)[:, None] + diagonal - np.arange(n_k)
    seen = (distance >= 0) if causal else np.ones_like(distance, dtype=bool)
    if window is not None:
        seen &= np.abs(distance) < window
    np.testing.assert_array_equal(matrix(sliding(n_q, n_k, causal, window, diagonal), n_k), seen)
    if causal and diagonal == n_k - n_q and (window is None or window < 100):
        np.testing.assert_array_equal(seen, oracles.causal_bias(n_q, n_k, window) == 0)


@given(st.integers(1, 50), st.integers(0, 4), st.integers(0, 50), st.integers(0, 50))
def test_whole_chunks_are_the_largest_run_that_fits(n, level, a, b):
    first, end = min(a, b, n), min(max(a, b), n)
    chunks = cut(n, 1 << level)
    assert [x for span in chunks for x in range(*span)] == list(range(n))
    sizes = [stop - begin for begin, stop in chunks]
    assert max(sizes) - min(sizes) <= 1
    some, span = whole_chunks((first, end), n, level)
    inside = [i for i, (begin, stop) in enumerate(chunks) if begin < stop and first <= begin and stop <= end]
    held = [x for i in inside for x in range(*chunks[i])]
    assert held == list(range(*span))
    if inside:
        assert span == (chunks[some.first][0], chunks[some.end - 1][1])


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))
def test_what_is_stacked_comes_back_in_its_place(groups, parts, length, before, gap):
    spans = [(before + i * (length + gap), before + i * (length + gap) + length) for i in range(parts)]
    n = spans[-1][1] + gap
    rows = np.arange(groups * n * 2.0).reshape(groups, n, 2)
    found = stacked(host, rows, spans, parts)
    assert found.shape == (groups * parts, length, 2)
    for group in range(groups):
        for part, (first, end) in enumerate(spans):
            np.testing.assert_array_equal(found[group * parts + part], rows[group, first:end])
    assert covers(spans, n) == (before == 0 and gap == 0)
    changed = put_back(host, rows, -found, spans)
    expected = rows.copy()
    for first, end in spans:
        expected[:, first:end] *= -1
    np.testing.assert_array_equal(changed, expected)


def test_a_mask_is_found_for_rows_of_several_heads(rng):
    """Rows are numbered with the heads of a position next to each other; one matrix may serve several heads."""
    values = rng.standard_normal((3, 4, 5))
    matrix_of = np.array([[0, 1], [2, 2]])
    mask = Mask(values, matrix_of)
    rows, keys = rng.integers(0, 8, (2, 3, 6)), rng.integers(0, 5, (2, 3, 7))
    found = mask.bias(host, rows, keys, np.float64)
    for g, b, i, j in np.ndindex(found.shape):
        row = rows[g, b, i]
        assert found[g, b, i, j] == values[matrix_of[g, row % 2], row // 2, keys[g, b, j]]
    some = np.array([5, 0, 3])
    one = mask.groups(slice(1, 2)).rows(host, some).keys(host, np.array([4, 1]))
    every = np.broadcast_to(np.arange(3), (1, 1, 3)), np.broadcast_to(np.arange(2), (1, 1, 2))
    np.testing.assert_array_equal(one.bias(host, *every, np.float64)[0, 0], values[2][some // 2][:, [4, 1]])
    seen = Mask(values[:1, :1] > 0, np.zeros((2, 1), np.int64))
    found = seen.bias(host, rows, keys, np.float32)
    np.testing.assert_array_equal(found == 0, np.broadcast_to((values[0, 0] > 0)[keys][:, :, None, :], found.shape))
    assert np.isneginf(found[found != 0]).all()
