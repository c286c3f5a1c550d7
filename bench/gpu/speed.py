"""How fast `bench.gpu`'s device is: what it reaches at best, PyTorch's fused attention, and estimates beside that."""

import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import kdecore
from bench.gpu.profile import counted, device_launches, rates, summarise
from bench.gpu.session import (
    LONG,
    Findings,
    Session,
    attempted,
    exact_rows,
    failure,
    free_memory,
    issue_seconds,
    left_out,
    median_seconds,
    timed,
)
from kdecore.accuracy.metrics import Errors, errors
from kdecore.arrays.backend import unusable
from kdecore.arrays.namespace import namespace_of
from kdecore.compare.cases import GLOVE_SCALE, Case, glove_case

HEADS, D, BUDGET = 16, 64, 512
SIZES = tuple(2**power for power in range(12, 19))
DTYPES = ("bfloat16", "float32")
METHODS = ("sortlsh", "treecode")
HYPER_SIZE, CHOICE_SIZE, CEILING_SIZE = 2**15, 2**13, 2**14
CUPY_SIZES = GRAPH_SIZES = (2**13, 2**15, 2**17)
PROFILES, REHEARSED_PROFILES = {"bfloat16": SIZES, "float32": (2**17,)}, {"bfloat16": (256,)}
INPUT_SETS = 3
LONGEST_EXACT = 4.0
"""Seconds of a call of exact attention that is not made, but predicted."""
CHECKED_ROWS = 256
"""Queries on which errors are computed."""
NOISE = 0.3
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
OUT_OF_TIME = "no time left"
Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""q, k and v."""


@dataclass(frozen=True)
class Scale:
    """Sizes of all measurements, tiny in a rehearsal."""

    heads: int
    sizes: tuple[int, ...]
    hyper_size: int
    choice_size: int
    ceiling_size: int
    cupy_sizes: tuple[int, ...]
    graph_sizes: tuple[int, ...]
    budget: int
    copied: int
    product: int


FULL = Scale(HEADS, SIZES, HYPER_SIZE, CHOICE_SIZE, CEILING_SIZE, CUPY_SIZES, GRAPH_SIZES, BUDGET, 2**30, 8192)
TINY = Scale(2, (256,), 256, 256, 256, (256,), (256,), 64, 2**20, 128)


def scale_of(session: Session) -> Scale:
    """Return the sizes to measure."""
    return TINY if session.rehearsal else FULL


def dtypes(session: Session) -> tuple[str, ...]:
    """Return the dtypes to measure."""
    return DTYPES[:1] if session.rehearsal else DTYPES


def ceilings(session: Session) -> Findings:
    """Yield the device's rates: a copy of its memory, matrix products, and each of PyTorch's attention kernels."""
    scale, device = scale_of(session), session.device
    source = torch.empty(scale.copied // 4, device=device).normal_(generator=session.generator(1))
    target = torch.empty_like(source)
    seconds = median_seconds(device, [partial(target.copy_, source)])
    yield "ceiling", {"name": "copy", "unit": "TB/s", "value": 2 * scale.copied / seconds * 1e-12}
    del source, target
    for name, dtype, tf32 in (("bfloat16", "bfloat16", False), ("tf32", "float32", True), ("float32", "float32", False)):
        a, b = (normal(session, dtype, (scale.product, scale.product), stream) for stream in (2, 3))
        with tensor_float32(tf32):
            seconds = median_seconds(device, [partial(torch.matmul, a, b)])
        yield "ceiling", {"name": f"{name} product", "unit": "TFLOP/s", "value": 2 * scale.product**3 / seconds * 1e-12}
    for dtype in dtypes(session):
        shape = (1, scale.heads, scale.ceiling_size, D)
        q, k, v = (normal(session, dtype, shape, stream) for stream in (4, 5, 6))
        for backend in BACKENDS:
            row = {"backend": backend, "dtype": dtype, "n": scale.ceiling_size}
            took, reason = try_backend(device, backend, q, k, v, None) if session.has(8.0) else (None, OUT_OF_TIME)
            if took is None:
                yield "sdpa", row | {"ms": None, "why": reason}
            else:
                rate = 4 * scale.ceiling_size**2 * D * scale.heads / took * 1e-12
                yield "sdpa", row | {"ms": 1e3 * took, "tflop_s": rate}
        del q, k, v
        free_memory(device)


def normal(session: Session, dtype: str, shape: tuple[int, ...], stream: int) -> Tensor:
    """Return normal numbers."""
    generator = session.generator(*shape, stream)
    return torch.randn(shape, generator=generator, device=session.device).to(getattr(torch, dtype))


@contextmanager
def tensor_float32(allowed: bool) -> Iterator[None]:
    """Let products of float32 be of TensorFloat-32, or not, within the context."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def fused(backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Return exact attention by one of PyTorch's kernels."""
    with sdpa_kernel(BACKENDS[backend]), torch.no_grad():
        return functional.scaled_dot_product_attention(q, k, v, scale=scale)


