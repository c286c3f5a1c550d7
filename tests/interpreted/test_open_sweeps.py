"""`open_sweeps` in Triton's interpreter: the lists of its reference, but for nodes that rounding opens or leaves closed."""

import array_api_compat.torch as xp
import numpy as np
import pytest
import torch

from bench.gpu_checks import lists_differ
from kdecore.kernels.open_sweeps import reference, triton
from kdecore.namespaces import host
from tests.trees import far_key_problem, tree_problem

CASES = [
    {"n": 300, "n_q": 70, "rows": 16, "slots": 60},
    {"n": 300, "n_q": 70, "rows": 16, "slots": 60, "own": False},
    {"n": 701, "n_q": 66, "rows": 33, "slots": 150, "d": 19, "p": 5},
    {"n": 701, "n_q": 10, "rows": 5, "slots": 300, "scale": 3.0},
    {"n": 120, "n_q": 20, "rows": 10, "slots": 119, "own": False, "groups": 1},
    {"n": 64, "n_q": 8, "rows": 4, "slots": 14, "seen": (2, 1, 3), "own": False},
    {"n": 5, "n_q": 2, "rows": 1, "slots": 3, "own": False},
    {"n": 40, "n_q": 6, "rows": 3, "slots": 1, "own": False},
    {"n": 1500, "n_q": 64, "rows": 64, "slots": 400, "d": 64, "p": 16, "groups": 1},
]


def tensors(arguments, dtype="float32"):
    """Return arguments as tensors: q and keys of a dtype (float16's keys of float32), the others of float32."""
    stored = "float32" if dtype == "float16" else dtype
    q, scale, coordinates, index, keys, *summaries, own, slots, start = arguments
    single = [torch.tensor(x, dtype=torch.float32) for x in summaries]
    given = (torch.tensor(q).to(getattr(torch, dtype)), scale, torch.tensor(coordinates, dtype=torch.float32))
    more = (torch.tensor(index), torch.tensor(keys).to(getattr(torch, stored)), *single)
    return (*given, *more, None if own is None else torch.tensor(own), slots, start)


def expected(given):
    """Return what the reference lists of the same numbers in float64."""
    wide = [x.double().numpy() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given]
    return reference.open_sweeps(host, *(x.numpy() if isinstance(x, torch.Tensor) else x for x in wide))


def poisoned(monkeypatch):
    """Let PyTorch's empty tensors hold what no list may."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(-7))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lists(rng, monkeypatch, case, dtype):
    poisoned(monkeypatch)
    given = tensors(tree_problem(rng, **case), dtype)
    found = [x.numpy() for x in triton.open_sweeps(xp, *given)]
    assert lists_differ(*found, *expected(given)) <= 0.02


@pytest.mark.parametrize("tile", [16, 64])
def test_tiles_of_any_width(rng, monkeypatch, tile):
    monkeypatch.setattr(triton, "nodes_at_once", lambda *sizes: tile)
    given = tensors(tree_problem(rng, n=701, n_q=66, rows=33, slots=200))
    assert lists_differ(*(x.numpy() for x in triton.open_sweeps(xp, *given)), *expected(given)) <= 0.02


@pytest.mark.parametrize("length", [30.0, 300.0])
def test_slots_that_a_key_far_above_all_others_leaves(rng, length):
    """It is listed, and so is what hardly counts beside it: which, rounding may decide."""
    given = tensors(far_key_problem(rng, length))
    key_index, log_weight = (x.numpy()[0, 0] for x in triton.open_sweeps(xp, *given))
    assert (key_index[log_weight == 0.0] == given[5].shape[1] + 77).any()
    assert np.isfinite(log_weight).sum() > 40


def test_own_positions_that_come_again(rng):
    arguments = list(tree_problem(rng, n=200, n_q=48, rows=16, slots=60))
    arguments[-3][:, :, 4:9] = arguments[-3][:, :, 4:5]
    given = tensors(arguments)
    assert lists_differ(*(x.numpy() for x in triton.open_sweeps(xp, *given)), *expected(given)) <= 0.02


def test_queries_that_are_not_finite_count_as_nothing(rng):
    arguments = list(tree_problem(rng, n=200, n_q=48, rows=16, slots=60))
    arguments[0][0, 1, 2], arguments[2][0, 1] = np.nan, np.inf
    arguments[0][1, 4, 0], arguments[2][1, 4] = -np.inf, np.nan
    given = tensors(arguments)
    assert lists_differ(*(x.numpy() for x in triton.open_sweeps(xp, *given)), *expected(given)) <= 0.02


def test_what_tiles_cannot_hold_is_not_taken(rng):
    given = tensors(tree_problem(rng, n=300, n_q=140, rows=130, slots=200))
    with pytest.raises(AssertionError):
        triton.open_sweeps(xp, *given)
