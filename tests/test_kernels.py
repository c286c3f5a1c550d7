"""Every implementation of every kernel: its signature, its contract, the oracle, and the reference."""

import importlib
import inspect
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from kdecore.arrays.errors import KernelUnavailable, OptionError
from kdecore.arrays.namespace import host
from kdecore.core.state import AttentionState
from kdecore.core.tree import bounds, depth_of, node_count
from kdecore.kernels import registry
from kdecore.kernels.draw_indices.contract import Weights
from kdecore.kernels.draw_uniform import reference as draw_uniform
from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.kernels.open_tree.contract import ALONG
from kdecore.kernels.registry import KERNELS, Implementation, choose
from kdecore.kernels.runtime.threads import team
from kdecore.kernels.site import Site
from kdecore.kernels.tree_order.cpu import nth_smallest
from tests import oracles
from tests.implementations import here, implementations, run
from tests.tolerances import assert_close
from tests.trees import assert_same_lists, pass_problem, scaling_problem
from tests.views import arguments as view_arguments
from tests.views import graded_moments

IMPLEMENTATIONS = [(kernel, found) for kernel, all_found in KERNELS.items() for found in all_found]
ELSEWHERE = {"draw_uniform", "attend_tree"}
"""What other tests compare with oracles."""
FLOATS = ("float32", "float64")


def parameters(function):
    """Return names, defaults and kinds of what a function takes itself, whatever it wraps."""
    return [(p.name, p.default, p.kind) for p in inspect.signature(function, follow_wrapped=False).parameters.values()]


def written(kernel):
    """Return the functions of a kernel's modules, and of those that know its gradients, by what they are written for."""
    folder = Path(registry.__file__).parent / kernel
    modules = {path.stem: f"kdecore.kernels.{kernel}.{path.stem}" for path in folder.glob("*.py")}
    found = {name: modules[name] for name in ("reference", "cpu", "cuda", "triton") if name in modules}
    if any(one.target == "torch-autograd" for one in KERNELS[kernel]):
        found["torch"] = "kdecore_adapters.torch_gradients"
    needs = {"cuda": "numba_cuda", "triton": "triton", "torch": "torch"}
    there = {name: path for name, path in found.items() if name not in needs or find_spec(needs[name])}
    return {name: getattr(importlib.import_module(path), kernel) for name, path in there.items()}


@pytest.mark.parametrize("kernel", KERNELS)
def test_implementations_have_their_contracts_signature(kernel):
    """Of the modules' own functions: what is imported late is called through one that takes what the reference does."""
    contract = importlib.import_module(f"kdecore.kernels.{kernel}.contract")
    protocol = getattr(contract, "".join(word.capitalize() for word in kernel.split("_")))
    promised, every = parameters(protocol.__call__)[1:], written(kernel)
    assert len(every) >= min(2, len(KERNELS[kernel]))
    assert {name: parameters(function) for name, function in every.items()} == dict.fromkeys(every, promised)
    assert inspect.getdoc(protocol.__call__)


def test_every_kernel_ends_with_one_that_runs_everywhere():
    folders = {path.parent.name for path in Path(registry.__file__).parent.glob("*/contract.py")}
    assert set(KERNELS) == folders
    for every in KERNELS.values():
        assert every[-1].target == "array-api"
        assert every[-1].unsupported(Site("any", "anywhere", "float32")) is None
        assert len({found.target for found in every}) == len(every)


# hash_codes


