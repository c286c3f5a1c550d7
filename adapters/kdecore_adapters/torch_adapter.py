"""PyTorch: attention as its own function has it."""

from collections.abc import Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import CausalBias, CausalVariant

from kdecore.arrays.backend import common_namespace
from kdecore.arrays.errors import DTypeError, OptionError, ShapeError
from kdecore.arrays.namespace import ACCUMULATION
from kdecore.arrays.scalars import check_boolean, one_of
from kdecore.core.options import DEFAULT_BUDGET
from kdecore.core.problem import check_scale
from kdecore.methods import devices
from kdecore.methods.auto import WORTHWHILE, exact_over_treecode
from kdecore.methods.costs import Sizes
from kdecore.methods.treecode import PRIORS
from kdecore_adapters.torch_backend import BACKEND
from kdecore_adapters.torch_operator import (
    aligned,
    checked_seed,
    collect_reports,
    encoded,
    estimate,
)

__all__ = ["collect_reports", "scaled_dot_product_attention"]

BEYOND = ("window", "key_lengths", "max_memory", "check_finite", "kernels")
"""Options that ask for what PyTorch's own attention would not do, in the result or on the way there."""
EXACT: Mapping[str, Any] = {"method": "exact", "budget": None, "rtol": None}
"""Options in place of others where a call is left to PyTorch, whose own attention returns no log-sum-exp."""
LAYOUTS = ("bhsd", "bshd")


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    layout: str = ...,
    return_lse: Literal[False] = ...,
    **kdecore_options: Any,
) -> Tensor: ...
@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    layout: str = ...,
    return_lse: Literal[True],
    **kdecore_options: Any,
) -> tuple[Tensor, Tensor]: ...
@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    layout: str = ...,
    return_lse: bool = ...,
    **kdecore_options: Any,
) -> Any: ...
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    layout: str = "bhsd",
    return_lse: bool = False,
    **kdecore_options: Any,
) -> Any:
    """Return attention as `torch.nn.functional.scaled_dot_product_attention` does, estimated where that pays.

    A call that is left to PyTorch (see `left_to_torch`) is PyTorch's own. Works under torch.compile without graph breaks,
    torch.export, torch.func.vmap, and autocast, which makes the result of the dtype that PyTorch's would have.
    torch.func.grad does not work with operators like this one; backward() and torch.autograd.grad do, once: second
    derivatives need ``kdecore.attention(…, kernels="array-api")``.

    Parameters
    ----------
    query, key, value
        (…, n_q, d), (…, n_k, d), (…, n_k, d_v) of float16, bfloat16, float32 or float64; leading dimensions are broadcast.
    attn_mask
        As PyTorch's: boolean, True for what is seen, or added to the logits; its gradient is recorded. See
        `kdecore.attention` for which masks cost nothing.
    dropout_p
        0 where attention is estimated.
    is_causal
        Query i sees the keys j ≤ i: aligned to the first key and query, as PyTorch has it, unlike
        ``kdecore.attention(causal=True)``. The same for n_q = n_k.
    scale
        Factor on ⟨q, k⟩; 1/√d if None.
    enable_gqa
        Whether key and value may have fewer heads, a divisor of the query's.
    layout
        ``"bhsd"``, or ``"bshd"``: query, key and value are (…, n, heads, d), and so is the result, a view. Nothing is copied
        for it; a mask stays (…, heads, n_q, n_k).
    return_lse
        Also return the natural log of each query's softmax denominator, as parts of attention are merged by. PyTorch's own
        attention has none to return: calls that would be left to it are evaluated by kdecore's exact method.
    **kdecore_options
        method, budget, rtol, seed (below 2**63) and other options of `kdecore.attention`, but those that arguments above
        say. They are checked and hold whether or not a call is left to PyTorch: one with ``window``, ``key_lengths``,
        ``check_finite``, ``max_memory`` or named ``kernels`` isn't.

    Returns
    -------
    out : Tensor
        (…, n_q, d_v), of query's dtype and device, in the time and memory of `kdecore.attention`. Its gradients take another
        evaluation, with the same seed, and about as long again as two; nothing but the inputs is kept for them.
    lse : Tensor
        (…, heads, n_q), or (…, n_q, heads) with ``layout="bshd"``, float32, or float64 of float64: log Σⱼ exp(scale ·
        ⟨q, kⱼ⟩) or its estimate, −∞ of a query that sees no key; only with ``return_lse``. Its gradients are recorded too.

    Raises
    ------
    OptionError
        dropout_p is not 0 where the call isn't left to PyTorch; attn_mask together with is_causal; ``diagonal`` that these
        contradict; unknown options, layouts, and those out of their range.
    ShapeError
        With ``layout="bshd"``, a tensor without a dimension of heads.
    KdecoreError
        What else `kdecore.attention` raises.
    """
    return_lse = check_boolean("return_lse", return_lse)
    if is_causal and attn_mask is not None:
        raise OptionError("attn_mask must be None with is_causal=True")
    if one_of(LAYOUTS, "layout", layout) == "bshd":
        query, key, value = (swapped(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    lower_right, given = False, attn_mask
    if isinstance(attn_mask, CausalBias):
        lower_right = attn_mask.variant == CausalVariant.LOWER_RIGHT
        is_causal, attn_mask = not lower_right, None
        given = given if lower_right else None
    encoded({name: x for name, x in kdecore_options.items() if name not in ("seed", "key_lengths")})
    if not torch.compiler.is_compiling():
        # In compiled code these may be symbols, which the operator checks when it runs.
        checked_seed(kdecore_options.get("seed", 0))
        check_tensors(return_lse or beyond_torch(kdecore_options), query, key, value, attn_mask)
        check_scale(scale, 1)
    if is_causal or lower_right:
        kdecore_options = aligned(kdecore_options, query, key, top_left=is_causal)
    left = left_to_torch(query, key, value, kdecore_options, restricted=is_causal or given is not None)
    if left and not return_lse:
        out = functional.scaled_dot_product_attention(
            query, key, value, given, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return out.transpose(-3, -2) if layout == "bshd" else out
    if dropout_p > 0.0:
        raise OptionError(f"dropout_p must be 0 where a call isn't left to PyTorch, got {dropout_p}")
    options = {**kdecore_options, **EXACT} if left else kdecore_options
    check_leading(query, key, value, enable_gqa)
    query, key, value = broadcast(query, key, value, enable_gqa)
    out, lse = estimate(query, key, value, attn_mask, is_causal or lower_right, scale, options)
    if layout == "bshd":
        out, lse = out.transpose(-3, -2), lse.transpose(-2, -1)
    return (out, lse) if return_lse else out


def swapped(name: str, x: Any) -> Any:
    """Return a tensor of the layout ``"bshd"`` in ``"bhsd"``, a view; what is no tensor is left for `check_tensors`."""
    if not isinstance(x, Tensor):
        return x
    if x.ndim < 3:
        raise ShapeError(f'{name} must be (…, n, heads, d) with layout="bshd", got shape {tuple(x.shape)}')
    return x.transpose(-3, -2)


def left_to_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Mapping[str, Any],
    min_keys: int = 0,
    min_queries: int = 0,
    *,
    restricted: bool = False,
) -> str:
    """Return why a call is left to PyTorch's own attention; "" where it is not.

    From shapes and options alone: nothing waits for a device, and torch.compile sees integers only.

    Parameters
    ----------
    query, key, value
        As in `scaled_dot_product_attention`.
    options
        Of kdecore: with a method's name that method runs whatever it takes; with ``"auto"``, the default, one does where it
        is expected to be faster, on devices by what was measured on such a card (`kdecore.methods.devices`). With what
        PyTorch's own attention hasn't (see `beyond_torch`) nothing is left to it.
    min_keys, min_queries
        Shorter inputs are left to PyTorch.
    restricted
        Whether attention is causal or has a mask.
    """
    if beyond_torch(options):
        return ""
    if query.is_nested or key.is_nested or value.is_nested:
        return "nested tensors"
    dtype = str(query.dtype).removeprefix("torch.")
    if dtype not in ACCUMULATION:
        return f"dtype {dtype}"
    n_q, n_k = query.shape[-2], key.shape[-2]
    if n_k < min_keys:
        return f"fewer than {min_keys} keys"
    if n_q < min_queries:
        return f"fewer than {min_queries} queries"
    if options.get("method", "auto") != "auto":
        return ""
    budget = options.get("budget") or DEFAULT_BUDGET
    if options.get("rtol") is not None:
        budget = PRIORS.first_budget
    if n_k <= budget:
        return "no more keys than the budget"
    groups = 1
    for size in query.shape[:-2]:
        groups = groups * size
    sizes = Sizes(groups, n_q, n_k, query.shape[-1], value.shape[-1], dtype)
    if query.device.type != "cpu":
        recorded = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        having = {"masks": restricted, "rtol": options.get("rtol") is not None, "gradients": recorded}
        return left_by_card(card_of(str(query.device)), sizes, budget, [name for name, there in having.items() if there])
    return (
        ""
        if groups * n_q > 0 and exact_over_treecode(sizes, budget) >= WORTHWHILE
        else "exact attention is expected to be about as fast"
    )


def left_by_card(name: str, sizes: Sizes, budget: int, beside: list[str]) -> str:
    """Return why a call on a card of that name is left to PyTorch; "" where it isn't. ``beside`` as in `unmeasured`."""
    if reason := devices.unmeasured(name, sizes, beside):
        return reason
    if devices.exact_over_treecode(name, sizes, budget) >= WORTHWHILE:
        return ""
    return f"measured on {name}: exact attention is expected to be about as fast"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def card_of(device: str) -> str:
    """Return the name of a device's card."""
    return BACKEND.card(device)


def check_tensors(own: bool, query: Any, key: Any, value: Any, attn_mask: Any) -> None:
    """Raise `DTypeError` unless arguments are tensors that attention is computed of, or all nested, for PyTorch's own.

    ``own`` says that a call isn't left to that.
    """
    tensors = {"query": query, "key": key, "value": value, **({} if attn_mask is None else {"attn_mask": attn_mask})}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DTypeError(f"{name} must be a PyTorch tensor, got {type(tensor).__name__}")
    if own or not all(tensor.is_nested for tensor in (query, key, value)):
        common_namespace(**tensors)


def beyond_torch(options: Mapping[str, Any]) -> bool:
    """Return whether options ask for what PyTorch's own attention would not do: `BEYOND`."""
    return any(options.get(name) not in (None, False, "auto") for name in BEYOND if name != "key_lengths") or (
        options.get("key_lengths") is not None
    )


def check_leading(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Raise `ShapeError` unless leading dimensions can be broadcast; in compiled code PyTorch says so itself."""
    if torch.compiler.is_compiling():
        return
    try:
        broadcast(query, key, value, enable_gqa)
    except RuntimeError as error:
        which = "before heads, n and d" if enable_gqa else "before n and d, enable_gqa=False,"
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ShapeError(f"query, key and value must have dimensions {which} that can be broadcast, got {shapes}") from error


def broadcast(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Broadcast leading dimensions, but for the heads where key and value may have fewer."""
    own = 3 if enable_gqa else 2
    lead = torch.broadcast_shapes(*(x.shape[:-own] for x in (query, key, value)))
    query, key, value = (x.expand(*lead, *x.shape[-own:]) for x in (query, key, value))
    return query, key, value


def both_masks(a: Tensor | None, b: Tensor) -> Tensor:
    """Return what two masks do together, of which each is True for what is seen or added to the logits."""
    if a is None:
        return b
    if a.dtype == b.dtype == torch.bool:
        return a & b
    dtype = a.dtype if b.dtype == torch.bool else b.dtype
    a, b = (torch.zeros_like(x, dtype=dtype).masked_fill(~x, -torch.inf) if x.dtype == torch.bool else x for x in (a, b))
    return a + b
