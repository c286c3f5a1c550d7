"""Hosts by their own contracts: vLLM-Omni, xDiT, ComfyUI, and who calls SageAttention. None of them is imported.

Each public function here makes what a host calls, with options of kdecore given once and checked then. What a call asks for
is honoured, or refused by its name: docs/integrations.md.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdecore.arrays.errors import DTypeError, OptionError, ShapeError, did_you_mean
from kdecore.arrays.scalars import check_boolean, integer_at_least, one_of
from kdecore_adapters.torch_adapter import EXACT, beyond_torch, check_leading, check_tensors, scaled_dot_product_attention
from kdecore_adapters.torch_calls import Calls
from kdecore_adapters.torch_encoder import MIN_KEYS, left_by_model
from kdecore_adapters.torch_operator import OPTIONS, checked, encoded, overridden

__all__ = ["VLLM_OMNI", "comfyui", "comfyui_override", "sageattention", "vllm_omni", "xdit"]

ALL_KEYS: Mapping[str, Any] = {"budget": sys.maxsize}
"""Options with which calls are PyTorch's own attention, or kdecore's exact one where log-sum-exp is asked for."""
NO_ESTIMATE = "an exact result is asked for"
STATE = (
    "denoise_step_idx",
    "total_denoise_steps",
    "latent_shape",
    "patch_size",
    "total_latent_frames",
    "patches_per_frame",
    "kv_cache_dtype",
)
"""What vLLM-Omni tells every kernel, and no result depends on: steps, the video's shape, a cache that may be coarse."""
PACKED = ("indices_k", "cu_seqlens_k", "max_seqlen_k")
"""What xDiT says a second time, for kernels of packed samples, beside a mask or a length."""
PRECISIONS = (None, torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that ComfyUI may want logits in: they are computed in float32 at least."""
QUANTISED = ("smooth_k", "smooth_v", "qk_quant_gran", "quantization_backend", "pv_accum_dtype")
"""Arguments of SageAttention that say how it rounds: nothing is quantised here."""


def vllm_omni(*, min_keys: int = MIN_KEYS, **kdecore_options: Any) -> Any:
    """Return a kernel for vLLM-Omni's ``SPARSE_ATTN`` backend, whose plugins are entry points of ``vllm_omni.sparse_attn``.

    `VLLM_OMNI` is one, installed as ``kdecore``; its options come with the attention config: ``{"backend": "SPARSE_ATTN",
    "extra": {"backend": "kdecore", "params": {"rtol": 0.05}}}``. A plugin of your own can name another, made here.

    Parameters
    ----------
    min_keys
        Calls with fewer keys are left to PyTorch's attention, as by `torch_modules.reroute`.
    **kdecore_options
        method, budget, rtol, seed and other options of `kdecore.attention`; those in ``params`` replace them.

    Returns
    -------
    callable
        ``fn(query, key, value, params, is_causal, softmax_scale)`` → (batch, n_q, heads, d_v), of (batch, n, heads, d).
        ``params`` may hold options, ``min_keys``, ``attn_mask``, (batch, n_k), True for what is seen, or four dimensions as
        PyTorch's, and `STATE`. Its ``capabilities`` say so; its ``calls`` are `torch_calls.Calls`, to ``print``.

    Raises
    ------
    OptionError
        Unknown options; when called: anything else in ``params``, or a mask beside ``is_causal``.
    """
    found = _made(_vllm_omni, min_keys, kdecore_options)
    found.capabilities = {"supports_attention_mask": True, "supports_full_attn_spans": False}
    return found


def _vllm_omni(
    attend: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: Mapping[str, Any],
    is_causal: bool,
    softmax_scale: float | None,
) -> Any:
    if not isinstance(params, Mapping):
        raise OptionError(f"params must be a mapping of options, got {type(params).__name__}")
    own = {name: params[name] for name in (*OPTIONS, "min_keys") if name in params}
    _refuse("params", params, *OPTIONS, "min_keys", "attn_mask", *STATE)
    mask = params.get("attn_mask")
    if isinstance(mask, Tensor) and mask.ndim not in (2, 4):
        shape = tuple(mask.shape)
        raise ShapeError(f"attn_mask must be (batch, n_k), or have four dimensions as PyTorch's, got shape {shape}")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        if mask.is_floating_point():
            raise DTypeError(f"attn_mask (batch, n_k) must be boolean, True for what is seen, got {mask.dtype}")
        mask = mask.bool()[:, None, None, :]
    return attend(query, key, value, mask, own, is_causal=is_causal, scale=softmax_scale, layout="bshd")


def xdit(*, return_lse: bool = False, min_keys: int = MIN_KEYS, **kdecore_options: Any) -> Any:
    """Return an attention function for xDiT: ``register_attention_function(AttentionBackendType.SDPA)(xdit(rtol=0.05))``.

    Types of backends are a closed list there: the function takes the place of one.

    Parameters
    ----------
    return_lse
        Whether log-sum-exp is returned, which ring attention needs; short calls are evaluated by kdecore's exact method
        then.
    min_keys
        Calls with fewer keys are left to PyTorch's attention, as by `torch_modules.reroute`.
    **kdecore_options
        method, budget, rtol, seed and other options of `kdecore.attention`.

    Returns
    -------
    callable
        ``fn(query, key, value, dropout_p, is_causal, attention_kwargs=None)`` → (out, lse or None): (batch, heads, n_q, d_v)
        and (batch, heads, n_q), of (batch, heads, n, d). ``attention_kwargs`` may hold ``attn_mask``, ``valid_kv_len``, the
        keys that are no padding, and `PACKED` beside one of these. Its ``calls`` are `torch_calls.Calls`, to ``print``.

    Raises
    ------
    OptionError
        Unknown options; when called: anything else in ``attention_kwargs`` that isn't None, or dropout that can't be kept.
    """
    return _made(_xdit, min_keys, kdecore_options, return_lse=check_boolean("return_lse", return_lse))


def _xdit(
    attend: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    attention_kwargs: Mapping[str, Any] | None = None,
    *,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    given = {name: x for name, x in (attention_kwargs or {}).items() if x is not None}
    mask, length = given.get("attn_mask"), given.get("valid_kv_len")
    packed = () if mask is None and length is None else PACKED
    _refuse("attention_kwargs", given, "attn_mask", "valid_kv_len", *packed)
    if length is not None:
        length = integer_at_least(1, "valid_kv_len", length)
        if length > key.shape[2]:
            raise OptionError(f"valid_kv_len must be at most the number of keys, {key.shape[2]}, got {length}")
        key, value = key[:, :, :length], value[:, :, :length]
        mask = mask if mask is None else mask[..., :length]
    found = attend(query, key, value, mask, dropout_p=dropout_p, is_causal=is_causal, return_lse=return_lse)
    return found if return_lse else (found, None)


def comfyui(*, min_keys: int = MIN_KEYS, **kdecore_options: Any) -> Any:
    """Return an attention function for ComfyUI: ``register_attention_function("kdecore", wrap_attn(comfyui(rtol=0.05)))``.

    Parameters
    ----------
    min_keys
        Calls with fewer keys are left to PyTorch's attention, as by `torch_modules.reroute`; so are those with
        ``low_precision_attention=False``.
    **kdecore_options
        method, budget, rtol, seed and other options of `kdecore.attention`.

    Returns
    -------
    callable
        ``f(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs)``: q, k
        and v are (batch, n, heads · d), or (batch, heads, n, d) with ``skip_reshape``; the result is (batch, n_q,
        heads · d_v), or (batch, heads, n_q, d_v) with ``skip_output_reshape``. ``mask`` is (n_q, n_k), (batch, n_q, n_k) or
        (batch, heads, n_q, n_k). Of ``kwargs`` it knows ``scale``, ``enable_gqa`` and ``low_precision_attention``; what else
        ComfyUI passes on, ``transformer_options``, changes no result. Its ``calls`` are `torch_calls.Calls`, to ``print``.

    Raises
    ------
    OptionError
        Unknown options; when called: unknown ``kwargs`` that aren't None, or an ``attn_precision`` beyond float32.
    ShapeError
        When called: arrays that ``heads`` doesn't fit.
    """
    return _made(_comfyui, min_keys, kdecore_options)


def comfyui_override(*, min_keys: int = MIN_KEYS, **kdecore_options: Any) -> Any:
    """Return an override for a ComfyUI model: ``transformer_options["optimized_attention_override"] = comfyui_override()``.

    Parameters
    ----------
    min_keys, **kdecore_options
        As in `comfyui`; but calls are left to ComfyUI's own attention, whichever it is.

    Returns
    -------
    callable
        ``override(func, *args, **kwargs)``: as `comfyui`'s, or ``func(*args, **kwargs)`` where the call is left to that.

    Raises
    ------
    OptionError, ShapeError
        As in `comfyui`; but what the call asks for beside its arrays is refused only where it isn't left to ``func``.
    """
    return _made(_comfyui_override, min_keys, kdecore_options)


def _comfyui_override(attend: Callable[..., Any], func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _comfyui(partial(attend, leave=partial(func, *args, **kwargs)), *args, **kwargs)


def _comfyui(
    attend: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    low_precision_attention: bool = True,
    transformer_options: object = None,
    _inside_attn_wrapper: bool = True,
    **kwargs: Any,
) -> Any:
    def refuse() -> None:
        _refuse("kwargs", kwargs)
        if attn_precision not in PRECISIONS:
            raise OptionError(f"attn_precision must be None or at most torch.float32, got {attn_precision}")

    heads = integer_at_least(1, "heads", heads)
    _check_tensors(q, k, v, mask)
    if not skip_reshape:
        # A key is as wide as a query; of values there are as many heads as of keys.
        key_heads = k.shape[-1] // max(q.shape[-1] // heads, 1) if enable_gqa else heads
        q, k, v = (_with_heads(name, x, of) for name, x, of in (("q", q, heads), ("k", k, key_heads), ("v", v, key_heads)))
    elif q.ndim != 4 or q.shape[1] != heads:
        raise ShapeError(f"q must be (batch, {heads}, n, d) with skip_reshape=True, got shape {tuple(q.shape)}")
    if mask is not None and mask.ndim < 4:
        mask = mask[:, None] if mask.ndim == 3 else mask[None, None]
    layout = "bhsd" if skip_reshape else "bshd"
    more = {"scale": scale, "grouped": enable_gqa, "exact": not low_precision_attention, "refuse": refuse}
    return attend(q, k, v, mask, layout=layout, **more, returned=partial(_reshaped, layout, skip_output_reshape))


def _with_heads(name: str, x: Tensor, heads: int) -> Tensor:
    if x.ndim != 3 or heads < 1 or x.shape[-1] % heads != 0:
        raise ShapeError(f"{name} must be (batch, n, heads · d) with {heads} heads, got shape {tuple(x.shape)}")
    found: Tensor = x.unflatten(-1, (heads, -1))
    return found


def _reshaped(layout: str, skip_output_reshape: bool, out: Tensor) -> Tensor:
    if skip_output_reshape != (layout == "bhsd"):
        out = out.transpose(1, 2)
    return out if skip_output_reshape else out.flatten(2)


def sageattention(*, min_keys: int = MIN_KEYS, **kdecore_options: Any) -> Any:
    """Return a function with the signature of SageAttention's ``sageattn``, for whoever calls that.

    Parameters
    ----------
    min_keys
        Calls with fewer keys are left to PyTorch's attention, as by `torch_modules.reroute`.
    **kdecore_options
        method, budget, rtol, seed and other options of `kdecore.attention`.

    Returns
    -------
    callable
        ``sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, attn_mask=None,
        **kwargs)``: (batch, heads, n, d), or (batch, n, heads, d) with ``"NHD"``, and so is the result; with ``return_lse``
        (out, lse), lse (batch, heads, n_q) whatever the layout. Of ``kwargs`` it knows `QUANTISED`, which mean nothing here.
        Its ``calls`` are `torch_calls.Calls`, to ``print``.

    Raises
    ------
    OptionError
        Unknown options; when called: unknown ``kwargs`` that aren't None, or layouts.
    """
    return _made(_sageattn, min_keys, kdecore_options)


def _sageattn(
    attend: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    attn_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    _refuse("kwargs", kwargs, *QUANTISED)
    layout = {"HND": "bhsd", "NHD": "bshd"}[one_of(("HND", "NHD"), "tensor_layout", tensor_layout)]
    more = {"is_causal": is_causal, "scale": sm_scale, "layout": layout}
    if not check_boolean("return_lse", return_lse):
        return attend(q, k, v, attn_mask, **more)
    out, lse = attend(q, k, v, attn_mask, **more, return_lse=True)
    return out, lse.transpose(1, 2) if layout == "bshd" else lse


def _made(function: Callable[..., Any], min_keys: int, options: Mapping[str, Any], **more: Any) -> Any:
    """Return what a host calls: a function of its contract with `_attend`, made of these options, before its arguments."""
    calls = Calls()
    min_keys = integer_at_least(0, "min_keys", min_keys)
    found: Any = partial(function, partial(_attend, calls, {"min_keys": min_keys, **checked(options)}), **more)
    found.calls = calls
    return found


def _refuse(name: str, given: Mapping[str, Any], *known: str) -> None:
    """Raise `OptionError` for what isn't known and isn't None."""
    for other, value in given.items():
        if other not in known and value is not None:
            raise OptionError(_unknown(name, other, type(value).__name__, known))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _unknown(name: str, other: str, kind: str, known: tuple[str, ...]) -> str:
    so_far = ", ".join(known) or "nothing"
    return f"{other} must be None, got {kind}: of {name} kdecore knows {so_far}{did_you_mean(other, known)}"


def _check_tensors(*tensors: Any) -> None:
    """Raise `DTypeError` for what attention is not computed of, but in compiled code, which is given tensors."""
    if not torch.compiler.is_compiling():
        check_tensors(True, *tensors)


def _attend(
    calls: Calls,
    options: Mapping[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    own: Mapping[str, Any] | None = None,
    *,
    layout: str = "bhsd",
    grouped: bool = True,
    exact: bool = False,
    leave: Callable[[], Any] | None = None,
    refuse: Callable[[], None] = lambda: None,
    returned: Callable[[Any], Any] = lambda out: out,
    **call: Any,
) -> Any:
    """Call the shared function, and count; what is left to others is PyTorch's own attention, or ``leave``.

    Parameters
    ----------
    options, own
        min_keys and options of kdecore, of all calls and of this one.
    grouped
        Whether key and value may have fewer heads.
    exact
        That nothing may be estimated.
    leave
        Another's attention, result and all.
    refuse
        Raises for what a call asks for and isn't known, unless it is left to another's attention.
    returned
        What is done with a result that isn't another's.
    **call
        dropout_p, is_causal, scale and return_lse, as in `scaled_dot_product_attention`.
    """
    kdecore_options = overridden(options, own or {})
    min_keys = integer_at_least(0, "min_keys", kdecore_options.pop("min_keys"))
    if own and not torch.compiler.is_compiling():
        checked(kdecore_options)
    elif own:
        encoded({name: x for name, x in kdecore_options.items() if name not in ("seed", "key_lengths")})
    _check_tensors(query, key, value, mask)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            order = "heads, n" if layout == "bhsd" else "n, heads"
            raise ShapeError(f"{name} must be (batch, {order}, d), got shape {tuple(x.shape)}")
    q, k, v = (x.transpose(1, 2) if layout == "bshd" else x for x in (query, key, value))
    causal, dropout_p = call.get("is_causal", False), call.get("dropout_p", 0.0)
    reason = left_by_model(q, k, v, mask, dropout_p, kdecore_options, min_keys, causal=causal)
    if exact:
        reason = "" if beyond_torch(kdecore_options) else NO_ESTIMATE
        kdecore_options = {**kdecore_options, **EXACT}
    if reason and leave is not None:
        return calls.watch("", reason, query, leave)
    refuse()
    check_leading(q, k, v, grouped)
    heads: dict[str, Any] = {"layout": layout, "enable_gqa": grouped and q.shape[1] != k.shape[1]}
    more = ALL_KEYS if reason else kdecore_options
    ask = partial(scaled_dot_product_attention, query, key, value, mask, **call, **heads, **more)
    # PyTorch's own attention has no log-sum-exp: kdecore's exact method runs.
    return returned(calls.watch("", "" if call.get("return_lse") else reason, query, ask))


VLLM_OMNI = vllm_omni()
"""The kernel that is installed for vLLM-Omni by the name ``kdecore``."""