def codes_of(implementation, backend, x, planes, dtype="float64"):
    """Buckets of rows, which are the keys; there are fewer queries, whose buckets are those of keys by themselves."""
    q = x[:, : -(-x.shape[1] // 2)]
    of_queries, codes = run(implementation, backend, q, x, planes, dtype=dtype)
    np.testing.assert_array_equal(of_queries, run(implementation, backend, x[:, :1], q, planes, dtype=dtype)[1])
    return codes


@pytest.mark.parametrize("bits", [1, 2, 3, 7, 12, 15, 16])
@implementations("hash_codes")
def test_hash_codes(backend, rng, implementation, bits):
    x, planes = rng.standard_normal((3, 50, 6)), rng.standard_normal((6, bits))
    codes = codes_of(implementation, backend, x, planes)
    assert codes.dtype == (np.int16 if bits <= 15 else np.int32)
    np.testing.assert_array_equal(codes, oracles.hash_codes(x, planes))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@implementations("hash_codes")
def test_hash_codes_fill_thirty_bits(backend, rng, implementation, dtype):
    """The patterns' Gray ranks, with the pattern read back by the forward code rank ^ (rank >> 1).

    Rows within 1e-5 of a hyperplane may change side in float32; the seeded data has none.
    """
    x, planes = rng.standard_normal((2, 200, 40)), rng.standard_normal((40, 30))
    projected = (x - x.mean(axis=1, keepdims=True)) @ planes
    assert np.abs(projected).min() > 1e-5
    codes = codes_of(implementation, backend, x.astype(dtype), planes.astype(dtype), dtype=dtype).astype(np.int64)
    assert codes.min() >= 0
    assert codes.max() < 2**30
    np.testing.assert_array_equal(codes ^ (codes >> 1), (projected > 0) @ (2 ** np.arange(30)[::-1]))


@implementations("hash_codes")
def test_hash_codes_of_float32_rows_far_from_the_origin(backend, rng, implementation):
    """Means are better known than the projections that they are means of: hardly a sign differs from float64's.

    A projection of size 4 · offset is rounded by up to 2.4e-7 · offset; twelve planes meet twice that share of the rows.
    Means summed in float32 put up to 8e-5 · offset on the wrong side.
    """
    n, d, bits, offset = 20_000, 16, 12, 1e3
    x = (rng.standard_normal((1, n, d)) + offset * rng.standard_normal(d)).astype(np.float32)
    planes = rng.standard_normal((d, bits)).astype(np.float32)
    exact = oracles.hash_codes(x.astype(np.float64), planes.astype(np.float64))
    found = codes_of(implementation, backend, x, planes, dtype="float32")
    assert (found != exact).mean() < 3e-6 * offset


@pytest.mark.parametrize("bits", [1, 4, 7])
@implementations("hash_codes")
def test_neighbouring_buckets_differ_in_one_bit(backend, implementation, bits):
    """Every pattern of signs once: the ranks are a bijection, and successive ranks differ in one sign."""
    signs = np.array([[1.0 if word == "1" else -1.0 for word in f"{i:0{bits}b}"] for i in range(2**bits)])
    codes = codes_of(implementation, backend, signs[None], np.eye(bits))[0]
    np.testing.assert_array_equal(np.sort(codes), np.arange(2**bits))
    ordered = signs[np.argsort(codes)]
    np.testing.assert_array_equal((ordered[1:] != ordered[:-1]).sum(axis=1), 1)


@implementations("hash_codes")
def test_hash_codes_ignore_a_constant_vector(backend, rng, implementation):
    """Rows within 1e-9 of a hyperplane may change side; the seeded data has none."""
    x, planes = rng.standard_normal((2, 300, 6)), rng.standard_normal((6, 10))
    assert np.abs((x - x.mean(axis=1, keepdims=True)) @ planes).min() > 1e-9
    moved = x + 1e3 * rng.standard_normal(6)
    np.testing.assert_array_equal(
        codes_of(implementation, backend, moved, planes), codes_of(implementation, backend, x, planes)
    )


@implementations("hash_codes")
def test_hash_codes_centre_each_group_on_its_own_mean(backend, rng, implementation):
    x, planes = rng.standard_normal((2, 60, 6)), rng.standard_normal((6, 8))
    x[1] += 50.0
    together = codes_of(implementation, backend, x, planes)
    np.testing.assert_array_equal(together[1:], codes_of(implementation, backend, x[1:], planes))
    assert len(np.unique(together[1])) > 10


# row_norms


def naive_norms(rows):
    """Norms over the group's largest finite entry in long double; rows that are not finite, and groups of zeros, are 0."""
    largest = np.abs(np.where(np.isfinite(rows), rows, 0.0)).max(axis=(1, 2), initial=0.0).astype(np.longdouble)[:, None]
    rows = np.where(np.isfinite(rows).all(axis=-1, keepdims=True), rows, 0.0).astype(np.longdouble)
    return (np.sqrt((rows**2).sum(axis=-1)) / np.where(largest > 0, largest, 1.0)).astype(np.float64)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("float64", x) for x in (1e-300, 1e-200, 1.0, 1e200, 1e307)]
    + [("float32", x) for x in (1e-38, 1e-25, 1.0, 1e25, 1e37)],
)
@pytest.mark.parametrize("shape", [(3, 50, 7), (2, 5000, 3), (1, 1, 1), (2, 4, 0), (2, 30, 33), (2, 30, 64)], ids=str)
@implementations("row_norms")
def test_row_norms(backend, rng, implementation, shape, dtype, size):
    if backend.name == "cupy" and size == 1e-38:
        pytest.skip("CuPy's own kernels take subnormal numbers as 0")
    rows = (rng.standard_normal(shape) * size).astype(dtype)
    found = run(implementation, backend, rows, dtype=dtype)
    assert found.dtype == (dtype if implementation.target == "numba-cuda" else np.float64)
    assert_close(found, naive_norms(rows), dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("d", [5, 20, 33, 64])
@implementations("row_norms")
def test_row_norms_of_zeros_and_of_numbers_that_are_not_finite(backend, rng, implementation, d, dtype):
    """Odd numbers at both ends of a row: the first lie in its vectors, the last in what is left over."""
    rows = rng.standard_normal((4, 30, d)).astype(dtype)
    odd = [(i, at) for i in (np.inf, -np.inf, np.nan) for at in (0, 4, d - 1)]
    for row, (number, at) in enumerate(odd, start=3):
        rows[0, row, at] = number
        rows[0, row, 2] = 100.0 + row
    rows[1] = 0.0
    rows[2, 1:] = 0.0
    rows[3] = np.inf
    found = run(implementation, backend, rows, dtype=dtype)
    assert_close(found, naive_norms(rows), dtype=dtype)
    assert not found[0, 3 : 3 + len(odd)].any()
    assert found[0, 2] > 0
    assert not found[[1, 3]].any()


# value_sizes


def naive_sizes(rows):
    """Row by row: norms of the finite ones in long double, relative to the largest, or 0; and columns compared in lists."""
    norms = np.zeros(rows.shape[:2], dtype=np.longdouble)
    for at in np.ndindex(norms.shape):
        if np.isfinite(rows[at]).all():
            norms[at] = np.sqrt(sum((np.longdouble(x) ** 2 for x in rows[at]), np.longdouble(0)))
    top = norms.max(axis=1, keepdims=True)
    sizes = norms / np.where(top > 0, top, 1)
    ranges = []
    for choose_one in (min, max):
        found = [[choose_one(column.tolist()) for column in group.T] for group in rows]
        ranges.append(np.asarray(found, dtype=rows.dtype).reshape(len(rows), rows.shape[2]))
    return sizes, *ranges


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("float64", x) for x in (1e-300, 1e-200, 1.0, 1e200, 1e307)]
    + [("float32", x) for x in (1e-38, 1e-25, 1.0, 1e25, 1e37)],
)
@pytest.mark.parametrize("shape", [(3, 50, 7), (2, 1500, 3), (1, 1, 1), (2, 4, 0), (2, 600, 33), (2, 30, 64)], ids=str)
@implementations("value_sizes")
def test_value_sizes(backend, rng, implementation, shape, dtype, size):
    if backend.name == "cupy" and size == 1e-38:
        pytest.skip("CuPy's own kernels take subnormal numbers as 0")
    rows = (rng.standard_normal(shape) * size).astype(dtype)
    sizes, low, high = run(implementation, backend, rows, dtype=dtype)
    true_sizes, true_low, true_high = naive_sizes(rows)
    assert sizes.dtype == low.dtype == high.dtype == rows.dtype
    assert_close(sizes, true_sizes, dtype=dtype)
    np.testing.assert_array_equal(low, true_low)
    np.testing.assert_array_equal(high, true_high)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@implementations("value_sizes")
