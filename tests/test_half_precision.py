"""Inputs in half precision that stay as they are stored, as on accelerators: the results of the same numbers in float32."""

import numpy as np
import pytest
import torch

import kdecore
from kdecore.core import problem as problems
from kdecore.engine import nonfinite
from kdecore.methods import auto, choices, memory, treecode

METHODS = {
    "exact": kdecore.Exact(),
    "sortlsh": kdecore.SortLSH(),
    "hyper": kdecore.Hyper(),
    "kdeformer": kdecore.KDEformer(),
    "treecode": kdecore.Treecode().at(True),
}
RESTRICTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "lengths": {"key_lengths": [290, 150]},
    "window": {"window": 60},
    "mask": {"mask": True},
}


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    for module in (problems, nonfinite, choices, memory, auto, treecode):
        monkeypatch.setattr(module, "on_accelerator", lambda array: True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("restriction", "dtype"), [("plain", "float16"), *((restriction, "bfloat16") for restriction in RESTRICTIONS)]
)
def test_methods_compute_in_float32(request, method, restriction, dtype):
    """The same keys are chosen, but where float32 sums in another order say otherwise: no more than rounding differs."""
    rng = np.random.default_rng(0)
    q, k, v = (torch.tensor(rng.standard_normal((2, 300, 12))).to(getattr(torch, dtype)) for _ in range(3))
    options = dict(RESTRICTIONS[restriction])
    if "mask" in options:
        options["mask"] = torch.tensor(rng.random((300, 300)) < 0.8)
    budget = None if method == "exact" else 64
    call = {"method": METHODS[method], "budget": budget, "kernels": "array-api", "return_lse": True, **options}
    expected, expected_lse = kdecore.attention(q.float(), k.float(), v.float(), **call)
    request.getfixturevalue("as_on_an_accelerator")
    problem = problems.canonicalise(q, k, v)
    assert problem.q.dtype == problem.k.dtype == problem.v.dtype == q.dtype
    assert problem.dtype == torch.float32
    found, lse = kdecore.attention(q, k, v, **call)
    assert found.dtype == q.dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(found, expected.to(q.dtype), rtol=0, atol=2 * torch.finfo(q.dtype).eps * expected.abs().max())
    # A tree's mean keys are rounded to bfloat16 too.
    rounded = method == "treecode" and dtype == "bfloat16"
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=2.0**-8 if rounded else 1e-5)


@pytest.mark.parametrize("method", ["sortlsh", "treecode"])
def test_certificates_and_tolerances(as_on_an_accelerator, method):
    rng = np.random.default_rng(0)
    q, k, v = (torch.tensor(rng.standard_normal((2, 600, 12))).to(torch.bfloat16) for _ in range(3))
    _, report = kdecore.attention(q, k, v, method=method, budget=64, kernels="array-api", return_report=True)
    assert report.certificate is not None
    assert report.certificate.frobenius > 0
    out = kdecore.attention(q, k, v, method=method, rtol=0.3, kernels="array-api")
    exact = kdecore.attention(q.double(), k.double(), v.double(), method="exact")
    assert torch.linalg.norm(out.double() - exact) <= 0.3 * torch.linalg.norm(exact)


def test_numbers_that_are_not_finite_spoil_queries_and_groups(as_on_an_accelerator):
    q, k, v = (torch.randn(3, 200, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    expected = kdecore.attention(q, k, v, method="sortlsh", budget=32)
    q[0, 7, 3], k[1, 9, 2] = torch.nan, torch.inf
    found = kdecore.attention(q, k, v, method="sortlsh", budget=32, key_lengths=[200, 200, 150])
    lost = torch.isnan(found).all(dim=-1)
    assert lost[0].nonzero().flatten().tolist() == [7]
    assert lost[1].all()
    assert not torch.isnan(found[2]).any()
    k[1, 9, 2], k[2, 180, 0] = 0.0, torch.nan
    found = kdecore.attention(q, k, v, method="sortlsh", budget=32, key_lengths=[200, 200, 150])
    assert not torch.isnan(found[1:]).any(), "what is hidden spoils nothing"
    assert torch.isfinite(expected).all()
