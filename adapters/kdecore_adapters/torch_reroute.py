"""PyTorch: attention of a block of code estimated, wherever it is asked of PyTorch's own functions, and counted."""

import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import local
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from kdecore.api.report import Report
from kdecore.arrays.errors import OptionError
from kdecore.arrays.scalars import integer_at_least
from kdecore_adapters.torch_adapter import BEYOND, beyond_torch, scaled_dot_product_attention
from kdecore_adapters.torch_calls import Calls, Count
from kdecore_adapters.torch_encoder import MIN_KEYS, left_by_model
from kdecore_adapters.torch_operator import checked, counted_by

__all__ = ["NothingReplaced", "reroute"]


class NothingReplaced(UserWarning):
    """A model was to be estimated, and called nothing that can be."""


class _Running(local):
    """What runs in this thread: modules of a model, the innermost last, and what is to be left with the first of them.

    Those of diffusers' attention that have not asked for any yet are in ``waiting``.
    """

    def __init__(self) -> None:
        self.stack: list[tuple[str, Mapping[str, Any]]] = []
        self.waiting: set[str] = set()
        self.within = ExitStack()


class reroute(TorchFunctionMode):  # noqa: N801 - called as a function
    """Estimate, in a ``with`` block, what is asked of PyTorch's scaled_dot_product_attention where that pays; and count.

    `torch.nn.MultiheadAttention` is met too, unless its attention weights are asked for. PyTorch's own function is not
    changed: other threads see nothing of it.

    Parameters
    ----------
    min_keys
        Calls with fewer keys are left to PyTorch, and those with fewer than `torch_encoder.MIN_QUERIES` queries; but for
        options that PyTorch's attention hasn't, such as ``window``: with these nothing is left to it.
    **kdecore_options
        method, budget, rtol, seed and other options of `kdecore.attention`. With ``certificate`` or ``rtol`` the table of
        calls says what error was certified.

    Attributes
    ----------
    calls
        `torch_calls.Calls`, which ``print`` shows as a table: for each layer how many calls there were, which method ran or
        why they were left to PyTorch, keys per query, certified error, time. Layers' names are known to
        `replace_attention` only.
    counts
        `torch_calls.Count` (layer, outcome) → calls.

    Warns
    -----
    NothingReplaced
        At the end of the block, if nothing in it asked for attention in a way that is met; with options that PyTorch's
        attention hasn't, which did not hold then, an `OptionError` instead.

    Examples
    --------
    >>> import torch
    >>> from kdecore_adapters.torch_modules import reroute
    >>> q = torch.randn(1, 2, 2000, 16)
    >>> with reroute(method="sortlsh", budget=128) as rerouted:
    ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    >>> rerouted.counts
    Counter({Count(layer='', outcome='sortlsh'): 1})
    """

    def __init__(self, *, min_keys: int = MIN_KEYS, **kdecore_options: Any) -> None:
        super().__init__()
        self.min_keys = integer_at_least(0, "min_keys", min_keys)
        self.calls = Calls()
        self._options = checked(kdecore_options)
        self._running = _Running()
        self._signature = inspect.signature(functional.multi_head_attention_forward)
        self._multi_head = {of_heads: self._with_this_attention(of_heads) for of_heads in (False, True)}

    def _with_this_attention(self, masks_of_heads: bool) -> Callable[..., Any]:
        """Return PyTorch's multi-head attention, but calling this attention, and not looking for modes like this one."""
        attend = self.attend if masks_of_heads else partial(_with_one_mask, self.attend)
        scope = {**vars(functional), "has_torch_function": lambda _: False, "scaled_dot_product_attention": attend}
        original = functional.multi_head_attention_forward
        return FunctionType(original.__code__, scope, argdefs=original.__defaults__)

    @property
    def counts(self) -> Counter[Count]:
        """`Count` → calls."""
        return self.calls.counts

    def layer(self) -> tuple[str, Mapping[str, Any]]:
        """Return the name of the layer that is running, and its options."""
        return "", self._options

    def __enter__(self) -> Any:
        if not torch.compiler.is_compiling():
            self._running.within.enter_context(counted_by(self._ran_compiled))
        return super().__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if not torch.compiler.is_compiling():
            self._running.within.close()
            if kind is None:
                self.warn_of_nothing()

    def warn_of_nothing(self) -> None:
        """Warn if no call has been met, at the line that called PyTorch or left the block; raise for options of `BEYOND`."""
        if self.calls.tallies or self.calls.compiled:
            return
        what = (
            "only scaled_dot_product_attention and nn.MultiheadAttention of PyTorch are, and neither a softmax of a model's "
            "own nor another library's attention"
        )
        # As with an encoder that was compiled for evaluation: PyTorch has another function for its layers.
        refuse_beyond_torch(self._options, what)
        warnings.warn(f"no attention was met: {what}", NothingReplaced, stacklevel=callers_level())

    def _ran_compiled(self, report: Report) -> None:
        """Count a call of the operator that no function of PyTorch's led to: compiled code calls it by itself."""
        self.calls.add(Count(self.layer()[0], report.method), False, report.seconds, [report])

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Meet a call of a function of PyTorch's."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            return self.multi_head(*args, **kwargs)
        if func is Tensor.unflatten:
            # torch.compile can't follow the method, which calls super(), within a mode.
            func = torch.unflatten
        return func(*args, **kwargs)

    def multi_head(self, *args: Any, **kwargs: Any) -> Any:
        """Call PyTorch's multi-head attention, with this attention in it unless weights are asked for, or it is compiled."""
        compiling = torch.compiler.is_compiling()
        given = kwargs if compiling else self._signature.bind(*args, **kwargs).arguments
        if not compiling and not given.get("need_weights", True):
            mask = given.get("attn_mask")
            return self._multi_head[mask is not None and mask.ndim == 3](*args, **kwargs)
        layer, options = self.layer()
        reason = "compiled" if compiling else "attention weights are asked for"
        if beyond_torch(options):
            raise OptionError(
                f"nn.MultiheadAttention must be left to PyTorch ({reason}), which has none of {', '.join(BEYOND)}"
            )
        return self.calls.watch(layer, reason, args[0], lambda: functional.multi_head_attention_forward(*args, **kwargs))

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
        layer, options = self.layer()
        reason = left_by_model(query, key, value, attn_mask, dropout_p, options, self.min_keys, causal=is_causal)

        def call() -> Tensor:
            function, more = (
                (functional.scaled_dot_product_attention, {}) if reason else (scaled_dot_product_attention, options)
            )
            found: Tensor = function(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa, **more
            )
            return found

        return self.calls.watch(layer, reason, query, call)

    def __str__(self) -> str:
        return str(self.calls)

    __repr__ = __str__

    def __getstate__(self) -> dict[str, Any]:
        return {"min_keys": self.min_keys, "options": self._options, "calls": self.calls}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(min_keys=state["min_keys"], **state["options"])  # type: ignore[misc]
        self.calls = state["calls"]


def _with_one_mask(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *rest: Any
) -> Tensor:
    """Attend with the mask of one head, which is that of all: PyTorch's multi-head attention repeats it for each."""
    one = mask if mask is None or mask.ndim < 4 else mask[:, :1]
    return attend(query, key, value, one, *rest)


def refuse_beyond_torch(options: Mapping[str, Any], why: str) -> None:
    """Raise for an option that PyTorch's attention hasn't, where no attention is met for it to hold."""
    for name, value in options.items():
        if beyond_torch({name: value}):
            raise OptionError(f"{name} must not be given where no attention is met, got {value!r}: {why}")


def callers_level() -> int:
    """Return the ``stacklevel`` at which `warnings.warn`, called by who calls this, names the first line outside PyTorch."""
    own = tuple(str(Path(module.__file__ or "").parent) for module in (torch, sys.modules[__name__]))
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(own):
        frame, level = frame.f_back, level + 1
    return level
