"""Measures of sequences sharded across processes of one thread each: how much faster, and how much larger errors."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import kdecore
from bench.figures import Figure, Figures
from kdecore.accuracy.metrics import errors
from kdecore.arrays.namespace import host
from kdecore.compare.cases import glove_case
from kdecore_adapters.distributed import ring_attention, ulysses_attention

SPEED_UP, RATIO = 1.6, 1.5
"""Bars: two processes over one, and the ring's error over a single call's."""
BUDGET = 384


def in_processes(count: int, work: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """Return what the first of so many processes, of one thread each, returns."""
    threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    os.environ.update(dict.fromkeys(threads, "1"))
    try:
        with tempfile.TemporaryDirectory(prefix="kdecore-bench-") as folder:
            start: Any = spawn
            start(run, (count, folder, work, arguments), nprocs=count)
            found: dict[str, float] = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
            return found
    finally:
        for name, value in threads.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run(rank: int, count: int, folder: str, work: Callable[..., dict[str, float]], arguments: tuple[Any, ...]) -> None:
    """Do the work of one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    found = work(*arguments)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def mine(x: Tensor) -> Tensor:
    """Return this process's rows of (…, n, width)."""
    return x.tensor_split(dist.get_world_size(), dim=-2)[dist.get_rank()]


def sharded_speed(n: int = 16384, rounds: int = 5) -> Figures:
    """Two processes of one thread each, 4 heads, d = 64, budget 512, float32: times as fast as one process of one thread."""
    seconds = in_processes(2, timed, n, rounds)
    figures: Figures = {name: Figure(1e3 * took, "ms") for name, took in seconds.items()}
    for name, took in seconds.items():
        way, _, rest = name.partition(", ")
        if way != "one process":
            bar = SPEED_UP if way == "Ulysses" else None
            figures[f"{name}: speed-up"] = Figure(seconds[f"one process, {rest}"] / took, "×", at_least=bar)
    return figures


def timed(n: int, rounds: int) -> dict[str, float]:
    """Return median seconds of calls that take turns, after one untimed turn; other processes wait while one works alone."""
    torch.manual_seed(0)
    whole = [torch.randn(1, 4, n, 64) for _ in range(3)]
    shards = [mine(x).contiguous() for x in whole]
    calls: dict[str, Callable[[], Any]] = {}
    for kind, options in kinds().items():
        options = {**options, "budget": 512, "threads": 1}
        calls[f"one process, {kind}"] = partial(alone, whole, options)
        for way, sharded in (("Ulysses", ulysses_attention), ("ring", ring_attention)):
            calls[f"{way}, {kind}"] = partial(sharded, *shards, **options)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            dist.barrier()
            started = time.perf_counter()
            call()
            dist.barrier()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(some) for name, some in seconds.items()}


def kinds() -> dict[str, dict[str, Any]]:
    """Return options of what is timed."""
    return {
        "treecode": {"method": "treecode"},
        "treecode, causal": {"method": "treecode", "causal": True},
        "sortlsh": {"method": "sortlsh"},
    }


def alone(arrays: list[Tensor], options: dict[str, Any]) -> None:
    """Call in the first process only."""
    if dist.get_rank() == 0:
        kdecore.attention(*arrays, **options)


class Data(NamedTuple):
    """What attends to each other, and the factor on logits."""

    name: str
    q: Any
    k: Any
    v: Any
    scale: float | None


def ring_error(words: int = 8192, pixels: int = 896) -> Figures:
    """Error of a ring of 2 and 4 processes over that of a single call, 384 keys: vision transformer, words, clusters."""
    figures: Figures = {}
    for count in (2, 4):
        found = in_processes(count, compared, words, pixels)
        ratios: dict[str, list[float]] = {}
        for name, ratio in found.items():
            figures[f"{count} processes, {name}"] = Figure(ratio, "×", at_most=RATIO)
            ratios.setdefault(name.partition(" on ")[0], []).append(ratio)
        for kind, some in ratios.items():
            figures[f"{count} processes, {kind}: mean over data"] = Figure(statistics.fmean(some), "×", at_most=RATIO)
    return figures


def data(words: int, pixels: int) -> Iterator[Data]:
    """Yield six layers of a vision transformer, words at three scales, and clusters of rows anywhere in the sequence."""
    from bench import vit

    for layer, (q, k, v) in vit.qkv(pixels).items():
        yield Data(f"layer {layer}", q, k, v, None)
    case = glove_case(words)
    for scale in (1.0, 10**-0.5, 0.1):
        yield Data(f"words, logit scale {scale:.2f}", case.q[None], case.k[None], case.v[None], scale)
    rng = np.random.default_rng(0)
    centres = 2.0 * rng.standard_normal((64, 16), dtype=np.float32)
    rows = (centres[rng.integers(0, 64, words)] + 0.5 * rng.standard_normal((words, 16), dtype=np.float32) for _ in "qkv")
    q, k, v = (x[None] for x in rows)
    yield Data("clusters", q, k, v, None)


def compared(words: int, pixels: int) -> dict[str, float]:
    """Return the ring's Frobenius error over that of one call, for methods and data; the same budget, own keys said."""
    found = {}
    for one in data(words, pixels):
        arrays = [torch.from_numpy(np.ascontiguousarray(x)) for x in (one.q, one.k, one.v)]
        for causal in (False, True):
            asked: dict[str, Any] = {"scale": one.scale, "causal": causal, "diagonal": 0}
            exact = kdecore.attention(*(x.double() for x in arrays), method="exact", **asked).numpy()
            for method in ("treecode", "sortlsh"):
                options = {**asked, "method": method, "budget": BUDGET}
                single = errors(host, kdecore.attention(*arrays, **options).numpy(), exact).frobenius
                rows: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(rows, ring_attention(*(mine(x) for x in arrays), **options))
                ring = errors(host, torch.cat(rows, dim=-2).numpy(), exact).frobenius
                found[f"{method}{', causal' if causal else ''} on {one.name}"] = ring / single
    return found
