"""PyTorch: attention of whole models estimated, by a module, for a block of code, or for a model and good.

`KDEAttention` (`torch_encoder`) is a module to build with. `reroute` (`torch_reroute`) sends what a block of code asks of
PyTorch's ``scaled_dot_product_attention`` to kdecore where that pays, and counts. `replace_attention` does so for a model,
wherever it is called. Neither changes parameters, so saved models load without kdecore.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdecore.arrays.errors import OptionError
from kdecore_adapters.diffusers_adapter import attends, models_of, named_parts, processor_of
from kdecore_adapters.torch_calls import Calls, Count
from kdecore_adapters.torch_encoder import MIN_KEYS, KDEAttention
from kdecore_adapters.torch_operator import checked, overridden
from kdecore_adapters.torch_reroute import NothingReplaced, refuse_beyond_torch, reroute

__all__ = ["Calls", "KDEAttention", "NothingReplaced", "replace_attention", "reroute", "restore_attention"]


class Replacement(reroute):
    """What `replace_attention` returns: calls of each layer, and `restore`."""

    def __init__(self, *, min_keys: int = MIN_KEYS, **kdecore_options: Any) -> None:
        super().__init__(min_keys=min_keys, **kdecore_options)
        self._handles: list[Any] = []
        self._whole: frozenset[str] = frozenset()
        self._restored, self._threads, self._lock = False, set[int](), Lock()

    def attach(self, models: Mapping[str, nn.Module], layers: Mapping[str, Mapping[str, Any]]) -> None:
        """Give hooks to models, by their names, and to all of their parts."""
        self._whole = frozenset(models)
        for name, module in named_parts(models):
            own = {key: value for pattern, o in layers.items() if fnmatchcase(name, pattern) for key, value in o.items()}
            self._handles.append(module.register_forward_pre_hook(_Enter(self, name, own)))
            self._handles.append(module.register_forward_hook(_Leave(self, name), always_call=True))

    def enter(self, name: str, own: Mapping[str, Any], asks: bool) -> None:
        """Begin a module, whose options beside those of the one around it are ``own``; ``asks``: for attention."""
        if name in self._whole:
            # What a KeyboardInterrupt left, after which PyTorch calls no hooks.
            self.leave_all_but(0)
        stack = self._running.stack
        if not stack:
            if self._restored:
                return
            self.__enter__()
            self._thread_runs(True)
        outer = stack[-1][1] if stack else self._options
        stack.append((name, overridden(outer, own)))
        if asks:
            self._running.waiting.add(name)

    def leave(self, name: str, module: nn.Module, ended: bool) -> None:
        """End a module; ``ended`` says that it raised nothing."""
        waited, counted = name in self._running.waiting, ended and not torch.compiler.is_compiling()
        # Of a module that another hook kept from being entered there is nothing to leave.
        entered = [i for i, (running, _) in enumerate(self._running.stack) if running == name]
        if entered:
            options = self._running.stack[entered[-1]][1]
            self.leave_all_but(entered[-1])
            if waited and counted and not self.calls.compiled:
                self.calls.miss(Count(name, f"none met: {processor_of(module)}"))
                refuse_beyond_torch(options, f"{name or 'the model'} asks {processor_of(module)}")
        if name in self._whole and counted and not self._restored:
            self.warn_of_nothing()

    def leave_all_but(self, depth: int) -> None:
        """Leave all modules but the first ``depth`` that are running."""
        stack = self._running.stack
        if stack and depth == 0:
            # Not a block's end: a part of a model may well have no attention.
            self.__exit__(GeneratorExit, None, None)
            self._thread_runs(False)
        self._running.waiting.difference_update(name for name, _ in stack[depth:])
        del stack[depth:]

    def layer(self) -> tuple[str, Mapping[str, Any]]:
        """Return the name of the layer that is running and asks for attention, and its options."""
        self._running.waiting.clear()
        return self._running.stack[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "handles": self._handles, "whole": self._whole, "restored": self._restored}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._handles, self._whole, self._restored = state["handles"], state["whole"], state["restored"]

    def _thread_runs(self, begins: bool) -> None:
        """Note that the model begins or ends in this thread; the last to end after `restore` takes the hooks away."""
        if torch.compiler.is_compiling():
            return
        with self._lock:
            (self._threads.add if begins else self._threads.discard)(get_ident())
            if self._restored and not self._threads:
                self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def attend(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call kdecore's attention or PyTorch's, with the arguments of PyTorch's."""
        if self._restored:
            return functional.scaled_dot_product_attention(query, *args, **kwargs)
        return super().attend(query, *args, **kwargs)

    def restore(self) -> None:
        """Leave the model's attention to PyTorch again; of a copy, `restore_attention` does.

        Where another thread runs the model, attention is PyTorch's from its next call on, and hooks are taken away when it
        ends.
        """
        self.leave_all_but(0)
        with self._lock:
            self._restored = True
            if not self._threads:
                self._remove()


