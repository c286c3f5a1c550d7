"""Errors beside times on `bench.gpu`'s device: GloVe words, and layers of a vision transformer from a file."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import kdecore
from bench.gpu.session import Findings, Session, attempted, exact_rows, free_memory, left_out, median_seconds
from bench.gpu.speed import OUT_OF_TIME, best_backend, dtypes
from kdecore.accuracy.metrics import errors
from kdecore.arrays.namespace import namespace_of
from kdecore.compare.cases import GLOVE_SCALE, Case, glove_case

METHODS = ("sortlsh", "hyper", "treecode")
"""kdeformer is left out: it takes longer than exact attention."""
BUDGETS, REHEARSED_BUDGETS = (256, 512, 1024), (64,)
N, REHEARSED_N = 8192, 256
LAYERS = (1, 3, 6)
LARGEST_EXPORT = 30 * 10**6


@dataclass(frozen=True)
class Measured:
    """A case on the device, (heads, n, d), in one dtype, with exact attention in float64 and PyTorch's seconds."""

    arrays: tuple[Tensor, Tensor, Tensor]
    scale: float
    exact: Tensor
    sdpa: str
    seconds: float


def error_rows(session: Session) -> Findings:
    """Yield one row for each case, dtype, method and budget."""
    if session.vit is None:
        yield left_out("errors on a vision transformer", "no file: see --vit")
    for case in cases(session):
        for dtype in dtypes(session):
            what = f"errors ({case.name}, {dtype})"
            if session.has(6.0):
                yield from attempted(what, partial(errors_of, session, case, dtype))
            else:
                yield left_out(what, OUT_OF_TIME)
            free_memory(session.device)


def errors_of(session: Session, case: Case, dtype: str) -> Findings:
    """Yield the errors and times of all methods and budgets on one case."""
    measured = prepare(session, case, dtype)
    row = {"case": case.name, "dtype": dtype, "n": measured.exact.shape[1]}
    row |= {"sdpa": measured.sdpa, "sdpa_ms": 1e3 * measured.seconds}
    for method in METHODS:
        for budget in REHEARSED_BUDGETS if session.rehearsal else BUDGETS:
            if not session.has(3.0):
                yield left_out(f"errors ({case.name}, {dtype}, {method}, {budget})", OUT_OF_TIME)
                continue
            call = partial(
                kdecore.attention, *measured.arrays, method=method, budget=budget, scale=measured.scale, diagonal=0
            )
            found = errors(namespace_of(measured.exact), call().double(), measured.exact)
            seconds = median_seconds(session.device, [call], 5)
            own = {"method": method, "budget": budget, "ms": 1e3 * seconds}
            yield "error", row | own | {"spectral": found.spectral, "frobenius": found.frobenius}


def cases(session: Session) -> Iterator[Case]:
    """Yield words at two logit scales, and the layers that the file holds."""
    glove = glove_case(REHEARSED_N if session.rehearsal else N)
    for scale in (GLOVE_SCALE,) if session.rehearsal else (GLOVE_SCALE, 1.0):
        yield replace(glove, name=f"GloVe, logits × {scale:.2f}", scale=scale)
    if session.vit is not None:
        with np.load(session.vit, allow_pickle=False) as file:
            for layer in LAYERS:
                q, k, v = (file[f"{name}{layer}"] for name in "qkv")
                yield Case(f"vision transformer, layer {layer}", q, k, v)


def prepare(session: Session, case: Case, dtype: str) -> Measured:
    """Bring a case to the device, evaluate it exactly there, and time PyTorch's fastest kernel."""
    q, k, v = (torch.tensor(x, device=session.device).to(getattr(torch, dtype)) for x in (case.q, case.k, case.v))
    q, k, v = (x if x.ndim == 3 else x[None] for x in (q, k, v))
    scale = float(q.shape[-1] ** -0.5) if case.scale is None else case.scale
    backend, seconds = best_backend(session.device, q[None], k[None], v[None], scale)
    return Measured((q, k, v), scale, exact_rows(q, k, v, scale), backend, seconds)


def export_vit(path: Path) -> str:
    """Write a vision transformer's q, k and v as float16, where its packages are installed; say what was written."""
    from bench import vit

    arrays = {
        f"{name}{layer}": array.astype(np.float16)
        for layer, found in vit.qkv(896, LAYERS).items()
        for name, array in zip("qkv", found, strict=True)
    }
    np.savez_compressed(path, **arrays)
    size = path.stat().st_size
    if size > LARGEST_EXPORT:
        raise ValueError(f"{path} takes {size} bytes, more than {LARGEST_EXPORT}")
    shape = "×".join(map(str, arrays[f"q{LAYERS[0]}"].shape))
    return f"{path}: layers {', '.join(map(str, LAYERS))}, {shape} each, {size / 1e6:.1f} MB"
