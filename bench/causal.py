"""Measures of attention as models call it: causal, with padding, with grouped heads."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import kdecore
from bench.figures import Figure, Figures
from bench.timing import interleaved
from kdecore.accuracy.metrics import errors
from kdecore.arrays.backend import backend_named
from kdecore.arrays.namespace import host
from kdecore.compare.cases import glove_case

SEEDS = 6


def causal_speed() -> Figures:
    """Causal attention over torch SDPA's in the same run, 4 heads, d = 64, budget 512, float32."""
    figures = {}
    for n in (4096, 8192, 16384, 32768):
        q, k, v = np.random.default_rng(0).standard_normal((3, 1, 4, n, 64), dtype=np.float32)
        calls: dict[str, Any] = {"torch SDPA": partial(causal_sdpa, q, k, v)}
        for method in ("sortlsh", "hyper", "treecode", "exact"):
            calls[method] = partial(kdecore.attention, q, k, v, method=method, budget=512, causal=True)
            if method != "exact":
                calls[f"{method}, not causal"] = partial(kdecore.attention, q, k, v, method=method, budget=512)
        seconds = interleaved(calls, repeats=1, rounds=5)
        for method in ("sortlsh", "hyper", "treecode", "exact"):
            bar = 15.0 if n == 32768 and method == "sortlsh" else None
            ratio = seconds["torch SDPA"] / seconds[method]
            figures[f"n = {n:,}, {method}: times as fast as SDPA"] = Figure(ratio, "×", at_least=bar)
        for method in ("sortlsh", "hyper", "treecode"):
            ratio = seconds[method] / seconds[f"{method}, not causal"]
            figures[f"n = {n:,}, {method}: causal over not causal"] = Figure(ratio, "×")
        figures[f"n = {n:,}, sortlsh"] = Figure(1e3 * seconds["sortlsh"], "ms")
    return figures


def causal_sdpa(q: Any, k: Any, v: Any) -> Any:
    """Causal attention by torch's fused kernel, on NumPy arrays without a copy."""
    import torch

    library = backend_named("torch")
    query, key, value = (library.from_numpy(x) for x in (q, k, v))
    with torch.no_grad():
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def causal_error() -> Figures:
    """Spectral error of causal attention over that of all keys seen, 384 keys, means over heads (and 6 seeds of sortlsh)."""
    from bench import vit

    cases: dict[str, tuple[Any, Any, Any, float | None]] = {
        f"layer {layer}": (*arrays, None) for layer, arrays in vit.qkv(896).items()
    }
    words = glove_case(8192)
    for factor in (1.0, 10**-0.5, 0.1):
        cases[f"words, logit scale {factor:.2f}"] = (words.q[None], words.k[None], words.v[None], factor)
    figures = {}
    for method, seeds in (("treecode", 1), ("sortlsh", SEEDS)):
        ratios = []
        for name, (q, k, v, scale) in cases.items():
            found = [mean_error(q, k, v, scale, method, seeds, causal) for causal in (False, True)]
            ratios.append(found[1] / found[0])
            figures[f"{method}, {name}"] = Figure(found[1], "")
            figures[f"{method}, {name}: over not causal"] = Figure(ratios[-1], "×", at_most=1.5)
        figures[f"{method}: mean over data"] = Figure(float(np.mean(ratios)), "×", at_most=1.5)
    return figures


def mean_error(q: Any, k: Any, v: Any, scale: float | None, method: str, seeds: int, causal: bool) -> float:
    """Return the spectral error at 384 keys, the mean over heads and seeds."""
    call = partial(kdecore.attention, scale=scale, causal=causal, diagonal=0)
    exact = call(*(x.astype(np.float64) for x in (q, k, v)), method="exact")
    outs = (call(q, k, v, method=method, budget=384, seed=seed) for seed in range(seeds))
    return float(np.mean([errors(host, out, exact).spectral for out in outs]))


def padding() -> Figures:
    """8 samples padded to 16,384 keys: time over that of them one by one without padding, d = 64, budget 512, float32."""
    lengths = [16384, 12000, 9000, 6000, 4000, 3000, 2000, 1000]
    q, k, v = np.random.default_rng(0).standard_normal((3, len(lengths), 4, 16384, 64), dtype=np.float32)
    figures = {}
    for method in ("sortlsh", "treecode"):
        call = partial(kdecore.attention, method=method)
        calls = {"padded": partial(call, q, k, v, key_lengths=lengths), "alone": partial(one_by_one, call, q, k, v, lengths)}
        seconds = interleaved(calls, repeats=1)
        figures[method] = Figure(seconds["padded"] / seconds["alone"], "×", at_most=1.1)
    return figures


def one_by_one(call: Callable[..., Any], q: Any, k: Any, v: Any, lengths: list[int]) -> Any:
    """Call once for each sample, without its padding, and put the results together."""
    return np.stack([call(q[i], k[i, :, :length], v[i, :, :length]) for i, length in enumerate(lengths)])


def grouped_heads() -> Figures:
    """8 query heads on 2 key heads, n = 16,384, d = 64, budget 512: time over that with the keys repeated, float32."""
    q = np.random.default_rng(0).standard_normal((8, 16384, 64), dtype=np.float32)
    k, v = np.random.default_rng(1).standard_normal((2, 2, 16384, 64), dtype=np.float32)
    many = [np.repeat(x, 4, axis=0) for x in (k, v)]
    figures = {}
    for method in ("sortlsh", "treecode"):
        for causal in (False, True):
            call = partial(kdecore.attention, method=method, causal=causal)
            seconds = interleaved({"grouped": partial(call, q, k, v), "repeated": partial(call, q, *many)}, repeats=1)
            figures[f"{method}{', causal' * causal}"] = Figure(seconds["grouped"] / seconds["repeated"], "×")
    return figures
