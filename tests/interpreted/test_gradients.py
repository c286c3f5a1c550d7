"""Gradients in Triton's interpreter, as PyTorch calls them, against those of a plain implementation in float64."""

from dataclasses import replace

import array_api_compat.torch as xp
import pytest
import torch

from kdecore.kernels.attend_blocks import triton, triton_backward
from kdecore.kernels.attend_dense import triton as dense
from kdecore.kernels.site import Largest, Site
from kdecore_adapters import torch_gradients
from tests.interpreted.problems import DTYPES, bias, lists, rows
from tests.tolerances import EPS

KERNELS = {"attend_blocks": triton.attend_blocks, "attend_dense": dense.attend_dense}


@pytest.fixture(params=["tiny tiles", "whole tiles", "tiles of PyTorch"])
def backward(request, monkeypatch):
    """Record the Triton kernels on tensors of the host, and differentiate by them or by PyTorch's products."""
    if request.param == "tiny tiles":
        request.getfixturevalue("tiny")
    monkeypatch.setattr(torch_gradients, "unrecorded", lambda kernel, _: KERNELS[kernel])
    fused = None if request.param == "tiles of PyTorch" else triton_backward
    monkeypatch.setattr(torch_gradients, "_fused", lambda *_: fused)


def plain(q, k, v, query_index, key_index, log_weight, scale, added=None):
    """Return out and lse of every query that sees something, the first time it is there, in the order of the blocks."""
    outs, lses = [], []
    for block in range(len(query_index)):
        for place, query in enumerate(query_index[block]):
            if place and query == query_index[block, place - 1]:
                continue
            logits = scale * (k[key_index[block]] @ q[query]) + log_weight[block]
            if added is not None:
                logits = logits + added[block if len(added) > 1 else 0, place]
            if (logits > -torch.inf).any():
                lses.append(torch.logsumexp(logits, 0))
                outs.append(torch.softmax(logits, 0) @ v[key_index[block]])
    return torch.stack(outs), torch.stack(lses)


def in_order(part, query_index):
    """Return the same of a Part."""
    queries = torch.unique_consecutive(query_index.reshape(-1))
    queries = queries[part.lse[queries] > -torch.inf]
    return part.out[queries], part.lse[queries]


def assert_gradients(rng, call, truth, inputs, dtype):
    """Assert that gradients of a random function of out and lse agree.

    For tensor cores weights, ∂out and ∂logits are rounded by half an ulp each: three ulps of the largest, and 64 of float32.
    """
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found, expected = call(*inputs), truth(*wide)
    slopes = [torch.from_numpy(rng.standard_normal(x.shape)) for x in expected]
    found = torch.autograd.grad(sum((x * y).sum() for x, y in zip(found, slopes, strict=True)), inputs)
    expected = torch.autograd.grad(sum((x * y).sum() for x, y in zip(expected, slopes, strict=True)), wide)
    for x, y, given in zip(found, expected, inputs, strict=True):
        assert x.dtype == given.dtype
        limit = (64 * EPS["float32"] + (3 * EPS[dtype] if dtype != "float32" else 0.0)) * float(y.abs().max())
        torch.testing.assert_close(x.double(), y, rtol=0, atol=max(limit, 1e-6))


SIZES, BIASES = [(1, 1, 1, 1), (5, 9, 4, 33), (20, 37, 17, 3)], ["", "for each block", "for all"]


