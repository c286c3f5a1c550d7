"""PyTorch: `kdecore.attention` as an operator, which torch.compile, torch.export and torch.func take as one step.

Between forward and backward the operator keeps its inputs, nothing else: backward evaluates again, with the same seed and so
from the same keys, and records it (as in activation checkpointing, Chen et al. 2016).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar

from kdecore.api.attention import attention
from kdecore.api.call import NAMES, call_options
from kdecore.api.report import Report
from kdecore.arrays.errors import OptionError
from kdecore.arrays.random import check_seed
from kdecore.arrays.scalars import check_boolean
from kdecore.core.options import Options
from kdecore.core.problem import check_scale
from kdecore.engine.restrictions import integers
from kdecore.methods import METHODS
from kdecore_adapters.torch_backend import forward_differentiated
from kdecore_adapters.torch_graphs import check_capturable, replayed

OPTIONS = (*(name for name in NAMES if name != "causal"), "key_lengths", "cuda_graph")
"""Options that calls through PyTorch take: of `kdecore.attention`, where PyTorch's own arguments don't say them, and
``cuda_graph``."""
LARGEST_SEED = 2**63 - 1
REPORT_SHARE = 0.1
"""What the certificates of collected reports may take, where options don't say it."""

_collected: ContextVar[list[Report] | None] = ContextVar("collected", default=None)
_counted: ContextVar[Callable[[Report], object] | None] = ContextVar("counted", default=None)


@contextmanager
def collect_reports() -> Iterator[list[Report]]:
    """Collect the `Report` of every call of the operator in this context, with a certificate of its error.

    A context within this one collects its own.
    """
    found: list[Report] = []
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


@contextmanager
def counted_by(count: Callable[[Report], object] | None) -> Iterator[None]:
    """Tell ``count``, and no other one around this context, of every call of the operator in it; or nobody.

    Its report has a certificate where options ask for one, by ``certificate`` or ``rtol``.
    """
    before = _counted.get()
    token = _counted.set(count)
    try:
        yield
    finally:
        try:
            _counted.reset(token)
        except ValueError:  # left in another context than it was entered in, as after a KeyboardInterrupt
            _counted.set(before)


def _reported() -> bool:
    """Return whether somebody is told of calls of the operator."""
    return _collected.get() is not None or _counted.get() is not None


def check_no_forward_mode(*tensors: Tensor | None) -> None:
    """Raise `OptionError` where forward-mode derivatives of query, key, value or mask would be lost."""
    if forward_differentiated(*(tensor for tensor in tensors if tensor is not None)):
        names = "query, key, value and attn_mask"
        raise OptionError(f"{names} must record no forward-mode derivatives where a call isn't left to PyTorch")


def aligned(options: Mapping[str, Any], query: Tensor, key: Tensor, *, top_left: bool) -> dict[str, Any]:
    """Return options of causal attention that is aligned to the first query and key, or else to the last ones.

    Raise `OptionError` where they say another ``diagonal``.
    """
    diagonal = options.get("diagonal")
    if diagonal is not None and diagonal != (0 if top_left else key.shape[-2] - query.shape[-2]):
        corner = "first" if top_left else "last"
        raise OptionError(f"diagonal must be None where the {corner} query stands at the {corner} key, got {diagonal!r}")
    return {**options, "diagonal": 0 if top_left else None}


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options, or raise `OptionError` for what no call could have; lengths and kernels depend on its arrays."""
    if "causal" in options:
        raise OptionError("causal must be said by the call, as PyTorch's is_causal, not by an option")
    check_boolean("cuda_graph", options.get("cuda_graph", False))
    checked_seed(call_options(options, "key_lengths", "cuda_graph").seed)
    return dict(options)


def overridden(options: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with some in place of others; a tolerance takes the place of a budget too, and a budget of one."""
    dropped = {other for given, other in (("rtol", "budget"), ("budget", "rtol")) if own.get(given) is not None}
    return {**{name: value for name, value in options.items() if name not in dropped}, **own}


def checked_seed(seed: object) -> int:
    """Return a seed that an operator can be given, or raise `OptionError`."""
    number = check_seed(seed)
    if number > LARGEST_SEED:
        raise OptionError(f"seed must be an integer in [0, 2**63), got {number}")
    return number


