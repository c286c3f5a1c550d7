"""Exact attention that estimates are measured beside: PyTorch's kernels, and other packages' where a user has them.

A peer takes q, k and v, (heads, n, d) each, and the scale, and returns a call without arguments: inputs are laid out before
it, as the package's documentation asks for them, and what it returns is (heads, n, d) again, as a view.
"""

import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex

from bench.gpu.inputs import sampled_errors, scale_of, words
from bench.gpu.session import Findings, Row, Session, failure, free_memory, left_out, median_seconds, out_of_time
from kdecore.compare.cases import GLOVE_SCALE

Peer: TypeAlias = Callable[[Tensor, Tensor, Tensor, float], Callable[[], Tensor]]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def fused(backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return exact attention by one of PyTorch's kernels, which take another path without an axis before that of heads."""
    with sdpa_kernel(BACKENDS[backend]), torch.no_grad():
        return functional.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0]


def best_backend(device: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[str, float]:
    """Return the fastest of PyTorch's kernels that runs, and its seconds."""
    seconds = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what speaks against a kernel, which its exception says again
        for backend in BACKENDS:
            with suppress(RuntimeError):
                seconds[backend] = median_seconds(device, [partial(fused, backend, q, k, v, scale)], 5)
            free_memory(device)
    return min(seconds.items(), key=lambda pair: pair[1])


def of_torch(backend: str) -> Peer:
    """Return one of PyTorch's kernels as a peer."""
    return lambda q, k, v, scale: partial(fused, backend, q, k, v, scale)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[[], Tensor]:
    """PyTorch's FlexAttention takes (1, heads, n, d); it is compiled, but for a rehearsal, where that takes long."""
    call = torch.compile(flex.flex_attention, dynamic=False) if q.is_cuda else flex.flex_attention
    return lambda: call(q[None], k[None], v[None], scale=scale)[0]


def of_package(module: str, function: str, layout: str, named: str) -> Peer:
    """Return a package's function as a peer: the ``layout`` that it takes and returns, and what it calls the scale."""

    def peer(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[[], Tensor]:
        attend = getattr(import_module(module), function)
        inputs = [laid_out(x, layout) for x in (q, k, v)]
        return lambda: heads_first(attend(*inputs, **{named: scale}), layout)

    return peer


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return (heads, n, d) in another layout, row by row in memory."""
    x = x.transpose(0, 1).contiguous() if layout.endswith("nhd") else x
    return x[None] if layout.startswith("1") else x


def heads_first(x: Tensor, layout: str) -> Tensor:
    """Return an array of a layout as (heads, n, d)."""
    x = x[0] if layout.startswith("1") else x
    return x.transpose(0, 1) if layout.endswith("nhd") else x


OWN = {name: of_torch(name) for name in ("cudnn", "flash", "efficient")} | {"flex_attention": flex_attention}
OTHERS = {
    "FlashAttention 2": of_package("flash_attn", "flash_attn_func", "1nhd", "softmax_scale"),
    "FlashAttention 3": of_package("flash_attn_interface", "flash_attn_func", "1nhd", "softmax_scale"),
    "SageAttention": of_package("sageattention", "sageattn", "1hnd", "sm_scale"),
    "xFormers": of_package("xformers.ops", "memory_efficient_attention", "1nhd", "scale"),
    # What compiles when it is called comes last.
    "FlashInfer": of_package("flashinfer", "single_prefill_with_kv_cache", "nhd", "sm_scale"),
}


def peer_rows(session: Session) -> Findings:
    """Yield what peers take in bfloat16, and how they err, on the inputs that timings are of."""
    if session.peers is not None:
        # At the end: what is installed is not to be replaced.
        sys.path.append(str(session.peers))
    for name, peer in (OWN if session.peers is None else OWN | OTHERS).items():
        for n in scale_of(session).goals:
            what = f"{name}, n = {n:,}"
            if not session.has(3.0):
                yield out_of_time(what)
                continue
            try:
                yield "peer", measured(session, name, peer, n)
            except Exception as error:  # it is the package's, and not the library's
                yield left_out(what, failure(what, error)[1]["error"])
                break
            finally:
                free_memory(session.device)


def measured(session: Session, name: str, peer: Peer, n: int) -> Row:
    """Return one peer's time and errors."""
    one = words(session, n, "bfloat16")
    with torch.no_grad():
        call = peer(*one, GLOVE_SCALE)
        found = sampled_errors(session, one, call())
        seconds = median_seconds(session.device, [call], 5)
    rate = 4 * n**2 * one[0].shape[2] * len(one[0]) / seconds * 1e-12
    row = {"peer": name, "dtype": "bfloat16", "n": n, "ms": 1e3 * seconds, "tflop_s": rate}
    return row | {"spectral": found.spectral, "frobenius": found.frobenius}
