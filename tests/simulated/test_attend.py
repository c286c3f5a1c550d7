"""`attend_blocks` and `attend_dense` in the simulator, against their references in float64 on the same numbers."""

import numpy as np
import pytest

from kdecore.arrays.namespace import host
from kdecore.core.state import AttentionState
from kdecore.kernels.attend_blocks import cuda, reference
from kdecore.kernels.attend_dense import cuda as dense
from kdecore.kernels.attend_dense import reference as dense_reference
from tests.simulated.rows import DTYPES, stored
from tests.tolerances import assert_close

SHAPES = [
    {},
    {"b": 1},
    {"s": 1},
    {"d": 1, "d_v": 1},
    {"N": 1, "b": 1, "s": 1},
    {"d": 13, "d_v": 17},
    {"N": 1, "b": 17, "s": 9, "d": 4, "d_v": 33},
    {"N": 2, "b": 8, "s": 12, "d": 8, "d_v": 16},
    {"d_v": 0},
]
"""Tiles are of 8 queries and 4 slots here, of 4 columns of keys, and of 16, 20 or 32 of values."""
# Of other dtypes rows are read otherwise, and float64 has tiles of its own: of one width of values each.
OF_DTYPES = [
    *(("float32", shape) for shape in SHAPES),
    *((dtype, SHAPES[i]) for dtype in ("float16", "bfloat16", "float64") for i in (0, 5, 6)),
    ("float64", SHAPES[8]),
]


def rows(rng, dtype, *shapes):
    """Return a namespace, random rows of each shape, and the same numbers in float64."""
    every = [stored(rng.standard_normal(shape), dtype) for shape in shapes]
    return every[0][0], [one[1] for one in every], [one[2] for one in every]


def lists(rng, R_q, R_k, N, b, s):
    """Return queries in any order, the last block filled up with its last one where it has several; keys; log weights."""
    order = rng.permutation(R_q)[: N * b]
    query_index = np.concat([order, np.repeat(order[-1:], N * b - len(order))]).reshape(N, b)
    return query_index, rng.integers(0, R_k, (N, s)), rng.standard_normal((N, s))


def attend(xp, given, found, scale, bias=None, before=None):
    """Call the kernel, with numbers of the dtype that it computes in."""
    dtype = "float64" if "float64" in str(given[0].dtype) else "float32"
    *index, log_weight, added = (None if x is None else xp.asarray(x) for x in (*found, bias))
    log_weight, added = (None if x is None else xp.astype(x, getattr(xp, dtype)) for x in (log_weight, added))
    return cuda.attend_blocks(xp, *given, *index, log_weight, scale, added, before)


def expected(wide, found, scale, bias=None, before=None, dtype="float32"):
    """Return what the reference finds, of log-weights and a bias as they are rounded to a dtype."""
    query_index, key_index, *more = (x if x is None or x.dtype == np.int64 else rounded(x, dtype) for x in (*found, bias))
    return reference.attend_blocks(host, *wide, query_index, key_index, more[0], scale, more[1], before)


def rounded(numbers, dtype):
    """Return float64 numbers that a dtype has."""
    return numbers.astype(dtype).astype(np.float64)


def number(dtype):
    """Return the name of the dtype that rows of a dtype are computed in."""
    return "float64" if dtype == "float64" else "float32"


def assert_part(part, truth, dtype):
    """Assert that a result has the dtype computed in and its accuracy: half precision is exact in float32."""
    out, lse = (np.asarray(x) for x in (part.out, part.lse))
    assert out.dtype == lse.dtype == number(dtype)
    assert_close(out, truth.out, dtype=number(dtype))
    assert_close(lse, truth.lse, dtype=number(dtype))


@pytest.mark.parametrize(("dtype", "shape"), OF_DTYPES, ids=str)
def test_shapes(rng, dtype, shape):
    """The last two queries of the last block are one, and query 0 may be in none."""
    N, b, s, d, d_v = ({"N": 3, "b": 5, "s": 7, "d": 4, "d_v": 3} | shape).values()
    xp, given, wide = rows(rng, dtype, (N * b - (b > 1), d), (40, d), (40, d_v))
    found = lists(rng, len(given[0]), 40, N, b, s)
    assert_part(attend(xp, given, found, 0.3), expected(wide, found, 0.3, dtype=number(dtype)), dtype)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_slots_at_minus_infinity(rng, dtype):
    """Blocks with all, all but one, the first part, the last part, and every other of their slots masked."""
    xp, given, wide = rows(rng, dtype, (30, 4), (50, 4), (50, 5))
    query_index, key_index, log_weight = lists(rng, 30, 50, 6, 5, 11)
    log_weight[0] = -np.inf
    log_weight[1, 1:] = -np.inf
    log_weight[2, :10] = -np.inf
    log_weight[3, 5:] = -np.inf
    log_weight[4, ::2] = -np.inf
    found = query_index, key_index, log_weight
    part = attend(xp, given, found, 0.3)
    assert (np.asarray(part.out)[query_index[0]] == 0).all()
    assert (np.asarray(part.lse)[query_index[0]] == -np.inf).all()
    assert_part(part, expected(wide, found, 0.3, dtype=number(dtype)), dtype)


