"""`open_sweeps` in the simulator: the lists of its reference, in float64."""

from itertools import pairwise

import numpy as np
import pytest

from kdecore.kernels.open_sweeps import cuda, reference
from kdecore.namespaces import host
from kdecore.tree import bounds, depth
from tests.trees import LEAF_SIZE, assert_same_lists, tree_problem


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Let empty arrays hold what no list may, so that what is read before it is written shows."""
    empty = host.empty

    def filled(*args, **kwargs):
        found = empty(*args, **kwargs)
        found.fill(np.nan if found.dtype.kind == "f" else 10**9)
        return found

    monkeypatch.setattr(host, "empty", filled)


def assert_lists_of_the_reference(arguments):
    """Assert that the kernel lists what the reference does, and return how many slots hold something."""
    found = cuda.open_sweeps(host, *arguments)
    assert found[0].shape == found[1].shape == (*arguments[3].shape[:2], arguments[-2])
    assert_same_lists(found, reference.open_sweeps(host, *arguments))
    return np.isfinite(found[1]).sum(axis=-1)


@pytest.mark.parametrize(
    "given",
    [
        {"n": 50, "n_q": 6, "rows": 3, "slots": 14},
        {"n": 40, "n_q": 6, "rows": 3, "slots": 11, "own": False},
        {"n": 64, "n_q": 6, "rows": 6, "slots": 40, "groups": 1},
        {"n": 50, "n_q": 4, "rows": 2, "slots": 14, "scale": 6.0, "own": False, "groups": 1},
        {"n": 64, "n_q": 2, "rows": 2, "slots": 14, "seen": (2, 1, 3), "own": False},
        {"n": 5, "n_q": 2, "rows": 1, "slots": 3, "own": False},
    ],
    ids=str,
)
def test_open_sweeps_lists_what_the_reference_lists(rng, given):
    assert_lists_of_the_reference(tree_problem(rng, d=3, p=2, **given))


@pytest.mark.parametrize("start", [(2, 0, 4), (3, 0, 8)], ids=str)
def test_lists_that_begin_with_several_nodes(rng, start):
    """The first nodes are ranked beside their own sum, for each query."""
    arguments = list(tree_problem(rng, n=64, n_q=8, rows=4, d=3, p=2, slots=14, scale=2.0, own=False, groups=1))
    assert_lists_of_the_reference([*arguments[:-1], start])


@pytest.mark.parametrize("sweeps", [1, 3])
def test_lists_that_end_after_so_many_sweeps(rng, monkeypatch, sweeps):
    """Fewer than it takes to open nothing more."""
    arguments = tree_problem(rng, n=50, n_q=4, rows=2, d=3, p=2, slots=20, own=False, groups=1)
    for implementation in (cuda, reference):
        monkeypatch.setattr(implementation, "MORE_SWEEPS", sweeps - 1 - depth(50, LEAF_SIZE))
    assert_lists_of_the_reference(arguments)


def test_one_slot_holds_the_root(rng):
    held = assert_lists_of_the_reference(tree_problem(rng, n=40, n_q=4, rows=2, d=3, p=2, slots=1, own=False, groups=1))
    np.testing.assert_array_equal(held, 1)


def test_all_but_one_slot_list_keys(rng):
    held = assert_lists_of_the_reference(tree_problem(rng, n=30, n_q=5, rows=5, d=3, p=2, slots=29, own=False, groups=1))
    assert held.min() > 20


def test_own_positions_that_come_again(rng):
    arguments = list(tree_problem(rng, n=40, n_q=8, rows=4, d=3, p=2, slots=16, groups=1))
    arguments[-3][:, :, 1:3] = arguments[-3][:, :, :1]
    assert_lists_of_the_reference(arguments)


def test_nodes_that_are_all_own(rng):
    arguments = list(tree_problem(rng, n=20, n_q=6, rows=6, d=3, p=2, slots=10, groups=1))
    arguments[-3][:] = np.arange(6)
    assert_lists_of_the_reference(arguments)


@pytest.mark.parametrize("sizes", ["from 1e-90 to 1e60", "all 0"])
def test_errors_of_any_size(rng, sizes):
    """Errors above the largest one count alike, and nothing is opened where there are none."""
    arguments = list(tree_problem(rng, n=50, n_q=2, rows=2, d=3, p=2, slots=14, own=False, groups=1))
    shape = arguments[7].shape
    arguments[7] = arguments[7] * 10.0 ** rng.integers(-90, 61, shape) if sizes != "all 0" else np.zeros(shape)
    assert_lists_of_the_reference(arguments)


def test_logits_far_apart(rng):
    """Logits of thousands, as sums of weights relative to the largest hold them."""
    q, *others = tree_problem(rng, n=50, n_q=4, rows=2, d=3, p=2, slots=14, groups=1)
    assert_lists_of_the_reference([1000.0 * q, *others])


def test_queries_that_are_not_finite_count_as_nothing(rng):
    arguments = list(tree_problem(rng, n=40, n_q=6, rows=3, d=3, p=2, slots=20, groups=1))
    arguments[0][0, 1, 2], arguments[2][0, 1] = np.nan, np.inf
    arguments[0][0, 4, 0], arguments[2][0, 4] = -np.inf, np.nan
    assert_lists_of_the_reference(arguments)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_lists_in_float32_hold_every_key_once(rng, dtype):
    """Rounding may open another node; what is listed covers all keys, each in one slot."""
    q, scale, coordinates, index, *nodes, own, slots, start = tree_problem(rng, n=50, n_q=3, rows=3, d=3, p=2, slots=17)
    single = [x.astype(np.float32) for x in (coordinates, *nodes)]
    key_index, log_weight = cuda.open_sweeps(host, q.astype(dtype), scale, single[0], index, *single[1:], own, slots, start)
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
