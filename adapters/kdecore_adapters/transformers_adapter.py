"""Hugging Face transformers: ``attn_implementation="kdecore"``, for every model that takes its attention from there.

Masks stay as small as they can: causal and padded batches need what padding hides, (batch, 1, 1, n_k), and no n_q × n_k
array; any other mask is the boolean one that transformers makes for PyTorch's attention.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from kdecore.arrays.errors import OptionError
from kdecore.arrays.scalars import integer_at_least, to_integer
from kdecore_adapters.torch_adapter import both_masks, broadcast, scaled_dot_product_attention
from kdecore_adapters.torch_calls import Calls
from kdecore_adapters.torch_encoder import MIN_KEYS, left_by_model
from kdecore_adapters.torch_operator import aligned, checked, estimate

UNKNOWN = ("softcap", "s_aux", "head_mask")
"""Arguments of models' attention functions that would change the result, and aren't known here."""
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
"""Where configurations say how many layers there are."""
CAUSAL_TOO = torch.int8
"""Dtype of a mask (batch, 1, 1, n_k), 0 for padding, beside which attention is causal, aligned to the last key; no model
makes such a mask itself."""


def register(
    name: str = "kdecore",
    *,
    layers: Mapping[int, Mapping[str, Any]] | None = None,
    min_keys: int = MIN_KEYS,
    **kdecore_options: Any,
) -> Calls:
    """Make an attention implementation known to transformers, to be asked for by name.

    ``AutoModel.from_pretrained(…, attn_implementation="kdecore")`` or ``model.set_attn_implementation("kdecore")``. Called
    again with a name, it replaces what was known by that name, for models that run already too; several names may stand
    for several sets of options. Weights and saved models stay as they are.

    Parameters
    ----------
    name
        What to ask for.
    layers
        Number of a layer → options that replace others there. Layers go by the ``layer_idx`` that attention modules of most
        models have; a model whose modules have none, or that has no layer of that number, raises when it is called.
    min_keys
        Calls with fewer keys are left to PyTorch's attention, as ``attn_implementation="sdpa"`` would call it; but for
        options that it hasn't, such as ``window``.
    **kdecore_options
        method, budget, rtol, seed and other options of `kdecore.attention`.

    Returns
    -------
    Calls
        ``print`` it for a table, kept up to date: for each layer how many calls there were, which method ran or why they
        were left to PyTorch, keys per query, certified error, time; ``.counts`` are the numbers of calls. Calls of compiled
        code are not counted, which it says.

    Raises
    ------
    OptionError
        Unknown options, or a name that transformers itself has; when a model is called: ``layers`` that it hasn't.

    Notes
    -----
    Causal decoders with a cache, grouped heads, left and right padding, sliding windows and packed sequences work as with
    ``"sdpa"``. Steps of decoding, of fewer than `torch_encoder.MIN_QUERIES` queries, and attention with a position bias
    (T5) are left to PyTorch.

    DeepSpeed's ``UlyssesSPAttentionHF.register_with_transformers(core_attn_implementation="kdecore", …)`` takes this name:
    the function is called with the whole sequence and some of the heads, and without a mask. Causal self-attention without
    one goes by ``position_ids``, which start anew where another sample does, and by the model's ``sliding_window``.
    """
    if name in ("eager", "sdpa", "flex_attention") or name.startswith(("flash_attention", "paged|")):
        raise OptionError(f"name must not be one that transformers has, got {name!r}")
    layers = layers or {}
    for number in layers:
        if to_integer(number) is None or number < 0:
            raise OptionError(f"layers must be numbered from 0, got {number!r}")
    min_keys = integer_at_least(0, "min_keys", min_keys)
    checked(kdecore_options)
    calls = Calls()
    chosen = {number: checked({**kdecore_options, **own}) for number, own in layers.items()}
    AttentionInterface.register(name, partial(attend, chosen, kdecore_options, min_keys, calls))
    AttentionMaskInterface.register(name, mask)
    return calls


def options_of(
    module: nn.Module, layers: Mapping[int, Mapping[str, Any]], others: Mapping[str, Any]
) -> tuple[str, Mapping[str, Any]]:
    """Return the name of an attention module's layer, and its options, or raise for layers that there can't be."""
    number = getattr(module, "layer_idx", None)
    if layers and number is None:
        raise OptionError(
            f"layers must be None for {type(module).__name__}, which has no layer_idx to go by, got {sorted(layers)}; "
            "kdecore_adapters.torch_modules.replace_attention takes names of modules"
        )
    if layers:
        found = [getattr(getattr(module, "config", None), name, None) or 0 for name in LAYER_COUNTS]
        if 0 < max(found) <= max(layers):
            raise OptionError(
                f"layers must be numbered below {max(found)} for {type(module).__name__}, got {sorted(layers)}"
            )
    return ("", others) if number is None else (f"layer {number}", layers.get(number, others))


def attend(
    layers: Mapping[int, Mapping[str, Any]],
    options: Mapping[str, Any],
    min_keys: int,
    calls: Calls,
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
    layer, own = options_of(module, layers, options)
    bias = kwargs.get("position_bias")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and attention_mask is None and query.shape[2] > 1
    if causal and bias is None and (packed := samples_of(kwargs.get("position_ids"), query, key)):
        rest: Any = {**kwargs, "dropout": dropout, "scaling": scaling, "is_causal": is_causal, "position_ids": None}
        outs = []
        for row, some in packed:
            q, k, v = (x[row, :, some] for x in (query, key, value))
            outs.append(attend(layers, options, min_keys, calls, module, q, k, v, None, **rest)[0])
        return torch.cat(outs, dim=1).reshape(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    own = windowed(own, kwargs.get("sliding_window"), query, key) if causal else own
    reason = left_by_model(query, key, value, attention_mask, dropout, own, min_keys, causal=causal, biased=bias is not None)
    padded = attention_mask is not None and attention_mask.dtype == CAUSAL_TOO
    hides = attention_mask.bool() if attention_mask is not None and padded else attention_mask

    def leave() -> Tensor:
        whole = hides
        if padded:
            n_q, n_k = query.shape[2], key.shape[2]
            seen = torch.ones(n_q, n_k, dtype=torch.bool, device=query.device).tril(n_k - n_q)
            whole = both_masks(hides, seen)
        found: Tensor = sdpa_attention_forward(
            module, query, key, value, whole, dropout, scaling, is_causal=is_causal, **kwargs
        )[0]
        return found

    def take() -> Tensor:
        whole = hides if bias is None else both_masks(hides, bias)
        if padded or (causal and bias is not None):
            if dropout > 0.0:
                raise OptionError(f"dropout must be 0 where a call isn't left to PyTorch, got {dropout}")
            lower_right = aligned(own, query, key, top_left=False)
            out, _ = estimate(*broadcast(query, key, value, True), whole, True, scaling, lower_right)
        else:
            out = scaled_dot_product_attention(
                query, key, value, whole, dropout, is_causal=causal, scale=scaling, enable_gqa=True, **own
            )
        return out.transpose(1, 2).contiguous()

    return calls.watch(layer, reason, query, leave if reason else take), None


def samples_of(positions: Tensor | None, query: Tensor, key: Tensor) -> list[tuple[slice, slice]]:
    """Return where each sample of causal self-attention lies, batch and rows, where positions say that several are packed.

    Models say it by masks; what shards their sequences, such as DeepSpeed's Ulysses, leaves those out, and positions alone
    are left to tell. Compiled code can't look.
    """
    batch, _, n, _ = query.shape
    if positions is None or positions.ndim != 2 or not positions.shape[1] == n == key.shape[2]:
        return []
    if torch.compiler.is_compiling() or len(positions) not in (1, batch):
        return []
    apart = positions.diff(dim=1) != 1
    if not bool(apart.any()):
        return []
    rows = apart.expand(batch, -1).cpu()
    edges = [[0, *(row.nonzero()[:, 0] + 1).tolist(), n] for row in rows]
    return [(slice(row, row + 1), slice(*some)) for row in range(batch) for some in pairwise(edges[row])]


def windowed(options: Mapping[str, Any], window: int | None, query: Tensor, key: Tensor) -> Mapping[str, Any]:
    """Return options of causal self-attention without a mask, with the model's sliding window where that hides anything."""
    if window is None or window >= key.shape[2] or query.shape[2] != key.shape[2]:
        return options
    own = options.get("window")
    return {**options, "window": window if own is None else min(own, window)}


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