@pytest.mark.parametrize(
    ("dtype", "biased", "sizes"), [(DTYPES[(i + j) % 3], BIASES[i], SIZES[j]) for i in range(3) for j in range(3)], ids=str
)
def test_gradients_of_blocks(rng, backward, dtype, biased, sizes):
    """With hidden slots, a query that sees nothing, one that is there again, and some that are in no block.

    Every dtype with every bias and with all sizes, and every bias with all sizes.
    """
    b, s, d, d_v = sizes
    q, k, v = rows(rng, dtype, (2 * b + 3, d), (30, d), (30, d_v))
    query_index, key_index, log_weight = lists(rng, len(q), 30, 2, b, s)
    log_weight[0, 1::3] = -torch.inf
    if b > 1:
        query_index[0, -1] = query_index[0, -2]
    inputs = [q, k, v]
    if biased:
        added = bias(rng, 1 if biased == "for all" else 2, b, s, hidden=0.3)
        if b == 1:
            added[:] = 0.1
        inputs.append(added)
    inputs = [x.requires_grad_() for x in inputs]

    def call(q, k, v, added=None):
        part = torch_gradients.attend_blocks(xp, q, k, v, query_index, key_index, log_weight, 0.4, added)
        return in_order(part, query_index)

    def truth(q, k, v, added=None):
        return plain(q, k, v, query_index, key_index, log_weight.double(), 0.4, added)

    assert_gradients(rng, call, truth, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 7, 9, 4, 3), (1, 1, 1, 1, 1), (2, 20, 40, 33, 17)])
def test_gradients_of_exact_attention(rng, backward, dtype, shape):
    G, n_q, n_k, d, d_v = shape
    inputs = [x.requires_grad_() for x in rows(rng, dtype, (G, n_q, d), (G, n_k, d), (G, n_k, d_v))]

    def call(q, k, v):
        part = torch_gradients.attend_dense(xp, q, k, v, 0.4)
        return part.out, part.lse

    def truth(q, k, v):
        logits = 0.4 * q @ k.mT
        return torch.softmax(logits, -1) @ v, torch.logsumexp(logits, -1)

    assert_gradients(rng, call, truth, inputs, dtype)


def test_a_query_that_sees_nothing_spoils_no_gradient(rng):
    """Though it is NaN."""
    q, k, v = rows(rng, "float32", (10, 4), (30, 4), (30, 3))
    found = lists(rng, 10, 30, 2, 5, 9)
    added = torch.zeros(2, 5, 9)
    added[1, 2] = -torch.inf
    q[found[0][1, 2]] = torch.nan
    part = triton.attend_blocks(xp, q, k, v, *found, 0.4, added)
    kept = part.lse.masked_fill(part.lse == -torch.inf, torch.inf), torch.ones(10, 3), torch.ones(10)
    gradients = triton_backward.gradients(q, k, v, found, (2, 5, 9), 0.4, *kept, added, of_bias=True)
    assert all(x.isfinite().all() for x in gradients)


FUSED = Site("torch", "cuda:0", "float32", "reverse", Largest(d=64, d_v=65, item_bytes=4))


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        (FUSED, None),
        (replace(FUSED, dtype="float64"), "computes in float32, not in float64"),
        (replace(FUSED, device="cpu"), "needs PyTorch tensors on a CUDA device, got torch on cpu"),
        (replace(FUSED, largest=Largest(d=64, d_v=81, item_bytes=4)), "of ≤ 576 bytes, padded, got 640"),
    ],
    ids=str,
)
def test_where_fused_gradients_are_used(site, reason):
    """On CUDA devices, for rows that fit; not in float64."""
    found = torch_gradients.unfused(site)
    assert found is None if reason is None else reason in found
    assert torch_gradients._fused(site) is (triton_backward if reason is None else None)


def test_no_fused_gradients_where_the_order_of_additions_is_to_be_fixed(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert "no fixed order" in torch_gradients.unfused(FUSED)
    assert torch_gradients._fused(FUSED) is None


def test_rows_too_wide_for_fused_gradients_are_not_taken(rng):
    q, k, v = rows(rng, "float32", (10, 64), (30, 64), (30, 81))
    found = lists(rng, 10, 30, 2, 5, 9)
    with pytest.raises(AssertionError):
        triton_backward.gradients(q, k, v, found, (2, 5, 9), 0.4, torch.ones(10), torch.ones(10, 81), torch.ones(10))