def test_value_sizes_of_zeros_and_of_numbers_that_are_not_finite(backend, rng, implementation, dtype):
    rows = rng.standard_normal((5, 700, 35)).astype(dtype)
    rows[0, 7, 0], rows[0, 8, 34], rows[0, 699, 33] = np.inf, -np.inf, np.inf
    rows[0, 9] = 1e4
    rows[1] = 0.0
    rows[2, 1:] = 0.0
    rows[3] = -np.inf
    rows[4, 650, 34], rows[4, 651] = np.nan, 100.0
    sizes, low, high = run(implementation, backend, rows, dtype=dtype)
    assert_close(sizes, naive_sizes(rows)[0], dtype=dtype)
    assert not sizes[0, [7, 8, 699]].any()
    assert not sizes[[1, 3]].any()
    assert (sizes.max(axis=1) == [1, 0, 1, 0, 1]).all()
    for found, among in ((low, np.min), (high, np.max)):
        np.testing.assert_array_equal(found, among(rows, axis=1))
        assert np.isnan(found[4, 34])


# bucket_order


@pytest.mark.parametrize("dtype", ["int16", "int32"])
@pytest.mark.parametrize("buckets", [1, 3, 1000])
@implementations("bucket_order")
def test_bucket_order_is_the_stable_order(backend, rng, implementation, buckets, dtype):
    codes = rng.integers(0, buckets, (3, 400)).astype(dtype)
    order = run(implementation, backend, codes, 10)
    assert order.dtype == np.int64
    for row, found in zip(codes, order, strict=True):
        assert found.tolist() == sorted(range(400), key=lambda i: (row[i], i))


# draw_indices (its unbiasedness: test_unbiasedness.py)


def sorted_codes(rng, n, buckets):
    """Codes of two groups, and their order."""
    codes = rng.integers(0, buckets, (2, n)).astype(np.int16)
    return codes, np.argsort(codes, axis=1, stable=True)


def draws_from(rng, groups, n, more=5):
    """An order of some keys, and weights of all."""
    order = rng.permuted(np.tile(np.arange(n + more), (groups, 1)), axis=1)[:, :n]
    sizes = rng.random((groups, n + more))
    return order, Weights(sizes, sizes.mean(axis=1))


def list_keys(implementation, backend, order, weights, window_start, window, starts, count):
    """Keys and log-weights of lists for given random numbers (G, B); without an order, a key's place is its number."""
    if implementation.target == "numba-cuda":
        pytest.skip("draws its own numbers; the simulator is given some")
    if order is None:
        order = np.tile(np.arange(weights.sizes.shape[1]), (len(starts), 1))
    given = order, weights, window_start, window, 3, 1, count, "float64"
    with mock.patch.object(draw_uniform, "uniform", lambda xp, *_, device=None: xp.asarray(starts.reshape(-1))):
        return run(implementation, backend, *given)


@pytest.mark.parametrize("alike", [False, True])
@implementations("draw_indices")
def test_draw_indices_follows_systematic_sampling(backend, rng, implementation, alike):
    n, window, count = 60, 11, 7
    order, weights = draws_from(rng, 3, n)
    shares = np.ones_like(weights.sizes) if alike else 1.0 + weights.sizes / weights.mean[:, None]
    first = rng.integers(0, n - window + 1, (3, 20))
    first[:, 0], first[:, 1] = 0, n - window
    starts = rng.random((3, 20))
    given = None if alike else weights
    key_index, log_weight = list_keys(implementation, backend, order, given, first, window, starts, count)
    assert key_index.dtype == np.int64
    assert log_weight.dtype == np.float64
    for g, block in np.ndindex(3, 20):
        own = slice(first[g, block], first[g, block] + window)
        outside = np.delete(order[g], own)
        expected = outside[oracles.systematic_sample(shares[g, outside], starts[g, block], count)]
        np.testing.assert_array_equal(key_index[g, block], np.r_[order[g, own], expected])
        inclusion = count * shares[g, expected] / shares[g, outside].sum()
        np.testing.assert_allclose(log_weight[g, block, window:], -np.log(inclusion), rtol=0, atol=1e-12)
        assert not log_weight[g, block, :window].any()


@implementations("draw_indices")
def test_draw_indices_caps_weights_and_takes_means_of_zero_for_one(backend, rng, implementation):
    """A key that weighs too much weighs as much as lets no probability exceed 1."""
    n, window, count = 20, 4, 3
    sizes = np.stack([np.where(np.arange(n) == 13, 1e9, 1.0), np.zeros(n)])
    weights = Weights(sizes, sizes.mean(axis=1))
    starts = rng.random((2, 30))
    key_index, log_weight = list_keys(
        implementation, backend, None, weights, np.zeros((2, 30), np.int64), window, starts, count
    )
    shares = np.minimum(1.0 + sizes[0] / weights.mean[0], (n - window) / count)
    total = shares[window:].sum()
    drawn = key_index[0, :, window:]
    np.testing.assert_allclose(log_weight[0, :, window:], -np.log(count * shares[drawn] / total), rtol=0, atol=1e-12)
    np.testing.assert_allclose(log_weight[1, :, window:], np.log((n - window) / count), rtol=0, atol=1e-12)


