"""PyTorch: attention of whole models estimated, by a module, for a block of code, or for a model and good.

`KDEAttention` is a module to build with. `reroute` sends what a block of code asks of PyTorch's
``scaled_dot_product_attention`` to kdecore where that pays, and counts. `replace_attention` does so for a model, wherever it
is called. Neither changes parameters, so saved models load without kdecore.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from threading import local
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from kdecore.errors import OptionError
from kdecore_adapters.torch_adapter import both_masks, left_to_torch, scaled_dot_product_attention
from kdecore_adapters.torch_operator import checked, estimate

MIN_KEYS = 1024
"""Calls with fewer keys are left to PyTorch where nothing else is asked for."""
MIN_QUERIES = 32
"""Fewer queries, as in decoding, take longer to choose keys for than to evaluate exactly."""
TAKEN = "kdecore"
"""What is counted for a call that kdecore took: its report says which method ran, and exact may have been the cheapest."""


def left_by_model(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, options: Mapping[str, Any], min_keys: int
) -> str:
    """Return why a model's call is left to PyTorch, as `left_to_torch`, and for dropout too, or ""."""
    return left_to_torch(query, key, value, options, min_keys, MIN_QUERIES) or ("dropout" if dropout_p > 0.0 else "")


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
        batched = query.ndim == 3
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._heads(x) for x in self._projected(query, key, value))
        out = self._attend(q, k, v, key_padding_mask, attn_mask, is_causal)
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
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, mask: Tensor | None, is_causal: bool
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
            n_q, n_k = q.shape[-2], k.shape[-2]
            if n_q == n_k and dropout == 0.0 and not left_to_torch(q, k, v, self.kdecore_options):
                return estimate(q, k, v, mask, True, None, self.kdecore_options)
            causal = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril()
            mask, is_causal = both_masks(mask, causal), False
        return scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, **self.kdecore_options)


def _seen(mask: Tensor) -> Tensor:
    """Turn True for what is hidden into True for what is seen; numbers stay."""
    return ~mask if mask.dtype == torch.bool else mask


class Count(NamedTuple):
    """Calls of one layer that had the same fate."""

    layer: str
    outcome: str


