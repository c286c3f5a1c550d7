"""`open_tree` and `pick_threshold` in Triton's interpreter: as their contracts have it, but for what rounding decides."""

from itertools import cycle

import array_api_compat.torch as xp
import numpy as np
import pytest
import torch

from bench.gpu.checks import lists_differ
from kdecore.arrays.namespace import host
from kdecore.core.state import AttentionState
from kdecore.core.tree import BlockQueries, Tree
from kdecore.kernels.attend_tree import reference as attending_reference
from kdecore.kernels.attend_tree import triton as attending
from kdecore.kernels.open_tree import reference, triton
from kdecore.kernels.pick_threshold import reference as picking_reference
from kdecore.kernels.pick_threshold import triton as picking
from kdecore.kernels.pick_threshold.contract import STEPS
from tests.trees import pass_problem

CASES = [
    {"n": 300, "n_q": 37, "rows": 16, "budget": 60},
    {"n": 300, "n_q": 37, "rows": 16, "budget": 60, "apart": True},
    {"n": 701, "n_q": 66, "rows": 33, "budget": 150, "d": 19, "p": 5},
    {"n": 701, "n_q": 10, "rows": 5, "budget": 300, "scale": 3.0, "apart": True},
    {"n": 120, "n_q": 20, "rows": 10, "budget": 119, "groups": 1},
    {"n": 64, "n_q": 8, "rows": 4, "budget": 14, "seen": (2, 1, 3)},
    {"n": 5, "n_q": 2, "rows": 1, "budget": 3},
    {"n": 40, "n_q": 6, "rows": 3, "budget": 1},
    {"n": 1500, "n_q": 64, "rows": 64, "budget": 400, "d": 64, "p": 16, "groups": 1, "apart": True},
]
WIDE = [CASES[2], CASES[8]]
"""For half precision, which changes what is loaded and how it is multiplied: of 19 columns, and of 64."""


def tensors(arguments, dtype="float32"):
    """Return queries and a tree as tensors: q and keys of a dtype (float16's keys of float32), the others of float32."""
    stored = getattr(torch, "float32" if dtype == "float16" else dtype)
    (q, scale, coordinates, index, apart), (keys, *summaries) = arguments
    queries = torch.tensor(q).to(getattr(torch, dtype)), scale, torch.tensor(coordinates).float(), torch.tensor(index), apart
    return BlockQueries(*queries), Tree(torch.tensor(keys).to(stored), *(torch.tensor(x).float() for x in summaries))


def wide(given):
    """Return the same numbers in float64, as NumPy arrays."""

    def widened(x):
        if not isinstance(x, torch.Tensor):
            return x
        return (x.double() if x.is_floating_point() else x).numpy()

    return [type(x)(*map(widened, x)) if hasattr(x, "_fields") else tuple(map(widened, x)) for x in given]


def expected(given, *rest):
    """Return what the reference lists of the same numbers in float64."""
    return reference.open_tree(host, *wide(given), *rest)


def assert_alike(found, truth, share=0.02):
    """Assert that lists differ in so little, that they ascend, and that nothing counts after their ends."""
    key_index, log_weight, shares, counts = (x.numpy() for x in found)
    *rows, true_counts = truth
    more = [(0, 0), (0, 0), (0, key_index.shape[2] - rows[0].shape[2])]
    true_index, true_weight, true_shares = (
        np.pad(x, more, constant_values=empty) for x, empty in zip(rows, (0, -np.inf, 0.0), strict=True)
    )
    assert lists_differ(key_index, log_weight, true_index, true_weight) <= share
    np.testing.assert_allclose(shares.sum(-1), true_shares.sum(-1), atol=0.02)
    assert abs(counts - true_counts).max() <= 3 + share * true_counts.max()
    for index, weight, mine, count in zip(
        *(x.reshape(-1, x.shape[-1]) for x in (key_index, log_weight, shares)), counts.flat, strict=True
    ):
        assert (np.diff(index[:count]) > 0).all()
        assert np.isfinite(weight[:count]).all()
        assert (weight[count:] == -np.inf).all()
        assert (index[count:] == 0).all()
        assert (mine[count:] == 0).all()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Let PyTorch's empty tensors hold what no list may."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(-7))


@pytest.mark.parametrize(
    ("case", "threshold", "dtype"),
    [
        *((case, threshold, "float32") for case, threshold in zip(CASES, cycle((0.02, 0.001, 0.3)), strict=False)),
        *((case, 0.02, dtype) for case in WIDE for dtype in ("bfloat16", "float16")),
    ],
    ids=str,
)
def test_lists(rng, case, threshold, dtype):
    arguments, start = pass_problem(rng, **case)
    given, most = tensors(arguments, dtype), max(case["budget"] * 4, start[2] - start[1])
    found = triton.open_tree(xp, *given, torch.tensor(threshold), most, start)
    assert found[0].shape == (*arguments[0].index.shape[:2], most)
    assert_alike(found, expected(given, np.asarray(threshold), most, start))


@pytest.mark.parametrize("tile", [16, 64])
def test_tiles_of_any_width(rng, monkeypatch, tile):
    monkeypatch.setattr(triton, "nodes_at_once", lambda *sizes: tile)
    arguments, start = pass_problem(rng, 200, groups=1, n=701, n_q=66, rows=33)
    given = tensors(arguments)
    found = triton.open_tree(xp, *given, torch.tensor(0.02), 800, start)
    assert_alike(found, expected(given, np.asarray(0.02), 800, start))