@pytest.mark.parametrize("first", [0, 3, 6])
@pytest.mark.parametrize("window", [3, 0])
@pytest.mark.parametrize("start", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
@implementations("draw_indices")
def test_draw_indices_at_the_ends_of_a_start_and_of_a_row(backend, implementation, start, window, first):
    """Whatever rounding does, keys are distinct, in their order, in range, and outside the window."""
    weights = Weights(np.random.default_rng(0).random((200, 9)) / 10, np.ones(200))
    windows, starts = np.full((200, 1), first), np.full((200, 1), start)
    for count in (1, 3, 4):
        key_index, _ = list_keys(implementation, backend, None, weights, windows, window, starts, count)
        drawn = key_index[..., window:]
        assert ((drawn >= 0) & (drawn < 9)).all()
        assert (np.diff(drawn, axis=-1) > 0).all()
        assert not ((drawn >= first) & (drawn < first + window)).any()


@implementations("draw_indices")
def test_draw_indices_where_rounding_puts_a_point_back_into_the_window(backend, implementation):
    """A point just at the window's start, moved past it, may round to less than the window's end."""
    rng = np.random.default_rng(0)
    groups, n, first, window = 4000, 9, 1, 6
    sizes = rng.random((groups, n))
    sums = np.concatenate([np.zeros((groups, 1)), np.cumsum(1.0 + sizes, axis=1)], axis=1)
    below, end = sums[:, first], sums[:, first + window]
    total = sums[:, n] - (end - below)
    starts = (below / total)[:, None]
    points = starts[:, 0] * total
    assert ((points >= below) & (points + (end - below) < end)).sum() > 50
    weights = Weights(sizes, np.ones(groups))
    key_index, _ = list_keys(implementation, backend, None, weights, np.full((groups, 1), first), window, starts, 1)
    drawn = key_index[..., window:]
    assert not ((drawn >= first) & (drawn < first + window)).any()


# attend_blocks


def block_problem(rng, dtype, N=6, b=5, s=7, R_k=40, d=4, d_v=3):
    """Arguments up to log_weight: queries in any order, the last block filled up with its last query."""
    filled = min(2, b - 1)
    R_q = N * b - filled
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in ((R_q, d), (R_k, d), (R_k, d_v)))
    order = rng.permutation(R_q)
    query_index = np.concat([order, np.repeat(order[-1:], filled)]).reshape(N, b)
    log_weight = rng.standard_normal((N, s)).astype(dtype)
    return q, k, v, query_index, rng.integers(0, R_k, (N, s)), log_weight


