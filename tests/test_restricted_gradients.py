"""Gradients through PyTorch where keys are hidden or shared."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kdecore import attention
from tests.features import METHODS

CALLS = {
    "causal": ({"causal": True}, {"is_causal": True}),
    "mask": ({"mask": torch.rand(40, 40, generator=torch.manual_seed(0)) < 0.7}, None),
    "additive": ({"mask": torch.randn(40, 40, dtype=torch.float64, generator=torch.manual_seed(0))}, None),
    "lengths": ({"key_lengths": [30, 25]}, {"attn_mask": torch.arange(40) < torch.tensor([30, 25])[:, None, None, None]}),
}


def inputs(heads_k=4):
    rng = np.random.default_rng(0)
    shapes = ((2, 4, 40, 6), (2, heads_k, 40, 6), (2, heads_k, 40, 5))
    return [torch.from_numpy(rng.standard_normal(shape)).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("ours", "theirs"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("heads_k", [4, 2])
def test_gradients_at_full_budget_are_exact(ours, theirs, method, heads_k):
    found, expected = inputs(heads_k), inputs(heads_k)
    weights = torch.linspace(-1, 1, 5, dtype=torch.float64)
    (attention(*found, method=method, budget=40, **ours) * weights).sum().backward()
    theirs = {"attn_mask": ours["mask"]} if theirs is None else theirs
    (sdpa(*expected, enable_gqa=True, **theirs) * weights).sum().backward()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("ours", "theirs"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("method", METHODS[1:])
def test_gradients_flow_at_a_small_budget(ours, theirs, method):
    """Of an estimate that is a weighted mean of values: those of the values add up to what the outputs weigh."""
    q, k, v = inputs()
    attention(q, k, v, method=method, budget=15, **ours).sum().backward()
    for x in (q, k, v):
        assert torch.isfinite(x.grad).all()
        assert x.grad.abs().sum() > 0
    if method in ("sortlsh", "hyper"):
        torch.testing.assert_close(v.grad.sum(dim=2), torch.full((2, 4, 5), 40.0, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_that_is_learned_has_a_gradient(method):
    masks = [torch.zeros(40, 40, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for mask, call in zip(masks, (attention, sdpa), strict=True):
        q, k, v = (x.detach() for x in inputs())
        out = call(q, k, v, mask=mask, method=method, budget=40) if call is attention else call(q, k, v, attn_mask=mask)
        (out * torch.linspace(-1, 1, 5, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(masks[0].grad, masks[1].grad, rtol=1e-9, atol=1e-11)
    q, k, v = (x.detach() for x in inputs())
    masks[0].grad = None
    attention(q, k, v, mask=masks[0], method=method, budget=15).sum().backward()
    assert torch.isfinite(masks[0].grad).all()


def test_a_row_without_keys_has_no_gradient():
    q, k, v = inputs()
    mask = torch.ones(40, 40, dtype=torch.bool)
    mask[3] = False
    attention(q, k, v, mask=mask).sum().backward()
    assert (q.grad[:, :, 3] == 0).all()
    for x in (q, k, v):
        assert torch.isfinite(x.grad).all()
