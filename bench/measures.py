"""What is measured: one function a measure, each returning figures with the bar they are to reach."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import kdecore
from bench import peers
from bench.timing import interleaved
from kdecore.loading import GLOVE, glove_case
from kdecore.machine import load_adapter, peak_memory
from kdecore.metrics import errors
from kdecore.namespaces import host
from kdecore_adapters import numpy_adapter

GIB = 2**30


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes
    ----------
    value
        The number.
    unit
        Its unit, ``"×"`` for ratios taken in one run.
    at_most, at_least
        The bar, where there is one.
    """

    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the bar is reached; None without a bar."""
        if self.at_most is None and self.at_least is None:
            return None
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )


Figures = dict[str, Figure]


def sdpa(q: Any, k: Any, v: Any, scale: float) -> Any:
    """Exact attention by torch's fused kernel, on NumPy arrays without a copy."""
    return load_adapter("torch").scaled_dot_product_attention(q, k, v, scale)


def glove_error() -> Figures:
    """KDEformer paper's GloVe protocol: n = 8192, K = Q, 384 keys per query, mean and deviation over 10 seeds."""
    case = glove_case(8192)
    q, v = case.q.astype(np.float64), case.v.astype(np.float64)
    scale = case.scale or 1.0
    exact = kdecore.attention(q, q, v, method="exact", scale=scale)
    estimates: dict[str, Callable[[int], Any]] = {
        method: partial(
            lambda method, seed: kdecore.attention(q, q, v, method=method, budget=384, scale=scale, seed=seed), method
        )
        for method in ("sortlsh", "hyper")
    }
    if (released := peers.kdeformer(block_size=128, num_samples=256)) is not None:
        estimates["KDEformer as released"] = lambda seed: released(q, q, v, scale, seed)
    figures = {}
    for name, estimate in estimates.items():
        found = [errors(host, estimate(seed), exact) for seed in range(10)]
        spectral, frobenius = [x.spectral for x in found], [x.frobenius for x in found]
        bar = 0.18 if name == "sortlsh" else None
        figures[f"{name}, spectral error"] = Figure(float(np.mean(spectral)), "", at_most=bar)
        figures[f"{name}, spectral error, deviation"] = Figure(float(np.std(spectral, ddof=1)), "")
        figures[f"{name}, Frobenius error"] = Figure(float(np.mean(frobenius)), "")
    return figures


def speed_16k() -> Figures:
    """At n = 16,384, one head, d = 100, float32, NumPy arrays, budget 384: times over torch SDPA, in one run."""
    case = glove_case(16384)
    q, v = case.q, case.v
    scale = case.scale or 1.0
    calls: dict[str, Callable[[], Any]] = {
        "torch SDPA": lambda: sdpa(q, q, v, scale),
        "sortlsh": lambda: kdecore.attention(q, q, v, method="sortlsh", budget=384, scale=scale),
        "hyper": lambda: kdecore.attention(q, q, v, method="hyper", budget=384, scale=scale),
        "exact": lambda: kdecore.attention(q, q, v, method="exact", scale=scale),
    }
    if (released := peers.kdeformer(block_size=128, num_samples=256)) is not None:
        calls["KDEformer as released"] = lambda: released(q, q, v, scale, 0)
    seconds = interleaved(calls, repeats=2)
    figures = {f"{name}, time": Figure(value * 1e3, "ms") for name, value in seconds.items()}
    for name in calls:
        if name != "torch SDPA":
            bar = 8.3 if name == "sortlsh" else None
            figures[f"{name}, speed-up over torch SDPA"] = Figure(seconds["torch SDPA"] / seconds[name], "×", at_least=bar)
    return figures


def growth_131k() -> Figures:
    """At n = 131,072, d = 64, one head, budget 512: memory above the inputs, and time over that at n = 16,384."""
    rng = np.random.default_rng(0)
    (words,) = numpy_adapter.load(GLOVE, ("vectors",))
    base = words[:, :64].astype(np.float32)

    def inputs(n: int) -> list[Any]:
        # Words with a little noise: real directions and norms, in any number.
        return [base[rng.integers(0, len(base), n)] + 0.1 * rng.standard_normal((n, 64), dtype=np.float32) for _ in range(3)]

    small, large = inputs(16384), inputs(131072)
    call = partial(kdecore.attention, method="sortlsh", budget=512, scale=0.1)
    seconds = interleaved({"16,384": lambda: call(*small), "131,072": lambda: call(*large)}, repeats=3)
    peak = peak_memory(lambda: call(*large))
    figures = {
        "time at 16,384": Figure(seconds["16,384"] * 1e3, "ms"),
        "time at 131,072": Figure(seconds["131,072"] * 1e3, "ms"),
        "time at 131,072 over that at 16,384": Figure(seconds["131,072"] / seconds["16,384"], "×", at_most=10.0),
    }
    if peak is not None:
        figures["peak memory above the inputs"] = Figure(peak / GIB, "GiB", at_most=1.0)
    return figures


def crossover() -> Figures:
    """Where "auto" should leave exact: time of exact over that of sortlsh at budget 512, n from 512 to 8,192, d = 64."""
    rng = np.random.default_rng(0)
    figures = {}
    for n in (512, 768, 1024, 1536, 2048, 3072, 4096, 8192):
        q, k, v = rng.standard_normal((3, n, 64), dtype=np.float32)
        calls = {
            "exact": partial(kdecore.attention, q, k, v, method="exact"),
            "sortlsh": partial(kdecore.attention, q, k, v, method="sortlsh", budget=min(512, n - 1)),
            "auto": partial(kdecore.attention, q, k, v, budget=min(512, n - 1)),
        }
        seconds = interleaved(calls, repeats=7)
        figures[f"n = {n:,}: exact over sortlsh"] = Figure(seconds["exact"] / seconds["sortlsh"], "×")
        figures[f"n = {n:,}: auto over the better of the two"] = Figure(
            seconds["auto"] / min(seconds["exact"], seconds["sortlsh"]), "×"
        )
    return figures


MEASURES: dict[str, Callable[[], Figures]] = {
    function.__name__: function for function in (glove_error, speed_16k, growth_131k, crossover)
}
"""Measure name → function."""