def encoded(options: Mapping[str, Any]) -> str:
    """Return options, checked, as text, which an operator can be given; without those that may be tensors, and the seed."""
    if torch.compiler.is_compiling():
        # Numbers that changed since compiled code was made are symbols there: it is made anew for each.
        options = {name: guard_scalar(value) if isinstance(value, int | float) else value for name, value in options.items()}
    text: str = _encoded(options)
    return text


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _encoded(options: Mapping[str, Any]) -> str:
    checked(options)

    def plain(value: Any) -> Any:
        if isinstance(value, Options):
            return {"name": value.name, **asdict(value)}
        return value.tolist() if hasattr(value, "tolist") else value

    return json.dumps({name: plain(value) for name, value in options.items()})


def decoded(text: str) -> dict[str, Any]:
    """Return the options that `encoded` wrote."""
    options: dict[str, Any] = json.loads(text)
    if isinstance(method := options.get("method"), dict):
        options["method"] = METHODS[method.pop("name")].options(**method)
    return options


def estimate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    options: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """Call the operator; tensors are cast first as autocast would for PyTorch's own attention.

    Parameters
    ----------
    query, key, value, mask, causal, scale
        As in `kdecore.attention`: the last query is aligned to the last key.
    options
        Of `OPTIONS`; ``seed`` is at most `LARGEST_SEED`.

    Returns
    -------
    out, lse
        (…, n_q, d_v) and (…, n_q), as `kdecore.attention` returns them.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:
        check_no_forward_mode(query, key, value, mask)
    options = dict(options)
    if graph := options.pop("cuda_graph", False):
        check_capturable(query, key, value, mask, causal, options, not compiling and _reported())
    seed, lengths = options.pop("seed", 0), options.pop("key_lengths", None)
    if not compiling:
        seed = checked_seed(seed)
    elif not 0 <= seed <= LARGEST_SEED:  # one that may be a symbol
        raise OptionError(f"seed must be an integer in [0, 2**63), got {seed}")
    if lengths is not None and not isinstance(lengths, Tensor):
        # A tensor, so that torch.func can map over other dimensions.
        lengths = torch.as_tensor(lengths) if compiling else torch.from_numpy(integers("key_lengths", lengths))
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (x.to(dtype) if x.dtype != torch.float64 else x for x in (query, key, value))
    if graph and scale is not None:  # an array could be another number when it comes again
        scale = check_scale(scale, 1)
    settings = (mask, lengths, causal, scale, seed, encoded(options))
    if graph:
        out, lse = replayed(attend, {"query": query, "key": key, "value": value}, settings)
    else:
        out, lse = attend(query, key, value, *settings)
    return out, lse


@torch.library.custom_op("kdecore::attention", mutates_args=())
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    causal: bool,
    scale: float | None,
    seed: int,
    options: str,
) -> tuple[Tensor, Tensor]:
    """Return `kdecore.attention`, (…, n_q, d_v), and its log-sum-exp, (…, n_q)."""
    with _recording():  # compiled code comes here without a check
        check_no_forward_mode(query, key, value, mask)
    settings = _settings(mask, lengths, causal, scale, seed, options)
    collected, count, wanted = _collected.get(), _counted.get(), _reported()
    if wanted:
        settings.setdefault("certificate", 0.0 if collected is None else REPORT_SHARE)
    with torch.autocast(query.device.type, enabled=False):
        out, lse, *reports = attention(query, key, value, **settings, return_lse=True, return_report=wanted)
    for report in reports:
        if collected is not None:
            collected.append(report)
        if count is not None:
            count(report)
    return out.contiguous(), lse.contiguous()


def _settings(
    mask: Tensor | None, lengths: Tensor | None, causal: bool, scale: float | None, seed: int, options: str
) -> dict[str, Any]:
    """Return all keyword arguments of `kdecore.attention`."""
    settings: dict[str, Any] = {"mask": mask, "causal": causal, "scale": scale, "seed": seed, **decoded(options)}
    return settings if lengths is None else {**settings, "key_lengths": lengths}


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Any, lengths: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((*query.shape[:-1], value.shape[-1])), query.new_empty(query.shape[:-1], dtype=dtype)


@contextmanager
def _recording() -> Iterator[None]:
    """Record gradients within an operator, which PyTorch runs beneath automatic differentiation."""
    autograd = ("AutogradFunctionality", "ADInplaceOrView")
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for name in autograd:
        exclude = exclude.remove(getattr(torch._C.DispatchKey, name))
    guard = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude)
    with guard, torch.enable_grad():
        yield


@torch.library.custom_op("kdecore::attention_backward", mutates_args=())
def attend_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    of_mask: bool,
    causal: bool,
    scale: float | None,
    seed: int,
    options: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and, ``of_mask``, mask; else an empty tensor for that.

    ``grad_out`` and ``grad_lse`` are None where nothing follows from that result, one of them at most.
    """
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    if of_mask:
        assert mask is not None
        mask = mask.detach().requires_grad_()
        inputs.append(mask)
    settings = _settings(mask, lengths, causal, scale, seed, options)
    with _recording(), torch.autocast(query.device.type, enabled=False):
        results = attention(*inputs[:3], **settings, return_lse=True)
        # The results themselves aren't kept while they are differentiated.
        edges = [torch.autograd.graph.get_gradient_edge(x) for x in results]
        del results
        grads = {edge: grad for edge, grad in zip(edges, (grad_out, grad_lse), strict=True) if grad is not None}
        # Values play no part in lse.
        slopes = torch.autograd.grad(list(grads), inputs, list(grads.values()), allow_unused=True, materialize_grads=True)
        found = [x.contiguous() for x in slopes]
    return found[0], found[1], found[2], found[3] if of_mask else query.new_empty(0)