class reroute(TorchFunctionMode):  # noqa: N801 - called as a function
    """Estimate, in a ``with`` block, what is asked of PyTorch's scaled_dot_product_attention where that pays; and count.

    `torch.nn.MultiheadAttention` is met too, unless its attention weights are asked for. PyTorch's own function is not
    changed: other threads see nothing of it.

    Parameters
    ----------
    min_keys
        Calls with fewer keys are left to PyTorch, and those with fewer than `MIN_QUERIES` queries.
    **kdecore_options
        method, budget, rtol, seed and other options of `kdecore.attention`.

    Attributes
    ----------
    counts
        `Count` (layer, outcome) → calls. The outcome is `TAKEN`, or why a call was left to PyTorch; the layer's name is
        known to `replace_attention` only. Calls of compiled code are not counted.

    Examples
    --------
    >>> import torch
    >>> from kdecore_adapters.torch_modules import reroute
    >>> q = torch.randn(1, 2, 2000, 16)
    >>> with reroute(method="sortlsh", budget=128) as rerouted:
    ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    >>> print(rerouted)
    kdecore: 1
    """

    def __init__(self, *, min_keys: int = MIN_KEYS, **kdecore_options: Any) -> None:
        super().__init__()
        self.min_keys = min_keys
        self.counts: Counter[Count] = Counter()
        self._options = checked(kdecore_options)
        # The body of PyTorch's function, but calling this attention, and not looking for modes like this one.
        scope = {
            **vars(functional),
            "has_torch_function": lambda _: False,
            "scaled_dot_product_attention": self.attend,
        }
        original = functional.multi_head_attention_forward
        self._multi_head = FunctionType(original.__code__, scope, argdefs=original.__defaults__)

    def layer(self) -> tuple[str, Mapping[str, Any]]:
        """Return the name of the layer that is running, and its options."""
        return "", self._options

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Meet a call of a function of PyTorch's."""
        if func is functional.scaled_dot_product_attention:
            return self.attend(*args, **(kwargs or {}))
        if func is functional.multi_head_attention_forward:
            if (kwargs or {}).get("need_weights", True):
                self.count("attention weights are asked for")
            elif not torch.compiler.is_compiling():
                return self._multi_head(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Call kdecore's attention or PyTorch's, with the arguments of PyTorch's."""
        _, options = self.layer()
        reason = left_by_model(query, key, value, dropout_p, options, self.min_keys)
        self.count(reason or TAKEN)
        function, more = (functional.scaled_dot_product_attention, {}) if reason else (scaled_dot_product_attention, options)
        return function(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa, **more)

    def count(self, outcome: str) -> None:
        """Count a call of the layer that is running; not in compiled code, which would be compiled again for each number."""
        if not torch.compiler.is_compiling():
            self.counts[Count(self.layer()[0], outcome)] += 1

    def __str__(self) -> str:
        return "\n".join(f"{f'{layer} ' if layer else ''}{outcome}: {n}" for (layer, outcome), n in self.counts.items())


class _Running(local):
    """Modules of a model that are running in this thread, the innermost last: names and options."""

    def __init__(self) -> None:
        self.stack: list[tuple[str, Mapping[str, Any]]] = []


class Replacement(reroute):
    """What `replace_attention` returns: counts for each layer, and `restore`."""

    def __init__(
        self, model: nn.Module, layers: Mapping[str, Mapping[str, Any]], min_keys: int, options: dict[str, Any]
    ) -> None:
        super().__init__(min_keys=min_keys, **options)
        names = [name for name, _ in model.named_modules()]
        for pattern, own in layers.items():
            checked({**options, **own})
            if not any(fnmatchcase(name, pattern) for name in names):
                raise OptionError(
                    f"layers must name modules of the model, got {pattern!r}; it has {', '.join(names[1:9])}, …"
                )
        self._running = _Running()
        self._hooks: list[Any] = []
        for name, module in model.named_modules():
            own = {key: value for pattern, o in layers.items() if fnmatchcase(name, pattern) for key, value in o.items()}
            self._hooks += self._watch(name, module, own)

    def _watch(self, name: str, module: nn.Module, own: Mapping[str, Any]) -> tuple[Any, Any]:
        def enter(*_: Any) -> None:
            if not name:
                # The whole model: what a KeyboardInterrupt left, after which PyTorch calls no hooks.
                self._leave(0)
            stack = self._running.stack
            if not stack:
                self.__enter__()
            outer = stack[-1][1] if stack else self._options
            stack.append((name, {**outer, **own}))

        def leave(*_: Any) -> None:
            # Of a module that another hook kept from being entered there is nothing to leave.
            entered = [i for i, (running, _) in enumerate(self._running.stack) if running == name]
            if entered:
                self._leave(entered[-1])

        return module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)

    def _leave(self, depth: int) -> None:
        """Leave all modules but the first ``depth`` that are running."""
        stack = self._running.stack
        if stack and depth == 0:
            self.__exit__(None, None, None)
        del stack[depth:]

    def layer(self) -> tuple[str, Mapping[str, Any]]:
        """Return the name of the layer that is running, and its options."""
        return self._running.stack[-1]

    def restore(self) -> None:
        """Leave the model's attention to PyTorch again."""
        self._leave(0)
        for hook in self._hooks:
            hook.remove()


def replace_attention(
    model: nn.Module,
    *,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    min_keys: int = MIN_KEYS,
    **kdecore_options: Any,
) -> Replacement:
    """Estimate a model's attention where that pays, whenever the model or a part of it is called.

    Works for every model that calls PyTorch's scaled_dot_product_attention or `torch.nn.MultiheadAttention`. The model keeps
    its modules and parameters: it gets hooks, which `Replacement.restore` takes away. Copy or pickle a model before.

    Parameters
    ----------
    model
        Any module.
    layers
        Options for some of its modules: name, with ``*`` and ``?`` as in file names, → options that replace others.
    min_keys
        Calls with fewer keys are left to PyTorch, and those with fewer than `MIN_QUERIES` queries.
    **kdecore_options
        method, budget, rtol, seed and other options of `kdecore.attention`.

    Returns
    -------
    Replacement
        ``print`` it to see, for each layer, how many calls were estimated, and why others were not.

    Raises
    ------
    OptionError
        Unknown options, or layers that the model hasn't.

    Notes
    -----
    Activation checkpointing of a module works. Of a function inside a module's forward it doesn't, since no hook runs when
    it is called again: put ``with reroute(…)`` round forward and backward instead. `torch.nn.TransformerEncoder` must be
    made with ``enable_nested_tensor=False``. In torch.compile `torch.nn.MultiheadAttention` is left to PyTorch: build with
    `KDEAttention`. After a KeyboardInterrupt call `Replacement.restore`, or the model once more.
    """
    return Replacement(model, layers or {}, min_keys, kdecore_options)
