"""PyTorch: `KDEAttention`, for encoders, and when a model leaves a call to PyTorch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdecore.arrays.errors import OptionError
from kdecore_adapters.torch_adapter import beyond_torch, both_masks, left_to_torch, scaled_dot_product_attention
from kdecore_adapters.torch_operator import aligned, checked, estimate

POSITION_BIAS = "numbers added to the logits of each head"
"""Why attention with a position bias, such as T5's, is left to PyTorch: a mask that is no interval, whatever it rests on."""
MIN_KEYS = 1024
"""Calls with fewer keys are left to PyTorch where nothing else is asked for."""

MIN_QUERIES = 32
"""Fewer queries, as in decoding, take longer to choose keys for than to evaluate exactly."""


def left_by_model(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    options: Mapping[str, Any],
    min_keys: int,
    *,
    causal: bool,
    biased: bool = False,
) -> str:
    """Return why a model's call is left to PyTorch, or "": one rule for every way into a model.

    Beside `left_to_torch`'s reasons these are dropout and position biases, such as T5's: ``biased`` says that there is one,
    or a mask of numbers does that differs from head to head and query to query. ``causal`` says that attention is, beside
    what the mask says; aligned to the first key, so that another ``diagonal`` raises `OptionError`, whoever evaluates it.
    """
    if beyond_torch(options):
        return ""
    if causal:
        aligned(options, query, key, top_left=True)
    restricted = causal or biased or mask is not None
    if reason := left_to_torch(query, key, value, options, min_keys, MIN_QUERIES, restricted=restricted):
        return reason
    if mask is not None and mask.dtype != torch.bool and mask.ndim > 2:
        biased = biased or (mask.shape[-3] > 1 and mask.shape[-2] > 1)
    return "dropout" if dropout_p > 0.0 else (POSITION_BIAS if biased else "")


class KDEAttention(nn.MultiheadAttention):
    """Multi-head attention whose core is estimated: a drop-in for `torch.nn.MultiheadAttention`.

    Parameters, and so saved weights, are those of `torch.nn.MultiheadAttention`. Attention weights are never made, and not
    returned: ``need_weights`` is False by default.

    Parameters
    ----------
    embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        As PyTorch's; add_bias_kv and add_zero_attn must be False. Dropout must be 0 while training on inputs that are long
        enough to be estimated.
    **kdecore_options
        method, budget, rtol, seed and other options of `kdecore.attention`.

    Raises
    ------
    OptionError
        Unknown options, or one of PyTorch's that can't be kept.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        **kdecore_options: Any,
    ) -> None:
        if add_bias_kv or add_zero_attn:
            raise OptionError("add_bias_kv and add_zero_attn must be False")
        super().__init__(
            embed_dim, num_heads, dropout, bias, kdim=kdim, vdim=vdim, batch_first=batch_first, device=device, dtype=dtype
        )
        self.kdecore_options = checked(kdecore_options)

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        # PyTorch's encoder layers have a fast path round forward, for modules whose projections are one matrix.
        self._qkv_same_embed_dim = False

    def extra_repr(self) -> str:
        """Return the sizes and options, for ``print``."""
        options = "".join(f", {name}={value!r}" for name, value in self.kdecore_options.items())
        return f"{self.embed_dim}, {self.num_heads}{options}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Return attention of projected inputs, projected.

        Parameters
        ----------
        query, key, value
            (batch, n, embed_dim) with batch_first, else (n, batch, embed_dim); or (n, embed_dim).
        key_padding_mask
            (batch, n_k): True, or a number added to the logits, for padding, as PyTorch's.
        need_weights
            Must be False.
        attn_mask
            (n_q, n_k) or (batch · num_heads, n_q, n_k): True for what is hidden, or added to the logits, as PyTorch's.
        average_attn_weights
            Not used.
        is_causal
            That attn_mask is causal, as PyTorch's: it is not looked at, and may be None.

        Returns
        -------
        out : Tensor
            Of query's shape.
        weights : None
        """
        if need_weights:
            raise OptionError("need_weights must be False: attention weights are never made")
        # One tensor for both says that each row is its own key.
        own = {"diagonal": 0} if query is key and self.kdecore_options.get("diagonal") is None else {}
        options = {**self.kdecore_options, **own}
        batched = query.ndim == 3
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._heads(x) for x in self._projected(query, key, value))
        out = self._attend(q, k, v, key_padding_mask, attn_mask, is_causal, options)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], None
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        rows = (query, key, value)
        q, k, v = (functional.linear(*both) for both in zip(rows, weights, biases, strict=True))
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
        options: Mapping[str, Any],
    ) -> Tensor:
        if is_causal:
            mask = None
        elif mask is not None:
            mask = _seen(mask)
            mask = mask.unflatten(0, (-1, self.num_heads)) if mask.ndim == 3 else mask
        if padding is not None:
            mask = both_masks(mask, _seen(padding)[:, None, None, :])
        dropout = self.dropout if self.training else 0.0
        if is_causal and mask is not None:
            if dropout == 0.0 and not left_to_torch(q, k, v, options, restricted=True):
                return estimate(q, k, v, mask, True, None, aligned(options, q, k, top_left=True))[0]
            causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
            mask, is_causal = both_masks(mask, causal), False
        found: Tensor = scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, **options)
        return found


def _seen(mask: Tensor) -> Tensor:
    """Turn True for what is hidden into True for what is seen; numbers stay."""
    return ~mask if mask.dtype == torch.bool else mask