@pytest.mark.parametrize(
    ("dtype", "shared", "b", "s", "d_v"),
    [
        *(("float32", *sizes) for sizes in ((True, 1, 1, 3), (False, 5, 7, 33), (True, 11, 9, 21))),
        *((dtype, True, 11, 9, 21) for dtype in ("bfloat16", "float64")),
        ("float16", False, 5, 7, 33),
    ],
)
def test_a_bias_and_what_was_before(rng, dtype, shared, b, s, d_v):
    """Two lists one after another: of the queries some are in no block, one is NaN and sees nothing, and one is there twice.

    What comes again has another bias here: the first counts.
    """
    blocks = 2
    xp, given, wide = rows(rng, dtype, (40, 5), (30, 5), (30, d_v))
    query_index, key_index, log_weight = lists(rng, 40, 30, blocks, b, s)
    if b > 1:
        query_index[0, -1] = query_index[0, -2]
    given[0][query_index[0, b // 2]] = np.nan
    wide[0][query_index[0, b // 2]] = 0.0
    part = truth = None
    for _ in range(2):
        key_index = key_index[:, ::-1] // 2
        added = rng.standard_normal((1 if shared else blocks, b, s))
        added[rng.random(added.shape) < 0.4] = -np.inf
        added[:, b // 2] = -np.inf
        found = query_index, np.ascontiguousarray(key_index), log_weight
        part = attend(xp, given, found, 0.3, added, part)
        truth = expected(wide, found, 0.3, added, truth, number(dtype))
    assert_part(part, truth, dtype)
    rest = np.ones(40, dtype=bool)
    rest[query_index] = False
    assert (np.asarray(part.out)[rest] == 0).all()
    assert (np.asarray(part.lse)[rest] == -np.inf).all()


@pytest.mark.parametrize(("dtype", "whole"), [("bfloat16", False), ("float64", True)])
def test_groups_number_their_own_rows(rng, dtype, whole):
    """Two groups of two blocks; the last query of each is there twice, and where not all are in a block some are in none."""
    queries = 9 if whole else 11
    xp, given, wide = rows(rng, dtype, (2 * queries, 5), (40, 5), (40, 3))
    order = [rng.permutation(queries)[:9] for _ in range(2)]
    query_index = np.stack([np.append(x, x[-1:]).reshape(2, 5) for x in order]).reshape(4, 5)
    key_index, log_weight = rng.integers(0, 20, (4, 7)), rng.standard_normal((4, 7))
    *index, weight = (xp.asarray(x) for x in (query_index, key_index, log_weight))
    weight = xp.astype(weight, getattr(xp, number(dtype)))
    part = cuda.attend_blocks(xp, *given, *index, weight, 0.3, groups=2, whole=whole)
    group = np.repeat([0, 1], 2)[:, None]
    found = query_index + group * queries, key_index + group * 20, log_weight
    assert_part(part, expected(wide, found, 0.3, dtype=number(dtype)), dtype)


@pytest.mark.parametrize("d_v", [3, 33])
def test_what_was_before_is_kept_for_queries_of_no_block(rng, d_v):
    xp, given, wide = rows(rng, "float32", (30, 4), (30, 4), (30, d_v))
    found = lists(rng, 30, 30, 2, 9, 7)
    before = AttentionState(*rows(rng, "float32", (30, d_v), (30,))[1])
    copy = AttentionState(*(x.astype(np.float64) for x in (before.out, before.lse)))
    part = attend(xp, given, found, 0.3, None, before)
    rest = np.ones(30, dtype=bool)
    rest[found[0]] = False
    np.testing.assert_array_equal(part.out[rest], copy.out[rest])
    np.testing.assert_array_equal(part.lse[rest], copy.lse[rest])
    assert_part(part, expected(wide, found, 0.3, None, copy), "float32")


@pytest.mark.parametrize("b", [9, 17])
def test_a_query_that_fills_up_a_block_is_merged_once(rng, b):
    """Also where it comes again first thing in another tile."""
    xp, given, wide = rows(rng, "float32", (2 * b - 1, 6), (50, 6), (50, 6))
    found, more = lists(rng, 2 * b - 1, 50, 2, b, 5), lists(rng, 2 * b - 1, 50, 2, b, 5)[1:]
    part, truth = attend(xp, given, found, 0.3), expected(wide, found, 0.3)
    found = found[0], *more
    assert_part(attend(xp, given, found, 0.3, None, part), expected(wide, found, 0.3, None, truth), "float32")


def test_a_nan_stays_where_it_is(rng):
    """A query that is NaN has NaN, and no other."""
    xp, given, wide = rows(rng, "float32", (20, 4), (30, 4), (30, 3))
    found = lists(rng, 20, 30, 1, 20, 9)
    given[0][3], wide[0][3] = np.nan, 0.0
    part, truth = attend(xp, given, found, 0.3), expected(wide, found, 0.3)
    assert np.isnan(part.out[3]).all()
    assert np.isnan(part.lse[3])
    part.out[3], part.lse[3] = truth.out[3], truth.lse[3]
    assert_part(part, truth, "float32")


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 30.0), ("float32", 30.0), ("float32", -30.0), ("float64", -30.0)])
def test_large_logits(rng, dtype, size):
    """Of some hundreds, where exp itself is infinite; their errors are as many ulps of them, and so are weights'."""
    xp, given, wide = rows(rng, dtype, (20, 16), (40, 16), (40, 5))
    query_index, key_index, log_weight = lists(rng, 20, 40, 2, 10, 11)
    found = query_index, key_index, log_weight * 100
    part, truth = attend(xp, given, found, size), expected(wide, found, size, dtype=number(dtype))
    assert float(np.abs(truth.lse).max()) > 100
    assert_part(part, truth, dtype)


def test_rows_that_lie_apart(rng):
    """Of wider rows the first columns, and rows that are not laid out row by row."""
    xp, given, wide = rows(rng, "float32", (20, 20), (40, 16), (5, 40))
    given, wide = ((q[:, 3:12], k[:, :9], v.T) for q, k, v in (given, wide))
    found = lists(rng, 20, 40, 2, 10, 9)
    assert_part(attend(xp, given, found, 0.3), expected(wide, found, 0.3), "float32")


def test_nothing(rng):
    xp, given, _ = rows(rng, "float32", (0, 4), (30, 4), (30, 3))
    part = attend(xp, given, lists(rng, 0, 30, 0, 5, 9), 0.3)
    assert part.out.shape == (0, 3)
    assert part.lse.shape == (0,)
    part = dense.attend_dense(xp, *(x[None] for x in given), 0.3)
    assert part.out.shape == (1, 0, 3)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        *(("float32", shape) for shape in ((2, 7, 9, 5, 3), (1, 1, 1, 1, 1))),
        *((dtype, (3, 9, 4, 2, 33)) for dtype in DTYPES),
    ],
    ids=str,
)
def test_attend_dense(rng, dtype, shape):
    G, n_q, n_k, d, d_v = shape
    xp, given, wide = rows(rng, dtype, (G, n_q, d), (G, n_k, d), (G, n_k, d_v))
    truth = dense_reference.attend_dense(host, *wide, 0.3)
    assert_part(dense.attend_dense(xp, *given, 0.3), truth, dtype)