@pytest.mark.parametrize(("threshold", "most"), [(0.001, 55), (0.0, 30)])
def test_lists_that_would_be_too_long_begin_anew(rng, threshold, most):
    arguments, start = pass_problem(rng, groups=1, n=300, n_q=33)
    given = tensors(arguments)
    found = triton.open_tree(xp, *given, torch.tensor(threshold), most, start)
    assert 10 < int(found[3].max()) <= most
    assert_alike(found, expected(given, np.asarray(threshold), most, start))


def test_queries_that_are_not_finite_count_as_nothing(rng):
    (queries, tree), start = pass_problem(rng, 60, n=200, n_q=48, rows=16)
    queries.q[0, 1, 2], queries.coordinates[0, 1] = np.nan, np.inf
    queries.q[1, 4, 0], queries.coordinates[1, 4] = -np.inf, np.nan
    given = tensors((queries, tree))
    found = triton.open_tree(xp, *given, torch.tensor(0.05), 240, start)
    assert_alike(found, expected(given, np.asarray(0.05), 240, start))


def test_what_tiles_cannot_hold_is_not_taken(rng):
    arguments, start = pass_problem(rng, 200, n=300, n_q=140, rows=130)
    with pytest.raises(AssertionError):
        triton.open_tree(xp, *tensors(arguments), torch.tensor(0.1), 300, start)


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, "float32") for case in CASES), *((case, "bfloat16") for case in WIDE)], ids=str
)
def test_a_threshold(rng, case, dtype):
    """The end of the bin that it lies in, which is no less; what other levels open beside it moves it a little."""
    arguments, start = pass_problem(rng, **case)
    given, budget = tensors(arguments, dtype), case["budget"]
    found = float(picking.pick_threshold(xp, *given, budget, 10 * case["n"], start))
    truth = float(picking_reference.pick_threshold(host, *wide(given), budget, 10 * case["n"], start))
    assert truth * 0.97 <= found <= truth * 2.0 ** (1 / STEPS) * 1.03


def test_a_level_of_the_pilot_has_no_more_nodes_than_it_may(rng):
    arguments, start = pass_problem(rng, 200, n=701, n_q=66, rows=33)
    given = tensors(arguments)
    found = float(picking.pick_threshold(xp, *given, 200, 16, start))
    truth = float(picking_reference.pick_threshold(host, *wide(given), 200, 16, start))
    assert truth * 0.97 <= found <= truth * 2.0 ** (1 / STEPS) * 1.03


def well_liked(rng, queries, tree):
    """Return for each query one of the twenty keys that it attends to most, −1 for some: in a list, and beside it."""
    logits = queries.q @ np.swapaxes(tree.keys[:, tree.nodes :], 1, 2)
    best = np.argsort(logits, axis=-1)[..., -20:]
    own = np.take_along_axis(best, rng.integers(0, 20, (*best.shape[:2], 1)), axis=-1)[..., 0]
    return np.where(rng.random(own.shape) < 0.1, -1, own)


@pytest.mark.parametrize(
    ("given", "d_v", "dtype"),
    [
        # What is given is read by columns, of which some are beyond 19; what isn't, is not read whatever the columns are.
        *((given, 19, "float32") for given in ("own slope limits", "before")),
        *((given, 64, "float32") for given in ("own", "slope", "")),
        *(("own slope limits", d_v, dtype) for d_v, dtype in ((64, "bfloat16"), (19, "float16"))),
    ],
)
def test_attention(rng, monkeypatch, request, given, d_v, dtype):
    """Against the reference's, of the same numbers in float64, a few blocks at a time."""
    monkeypatch.setattr(attending, "AT_ONCE", 700)
    if dtype == "float32":
        request.getfixturevalue("tiny")
    n_q, b = (38, 16) if d_v == 19 else (70, 35)
    arguments, start = pass_problem(rng, 60, n=300, n_q=n_q, rows=b, d=17)
    numbers, (groups, rows, _) = tensors(arguments, dtype), arguments[1].keys.shape

    def random(*shape):
        return torch.tensor(rng.standard_normal(shape)).float()

    values = random(groups, rows, d_v + 1).to(numbers[1].keys.dtype)
    own = torch.tensor(well_liked(rng, *arguments)) if "own" in given else None
    slope = random(groups, 3, 17, d_v) if "slope" in given else None
    limits = tuple(torch.sort(random(2, groups, d_v), dim=0).values) if "limits" in given else None
    before = AttentionState(random(groups, n_q, d_v), random(groups, n_q)) if "before" in given else None
    numbers_of_before = (before.out, before.lse) if before else ()
    *rest, kept = wide([(values, torch.tensor(0.05)), (own, slope), limits or (), numbers_of_before])
    (wide_values, threshold), others, ends = rest
    truth, true_counts = attending_reference.attend_tree(
        host,
        *wide(numbers),
        wide_values,
        threshold,
        240,
        start,
        *others,
        ends or None,
        AttentionState(*kept) if kept else None,
    )
    part, counts = attending.attend_tree(xp, *numbers, values, torch.tensor(0.05), 240, start, own, slope, limits, before)
    inside = np.zeros((groups, n_q), bool)
    for group, index in enumerate(arguments[0].index):
        inside[group, index.reshape(-1)] = True
    inside |= before is not None
    assert abs(counts.numpy() - true_counts).max() <= 6
    size = {"float32": 2e-4, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    off = np.abs(part.out.numpy() - truth.out).max(axis=-1)[inside]
    assert np.quantile(np.abs(part.lse.numpy() - truth.lse)[inside], 0.9) < size
    # Rounding opens other nodes for few blocks.
    assert np.quantile(off, 0.9) < size
    assert off.max() < 0.2
