"""Errors beside times on `bench.gpu`'s device: GloVe words, and layers of a vision transformer from a file."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import kdecore
from bench.gpu.peers import best_backend
from bench.gpu.session import Findings, Session, attempted, exact_rows, free_memory, left_out, median_seconds, out_of_time
from kdecore.accuracy.metrics import errors
from kdecore.arrays.namespace import namespace_of
from kdecore.compare.cases import GLOVE_SCALE, Case, glove_case

METHODS = ("treecode", "sortlsh", "hyper")
"""kdeformer is left out: it takes longer than exact attention."""
BUDGETS, REHEARSED_BUDGETS = (256, 512, 1024), (64,)
N, REHEARSED_N = 8192, 256
LAYERS = (1, 3, 6)
LARGEST_EXPORT = 30 * 10**6


def error_rows(session: Session, dtype: str = "bfloat16") -> Findings:
    """Yield one row for each case, method and budget."""
    if session.vit is None:
        yield left_out("errors on a vision transformer", "no file: see --vit")
    for case in cases(session):
        what = f"errors ({case.name}, {dtype})"
        if session.has(3.0):
            yield from attempted(what, partial(errors_of, session, case, dtype))
        else:
            yield out_of_time(what)
        free_memory(session.device)


def errors_of(session: Session, case: Case, dtype: str) -> Findings:
    """Yield the errors and times of all methods and budgets on one case, beside PyTorch's fastest kernel."""
    q, k, v = (torch.tensor(x, device=session.device).to(getattr(torch, dtype)) for x in (case.q, case.k, case.v))
    q, k, v = (x if x.ndim == 3 else x[None] for x in (q, k, v))
    scale = float(q.shape[-1] ** -0.5) if case.scale is None else case.scale
    backend, seconds = best_backend(session.device, q, k, v, scale)
    row = {"case": case.name, "dtype": dtype, "n": q.shape[1], "sdpa": backend, "sdpa_ms": 1e3 * seconds}
    exact = exact_rows(q, k, v, scale)
    for method in METHODS:
        for budget in REHEARSED_BUDGETS if session.rehearsal else BUDGETS:
            if not session.has(1.0):
                yield out_of_time(f"errors ({case.name}, {dtype}, {method}, {budget})")
                continue
            call = partial(kdecore.attention, q, k, v, method=method, budget=budget, scale=scale, diagonal=0)
            found = errors(namespace_of(exact), call().double(), exact)
            own = {"method": method, "budget": budget, "ms": 1e3 * median_seconds(session.device, [call], 5)}
            yield "error", row | own | {"spectral": found.spectral, "frobenius": found.frobenius}


def cases(session: Session) -> Iterator[Case]:
    """Yield the layers that the file holds, and words at two logit scales."""
    if session.vit is not None:
        with np.load(session.vit, allow_pickle=False) as file:
            for layer in LAYERS:
                q, k, v = (file[f"{name}{layer}"] for name in "qkv")
                yield Case(f"vision transformer, layer {layer}", q, k, v)
    glove = glove_case(REHEARSED_N if session.rehearsal else N)
    for scale in (GLOVE_SCALE,) if session.rehearsal else (GLOVE_SCALE, 1.0):
        yield replace(glove, name=f"GloVe, logits × {scale:.2f}", scale=scale)


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
