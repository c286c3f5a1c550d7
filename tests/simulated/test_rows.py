"""What looks at rows, and what becomes of them, in the simulator: against references on the same numbers."""

import numpy as np
import pytest
import torch

from kdecore.arrays.namespace import host
from kdecore.core.state import AttentionState
from kdecore.kernels.finite_rows import cuda as finite_cuda
from kdecore.kernels.finite_rows import reference as finite_reference
from kdecore.kernels.row_norms import cuda as norms_cuda
from kdecore.kernels.row_norms import reference as norms_reference
from kdecore.kernels.spoil_groups import cuda as groups_cuda
from kdecore.kernels.spoil_groups import reference as groups_reference
from kdecore.kernels.spoil_rows import cuda as spoil_cuda
from kdecore.kernels.spoil_rows import reference as spoil_reference
from kdecore.kernels.value_sizes import cuda as sizes_cuda
from kdecore.kernels.value_sizes import reference as sizes_reference
from tests.simulated.rows import DTYPES, stored
from tests.tolerances import assert_close


def rows_with_holes(rng, shape):
    rows = rng.standard_normal(shape)
    for place, number in zip(rng.integers(0, shape[1], 4), (np.nan, np.inf, -np.inf, np.inf), strict=True):
        rows[rng.integers(shape[0]), place, rng.integers(shape[2])] = number
    return rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 17, 5), (1, 1, 1), (2, 40, 33), (1, 3, 90), (2, 70, 0)], ids=str)
def test_finite_rows(rng, shape, dtype):
    xp, rows, wide = stored(rows_with_holes(rng, shape) if shape[2] else np.zeros(shape), dtype)
    found, finite = finite_cuda.finite_rows(xp, rows)
    assert found.dtype == rows.dtype
    for one, other in zip((found, finite), finite_reference.finite_rows(host, wide), strict=True):
        np.testing.assert_array_equal(np.asarray(one.to(xp.float64) if dtype == "bfloat16" else one), other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 17, 5), (1, 1, 1), (2, 9, 33), (2, 5, 0)], ids=str)
def test_row_norms(rng, shape, dtype):
    rows = rows_with_holes(rng, shape) if shape[2] else np.zeros(shape)
    rows[-1, -1:] = 0.0
    xp, rows, wide = stored(rows, dtype)
    found = np.asarray(norms_cuda.row_norms(xp, rows))
    assert found.dtype == (np.float64 if dtype == "float64" else np.float32)
    expected = norms_reference.row_norms(host, wide)
    assert_close(found, expected, dtype="float64" if dtype == "float64" else "float32")


def test_row_norms_of_groups_of_any_size(rng):
    rows = rng.standard_normal((4, 9, 5)) * np.array([1e-300, 1e300, 0.0, 1.0])[:, None, None]
    assert_close(norms_cuda.row_norms(host, rows), norms_reference.row_norms(host, rows))


def logarithms(rng, shape, dtype):
    """Return logarithms of denominators, of queries that see no key and of spoilt ones among them."""
    found = rng.standard_normal(shape)
    found[-1, :3] = -np.inf
    found[0, 1:2] = np.nan
    return found.astype("float64" if dtype == "float64" else "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spoilt", "place", "number"), [("k", 0, np.nan), ("v", -1, -np.inf), ("k", 8, np.inf), ("", 0, 0)])
def test_spoil_groups(rng, dtype, spoilt, place, number):
    rows = {"k": rng.standard_normal((3, 9, 7)), "v": rng.standard_normal((3, 9, 5))}
    if spoilt:
        rows[spoilt][1, place, -1] = number
        rows[spoilt][2, place, 0] = number
    (xp, k, wide_k), (_, v, wide_v) = (stored(x, dtype) for x in rows.values())
    lse = logarithms(rng, (3, 21), dtype)
    found = np.asarray(groups_cuda.spoil_groups(xp, xp.asarray(lse), k, v))
    np.testing.assert_array_equal(found, groups_reference.spoil_groups(host, lse, wide_k, wide_v))
    assert np.isnan(found[1:]).any() == bool(spoilt)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 21, 5), (1, 1, 1), (3, 9, 0), (1, 5, 70)], ids=str)
def test_spoil_rows_and_round_them(rng, dtype, shape):
    xp, like, _ = stored(np.zeros(1), dtype)
    out = np.exp(3.0 * rng.standard_normal(shape)).astype("float64" if dtype == "float64" else "float32")
    # Halfway between two numbers of bfloat16, and of float16: the even one is below, and above.
    ties = np.resize([1.0 + 2.0**-8, 1.0 + 3.0 * 2.0**-8, 1.0 + 2.0**-11, 1.0 + 3.0 * 2.0**-11], out[-1, 3:].shape)
    out[-1, 3:] = ties
    part = AttentionState(xp.asarray(out), xp.asarray(logarithms(rng, shape[:2], dtype)))
    finite = xp.asarray((rng.random(shape[:2]) < 0.7) | (np.arange(shape[1]) >= 3))
    found, expected = (one.spoil_rows(xp, part, finite, like) for one in (spoil_cuda, spoil_reference))
    assert found.out.dtype == like.dtype
    # Rounded the same, bit by bit.
    for a, b in ((found.out, expected.out), (found.lse, expected.lse)):
        np.testing.assert_array_equal(*(np.asarray(x.to(xp.float64) if dtype == "bfloat16" else x) for x in (a, b)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 17, 5), (1, 1, 1), (2, 49, 9), (1, 33, 4), (2, 5, 0)], ids=str)
def test_value_sizes(rng, shape, dtype):
    """Of several parts, tiles and programs, the last ones ragged; fewer programs than ranges of columns."""
    rows = rng.standard_normal(shape)
    if shape[1] > 9 and shape[2]:
        rows = rows_with_holes(rng, shape)
        rows[-1, 7] *= 1e4
    xp, rows, wide = stored(rows, dtype)
    sizes, low, high = sizes_cuda.value_sizes(xp, rows)
    assert low.dtype == high.dtype == rows.dtype
    expected, *ranges = sizes_reference.value_sizes(host, wide)
    found = np.asarray(sizes)
    assert found.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert_close(found, expected, dtype=str(found.dtype))
    for x, wanted in zip((low, high), ranges, strict=True):
        np.testing.assert_array_equal(np.asarray(x.to(torch.float64) if dtype == "bfloat16" else x), wanted)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_value_sizes_in_any_units(rng, dtype):
    """Rows whose squares are no numbers of the dtype, beside others, in tiles and parts of their own; zeros; infinities."""
    rows, limits = rng.uniform(0.5, 1.0, (5, 40, 9)), np.finfo(dtype)
    rows[0] *= float(limits.max)
    rows[1] *= float(limits.tiny)
    rows[2, :33] *= float(limits.tiny)
    rows[2, 33:] *= float(limits.max) ** 0.9
    rows[2, :, 5:] *= 1e3
    rows[3] = 0.0
    rows[4] = np.inf
    rows[4, 20] = 0.0
    rows = rows.astype(dtype)
    sizes, low, high = sizes_cuda.value_sizes(host, rows)
    wide = rows.astype(np.longdouble)
    norms = np.sqrt((np.where(np.isfinite(wide), wide, 0.0) ** 2).sum(axis=-1))
    top = norms.max(axis=1, keepdims=True)
    assert_close(sizes, norms / np.where(top > 0, top, 1.0), dtype=dtype)
    assert (sizes[:3].max(axis=1) == 1.0).all()
    np.testing.assert_array_equal(low, rows.min(axis=1))
    np.testing.assert_array_equal(high, rows.max(axis=1))
