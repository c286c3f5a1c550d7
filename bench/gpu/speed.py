"""How fast `bench.gpu`'s device is, and estimates beside PyTorch's fused attention: times, profiles, graphs and CuPy."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kdecore
from bench.gpu.errors import error_rows
from bench.gpu.inputs import Inputs, input_sets, sampled_errors, scale_of, words
from bench.gpu.peers import best_backend, fused
from bench.gpu.profile import device_launches, summarise
from bench.gpu.session import (
    LONG,
    Findings,
    Session,
    attempted,
    failure,
    free_memory,
    issue_seconds,
    left_out,
    median_seconds,
    out_of_time,
)
from kdecore.arrays.backend import unusable
from kdecore.compare.cases import GLOVE_SCALE

METHODS = ("treecode", "sortlsh")
LONGEST_EXACT = 4.0
"""Seconds of a call of exact attention that is not made, but predicted."""


def ceilings(session: Session) -> Findings:
    """Yield the device's rates: a copy of its memory, and matrix products."""
    scale, device = scale_of(session), session.device
    source = torch.empty(scale.copied // 4, device=device).normal_(generator=session.generator(1))
    target = torch.empty_like(source)
    seconds = median_seconds(device, [partial(target.copy_, source)])
    yield "ceiling", {"name": "copy", "unit": "TB/s", "value": 2 * scale.copied / seconds * 1e-12}
    shape = scale.product, scale.product
    a, b = (torch.randn(shape, generator=session.generator(i), device=device).bfloat16() for i in (2, 3))
    seconds = median_seconds(device, [partial(torch.matmul, a, b)])
    yield "ceiling", {"name": "product", "unit": "TFLOP/s", "value": 2 * scale.product**3 / seconds * 1e-12}


def timings(session: Session) -> Findings:
    """Yield times and errors in bfloat16 at the goals' sizes, and where device time goes at each."""
    return timings_of(session, "bfloat16", scale_of(session).goals, profiled=True)


def float32(session: Session) -> Findings:
    """Yield times at the goals' sizes, and errors, in float32."""
    yield from timings_of(session, "float32", scale_of(session).goals)
    yield from error_rows(session, "float32")


def others(session: Session) -> Findings:
    """Yield times at other sizes."""
    for dtype in ("bfloat16", "float32"):
        yield from timings_of(session, dtype, scale_of(session).others)


def timings_of(session: Session, dtype: str, sizes: Iterable[int], profiled: bool = False) -> Findings:
    """Yield the timings of one dtype, beside the one of PyTorch's kernels that is fastest at the smallest goal's size."""
    backend, _ = best_backend(session.device, *words(session, scale_of(session).goals[0], dtype), GLOVE_SCALE)
    measured = list[tuple[int, float]]()
    for n in sizes:
        parts = {f"timings ({dtype}, n = {n:,})": partial(timings_at, session, dtype, n, backend, measured)}
        for method in METHODS if profiled else ():
            parts[f"profile ({dtype}, n = {n:,}, {method})"] = partial(profile_of, session, dtype, n, method)
        for what, rows in parts.items():
            yield from attempted(what, rows) if session.has(3.0) else [out_of_time(what)]
            free_memory(session.device)


def timings_at(session: Session, dtype: str, n: int, backend: str, measured: list[tuple[int, float]]) -> Findings:
    """Yield the timings at one size; PyTorch's seconds are added to those ``measured`` at sizes before."""
    sets = input_sets(session, n, dtype)
    seconds, predicted = fused_seconds(session, backend, sets, measured)
    if not predicted:
        measured.append((n, seconds))
    row = {
        "library": "torch",
        "dtype": dtype,
        "n": n,
        "sdpa": backend,
        "sdpa_ms": 1e3 * seconds,
        "sdpa_predicted": predicted,
    }
    scale = scale_of(session)
    calls = [("treecode", scale.budget), ("treecode", 2 * scale.budget), ("sortlsh", scale.budget)]
    # Another hash is enough at one size.
    for method, slots in [*calls, ("hyper", scale.budget)] if n == scale.goals[len(scale.goals) // 2] else calls:
        found = time_method(session, sets, method, slots, seconds)
        yield "timing", row | found
        name = f"{method}, budget {slots}, errs less than zeros would ({dtype}, n = {n:,})"
        yield "check", {"name": name, "measured": found["frobenius"], "limit": 1.0, "passed": found["frobenius"] < 1.0}


def fused_seconds(
    session: Session, backend: str, sets: list[Inputs], measured: list[tuple[int, float]]
) -> tuple[float, bool]:
    """Return the seconds of PyTorch's attention, and whether they are predicted, as n², from the longest inputs measured."""
    n = sets[0][0].shape[1]
    if measured:
        expected = measured[-1][1] * (n / measured[-1][0]) ** 2
        if expected > LONGEST_EXACT or 3 * expected > session.left():
            return expected, True
    return median_seconds(session.device, [partial(fused, backend, *one, GLOVE_SCALE) for one in sets], 5), False


def estimate(q: Any, k: Any, v: Any, method: str, budget: int) -> Any:
    """Call kdecore on words."""
    return kdecore.attention(q, k, v, method=method, budget=budget, scale=GLOVE_SCALE, diagonal=0)


def time_method(session: Session, sets: list[Inputs], method: str, budget: int, exact: float) -> dict[str, Any]:
    """Return the row of one method and budget, beside exact attention's seconds."""
    calls = [partial(estimate, *one, method, budget) for one in sets]
    seconds = median_seconds(session.device, calls)
    found = sampled_errors(session, sets[0], calls[0]())
    return {
        "method": method,
        "budget": budget,
        "ms": 1e3 * seconds,
        "issue_ms": 1e3 * issue_seconds(session.device, calls, 1 if seconds > LONG else 5),
        "speedup": exact / seconds,
        "spectral": found.spectral,
        "frobenius": found.frobenius,
    }


def profile_of(session: Session, dtype: str, n: int, method: str) -> Findings:
    """Yield where the device time of one call goes."""
    scale = scale_of(session)
    call = partial(estimate, *words(session, n, dtype), method, scale.budget)
    call()
    row = {"dtype": dtype, "heads": scale.heads, "n": n, "method": method, "budget": scale.budget}
    yield "profile", row | summarise(device_launches(session.device, call, 2), 2)


def cupy_timings(session: Session) -> Findings:
    """Yield what the same calls take on CuPy's arrays; on NumPy's in a rehearsal."""
    if not session.rehearsal and (reason := unusable("cupy")):
        yield left_out("timings by CuPy", reason)
        return
    library = "numpy" if session.rehearsal else "cupy"
    for n in scale_of(session).goals:
        for method in METHODS:
            what = f"timings ({library}, {method}, n = {n:,})"
            rows = partial(cupy_timing, session, library, n, method)
            yield from attempted(what, rows) if session.has(3.0) else [out_of_time(what)]


def cupy_timing(session: Session, library: str, n: int, method: str) -> Findings:
    """Yield one timing."""
    q, k, v = map(of_other_library, words(session, n, "float32"))
    # CuPy works on PyTorch's stream, where both take the default one.
    seconds = median_seconds(session.device, [partial(estimate, q, k, v, method, scale_of(session).budget)], 3)
    yield "timing", {"library": library, "dtype": "float32", "n": n, "method": method, "ms": 1e3 * seconds}


def of_other_library(x: Tensor) -> Any:
    """Return a tensor as a CuPy array in the same memory, or a NumPy array."""
    if x.device.type == "cpu":
        return np.asarray(x)
    import cupy

    return cupy.from_dlpack(x)


def graphs(session: Session) -> Findings:
    """Yield whether calls can be captured in a CUDA graph, and what their replay takes."""
    for n in scale_of(session).goals:
        for method in METHODS:
            what = f"CUDA graph of {method}, n = {n:,}"
            yield ("graph", graph_of(session, n, method)) if session.has(1.0) else out_of_time(what)


def graph_of(session: Session, n: int, method: str) -> dict[str, Any]:
    """Return the row of one method and size."""
    row = {"method": method, "dtype": "bfloat16", "n": n}
    call = partial(estimate, *words(session, n, "bfloat16"), method, scale_of(session).budget)
    try:
        return row | captured(session.device, call)
    except Exception as error:  # what can't be captured raises errors of many kinds
        return row | {"captured": False, "why": failure("", error)[1]["error"]}


def captured(device: str, call: Callable[[], Tensor]) -> dict[str, Any]:
    """Capture a call; return what it and its replay take, and whether they return the same."""
    if device != "cuda":
        return {"captured": False, "why": "no CUDA device"}
    new_stream: Any = torch.cuda.Stream
    with torch.cuda.stream(new_stream()):
        for _ in range(3):
            expected = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    seconds = median_seconds(device, [graph.replay])
    same = bool(torch.equal(out, expected))
    return {"captured": True, "same": same, "replay_ms": 1e3 * seconds, "ms": 1e3 * median_seconds(device, [call])}
