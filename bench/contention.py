"""Measure: how calls slow down beside another process that keeps the processors busy, as on machines that people share."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

import kdecore
from bench.figures import Figure, Figures
from kdecore.arrays.backend import backend_named

LOADS = {
    "torch attention": "import torch\nq = torch.randn(1, 8, 2048, 64)\n"
    "while True: torch.nn.functional.scaled_dot_product_attention(q, q, q)",
    "NumPy products": "import numpy\na = numpy.ones((1024, 1024), 'float32')\nwhile True: a @ a",
    "a plain loop": "while True: pass",
}
"""What the other process does, for ever."""
CALLS = 15
STARTING = 3.0
"""Seconds until the other process does nothing else."""


def contention() -> Figures:
    """Slow-down beside one busy process over torch SDPA's, n = 4,097, 3 heads, 256 keys: medians, and longest calls."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 3, 4097, 64), dtype=np.float32)
    query, key, value = tensors = [torch.from_numpy(x) for x in (q, k, v)]
    calls: dict[str, Callable[[], Any]] = {"SDPA": partial(backend_named("torch").exact_attention, query, key, value, 0.125)}
    for method in ("treecode", "sortlsh", "exact"):
        calls[method] = partial(kdecore.attention, q, k, v, method=method, budget=256)
        calls[f"{method}, tensors"] = partial(kdecore.attention, *tensors, method=method, budget=256)
    alone = timed(calls)
    figures = {f"{name}, alone": Figure(1e3 * statistics.median(seconds), "ms") for name, seconds in alone.items()}
    for load, program in LOADS.items():
        with busy(program):
            beside = timed(calls)
        median = {name: statistics.median(beside[name]) / statistics.median(alone[name]) for name in calls}
        figures[f"beside {load}: SDPA, over alone"] = Figure(median["SDPA"], "×")
        for name in calls:
            if name != "SDPA":
                bar = 1.5 if name.startswith(("treecode", "sortlsh")) else None
                longest = max(beside[name]) / statistics.median(alone[name])
                ratios = {"median": median[name] / median["SDPA"], "longest": longest / median["SDPA"]}
                for kind, ratio in ratios.items():
                    figures[f"beside {load}: {name}, {kind}, over SDPA's"] = Figure(ratio, "×", at_most=bar)
    return figures


def timed(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Return the seconds of `CALLS` calls of each, which take turns, after two of each."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(CALLS + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn > 1:
                seconds[name].append(time.perf_counter() - started)
    return seconds


@contextmanager
def busy(program: str) -> Iterator[None]:
    """Run a program that doesn't end beside what is in the context."""
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        time.sleep(STARTING)
        try:
            yield
        finally:
            process.kill()
