"""Kernels that build a tree in Triton's interpreter, against their references in float64 on the same numbers."""

import array_api_compat.torch as xp
import pytest
import torch
import triton.language as tl

from kdecore.core.tree import node_count
from kdecore.kernels.gap_moments import reference as gaps_reference
from kdecore.kernels.gap_moments import triton as gaps
from kdecore.kernels.node_summaries import reference as summaries_reference
from kdecore.kernels.node_summaries import triton as summaries
from kdecore.kernels.project_rows import reference as project_reference
from kdecore.kernels.project_rows import triton as project
from kdecore.kernels.rank_codes import reference as codes_reference
from kdecore.kernels.rank_codes import triton as codes
from kdecore.kernels.registry import KERNELS
from kdecore.kernels.site import Site
from tests.interpreted.problems import DTYPES, rows
from tests.tolerances import EPS, assert_close

SIZES = [1, 2, 5, 37, 128, 129, 1001]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Let memory be full of NaN, or of large numbers, so that what isn't written is seen."""
    empty = torch.empty

    def poisoned(*shape, **more):
        found = empty(*shape, **more)
        return found.fill_(torch.nan if found.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("kernel", ["node_summaries", "project_rows", "rank_codes"])
def test_where_they_run(kernel):
    """On PyTorch's CUDA tensors, in float32; codes, which are integers, also where gradients are recorded."""
    first = KERNELS[kernel][0]
    assert first.target == "triton"
    assert first.unsupported(Site("torch", "cuda:0", "float32")) is None
    assert (first.unsupported(Site("torch", "cuda:0", "float32", "reverse")) is None) == (kernel == "rank_codes")
    for site in (Site("torch", "cuda:0", "float64"), Site("cupy", "cuda:0", "float32"), Site("torch", "cpu", "float32")):
        assert first.unsupported(site) is not None


def problem(rng, dtype, n, d, d_v, p):
    """Return k, v, coordinates, sizes, order and half norms of two groups; rows lie around 3, means of them too.

    Of 19 columns, the first group has nodes just within the frozen phase, and just without.
    """
    k, v = (3.0 + x for x in rows(rng, dtype, (2, n, d), (2, n, d_v)))
    coordinates, sizes = rows(rng, "float32", (2, n, p), (2, n))
    order = torch.from_numpy(rng.permuted([range(n)] * 2, axis=1))
    return k, v, coordinates, sizes, order, torch.tensor([0.2, 5.0])


def assert_summaries(given, leaf_size=4):
    """Assert that all summaries agree; what is returned in bfloat16 is rounded once, by the interpreter towards 0."""
    k, d_v = given[0], given[1].shape[2]
    found = summaries.node_summaries(xp, *given[:5], leaf_size, given[5])
    wide = [x.double() if x.is_floating_point() else x for x in given]
    truth = summaries_reference.node_summaries(xp, *wide[:5], leaf_size, wide[5])
    stored = torch.bfloat16 if k.dtype == torch.bfloat16 else torch.float32
    n, nodes = k.shape[1], truth.spread.shape[1]
    for name, one, other in zip(found._fields, found, truth, strict=True):
        assert one.dtype == (stored if name in ("keys", "values") else torch.float32), name
        rounding = EPS["bfloat16"] if one.dtype == torch.bfloat16 else 0.0
        limit = 64 * EPS["float32"] * max(1.0, float(other.abs().max()))
        torch.testing.assert_close(
            one.double(), other, rtol=rounding, atol=limit, msg=lambda text, name=name: f"{name}: {text}"
        )
    index = given[4][:, :, None]
    assert torch.equal(found.keys[:, nodes:], torch.take_along_dim(k, index, 1).to(stored))
    assert torch.equal(found.values[:, nodes:, :-1], torch.take_along_dim(given[1], index, 1).to(stored))
    assert (found.values[:, nodes:, -1] == 0).all()
    assert found.values.stride() == ((nodes + n) * found.values.stride(1), found.values.stride(1), 1)
    assert found.values.stride(1) % 16 == 0
    beyond = torch.as_strided(found.values, (2, nodes + n, found.values.stride(1)), found.values.stride())[:, :, d_v + 1 :]
    assert (beyond == 0).all()
    flat = found.values.reshape(-1, d_v + 1)
    assert flat.data_ptr() == found.values.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_node_summaries(rng, dtype, n):
    assert_summaries(problem(rng, dtype, n, 19, 16, 5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "d_v", "p"), [(1, 1, 1), (64, 64, 16), (65, 15, 16), (5, 130, 3)])
def test_widths_of_node_summaries(rng, dtype, d, d_v, p):
    assert_summaries(problem(rng, dtype, 137, d, d_v, p))


@pytest.mark.parametrize("numbers", [2**4, 2**5, 2**7])
@pytest.mark.parametrize("leaf_size", [2, 3, 4])
def test_many_launches_of_node_summaries(rng, monkeypatch, numbers, leaf_size):
    """Tiles of one leaf, of two, and of eight; where the last launch has less to climb."""
    monkeypatch.setattr(summaries, "NUMBERS", numbers)
    for n in (1, 6, 70):
        assert_summaries(problem(rng, "float32", n, 3, 4, 2), leaf_size)


def test_leaves_of_many_rows(rng):
    assert_summaries(problem(rng, "bfloat16", 100, 3, 2, 2), leaf_size=30)


def test_node_summaries_of_rows_too_wide_for_tiles_are_not_taken(rng):
    given = problem(rng, "float32", 9, 1025, 1, 1)
    with pytest.raises(AssertionError):
        summaries.node_summaries(xp, *given[:5], 4, given[5])


def test_spreads_are_no_differences_of_squares(rng):
    """Of keys at 1,000, which vary by 1: squares would leave errors of some tenths."""
    k, v, coordinates, *rest = problem(rng, "float32", 300, 8, 3, 4)
    found = summaries.node_summaries(xp, k + 1000.0, v, coordinates + 1000.0, *rest[:2], 4, rest[2])
    wide = [x.double() for x in (k + 1000.0, v, coordinates + 1000.0, rest[0])]
    truth = summaries_reference.node_summaries(xp, *wide, rest[1], 4, rest[2].double())
    torch.testing.assert_close(found.spread.double(), truth.spread, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.variances.double(), truth.variances, rtol=1e-3, atol=1e-3)


@pytest.fixture
def small_samples(monkeypatch):
    """Let samples be small: the interpreter takes seconds to sort them."""
    monkeypatch.setattr(codes, "PLACES", tl.constexpr(32))
    for module in (codes, codes_reference):
        monkeypatch.setattr(module, "SAMPLE", 31)


def assert_codes(rng, n, p, bits, in_order):
    """Assert that all codes are those of the reference, also of rows with many equal numbers."""
    (x,) = rows(rng, "float32", (2, n, p))
    x[1] = (3 * x[1]).round()
    x *= torch.logspace(0.3, -0.7, p)
    x[0, n // 2, 0] = torch.nan
    x[1, n // 3, p - 1] = -torch.inf
    found = codes.rank_codes(xp, x, bits, in_order)
    assert found.dtype == torch.int32
    assert torch.equal(found, codes_reference.rank_codes(xp, x.double(), bits, in_order))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(
    ("p", "bits", "in_order"), [(1, 30, 0), (3, 24, 0), (16, 24, 0), (5, 10, 3), (65, 12, 0), (2, 4, 4)]
)
def test_rank_codes(rng, small_samples, n, p, bits, in_order):
    assert_codes(rng, n, p, bits, in_order)


@pytest.mark.parametrize("n", [1000, 1023, 2500])
def test_rank_codes_by_whole_samples(rng, n):
    assert_codes(rng, n, 2, 24, 0)


def test_of_equal_variances_the_first_gets_a_bit(rng, small_samples):
    """As often as it takes: shares are divided as exactly as the reference divides them."""
    x = rows(rng, "float32", (1, 500, 1))[0].repeat(1, 1, 7)
    assert torch.equal(codes.rank_codes(xp, x, 30), codes_reference.rank_codes(xp, x, 30))


def test_only_the_sample_deals_bits(rng, small_samples):
    """Rows that are not sampled change no other row's code."""
    x = rows(rng, "float32", (1, 2 * codes.SAMPLE, 3))[0] * torch.tensor([3.0, 2.0, 1.0])
    far = x.clone()
    far[0, 1::2, 2] *= 1e3
    first, second = (codes.rank_codes(xp, one, 12) for one in (x, far))
    assert torch.equal(first[0, ::2], second[0, ::2])


def test_variances_that_overflow_deal_bits(rng, small_samples):
    x = rows(rng, "float32", (1, 300, 3))[0] * 3e38
    found = codes.rank_codes(xp, x, 12)
    assert 0 <= int(found.min()) <= int(found.max()) < 2**12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("d", "p"), [(1, 1), (19, 16), (64, 16), (65, 65), (130, 70)])
def test_project_rows(rng, dtype, n, d, p):
    (x,), (matrix, less) = rows(rng, dtype, (2, n, d)), rows(rng, "float32", (2, d, p), (2, 1, p))
    x[0, n // 2, d // 2] = torch.nan
    less = less if p != 16 else None
    found = project.project_rows(xp, x, matrix, less)
    truth = project_reference.project_rows(xp, x.double(), matrix.double(), None if less is None else less.double())
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert found[0, n // 2].isnan().all()
    found[0, n // 2] = truth[0, n // 2] = 0.0
    assert_close(found, truth, dtype="float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "d_v", "slots"), [(40, 3, 1, 7), (500, 17, 33, 130), (90, 64, 64, 31), (5, 1, 20, 1)])
def test_gaps(rng, monkeypatch, dtype, n, d, d_v, slots):
    """Against the reference, of the same numbers in float64; float32 searches for shares at most a rounding apart."""
    monkeypatch.setattr(gaps, "SUMMED", tl.constexpr(16))
    nodes = node_count(n, 4)
    stored = "float32" if dtype == "float16" else dtype
    keys, values = rows(rng, stored, (2, nodes + n, d), (2, nodes + n, d_v + 1))
    key_index = torch.from_numpy(rng.integers(0, nodes + n, (2, 3, slots)))
    share = torch.from_numpy(rng.random((2, 3, slots))).float() * (key_index < nodes)
    key_index[..., 0], share[..., 0] = 0, 0.5
    found = gaps.gap_moments(xp, keys, values, key_index, share, nodes, 96)
    truth = gaps_reference.gap_moments(xp, keys.double(), values.double(), key_index, share.double(), nodes, 96)
    for one, other in zip(found, truth, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))