def test_the_fewest_columns_of_a_thread_that_are_enough(monkeypatch):
    """Columns in as few thread blocks as there may be, and no more in each than needed."""
    found = []
    monkeypatch.setattr(cuda, "launch", lambda kernel, grid, *_: found.append((kernel, grid)))
    for d_v, width, slices in [(0, 4, 1), (1, 4, 1), (16, 4, 1), (17, 5, 1), (21, 8, 1), (32, 8, 1), (33, 5, 2), (41, 8, 2)]:
        q, v = np.zeros((3, 2), np.float32), np.zeros((3, d_v), np.float32)
        cuda.attend_lists(host, q, q, v, None, (1, 3, 3), 1.0)
        assert found.pop() == (cuda.TILES["float32", width], slices)


def test_lse_is_not_written_where_other_thread_blocks_read_it(rng, monkeypatch):
    """Those of other columns of the values: the simulator, which copies every array, would not show it."""
    found = []
    monkeypatch.setattr(cuda, "launch", lambda kernel, *given: found.extend(given[-3:]))
    xp, given, _ = rows(rng, "float32", (9, 4), (9, 4), (9, 33))
    before = AttentionState(*rows(rng, "float32", (9, 33), (9,))[1])
    part = attend(xp, given, lists(rng, 9, 9, 1, 9, 5), 0.3, None, before)
    old, out, lse = found
    assert np.shares_memory(out, part.out)
    assert np.shares_memory(lse, part.lse)
    assert not np.shares_memory(lse, old)
    np.testing.assert_array_equal(lse, old)
