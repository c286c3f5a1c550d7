"""`rank_codes` against its contract, row by row, and the treecode on rows ordered by one sort of them."""

import numpy as np
import pytest

import kdecore
from kdecore import Treecode
from kdecore.accuracy.metrics import errors
from kdecore.arrays.namespace import host
from kdecore.compare.cases import glove_case
from kdecore.core.tree import bounds
from kdecore.kernels.rank_codes.contract import RATIO, SAMPLE
from tests.implementations import implementations, run


def naive_codes(x, bits, in_order=0):
    """Codes of the rows of one group, from the contract."""
    n, p = x.shape
    x = np.where(np.isfinite(x), x, 0.0)
    count = min(SAMPLE, n)
    sample = x[[j * n // count for j in range(count)]]
    variance, given = sample.var(axis=0), [0] * p
    pattern = [""] * n
    for _ in range(bits - in_order):
        widest = int(np.argmax(variance))
        variance[widest] /= RATIO
        given[widest] += 1
        for row in range(n):
            cell = (int((sample[:, widest] <= x[row, widest]).sum()) << given[widest]) // (count + 1)
            pattern[row] += str((cell ^ (cell >> 1)) & 1)
    codes = []
    for row, bits_of_row in enumerate(pattern):
        rank, parity = 0, 0
        for bit in bits_of_row:
            parity ^= int(bit)
            rank = 2 * rank + parity
        node = int(np.searchsorted(bounds(n, in_order), row, side="right")) - 1
        codes.append((node << (bits - in_order)) + rank)
    return codes


@pytest.mark.parametrize(
    ("n", "p", "bits", "in_order"), [(1, 1, 4, 0), (200, 4, 12, 0), (1500, 3, 30, 0), (77, 2, 10, 3), (50, 5, 4, 4)]
)
@implementations("rank_codes")
def test_rank_codes_follow_the_contract(backend, rng, implementation, n, p, bits, in_order):
    x = rng.standard_normal((2, n, p)) * np.geomspace(2.0, 0.2, p)
    x[1] = np.round(x[1])
    x[0, n // 2, 0] = np.nan
    found = run(implementation, backend, x, bits, in_order)
    assert found.dtype == np.int32
    assert found.min() >= 0
    assert found.max() < 2**bits
    assert found.tolist() == [naive_codes(group, bits, in_order) for group in x]


@implementations("rank_codes")
def test_codes_of_one_coordinate_are_its_quantiles(backend, rng, implementation):
    """In ascending order, and equally many of each."""
    x = rng.permutation(SAMPLE).reshape(1, -1, 1).astype(np.float64)
    found = run(implementation, backend, x, 5)[0]
    np.testing.assert_array_equal(np.diff(found[np.argsort(x[0, :, 0])]) >= 0, True)
    counts = np.bincount(found, minlength=32)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(("scale", "most"), [(1.0, 0.29), (10**-0.5, 0.115)])
def test_one_sort_errs_little_more_than_a_tree(scale, most):
    """0.95 and 1.36 times as much: .271 and .107, by a tree .286 and .078."""
    words = glove_case(2048)
    exact = kdecore.attention(words.q, words.k, words.v, method="exact", scale=scale)
    found = {
        ordering: errors(
            host,
            kdecore.attention(
                words.q, words.k, words.v, method=Treecode(ordering=ordering, block_size=16), budget=256, scale=scale
            ),
            exact,
        ).frobenius
        for ordering in ("tree", "sort")
    }
    assert found["sort"] < most
    assert found["tree"] < most


def test_the_report_says_which_ordering_ran():
    x = np.random.default_rng(0).standard_normal((600, 8), dtype=np.float32)
    _, report = kdecore.attention(x, x, x, method="treecode", budget=64, return_report=True)
    assert report.options["ordering"] == "tree"
    assert "rank_codes" not in report.kernels
    _, report = kdecore.attention(x, x, x, method=Treecode(ordering="sort"), budget=64, return_report=True)
    assert report.options["ordering"] == "sort"
    assert {"rank_codes", "bucket_order"} <= set(report.kernels)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 100}], ids=str)
def test_one_sort_under_restrictions(backend, rng, options):
    """Of rows alike in all directions, 1.26 times as much as a tree at most."""
    q, k, v = rng.standard_normal((3, 2, 500, 6))
    arrays = backend.arrays(q, k, v)
    exact = backend.numpy(kdecore.attention(*arrays, method="exact", **options))
    off = {}
    for ordering in ("tree", "sort"):
        out = kdecore.attention(*arrays, method=Treecode(ordering=ordering, block_size=16), budget=200, **options)
        off[ordering] = np.linalg.norm(backend.numpy(out) - exact) / np.linalg.norm(exact)
    assert off["sort"] < 1.3 * off["tree"] + 1e-12


def test_unknown_ordering():
    with pytest.raises(kdecore.OptionError, match="ordering must be one of auto, sort, tree, given, got 'hash'"):
        Treecode(ordering="hash")


@implementations("rank_codes")
def test_bits_are_dealt_by_the_variances_of_the_sample(backend, rng, implementation):
    """Rows that are not sampled change no other row's code."""
    x = rng.standard_normal((1, 2 * SAMPLE, 3)) * [3.0, 2.0, 1.0]
    far = x.copy()
    far[0, 1::2, 2] *= 1e3
    first, second = (run(implementation, backend, rows, 12) for rows in (x, far))
    np.testing.assert_array_equal(first[0, ::2], second[0, ::2])