def naive_blocks(q, k, v, query_index, key_index, log_weight):
    return oracles.attend_blocks(q, k, v, query_index, key_index, log_weight, 0.3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"b": 1},
        {"s": 1},
        {"d": 1, "d_v": 1},
        {"N": 1, "b": 1, "s": 1},
        {"d": 17, "d_v": 33},
        {"N": 2, "b": 300, "s": 900},
        {"N": 3, "b": 64, "s": 1300, "d": 64, "d_v": 64},
    ],
    ids=str,
)
@implementations("attend_blocks")
def test_attend_blocks(backend, rng, implementation, dtype, shape):
    arguments = block_problem(rng, dtype, **shape)
    out, lse = run(implementation, backend, *arguments, 0.3, dtype=dtype)
    assert out.dtype == lse.dtype == dtype
    true_out, true_lse = naive_blocks(*arguments)
    assert_close(out, true_out, ulps=32, dtype=dtype)
    assert_close(lse, true_lse, ulps=32, dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("s", [7, 40, 900])
@implementations("attend_blocks")
def test_attend_blocks_leaves_out_slots_at_minus_infinity(backend, rng, implementation, dtype, s):
    """Blocks with all, all but one, the first part, the last part, and every other of their slots masked."""
    *arguments, log_weight = block_problem(rng, dtype, s=s)
    log_weight[0] = -np.inf
    log_weight[1, 1:] = -np.inf
    log_weight[2, : s - 2] = -np.inf
    log_weight[3, s // 2 :] = -np.inf
    log_weight[4, ::2] = -np.inf
    out, lse = run(implementation, backend, *arguments, log_weight, 0.3, dtype=dtype)
    true_out, true_lse = naive_blocks(*arguments, log_weight)
    assert not np.isnan(out).any()
    assert (out[arguments[3][0]] == 0).all()
    assert (lse[arguments[3][0]] == -np.inf).all()
    assert_close(out, true_out, ulps=32, dtype=dtype)
    assert_close(lse, true_lse, ulps=32, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("b", "s"), [(1, 1), (5, 7), (37, 33), (300, 16), (20, 1300)])
@implementations("attend_blocks")
def test_attend_blocks_with_a_bias_merges_with_what_was_before(backend, rng, implementation, dtype, shared, b, s):
    """Two lists one after another are one list; hidden slots count for nothing, nor do they for a query that is NaN."""
    n, blocks, d, d_v = 700, 2, 5, 21
    q, k, v = (rng.standard_normal((n, width)).astype(dtype) for width in (d, d, d_v))
    index = rng.permutation(n)[: blocks * b].reshape(blocks, b)
    lists = rng.integers(0, n, (2, blocks, s))
    weights = rng.standard_normal((2, blocks, s)).astype(dtype)
    biases = rng.standard_normal((2, 1 if shared else blocks, b, s)).astype(dtype)
    biases[rng.random(biases.shape) < 0.4] = -np.inf
    biases[:, :, b // 2] = -np.inf
    if b > 1:
        # What comes again is not merged again.
        index[0, -1], biases[:, :, -1] = index[0, -2], biases[:, :, -2]
    q[index[0, b // 2]] = np.nan

    def run_once(number, before):
        arrays = (backend.array(x) for x in (q, k, v, index, lists[number], weights[number]))
        return implementation.function(backend.xp, *arrays, 0.3, backend.array(biases[number]), before)

    run(implementation, backend, q, k, v, index, lists[0], weights[0], 0.3, dtype=dtype)  # skips where it cannot
    found = run_once(1, run_once(0, None))
    expected = np.zeros((n, d_v)), np.full(n, -np.inf)
    wide = [x.astype(np.float64) for x in (q, k, v)]
    for block, row in np.ndindex(blocks, b):
        query = index[block, row]
        row = np.flatnonzero(index[block] == query)[0]
        bias = weights[:, block] + biases[:, 0 if shared else block, row].astype(np.float64)
        keys = np.concatenate(lists[:, block])
        expected[0][query], expected[1][query] = oracles.attend_list(
            np.nan_to_num(wide[0][query]), *wide[1:], keys, np.concatenate(bias), 0.3
        )
    assert_close(backend.numpy(found.out), expected[0], dtype=dtype, ulps=256)
    assert_close(backend.numpy(found.lse), expected[1], dtype=dtype, ulps=256)


@pytest.mark.parametrize("dtype", FLOATS)
@implementations("attend_blocks")
def test_attend_blocks_of_several_groups_number_the_rows_of_their_own(backend, rng, implementation, dtype):
    """As of one group whose lists number all rows; some queries are in no block, or all are in one."""
    groups, blocks, b = 3, 4, 5
    for n_q, whole in ((23, False), (blocks * b, True)):
        q, k, v = (rng.standard_normal((groups * n, 6)).astype(dtype) for n in (n_q, 31, 31))
        query_index = rng.permuted(np.tile(np.arange(n_q), (groups, 1)), axis=1)[:, : blocks * b].reshape(-1, b)
        key_index = rng.integers(0, 31, (groups * blocks, 9))
        log_weight = rng.standard_normal((groups * blocks, 9)).astype(dtype)
        group = np.repeat(np.arange(groups), blocks)[:, None]
        found = run(
            implementation, backend, q, k, v, query_index, key_index, log_weight, 0.3, None, None, groups, whole, dtype=dtype
        )
        expected = naive_blocks(q, k, v, query_index + group * n_q, key_index + group * 31, log_weight)
        expected[1][np.delete(np.arange(len(q)), query_index + group * n_q)] = -np.inf
        for part, truth in zip(found, expected, strict=True):
            assert_close(part, truth, ulps=32, dtype=dtype)


@pytest.mark.parametrize("b", [97, 145, 193, 1025])
@pytest.mark.parametrize("threads", [1, 8])
def test_attend_blocks_merges_a_query_that_fills_up_a_block_once(rng, b, threads):
    """Also where the row that comes again is the first of a task, another thread's perhaps."""
    q, k, v = (rng.standard_normal((2 * b - 1, 6), dtype=np.float32) for _ in range(3))
    index = np.concatenate([np.arange(2 * b - 1), [2 * b - 2]]).reshape(2, b)
    lists, weights = rng.integers(0, 2 * b - 1, (2, 2, 30)), np.zeros((2, 30), np.float32)
    found = []
    for implementation in KERNELS["attend_blocks"]:
        if implementation.unsupported(Site("numpy", "cpu", "float32")) is not None:
            continue
        part = None
        for one in lists:
            with team(threads):
                part = implementation.function(host, q, k, v, index, one, weights, 0.3, None, part)
        found.append(part)
    assert_close(found[0].out, found[1].out, dtype="float32")
    assert_close(found[0].lse, found[1].lse, dtype="float32")


@pytest.mark.parametrize("size", [1e4, -1e4])
@implementations("attend_blocks")
def test_attend_blocks_survives_huge_log_weights(backend, rng, implementation, size):
    *arguments, log_weight = block_problem(rng, "float64")
    out, lse = run(implementation, backend, *arguments, log_weight + size, 0.3)
    true_out, true_lse = naive_blocks(*arguments, log_weight)
    np.testing.assert_allclose(out, true_out, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(lse - size, true_lse, rtol=1e-10, atol=1e-10)


# attend_dense


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape", [(2, 7, 9, 4, 3), (1, 1, 1, 1, 1), (3, 300, 5, 2, 1), (1, 5, 3000, 3, 2), (2, 300, 1100, 2, 3)]
)
@implementations("attend_dense")
def test_attend_dense(backend, rng, implementation, dtype, shape):
    G, n_q, n_k, d, d_v = shape
    q, k, v = (rng.standard_normal(s).astype(dtype) for s in ((G, n_q, d), (G, n_k, d), (G, n_k, d_v)))
    out, lse = run(implementation, backend, q, k, v, 0.3, dtype=dtype)
    true_out, true_lse = oracles.exact_attention(q, k, v, 0.3)
    assert out.dtype == lse.dtype == dtype
    assert_close(out, true_out, ulps=32, dtype=dtype)
    assert_close(lse, true_lse, ulps=32, dtype=dtype)


# Against the reference, on data large enough to need every loop


def spoilt_rows(rng, *shape):
    """Return rows around 3 with some numbers that are not finite."""
    return np.where(rng.random(shape) < 0.05, np.inf, 3.0 + rng.standard_normal(shape))


def spoilt_groups(rng, n, dtype):
    """Return keys of two groups and values, one number of which is not finite."""
    k, v = (rng.standard_normal((2, n, width)).astype(dtype) for width in (9, 7))
    v[1, n - 2, 3] = -np.inf
    return k, v


@cache
def problem_of(kernel, dtype):
    """Return a kernel's arguments, of random numbers that no other test uses, and what the reference finds on NumPy."""
    n, rng = 3000, np.random.default_rng(20230702)
    arguments = {
        "row_norms": lambda: (rng.standard_normal((2, n, 9)).astype(dtype),),
        "value_sizes": lambda: (spoilt_rows(rng, 2, n, 9).astype(dtype),),
        "hash_codes": lambda: (*(rng.standard_normal((2, m, 9)) for m in (n, n // 2)), rng.standard_normal((9, 13))),
        "finite_rows": lambda: (spoilt_rows(rng, 2, n, 9).astype(dtype),),
        "spoil_groups": lambda: (rng.standard_normal((2, n)).astype(dtype), *spoilt_groups(rng, n, dtype)),
        "spoil_rows": lambda: (
            AttentionState(rng.standard_normal((2, n, 5)).astype(dtype), spoilt_rows(rng, 2, n).astype(dtype)),
            rng.random((2, n)) < 0.9,
            rng.standard_normal(3).astype(dtype),
        ),
        "bucket_order": lambda: (rng.integers(0, 700, (2, n)).astype(np.int16), 10),
        "bucket_windows": lambda: (*sorted_codes(rng, n, 90), *sorted_codes(rng, n, 90), 77, 65),
        "draw_indices": lambda: (*draws_from(rng, 2, n), rng.integers(0, n - 65, (2, 40)), 64, 2**40 + 5, 1, 100, dtype),
        "attend_blocks": lambda: (*block_problem(rng, dtype, N=47, b=64, s=190, R_k=n, d=16, d_v=17), 0.2),
        "attend_dense": lambda: (*(rng.standard_normal((2, m, 8)).astype(dtype) for m in (400, n, n)), 0.2),
        "balanced_view": lambda: view_arguments(graded_moments(rng, 20), 16, -0.3),
        "second_moment": lambda: (spoilt_rows(rng, 2, n, 21).astype(dtype), 2, True),
        "shrink_matrices": lambda: (
            rng.standard_normal((2, 3, 9, 7)).astype(dtype),
            (40.0 * rng.random((2, 3))).astype(dtype),
            True,
            0.7,
        ),
        "project_rows": lambda: (rng.standard_normal((2, n, 9)).astype(dtype), rng.standard_normal((2, 9, 7)).astype(dtype)),
        "rank_codes": lambda: (rng.standard_normal((2, n, 9)).astype(dtype), 20),
        "tree_order": lambda: (rng.standard_normal((2, n, 9)), 37),
        "node_summaries": lambda: (
            *(rng.standard_normal((2, n, width)).astype(dtype) for width in (9, 7, 3)),
            rng.random((2, n)).astype(dtype),
            rng.permuted(np.tile(np.arange(n), (2, 1)), axis=1),
            4,
            np.asarray([0.1, 3.0], dtype=dtype),
        ),
        "scaled_nodes": lambda: in_dtype(scaling_problem(rng, n), dtype),
        "pick_threshold": lambda: (*pass_problem(rng, 150, n=n)[0], 150, 4 * n, (3, 0, 8)),
        "open_tree": lambda: (*pass_problem(rng, 150, n=n)[0], np.asarray(0.1), 4 * n, (3, 0, 8)),
        "gap_moments": lambda: (
            *rng.standard_normal((2, 2, n + node_count(n, 4), 9)).astype(dtype),
            rng.integers(0, node_count(n, 4), (2, 3, 200)),
            rng.random((2, 3, 200)).astype(dtype),
            node_count(n, 4),
            128,
        ),
    }[kernel]()
    return arguments, KERNELS[kernel][-1].function(host, *arguments)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("kernel", "implementation"),
    [(kernel, found) for kernel, found in IMPLEMENTATIONS if kernel not in ELSEWHERE and here(found)],
    ids=lambda x: getattr(x, "target", x),
)
def test_implementations_agree_with_the_reference(backend, kernel, implementation, dtype):
    """Each on its backend, which is given copies."""
    arguments, reference = problem_of(kernel, dtype)
    found = run(implementation, backend, *arguments, dtype=dtype)
    if kernel in ("finite_rows", "hash_codes"):
        for part, expected in zip(found, reference, strict=True):
            np.testing.assert_array_equal(part, expected)
    elif kernel in ("spoil_groups", "bucket_order", "bucket_windows", "tree_order", "rank_codes"):
        np.testing.assert_array_equal(found, reference)
    elif kernel in ("node_summaries", "scaled_nodes", "value_sizes"):
        for part, expected in zip(found, reference, strict=True):
            assert_close(part, expected, dtype=dtype)
    elif kernel == "open_tree":
        np.testing.assert_array_equal(found[3], reference[3])
        assert_same_lists(found[:2], reference[:2])
    elif kernel == "second_moment":
        for part, expected in zip(found, reference, strict=True):
            assert_close(part, expected, dtype="float64")
    elif kernel == "gap_moments":
        for part, expected in zip(found, reference, strict=True):
            assert_close(part, expected, dtype=dtype, ulps=512)
    elif kernel in ("row_norms", "project_rows", "shrink_matrices", "pick_threshold"):
        in_double = kernel == "row_norms" and implementation.target != "numba-cuda"
        assert_close(found, reference, dtype="float64" if in_double else dtype)
    elif kernel == "balanced_view":
        for part, expected in zip(found, reference, strict=True):
            np.testing.assert_allclose(part, expected, rtol=0, atol=1e-9 * np.abs(expected).max())
    elif kernel == "draw_indices":
        np.testing.assert_array_equal(found[0], reference[0])
        assert found[1].dtype == dtype
        assert_close(found[1], reference[1], dtype=dtype)
    else:
        assert_close(found[0], reference.out, dtype=dtype)
        assert_close(found[1], reference.lse, dtype=dtype)


# scaled_nodes


def in_dtype(arguments, dtype):
    """Return arguments of `scaled_nodes`, all but the moment in a dtype."""
    nodes, moment, directions, half_norm, *numbers = arguments
    nodes = TreeNodes(*(x.astype(dtype) for x in nodes))
    return nodes, moment, directions.astype(dtype), half_norm.astype(dtype), *numbers


def naive_shares(nodes, moment, directions, half_norm, scale):
    """The part of each group's spreads that coordinates don't see, row by row, in float64."""
    keys, _, spread, variances, _ = (x.astype(np.float64) for x in nodes)
    (groups, count), d = spread.shape, keys.shape[2]
    n, shares = keys.shape[1] - count, []
    starts = bounds(n, depth_of(count))
    step = max(1, n // max(64, min(1024, 8192 // groups)))
    for g in range(groups):
        whole, seen, around = 0.0, 0.0, 0.0
        for j in range(0, n, step + (step % 2 == 0)):
            leaf = count // 2 + np.searchsorted(starts, j, side="right") - 1
            gap = keys[g, count + j] - keys[g, leaf]
            whole += 0.5 * scale**2 * (gap @ moment[g] @ gap)
            squares = [one @ moment[g] @ one for one in directions[g].T.astype(np.float64)]
            seen += ALONG * 0.5 * np.dot(squares, variances[g, leaf])
            around += half_norm[g] * spread[g, leaf]
        shares.append(min(max((whole - seen) / around, 0.0), d) if around > 0 else 0.0)
    return np.array(shares)


@cache
def scaling_of(n, d, p, groups, dtype):
    """Return arguments of `scaled_nodes`, and the shares that its oracle finds."""
    arguments = in_dtype(scaling_problem(np.random.default_rng(20230702), n, d, p, groups), dtype)
    return arguments, naive_shares(*arguments[:5])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("n", "d", "p", "groups"), [(1, 1, 1, 1), (5, 2, 1, 3), (37, 33, 16, 2), (700, 6, 3, 100), (5000, 6, 3, 2)], ids=str
)
@implementations("scaled_nodes")
def test_scaled_nodes(backend, implementation, n, d, p, groups, dtype):
    """All rows of trees of few keys; every seventh where there are many groups, and every fifth of many keys."""
    (nodes, *rest), shares = scaling_of(n, d, p, groups, dtype)
    spread, sizes = run(implementation, backend, nodes, *rest, dtype=dtype)
    assert spread.dtype == sizes.dtype == dtype
    if n > 1:
        assert ((shares > 0.02) & (shares < d)).all()
    assert_close(spread, nodes.spread * shares[:, None], dtype=dtype)
    levels = np.array([(node + 1).bit_length() - 1 for node in range(spread.shape[1])])
    assert_close(sizes, nodes.sizes * 2.0 ** (0.15 * levels), dtype=dtype)


@pytest.mark.parametrize("share", [0, 6])
@implementations("scaled_nodes")
def test_spreads_are_scaled_by_no_less_than_nothing_and_no_more_than_the_dimension(backend, rng, implementation, share):
    """Where coordinates see more than there is, and where a typical query is far shorter than their moment says."""
    nodes, moment, directions, half_norm, scale, _ = scaling_problem(rng, 300)
    given = (moment, directions * 9.0, half_norm) if share == 0 else (moment, directions, half_norm * 1e-9)
    spread, sizes = run(implementation, backend, nodes, *given, scale, 0.0)
    np.testing.assert_array_equal(spread, share * nodes.spread)
    np.testing.assert_array_equal(sizes, nodes.sizes)


@implementations("scaled_nodes")
def test_spreads_of_nothing_stay_nothing(backend, rng, implementation):
    """Leaves of one key, of which alone there are no gaps, and queries of no length."""
    nodes, moment, *rest = scaling_problem(rng, 1)
    spread, _ = run(implementation, backend, nodes, moment, *rest)
    np.testing.assert_array_equal(spread, 0.0)
    nodes, moment, directions, half_norm, *rest = scaling_problem(rng, 50)
    spread, _ = run(implementation, backend, nodes, 0.0 * moment, directions, 0.0 * half_norm, *rest)
    np.testing.assert_array_equal(spread, 0.0)


# second_moment


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("n", "d", "step"), [(1, 1, 1), (7, 5, 3), (1500, 17, 1), (5000, 40, 4)])
@implementations("second_moment")
def test_second_moments(backend, rng, implementation, n, d, step, centred):
    """Against products of all pairs of columns, one by one; rows far from 0, and numbers that are not finite."""
    rows = 100.0 + rng.standard_normal((2, n, d))
    rows[0, 0, 0] = np.nan
    moment, mean = run(implementation, backend, rows, step, centred)
    some = np.where(np.isfinite(rows), rows, 0.0)[:, ::step]
    true_mean = some.mean(axis=1)
    some = some - true_mean[:, None] if centred else some
    expected = [[[np.mean(x[:, i] * x[:, j]) for j in range(d)] for i in range(d)] for x in some]
    np.testing.assert_allclose(mean, true_mean, rtol=1e-12)
    np.testing.assert_allclose(moment, expected, rtol=1e-9, atol=1e-9)


# medians of tree_order


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 500, 4097, 20_000])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "outliers", "two values", "not finite"])
def test_the_number_that_so_many_are_below(rng, dtype, size, kind):
    """However numbers are spread, and whichever it is: bounds that hold none, or don't move, end the counting."""
    values = {
        "normal": rng.standard_normal(size),
        "ties": rng.integers(0, 9, size).astype(float),
        "equal": np.full(size, 0.1),
        "outliers": np.where(rng.random(size) < 0.02, 1e12, rng.standard_normal(size)),
        "two values": np.where(rng.random(size) < 0.5, 1.0, 1.0 + 1e-6),
        "not finite": np.where(rng.random(size) < 0.3, np.inf, rng.standard_normal(size)),
    }[kind].astype(dtype)
    given = values.copy()
    for nth in {0, size // 2, max(0, (size + 1) // 2 - 1), size - 1}:
        assert nth_smallest(given, size, nth, np.empty(size, dtype)) == np.sort(values)[nth]
    np.testing.assert_array_equal(given, values)


# registry.choose

SITE = Site("numpy", "cpu", "float64")


@pytest.fixture
def spare(monkeypatch):
    """Put before the implementations of bucket_order one that only runs in float32."""

    def function(xp, codes, bits):
        raise AssertionError("not to be called")

    found = Implementation("spare", function, lambda site: None if site.dtype == "float32" else "float32 only")
    monkeypatch.setitem(KERNELS, "bucket_order", (found, *KERNELS["bucket_order"]))
    monkeypatch.setattr(registry, "TARGETS", ("spare", *registry.TARGETS))
    return found


def test_choose_takes_the_first_that_can_run(spare):
    choice = choose("bucket_order", Site("numpy", "cpu", "float32"))
    assert (choice.kernel, choice.target, choice.function) == ("bucket_order", "spare", spare.function)
    assert choice.reason == "first choice"


def test_choose_says_what_it_passed_over(spare):
    choice = choose("bucket_order", SITE)
    assert choice.target != "spare"
    assert "spare: float32 only" in choice.reason


def test_choose_takes_the_target_asked_for(spare):
    choice = choose("bucket_order", Site("numpy", "cpu", "float32"), "array-api")
    assert (choice.target, choice.reason) == ("array-api", "asked for by name")
    assert choice.function is KERNELS["bucket_order"][-1].function


def test_choose_refuses_a_target_that_cannot_run(spare):
    with pytest.raises(KernelUnavailable, match=r"bucket_order.*spare: float32 only"):
        choose("bucket_order", SITE, "spare")


def test_choose_runs_in_the_array_api_what_lacks_a_target(spare):
    choice = choose("attend_dense", SITE, "spare")
    assert (choice.target, choice.reason) == ("array-api", "it has no target spare")


NO_DEVICE = "needs PyTorch tensors on a CUDA device, got"
NO_ARRAYS = "needs CuPy arrays or PyTorch tensors on a CUDA device, got"


@pytest.mark.parametrize(
    ("kernel", "target", "site", "reason"),
    [
        ("attend_blocks", "triton", Site("torch", "cpu", "float32"), f"{NO_DEVICE} torch on cpu"),
        ("attend_blocks", "triton", Site("torch", "cpu", "float32", "reverse"), f"{NO_DEVICE} torch on cpu"),
        ("attend_blocks", "triton", Site("torch", "cpu", "float64"), f"{NO_DEVICE} torch on cpu"),
        ("attend_blocks", "triton", Site("numpy", "cpu", "float32"), f"{NO_DEVICE} numpy on cpu"),
        ("attend_blocks", "triton", Site("cupy", "cuda:0", "float32"), f"{NO_DEVICE} cupy on cuda:0"),
        ("attend_blocks", "triton", Site("torch", "cuda:0", "float64"), "computes in float32, not in float64"),
        ("attend_blocks", "triton", Site("torch", "cuda:0", "float32"), "triton is not installed"),
        ("attend_blocks", "triton", Site("torch", "cuda:0", "float32", "reverse"), "triton is not installed"),
        ("node_summaries", "numba-cuda", Site("torch", "cpu", "float32", "reverse"), f"{NO_ARRAYS} torch on cpu"),
        ("row_norms", "numba-cuda", Site("numpy", "cpu", "float32"), f"{NO_ARRAYS} numpy on cpu"),
        ("row_norms", "numba-cuda", Site("cupy", "cuda:0", "float32"), "numba-cuda is not installed"),
        ("attend_blocks", "numba-cuda", Site("torch", "cuda:0", "float64", "reverse"), "numba-cuda is not installed"),
        ("attend_dense", "numba-cuda", Site("cupy", "cuda:0", "float64"), "numba-cuda is not installed"),
        ("attend_blocks", "numba-cpu", Site("torch", "cpu", "float32", "reverse"), "records no gradients"),
        ("attend_dense", "torch-autograd", Site("torch", "cpu", "float32"), "for PyTorch tensors whose gradients are rec"),
    ],
    ids=str,
)
def test_the_first_thing_that_is_missing_is_said(monkeypatch, kernel, target, site, reason):
    """The device before the dtype, both before a package, and gradients last; without Triton and numba-cuda here."""
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    registry.cuda_problem.cache_clear()
    try:
        (one,) = (found for found in KERNELS[kernel] if found.target == target)
        assert one.unsupported(site).startswith(reason)
    finally:
        registry.cuda_problem.cache_clear()


def test_choose_refuses_unknown_targets():
    with pytest.raises(OptionError, match=r"kernels must be one of auto.*array-api.*got 'abacus'"):
        choose("bucket_order", SITE, "abacus")
