"""`attend_blocks` and `attend_dense` in Triton's interpreter, against their references in float64 on the same numbers."""

import array_api_compat.torch as xp
import numpy as np
import pytest
import torch

from kdecore.core.state import AttentionState
from kdecore.kernels.attend_blocks import contract, reference, triton
from kdecore.kernels.attend_dense import reference as dense_reference
from kdecore.kernels.attend_dense import triton as dense
from tests.interpreted.problems import DTYPES, assert_part, bias, expected, lists, rows

SHAPES = [
    {},
    {"b": 1},
    {"s": 1},
    {"d": 1, "d_v": 1},
    {"N": 1, "b": 1, "s": 1},
    {"d": 17, "d_v": 33},
    {"N": 1, "b": 130, "s": 70, "d": 20, "d_v": 20},
    {"N": 2, "b": 16, "s": 32, "d": 64, "d_v": 65},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(rng, tiles, dtype, shape):
    """The last two queries of the last block are one, and query 0 may be in none."""
    N, b, s, d, d_v = ({"N": 4, "b": 5, "s": 37, "d": 4, "d_v": 3} | shape).values()
    q, k, v = rows(rng, dtype, (N * b - (b > 1), d), (40, d), (40, d_v))
    found = lists(rng, len(q), len(k), N, b, s)
    assert_part(triton.attend_blocks(xp, q, k, v, *found, 0.3), expected(q, k, v, *found, 0.3), v, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_at_minus_infinity(rng, tiles, dtype):
    """Blocks with all, all but one, the first part, the last part, and every other of their slots masked."""
    q, k, v = rows(rng, dtype, (30, 4), (50, 4), (50, 5))
    query_index, key_index, log_weight = lists(rng, 30, 50, 6, 5, 40)
    log_weight[0] = -torch.inf
    log_weight[1, 1:] = -torch.inf
    log_weight[2, :38] = -torch.inf
    log_weight[3, 20:] = -torch.inf
    log_weight[4, ::2] = -torch.inf
    part = triton.attend_blocks(xp, q, k, v, query_index, key_index, log_weight, 0.3)
    assert (part.out[query_index[0]] == 0).all()
    assert (part.lse[query_index[0]] == -torch.inf).all()
    assert_part(part, expected(q, k, v, query_index, key_index, log_weight, 0.3), v, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("b", "s"), [(1, 1), (5, 7), (37, 33), (20, 70)])
def test_a_bias_and_what_was_before(rng, tiles, dtype, shared, b, s):
    """Two lists one after another: of the queries some are in no block, one is NaN and sees nothing, and one is there twice.

    What comes again has another bias here: the first counts.
    """
    blocks = 2
    q, k, v = rows(rng, dtype, (90, 5), (60, 5), (60, 21))
    query_index, key_index, log_weight = lists(rng, 90, 60, blocks, b, s)
    if b > 1:
        query_index[0, -1] = query_index[0, -2]
    plain = q.clone()
    q[query_index[0, b // 2]] = torch.nan
    plain[query_index[0, b // 2]] = 0.0
    part = truth = None
    for _ in range(2):
        key_index = key_index.flip(1) // 2
        added = bias(rng, 1 if shared else blocks, b, s)
        part = triton.attend_blocks(xp, q, k, v, query_index, key_index, log_weight, 0.3, added, part)
        truth = expected(plain, k, v, query_index, key_index, log_weight, 0.3, added, truth)
    assert_part(part, truth, v, dtype)
    rest = torch.ones(90, dtype=torch.bool)
    rest[query_index] = False
    assert (part.out[rest] == 0).all()
    assert (part.lse[rest] == -torch.inf).all()


def test_what_was_before_is_kept_for_queries_of_no_block(rng):
    q, k, v = rows(rng, "float32", (40, 4), (30, 4), (30, 3))
    found = lists(rng, 40, 30, 2, 9, 7)
    before = AttentionState(*rows(rng, "float32", (40, 3), (40,)))
    copy = AttentionState(before.out.clone(), before.lse.clone())
    part = triton.attend_blocks(xp, q, k, v, *found, 0.3, None, before)
    rest = torch.ones(40, dtype=torch.bool)
    rest[found[0]] = False
    assert torch.equal(part.out[rest], copy.out[rest])
    assert torch.equal(part.lse[rest], copy.lse[rest])
    assert_part(
        part, expected(q, k, v, *found, 0.3, None, AttentionState(copy.out.double(), copy.lse.double())), v, "float32"
    )


@pytest.mark.parametrize("whole", [False, True])
def test_lists_number_the_rows_of_their_group(rng, tiles, monkeypatch, whole):
    """Where every query is in a block, nothing else is written."""
    groups, blocks, b, n_k = 3, 2, 20, 31
    n_q = blocks * b if whole else 47
    q, k, v = rows(rng, "bfloat16", (groups * n_q, 6), (groups * n_k, 6), (groups * n_k, 5))
    found = [lists(rng, n_q, n_k, blocks, b, 9) for _ in range(groups)]
    of_all = [
        torch.cat(parts) for parts in zip(*((x + g * n_q, y + g * n_k, z) for g, (x, y, z) in enumerate(found)), strict=True)
    ]
    if whole:
        monkeypatch.setattr(triton, "clear_rows", None)
    given = [torch.cat(parts) for parts in zip(*found, strict=True)]
    part = triton.attend_blocks(xp, q, k, v, *given, 0.3, groups=groups, whole=whole)
    assert_part(part, expected(q, k, v, *of_all, 0.3), v, "bfloat16")


@pytest.mark.parametrize("b", [17, 33, 129])
def test_a_query_that_fills_up_a_block_is_merged_once(rng, b):
    """Also where it comes again first thing in a tile of another program."""
    q, k, v = rows(rng, "float32", (2 * b - 1, 6), (50, 6), (50, 6))
    found, more = lists(rng, 2 * b - 1, 50, 2, b, 9), lists(rng, 2 * b - 1, 50, 2, b, 9)[1:]
    first, second = (call(q, k, v, *found, 0.3) for call in (lambda *x: triton.attend_blocks(xp, *x), expected))
    first = triton.attend_blocks(xp, q, k, v, found[0], *more, 0.3, None, first)
    assert_part(first, expected(q, k, v, found[0], *more, 0.3, None, second), v, "float32")


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_a_nan_stays_where_it_is(rng):
    """A query that is NaN has NaN, and no other."""
    q, k, v = rows(rng, "float32", (20, 4), (30, 4), (30, 3))
    found = lists(rng, 20, 30, 1, 20, 9)
    q[3] = torch.nan
    part = triton.attend_blocks(xp, q, k, v, *found, 0.3)
    assert part.out[3].isnan().all()
    assert part.lse[3].isnan()
    part.out[3], part.lse[3], q[3] = 0.0, -torch.inf, 0.0
    truth = expected(q, k, v, *found, 0.3)
    truth.out[3], truth.lse[3] = 0.0, -torch.inf
    assert_part(part, truth, v, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [30.0, -30.0])
def test_large_logits(rng, tiles, dtype, size):
    """Of some hundreds, where exp itself is infinite; their float32 errors are as many ulps of them, and so are weights'."""
    q, k, v = rows(rng, dtype, (20, 16), (40, 16), (40, 5))
    query_index, key_index, log_weight = lists(rng, 20, 40, 2, 10, 40)
    part = triton.attend_blocks(xp, q, k, v, query_index, key_index, log_weight * 100, size)
    truth = expected(q, k, v, query_index, key_index, log_weight * 100, size)
    assert float(truth.lse.abs().max()) > 100
    assert_part(part, truth, v, dtype)


def test_rows_that_lie_apart(rng):
    """Of wider rows the first columns, and rows that are not laid out row by row."""
    q, k, v = rows(rng, "float16", (20, 20), (40, 16), (5, 40))
    q, k, v = q[:, 3:12], k[:, :9], v.T
    found = lists(rng, 20, 40, 2, 10, 33)
    assert_part(triton.attend_blocks(xp, q, k, v, *found, 0.3), expected(q, k, v, *found, 0.3), v, "float16")


def test_nothing(rng):
    q, k, v = rows(rng, "float32", (0, 4), (30, 4), (30, 3))
    part = triton.attend_blocks(xp, q, k, v, *lists(rng, 0, 30, 0, 5, 9), 0.3)
    assert part.out.shape == (0, 3)
    part = dense.attend_dense(xp, q[None], k[None], v[None], 0.3)
    assert part.lse.shape == (1, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 7, 9, 4, 3), (1, 1, 1, 1, 1), (3, 40, 5, 2, 1), (1, 5, 300, 3, 33), (1, 130, 70, 80, 3)]
)
def test_attend_dense(rng, tiles, dtype, shape):
    G, n_q, n_k, d, d_v = shape
    q, k, v = rows(rng, dtype, (G, n_q, d), (G, n_k, d), (G, n_k, d_v))
    truth = dense_reference.attend_dense(xp, q.double(), k.double(), v.double(), 0.3)
    assert_part(dense.attend_dense(xp, q, k, v, 0.3), truth, v, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_references_take_half_precision(rng, dtype):
    """They are chosen for what is too wide for tiles, and round nothing to the dtype of the rows."""
    q, k, v = rows(rng, dtype, (20, 4), (40, 4), (40, 5))
    found = lists(rng, 20, 40, 2, 10, 33)
    assert_part(reference.attend_blocks(xp, q, k, v, *found, 0.3), expected(q, k, v, *found, 0.3), v, "float32")
    truth = dense_reference.attend_dense(xp, q[None].double(), k[None].double(), v[None].double(), 0.3)
    assert_part(dense_reference.attend_dense(xp, q[None], k[None], v[None], 0.3), truth, v, "float32")


def test_rows_too_wide_for_tiles_are_not_taken(rng):
    q, k, v = rows(rng, "float32", (20, 300), (40, 300), (40, 300))
    with pytest.raises(AssertionError):
        triton.attend_blocks(xp, q, k, v, *lists(rng, 20, 40, 2, 10, 33), 0.3)
    with pytest.raises(AssertionError):
        dense.attend_dense(xp, q[None], k[None], v[None], 0.3)


def test_parts_hold_a_width_and_little_more():
    """Powers of two, 16 at least; together no wider than one power of two for all would be."""
    for width in range(1, 600):
        main, rest = contract.parts(width)
        assert max(16, width) <= main + rest <= 2 ** np.ceil(np.log2(max(16, width)))
        assert all(x == 0 or (x >= 16 and x & (x - 1) == 0) for x in (main, rest))
    assert contract.parts(64) == (64, 0)
    assert contract.parts(65) == (64, 16)
    assert contract.parts(127) == (128, 0)
