"""`hash_codes` in Triton's interpreter, against its reference in float64 on the same numbers."""

import array_api_compat.torch as xp
import numpy as np
import pytest
import torch

from kdecore.kernels.hash_codes import reference, triton
from kdecore.kernels.registry import KERNELS
from kdecore.kernels.site import Site
from tests.interpreted.problems import DTYPES, rows


@pytest.fixture(params=["small parts", "whole parts"])
def parts(request, monkeypatch):
    """Let few rows need several tiles, parts and programs."""
    if request.param == "small parts":
        monkeypatch.setattr(triton, "ROWS", 16)
        monkeypatch.setattr(triton, "PARTS", 4)
        monkeypatch.setattr(triton, "PACKED", 32)
        monkeypatch.setattr(triton, "STEP", 16)


def test_where_it_runs():
    """Codes are integers: where gradients are recorded too."""
    first = KERNELS["hash_codes"][0]
    assert first.target == "triton"
    for gradient in ("", "reverse"):
        assert first.unsupported(Site("torch", "cuda:0", "float32", gradient)) is None
    for site in (Site("torch", "cuda:0", "float64"), Site("cupy", "cuda:0", "float32"), Site("torch", "cpu", "float32")):
        assert first.unsupported(site) is not None


def assert_codes(q, k, planes):
    """Assert that all codes are the reference's in float64, of the dtype that bits need; return them."""
    found = triton.hash_codes(xp, q, k, planes)
    expected = reference.hash_codes(xp, q.double(), k.double(), planes.double())
    for codes, wanted in zip(found, expected, strict=True):
        assert codes.dtype == (torch.int16 if planes.shape[1] <= 15 else torch.int32)
        assert torch.equal(codes, wanted)
    return found


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_q", "n_k", "d", "bits"),
    [
        *((1, 1, 1, 1), (2, 2, 16, 12), (1, 37, 19, 12), (64, 5, 65, 15)),
        *((129, 130, 6, 16), (101, 90, 64, 17), (30, 44, 4, 30)),
    ],
)
def test_hash_codes(rng, dtype, n_q, n_k, d, bits):
    """Projections within 1e-5 of a plane may change side in float32; the seeded data has none."""
    given = rows(rng, dtype, (2, n_q, d), (2, n_k, d))
    planes = torch.from_numpy(rng.standard_normal((d, bits)).astype(np.float32))
    for x in given:
        wide = x.double()
        assert x.shape[1] == 1 or ((wide - wide.mean(dim=1, keepdim=True)) @ planes.double()).abs().min() > 1e-5
    assert_codes(*given, planes)


def test_hash_codes_of_rows_far_from_the_origin(rng):
    """As of the others, in tests/test_kernels.py: hardly a sign differs from float64's."""
    n, d, bits, offset = 20_000, 16, 12, 1e3
    x = torch.from_numpy((rng.standard_normal((1, n, d)) + offset * rng.standard_normal(d)).astype(np.float32))
    planes = torch.from_numpy(rng.standard_normal((d, bits)).astype(np.float32))
    _, exact = reference.hash_codes(xp, x[:, :1].double(), x.double(), planes.double())
    _, found = triton.hash_codes(xp, x[:, :1], x, planes)
    assert (found != exact).double().mean() < 3e-6 * offset


@pytest.mark.usefixtures("parts")
def test_means_are_those_of_finite_projections(rng):
    """Tiles without any; and of numbers whose sum a float32 has no room for."""
    x = torch.from_numpy(rng.standard_normal((3, 200, 4)).astype(np.float32))
    x[0, 5, 1], x[0, 9, 2], x[0, 30, 3] = torch.nan, torch.inf, -torch.inf
    x[1, :70] = torch.nan
    x[2] *= 1e37
    assert_codes(x, x.flip(1), torch.eye(4))


@pytest.mark.usefixtures("parts")
def test_groups_have_their_own_means(rng):
    """Also where rows do not lie one after another."""
    x = torch.from_numpy(rng.standard_normal((2, 90, 6)).astype(np.float32))
    x[1] += 50.0
    planes = torch.from_numpy(rng.standard_normal((6, 8)).astype(np.float32))
    queries, keys = assert_codes(x[:, :40], x.transpose(1, 2).contiguous().transpose(1, 2), planes)
    alone = triton.hash_codes(xp, x[1:, :40], x[1:], planes)
    assert torch.equal(queries[1:], alone[0])
    assert torch.equal(keys[1:], alone[1])
    assert len(keys[1].unique()) > 10
