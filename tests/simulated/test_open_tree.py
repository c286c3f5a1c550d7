"""`open_tree` in the simulator: the lists of its reference, in float64."""

from itertools import pairwise

import numpy as np
import pytest

from kdecore.kernels.open_tree import cuda, reference
from kdecore.namespaces import host
from kdecore.tree import bounds, depth
from tests.trees import LEAF_SIZE, assert_same_lists, tree_problem


@pytest.mark.parametrize(
    "given",
    [
        {"n": 50, "n_q": 6, "rows": 3, "slots": 14},
        {"n": 40, "n_q": 6, "rows": 3, "slots": 11, "own": False},
        {"n": 45, "n_q": 6, "rows": 6, "slots": 30, "groups": 1},
        {"n": 30, "n_q": 5, "rows": 5, "slots": 29, "own": False, "groups": 1},
        {"n": 50, "n_q": 4, "rows": 2, "slots": 14, "scale": 6.0, "own": False, "groups": 1},
        {"n": 64, "n_q": 2, "rows": 2, "slots": 14, "seen": (2, 1, 3), "own": False},
        {"n": 5, "n_q": 2, "rows": 1, "slots": 3, "own": False},
    ],
    ids=str,
)
def test_open_tree_lists_what_the_reference_lists(rng, given):
    arguments = tree_problem(rng, d=3, p=2, **given)
    assert_same_lists(cuda.open_tree(host, *arguments), reference.open_tree(host, *arguments))


@pytest.mark.parametrize("sizes", ["from 1e-40 to 1e9", "mostly 0", "all 0"])
def test_errors_of_any_size(rng, monkeypatch, sizes):
    """All octaves have bins of their own. Which nodes of error 0 are opened is left open: lists hold every key once."""
    monkeypatch.setattr(cuda, "BINS", 256)
    arguments = list(tree_problem(rng, n=50, n_q=2, rows=2, d=3, p=2, slots=14, own=False, groups=1))
    shape = arguments[7].shape
    if sizes == "from 1e-40 to 1e9":
        arguments[7] = arguments[7] * 10.0 ** rng.integers(-40, 10, shape)
        assert_same_lists(cuda.open_tree(host, *arguments), reference.open_tree(host, *arguments))
    else:
        arguments[7] = np.where(rng.random(shape) < (0.8 if sizes == "mostly 0" else 1.0), 0.0, arguments[7])
        arguments[5] = np.zeros_like(arguments[5])
        _, log_weight = cuda.open_tree(host, *arguments)
        np.testing.assert_allclose(np.exp(log_weight).sum(axis=-1), 50, rtol=1e-12)


def test_queries_that_are_not_finite_count_as_nothing(rng):
    q, scale, coordinates, *others = tree_problem(rng, n=40, n_q=6, rows=3, d=3, p=2, slots=20, groups=1)
    q[0, 1, 2], coordinates[0, 1] = np.nan, np.inf
    q[0, 4, 0], coordinates[0, 4] = -np.inf, np.nan
    found = cuda.open_tree(host, q, scale, coordinates, *others)
    assert_same_lists(found, reference.open_tree(host, q, scale, coordinates, *others))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_lists_in_float32_hold_every_key_once(rng, dtype):
    """Rounding may open another node; what is listed covers all keys, each in one slot."""
    q, scale, coordinates, index, *nodes, own, slots, start = tree_problem(rng, n=50, n_q=3, rows=3, d=3, p=2, slots=17)
    single = [x.astype(np.float32) for x in (coordinates, *nodes)]
    key_index, log_weight = cuda.open_tree(host, q.astype(dtype), scale, single[0], index, *single[1:], own, slots, start)
    assert log_weight.dtype == np.float32
    count = nodes[1].shape[1]
    edges = [
        (int(first), int(end)) for level in range(depth(50, LEAF_SIZE) + 1) for first, end in pairwise(bounds(50, level))
    ]
    assert len(edges) == count
    for at in np.ndindex(index.shape[:2]):
        covered = np.zeros(50, int)
        listed = set(own[at].tolist())
        for row, weight in zip(key_index[at], log_weight[at], strict=True):
            if weight == -np.inf:
                continue
            if row >= count:
                covered[row - count] += 1
            else:
                inside = [j for j in range(*edges[row]) if j not in listed]
                covered[inside] += 1
        np.testing.assert_array_equal(covered, 1)
