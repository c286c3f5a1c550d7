"""PyTorch: calls of repeated shapes as CUDA graphs, each one launch instead of some hundred (docs/gpu.md).

The protocol is that of `torch.cuda.make_graphed_callables`: a call is warmed up on a stream of its own, captured there with
buffers for its inputs and its results, and replayed on whichever stream is current after new inputs were copied there.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from kdecore.arrays.errors import OptionError
from kdecore.arrays.gradients import outside_inference_mode
from kdecore.arrays.kept import kept_arrays_met
from kdecore.arrays.namespace import common_device
from kdecore_adapters.torch_backend import BACKEND

GRAPHS = 8
"""Graphs that are kept, those replayed last."""
WARM_UPS = 3
"""Calls before one is captured, as many as PyTorch's own protocol makes."""
DEVICE = "cuda"
"""Type of the devices that have graphs."""
WAITING = ("rtol", "check_finite", "window")
"""Options with which a call reads from the device or copies from the host, as with ``key_lengths``: no graph can."""

# Two captures at a time are none, and buffers are filled and read by one call after the other.
_one_at_a_time = Lock()


@dataclass(frozen=True)
class Captured:
    """A call that can be replayed.

    Attributes
    ----------
    graph
        What was launched.
    inputs
        Buffers that it reads.
    out
        The buffers that it writes.
    read
        Arrays kept for all calls that it goes on reading, whether or not they are kept for others.
    """

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    out: tuple[Tensor, ...]
    read: tuple[Tensor, ...]


def replayed(
    call: Callable[..., tuple[Tensor, ...]], tensors: Mapping[str, Tensor], settings: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """Return ``call(*tensors, *settings)``, captured when it is met first and replayed whenever it comes again.

    The last `GRAPHS` calls are kept, each with copies of its inputs, its results and all temporaries of a call. They are
    told apart by shapes, dtypes and device of the tensors, by ``settings``, and by the current stream, on which one call of
    a graph waits for the one before. PyTorch's settings, such as the precision of products, stay as they were at the
    capture.

    Parameters
    ----------
    call
        What launches the same kernels for the same settings and shapes, whatever the numbers; hashable.
    tensors
        Name → tensor, on one CUDA device; of any strides, whose gradients aren't recorded.
    settings
        What else the call is given; hashable.

    Returns
    -------
    tuple of Tensor
        Of the results' shapes and dtypes: copies, which no later call changes.

    Raises
    ------
    OptionError
        The call can't be captured; nothing is kept of it.
    DeviceError
        Tensors lie on different devices.
    KdecoreError
        What else the call raises.
    """
    device = common_device(**tensors)
    rows = tuple((tuple(x.shape), x.dtype) for x in tensors.values())
    stream = torch.cuda.current_stream(device).cuda_stream
    with _one_at_a_time, torch.no_grad():
        found = _captured(call, rows, device, stream, settings)
        for buffer, x in zip(found.inputs, tensors.values(), strict=True):
            buffer.copy_(x)
        found.graph.replay()
        return tuple(x.clone() for x in found.out)


def clear_graphs() -> None:
    """Forget all graphs, and free what they keep."""
    with _one_at_a_time:
        _captured.cache_clear()


@lru_cache(maxsize=GRAPHS)
@outside_inference_mode()
def _captured(
    call: Callable[..., tuple[Tensor, ...]],
    rows: tuple[tuple[tuple[int, ...], torch.dtype], ...],
    device: torch.device,
    stream: int,
    settings: tuple[Any, ...],
) -> Captured:
    """Capture a call of zeros; ``stream`` only tells graphs apart."""
    inputs = tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in rows)
    new_stream: Any = torch.cuda.Stream
    aside = new_stream(device)
    torch.cuda.synchronize(device)
    # PyTorch's own context doesn't bring back the stream where the end of a capture fails: this one does.
    with torch.cuda.stream(aside), kept_arrays_met() as read:
        for _ in range(WARM_UPS):
            call(*inputs, *settings)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        try:
            # What other threads do meanwhile, such as to allocate memory, is no part of it and must not spoil it.
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                out = call(*inputs, *settings)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # Where the end of a capture fails too, it says less than what came before.
            first = error.__context__ or error
            raise OptionError(
                f"cuda_graph needs a call that can be captured, got {type(first).__name__}: {first}"
            ) from error
    return Captured(graph, inputs, out, tuple(read))


def check_capturable(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, options: Mapping[str, Any], reported: bool
) -> None:
    """Raise `OptionError` for what can't be captured in a CUDA graph.

    Parameters
    ----------
    query, key, value, mask, causal
        As in `kdecore.attention`.
    options
        Of a call through PyTorch.
    reported
        Whether somebody is told what the call did, who would wait for it.
    """
    for needed, got in _obstacles(query, key, value, mask, causal, options, reported):
        raise OptionError(f"cuda_graph needs {needed}, got {got}")


def _obstacles(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, options: Mapping[str, Any], reported: bool
) -> Iterator[tuple[str, str]]:
    """Yield what would have to be, and what is."""
    if BACKEND.operations_watched() or any(map(torch._C._functorch.is_functorch_wrapped_tensor, (query, key, value))):
        yield "a call outside of torch.compile, tracers, torch.func and modes", "one within"
    if query.device.type != DEVICE:
        yield "tensors on a CUDA device", f"query on {query.device}"
    if torch.cuda.is_current_stream_capturing():
        yield "a stream that isn't captured already", "one that is"
    if BACKEND.gradient_mode(query, key, value):
        yield "a call whose gradients aren't recorded, as in torch.no_grad()", "query, key or value that requires them"
    if reported:
        yield "a call that nobody collects reports of or counts", "one in collect_reports or reroute"
    if mask is not None:
        yield "attn_mask=None", f"a mask of shape {tuple(mask.shape)}"
    if causal:
        yield "is_causal=False", "causal attention, which copies from the host"
    for name in WAITING:
        if options.get(name) not in (None, False):
            yield f"a call without {name}", repr(options[name])
    if options.get("key_lengths") is not None:
        yield "a call without key_lengths", repr(options["key_lengths"])
    method = options.get("method")
    if "kdeformer" in (method, getattr(method, "name", "")):
        yield "a method that doesn't wait for the device", "kdeformer"