@attend_backward.register_fake
def _(
    grad_out: Any, grad_lse: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, lengths: Any, of_mask: bool, *_: Any
) -> tuple[Tensor, ...]:
    found = [query, key, value, *([mask] if of_mask else [])]
    empty = [x.new_empty(x.shape) for x in found]
    return tuple(empty if of_mask else [*empty, query.new_empty(0)])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.scale, ctx.seed, ctx.options = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    of_mask = bool(ctx.needs_input_grad[3])
    found = attend_backward(grad_out, grad_lse, *ctx.saved_tensors, of_mask, ctx.causal, ctx.scale, ctx.seed, ctx.options)
    return *found[:3], found[3] if of_mask else None, None, None, None, None, None


attend.register_autograd(_differentiate, setup_context=_keep)


def _batched(size: int, lead: int, x: Tensor, dim: int | None) -> Tensor:
    """Put the dimension that is mapped over first, and then so many leading dimensions; others are repeated."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.reshape(size, *(1,) * (lead - (x.ndim - 3)), *x.shape[1:])


def _map_inputs(info: Any, in_dims: Any, tensors: tuple[Any, ...]) -> list[Tensor | None]:
    """Return rows and masks, and at the end lengths, with the dimension that is mapped over first."""
    *rows, lengths = zip(tensors, in_dims, strict=True)
    lead = max(x.ndim - 2 - (dim is not None) for x, dim in rows if x is not None)
    found = [None if x is None else _batched(info.batch_size, lead, x, dim) for x, dim in rows]
    x, dim = lengths
    if x is not None:
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
    return [*found, x]


@attend.register_vmap
def _(info: Any, in_dims: Any, query: Any, key: Any, value: Any, mask: Any, lengths: Any, *rest: Any) -> tuple[Any, Any]:
    return attend(*_map_inputs(info, in_dims[:5], (query, key, value, mask, lengths)), *rest), (0, 0)


@attend_backward.register_vmap
def _(info: Any, in_dims: Any, grad_out: Any, grad_lse: Any, *inputs: Any) -> tuple[Any, Any]:
    # As a row of one number, the gradient of lse has as many dimensions as the others.
    grad_lse = None if grad_lse is None else grad_lse[..., None]
    tensors, rest = inputs[:5], inputs[5:]
    of_out, of_lse, *mapped = _map_inputs(info, in_dims[:7], (grad_out, grad_lse, *tensors))
    found = attend_backward(of_out, None if of_lse is None else of_lse[..., 0], *mapped, *rest)
    return found, (0, 0, 0, 0 if rest[0] else None)