@dataclass(frozen=True)
class _Enter:
    """A hook that begins a module. A class, since functions within functions can't be pickled with the model."""

    replacement: Replacement
    name: str
    own: Mapping[str, Any]

    def __call__(self, module: nn.Module, given: Any) -> None:
        self.replacement.enter(self.name, self.own, attends(module))


@dataclass(frozen=True)
class _Leave:
    """A hook that ends a module."""

    replacement: Replacement
    name: str

    def __call__(self, module: nn.Module, given: Any, out: Any) -> None:
        self.replacement.leave(self.name, module, out is not None)


def restore_attention(model: Any) -> None:
    """Leave the attention of a model to PyTorch again, whatever replaced it: also of one that was copied or loaded whole."""
    for _, module in named_parts(models_of(model)):
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if isinstance(hook, _Enter | _Leave):
                hook.replacement.restore()


def replace_attention(
    model: Any,
    *,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    min_keys: int = MIN_KEYS,
    **kdecore_options: Any,
) -> Replacement:
    """Estimate a model's attention where that pays, whenever the model or a part of it is called.

    Works for every model that calls PyTorch's scaled_dot_product_attention or `torch.nn.MultiheadAttention`. The model keeps
    its modules and parameters: it gets hooks, which `Replacement.restore` takes away. Copied or pickled whole it keeps its
    hooks, with counts of its own, until `restore_attention`; its state dict knows nothing of them.

    Parameters
    ----------
    model
        Any module; or a pipeline of diffusers, for its models that denoise.
    layers
        Options for some of its modules: name, with ``*`` and ``?`` as in file names, → options that replace others.
        Names of a pipeline begin with that of a model, as in ``transformer.transformer_blocks.0.*``.
    min_keys
        As in `reroute`.
    **kdecore_options
        method, budget, rtol, seed and other options of `kdecore.attention`.

    Returns
    -------
    Replacement
        ``print`` it for a table of calls; see `reroute`. In compiled models they are not counted, which it says.
        Modules of diffusers' attention that ran and asked for none in a way that is met are counted too, with what they
        asked.

    Raises
    ------
    OptionError
        Unknown options, layers that the model hasn't, or neither a module nor a pipeline; when the model is called: options
        that PyTorch's attention hasn't, where none is met.

    Warns
    -----
    NothingReplaced
        When the model was called, and asked for no attention in a way that is met; see `reroute`.

    Notes
    -----
    Activation checkpointing of a module works. Of a function inside a module's forward it doesn't, since no hook runs when
    it is called again: put ``with reroute(…)`` round forward and backward instead. `torch.nn.TransformerEncoder` must be
    made with ``enable_nested_tensor=False``. In torch.compile `torch.nn.MultiheadAttention` is left to PyTorch: build with
    `KDEAttention`. After a KeyboardInterrupt call `Replacement.restore`, or the model once more.
    """
    layers = layers or {}
    models = models_of(model)
    names = [name for name, _ in named_parts(models)]
    for pattern, own in layers.items():
        if not isinstance(own, Mapping):
            raise OptionError(f"layers must give each a mapping of options, got {own!r} for {pattern!r}")
        checked(overridden(kdecore_options, own))
        if not isinstance(pattern, str) or not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(map(repr, names[1:9] or names)) + (", …" if len(names) > 9 else "")
            raise OptionError(f"layers must name modules of the model, got {pattern!r}; it has {some}")
    replacement = Replacement(min_keys=min_keys, **kdecore_options)
    replacement.attach(models, layers)
    return replacement