def try_backend(
    device: str, backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None
) -> tuple[float | None, str | None]:
    """Return the seconds of one of PyTorch's kernels, or why it doesn't run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what speaks against a kernel, which the exception says again
            return median_seconds(device, [partial(fused, backend, q, k, v, scale)], 5), None
    except RuntimeError as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0][:200]
    finally:
        free_memory(device)


def best_backend(device: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[str, float]:
    """Return the fastest of PyTorch's kernels that runs, and its seconds."""
    tried = {name: try_backend(device, name, q, k, v, scale)[0] for name in BACKENDS}
    return min(((name, seconds) for name, seconds in tried.items() if seconds is not None), key=lambda pair: pair[1])


def batched(one: Inputs) -> Inputs:
    """Return inputs with an axis before that of heads, without which PyTorch takes another path."""
    q, k, v = one
    return q[None], k[None], v[None]


@cache
def all_words() -> Case:
    """Read the words once."""
    return glove_case(16_384)


def words(session: Session, n: int, dtype: str, number: int) -> Inputs:
    """Return one set of inputs, (heads, n, 64) each, for logits ⟨q, k⟩ / √10.

    Rows are GloVe words, drawn with replacement, in 64 random directions for each head, and noise: real data of such length
    is not at hand, and attention to normal numbers is nearly uniform, which no estimate finds hard.
    """
    case, heads, device = all_words(), scale_of(session).heads, session.device
    generator = session.generator(n, number)
    of_keys, of_values = (torch.tensor(x, device=device) for x in (case.k, case.v))

    def some(source: Tensor, rows: Tensor, directions: Tensor) -> Tensor:
        found = source[rows] @ directions
        noise = torch.randn(found.shape, generator=generator, device=device)
        return (found + NOISE * found.std() * noise).to(getattr(torch, dtype))

    q_rows, k_rows = (torch.randint(len(of_keys), (heads, n), generator=generator, device=device) for _ in "qk")
    width = of_keys.shape[1]
    to_keys, to_values = (torch.randn((heads, width, D), generator=generator, device=device) / width**0.5 for _ in "kv")
    return some(of_keys, q_rows, to_keys), some(of_keys, k_rows, to_keys), some(of_values, k_rows, to_values)


def input_sets(session: Session, n: int, dtype: str) -> list[Inputs]:
    """Return as many sets of inputs as memory holds beside a call's temporaries, three at most."""
    one = words(session, n, dtype, 0)
    room = INPUT_SETS
    if session.device == "cuda":
        room = int(torch.cuda.mem_get_info()[0] / (8 * sum(x.nbytes for x in one)))
    return [one, *(words(session, n, dtype, number) for number in range(1, max(1, min(INPUT_SETS, room))))]


def timings(session: Session) -> Findings:
    """Yield what calls take beside PyTorch's fused attention, with their errors, and where their time goes."""
    for dtype in dtypes(session):
        if session.has(8.0):
            yield from attempted(f"timings ({dtype})", partial(timings_of, session, dtype))
        else:
            yield left_out(f"timings ({dtype})", OUT_OF_TIME)
        yield from profiles(session, dtype)
    yield from cupy_timings(session)


def timings_of(session: Session, dtype: str) -> Findings:
    """Yield the timings of one dtype, beside the one of PyTorch's kernels that is fastest at one size."""
    scale, measured = scale_of(session), list[tuple[int, float]]()
    one = words(session, scale.choice_size, dtype, 0)
    backend, seconds = best_backend(session.device, *batched(one), GLOVE_SCALE)
    yield "backend", {"dtype": dtype, "backend": backend, "n": scale.choice_size, "ms": 1e3 * seconds}
    for n in scale.sizes:
        what = f"timings ({dtype}, n = {n:,})"
        if session.has(20.0 if n > 2**16 else 8.0):
            yield from attempted(what, partial(timings_at, session, dtype, n, backend, measured))
        else:
            yield left_out(what, OUT_OF_TIME)
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
    budget = scale_of(session).budget
    calls = [*((method, budget) for method in METHODS), ("treecode", 2 * budget)]
    for method, slots in [*calls, ("hyper", budget)] if n == scale_of(session).hyper_size else calls:
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
    calls = [partial(fused, backend, *batched(one), GLOVE_SCALE) for one in sets]
    return median_seconds(session.device, calls, 5), False


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


