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
from kdecore.arrays.scalars import check_boolean, integer_at_least, to_integer
from kdecore_adapters.torch_adapter import both_masks, broadcast, scaled_dot_product_attention
from kdecore_adapters.torch_calls import Calls
from kdecore_adapters.torch_encoder import MIN_KEYS, left_by_model
from kdecore_adapters.torch_operator import aligned, checked, estimate, overridden

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
    packed: bool = False,
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
    packed
        That causal self-attention without a mask goes by ``position_ids``, (batch, n) or (1, n), as it must where several
        samples lie in a row and no mask says so, as under DeepSpeed's Ulysses. A sample begins where a position is no larger
        than the one before it; gaps begin none. Other calls, and those with a mask, are as without it. In compiled code such
        attention runs beside the graph.
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
        Unknown options, or a name that transformers itself has; when a model is called: ``layers`` that it hasn't, or
        ``packed`` where attention is told no positions of all keys, or has a position bias.

    Notes
    -----
    Causal decoders with a cache, grouped heads, left and right padding, sliding windows and packed sequences work as with
    ``"sdpa"``, where transformers makes their masks. Steps of decoding, of fewer than `torch_encoder.MIN_QUERIES` queries,
    and attention with a position bias (T5) are left to PyTorch.

    DeepSpeed's ``UlyssesSPAttentionHF.register_with_transformers(core_attn_implementation="kdecore", …)`` takes this name:
    the function is called with the whole sequence and some of the heads, and without a mask. Causal self-attention without
    one goes by the model's ``sliding_window``, and by positions with ``packed=True``, without which packed samples see each
    other there. Each layer then looks at them, which waits for a device.
    """
    if name in ("eager", "sdpa", "flex_attention") or name.startswith(("flash_attention", "paged|")):
        raise OptionError(f"name must not be one that transformers has, got {name!r}")
    layers = layers or {}
    for number in layers:
        if to_integer(number) is None or number < 0:
            raise OptionError(f"layers must be numbered from 0, got {number!r}")
        if not isinstance(layers[number], Mapping):
            raise OptionError(f"layers must give each a mapping of options, got {layers[number]!r} for {number!r}")
    min_keys = integer_at_least(0, "min_keys", min_keys)
    attention = attend_packed if check_boolean("packed", packed) else attend
    checked(kdecore_options)
    calls = Calls()
    chosen = {number: checked(overridden(kdecore_options, own)) for number, own in layers.items()}
    AttentionInterface.register(name, partial(attention, chosen, kdecore_options, min_keys, calls))
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
    causal = causal_alone(module, query, attention_mask, is_causal)
    own = windowed(own, kwargs.get("sliding_window"), query, key) if causal else own
    reason = left_by_model(query, key, value, attention_mask, dropout, own, min_keys, causal=causal, biased=bias is not None)
    padded = attention_mask is not None and attention_mask.dtype == CAUSAL_TOO
    if padded:
        aligned(own, query, key, top_left=False)
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


def causal_alone(module: nn.Module, query: Tensor, attention_mask: Tensor | None, is_causal: bool | None) -> bool:
    """Return whether attention is causal, and no mask says what is hidden beside."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return bool(causal) and attention_mask is None and query.shape[2] > 1


# Where samples begin no graph can depend on.
@torch.compiler.disable(reason="packed=True looks at the values of position_ids")  # type: ignore[untyped-decorator]
def attend_packed(
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
    """Follow transformers' attention functions as `attend` does, sample by sample where positions alone tell them apart."""
    rest: Any = {**kwargs, "dropout": dropout, "scaling": scaling, "is_causal": is_causal}
    call = partial(attend, layers, options, min_keys, calls, module)
    packed = samples_of(module, query, key, kwargs) if causal_alone(module, query, attention_mask, is_causal) else []
    if not packed:
        return call(query, key, value, attention_mask, **rest)
    outs = [call(query[at], key[at], value[at], None, **rest)[0] for at in packed]
    return torch.cat(outs, dim=1).reshape(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def samples_of(module: nn.Module, query: Tensor, key: Tensor, said: Mapping[str, Any]) -> list[tuple[slice, slice, slice]]:
    """Return where each sample of causal self-attention lies in (batch, heads, n); nothing where each row is one."""
    positions, (batch, _, n, _), n_k = said.get("position_ids"), query.shape, key.shape[2]
    if said.get("position_bias") is not None:
        raise OptionError(f"packed must be False for {type(module).__name__}, whose attention has a position bias")
    shape = None if positions is None else tuple(positions.shape)
    if positions is None or shape not in ((batch, n_k), (1, n_k)) or n != n_k:
        raise OptionError(
            f"packed must be False where attention isn't told the position of every key: position_ids of "
            f"{type(module).__name__} must be ({batch}, {n_k}) or (1, {n_k}) beside {n} queries, got {shape}"
        )
    begins = (positions.diff(dim=1) <= 0).expand(batch, -1).cpu()
    if not bool(begins.any()):
        return []
    edges = [[0, *(row.nonzero()[:, 0] + 1).tolist(), n] for row in begins]
    return [(slice(row, row + 1), slice(None), slice(*some)) for row in range(batch) for some in pairwise(edges[row])]


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
