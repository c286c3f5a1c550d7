"""Hugging Face transformers: ``attn_implementation="kdecore"``, for every model that takes its attention from there.

Masks stay as small as they can: causal and padded batches need what padding hides, (batch, 1, 1, n_k), and no n_q × n_k
array; any other mask is the boolean one that transformers makes for PyTorch's attention.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from kdecore.errors import OptionError
from kdecore_adapters.torch_adapter import both_masks, broadcast, scaled_dot_product_attention
from kdecore_adapters.torch_modules import MIN_KEYS, TAKEN, Count, left_by_model
from kdecore_adapters.torch_operator import checked, estimate

UNKNOWN = ("softcap", "s_aux", "head_mask")
"""Arguments of models' attention functions that would change the result, and aren't known here."""
CAUSAL_TOO = torch.int8
"""Dtype of a mask (batch, 1, 1, n_k), 0 for padding, beside which attention is causal, aligned to the last key; no model
makes such a mask itself."""


def register(
    name: str = "kdecore",
    *,
    layers: Mapping[int, Mapping[str, Any]] | None = None,
    min_keys: int = MIN_KEYS,
    **kdecore_options: Any,
) -> Counter[Count]:
    """Make an attention implementation known to transformers, to be asked for by name.

    ``AutoModel.from_pretrained(…, attn_implementation="kdecore")`` or ``model.set_attn_implementation("kdecore")``. Called
    again with a name, it replaces what was known by that name, for models that run already too; several names may stand
    for several sets of options. Weights and saved models stay as they are.

    Parameters
    ----------
    name
        What to ask for.
    layers
        Number of a layer → options that replace others there.
    min_keys
        Calls with fewer keys are left to PyTorch's attention, as ``attn_implementation="sdpa"`` would call it.
    **kdecore_options
        method, budget, rtol, seed and other options of `kdecore.attention`.

    Returns
    -------
    Counter
        `Count` (layer, outcome) → calls, kept up to date: `TAKEN`, or why a call was left to PyTorch. Calls of compiled
        code are not counted.

    Raises
    ------
    OptionError
        Unknown options, or a name that transformers itself has.

    Notes
    -----
    Causal decoders with a cache, grouped heads, left and right padding, sliding windows and packed sequences work as with
    ``"sdpa"``. Steps of decoding, of fewer than `torch_modules.MIN_QUERIES` queries, and attention with a position bias
    (T5) are left to PyTorch.
    """
    if name in ("eager", "sdpa", "flex_attention") or name.startswith(("flash_attention", "paged|")):
        raise OptionError(f"name must not be one that transformers has, got {name!r}")
    layers = layers or {}
    for number in layers:
        if not isinstance(number, int) or number < 0:
            raise OptionError(f"layers must be numbered from 0, got {number!r}")
    checked(kdecore_options)
    counts: Counter[Count] = Counter()
    chosen = {number: checked({**kdecore_options, **own}) for number, own in layers.items()}
    AttentionInterface.register(name, partial(attend, chosen, kdecore_options, min_keys, counts))
    AttentionMaskInterface.register(name, mask)
    return counts


def attend(
    layers: Mapping[int, Mapping[str, Any]],
    options: Mapping[str, Any],
    min_keys: int,
    counts: Counter[Count],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Follow transformers' attention functions: tensors (batch, heads, n, d) → (batch, n_q, heads, d_v), and no weights."""
    for argument in UNKNOWN:
        if kwargs.get(argument) is not None:
            raise OptionError(f'{argument} must be None with this attention; try attn_implementation="eager"')
    number = getattr(module, "layer_idx", None)
    own = dict(layers.get(number, options) if number is not None else options)
    reason = left_by_model(query, key, value, dropout, own, min_keys)
    reason = reason or ("position bias" if kwargs.get("position_bias") is not None else "")
    if not torch.compiler.is_compiling():
        counts[Count("" if number is None else f"layer {number}", reason or TAKEN)] += 1
    padded = attention_mask is not None and attention_mask.dtype == CAUSAL_TOO
    if attention_mask is not None and padded:
        attention_mask = attention_mask.bool()
    if reason:
        if padded:
            n_q, n_k = query.shape[2], key.shape[2]
            seen = torch.ones(n_q, n_k, dtype=torch.bool, device=query.device).tril(n_k - n_q)
            attention_mask = both_masks(attention_mask, seen)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    if padded:
        out = estimate(*broadcast(query, key, value, True), attention_mask, True, scaling, own)
    else:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        causal = causal and attention_mask is None and query.shape[2] > 1
        out = scaled_dot_product_attention(
            query, key, value, attention_mask, is_causal=causal, scale=scaling, enable_gqa=True, **own
        )
    return out.transpose(1, 2).contiguous(), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return (batch, 1, 1, n_k), True for what is no padding, where that says all, or it and being causal; else as for sdpa.

    A causal one is `CAUSAL_TOO`. Where a model says that it will add to the mask, it gets the whole one.
    """
    aligned = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    causal = mask_function is causal_mask_function and aligned and kwargs.get("allow_is_causal_skip", True)
    both_ways = mask_function is bidirectional_mask_function and kwargs.get("allow_is_bidirectional_skip", False)
    fits = attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] == kv_offset + kv_length
    if (causal or both_ways) and fits and q_length > 1:
        assert attention_mask is not None
        seen = attention_mask[:, None, None, kv_offset:]
        # Compiled code can't look whether anything is hidden.
        if torch.compiler.is_compiling() or q_length != kv_length or not bool(seen.all()):
            return seen.to(CAUSAL_TOO if causal else torch.bool)
    found: Tensor | None = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    return found