def sampled_errors(session: Session, one: Inputs, out: Tensor) -> Errors:
    """Return the errors on some queries, against exact attention in float64 to the same numbers."""
    q, k, v = one
    rows = torch.randperm(q.shape[1], generator=session.generator(7), device=q.device)[:CHECKED_ROWS]
    exact = exact_rows(q[:, rows], k, v, GLOVE_SCALE)
    return errors(namespace_of(exact), out[:, rows].double(), exact)


def cupy_timings(session: Session) -> Findings:
    """Yield what the same calls take on CuPy's arrays; on NumPy's in a rehearsal."""
    if not session.rehearsal and (reason := unusable("cupy")):
        yield left_out("timings by CuPy", reason)
        return
    library = "numpy" if session.rehearsal else "cupy"
    for n in scale_of(session).cupy_sizes:
        for method in METHODS:
            if not session.has(10.0):
                yield left_out(f"timings ({library}, {method}, n = {n:,})", OUT_OF_TIME)
                continue
            yield from attempted(f"timings by CuPy, {method}", partial(cupy_timing, session, library, n, method))
    free_memory(session.device)


def cupy_timing(session: Session, library: str, n: int, method: str) -> Findings:
    """Yield one timing."""
    q, k, v = map(of_other_library, words(session, n, "float32", 0))
    call = partial(estimate, q, k, v, method, scale_of(session).budget)
    seconds = cupy_seconds(call) if library == "cupy" else timed("cpu", [call], 1)[0]
    yield "timing", {"library": library, "dtype": "float32", "n": n, "method": method, "ms": 1e3 * seconds}


def of_other_library(x: Tensor) -> Any:
    """Return a tensor as a CuPy array in the same memory, or a NumPy array."""
    if x.device.type == "cpu":
        return np.asarray(x)
    import cupy

    return cupy.from_dlpack(x)


def cupy_seconds(call: Callable[[], Any]) -> float:
    """Return a call's median time by CuPy's events, after one to warm up."""
    import cupy

    torch.cuda.synchronize()
    seconds: list[float] = []
    for _ in range(4):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(cupy.cuda.get_elapsed_time(start, end) * 1e-3)
    return statistics.median(seconds[1:])


def profiles(session: Session, dtype: str) -> Findings:
    """Yield where the time of calls goes, the longest inputs first."""
    for n in reversed((REHEARSED_PROFILES if session.rehearsal else PROFILES)[dtype]):
        for method in METHODS:
            what = f"profiles ({dtype}, n = {n:,}, {method})"
            if session.has(5.0):
                yield from attempted(what, partial(profile_of, session, dtype, n, method))
            else:
                yield left_out(what, OUT_OF_TIME)
            free_memory(session.device)


def profile_of(session: Session, dtype: str, n: int, method: str) -> Findings:
    """Yield one profile."""
    budget = scale_of(session).budget
    call = partial(estimate, *words(session, n, dtype, 0), method, budget)
    with counted() as work:
        call()
    found = summarise(device_launches(session.device, call, 2), 2)
    row = {"dtype": dtype, "n": n, "method": method, "budget": budget}
    yield "profile", row | found | {"rates": rates(found["stages"], work)}


def graphs(session: Session) -> Findings:
    """Yield whether calls can be captured in a CUDA graph, and what their replay takes."""
    for n in scale_of(session).graph_sizes:
        for method in METHODS:
            if session.has(2.0):
                yield "graph", graph_of(session, n, method)
            else:
                yield left_out(f"CUDA graph of {method}, n = {n:,}", OUT_OF_TIME)


def graph_of(session: Session, n: int, method: str) -> dict[str, Any]:
    """Return the row of one method and size."""
    row = {"method": method, "dtype": "bfloat16", "n": n}
    call = partial(estimate, *words(session, n, "bfloat16", 0), method, scale_of(session).budget)
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
