"""What is measured: one function a measure, each returning figures with the bar they are to reach."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

import kdecore
from bench import glove_full
from bench.baselines import kdeformer_released
from bench.causal import causal_error, causal_speed, grouped_heads, padding
from bench.contention import contention
from bench.diffusion import diffusion
from bench.distributed import ring_error, sharded_speed
from bench.estimators import estimator_certificates, estimators
from bench.figures import Figure, Figures
from bench.models import adapter_overhead, minilm, training_speed
from bench.timing import interleaved
from kdecore.accuracy.metrics import Errors, errors
from kdecore.arrays import files
from kdecore.arrays.backend import backend_named
from kdecore.arrays.namespace import host
from kdecore.compare.cases import GLOVE, glove_case
from kdecore.compare.machine import peak_memory
from kdecore.core.problem import Problem, canonicalise
from kdecore.kernels.attend_blocks import cpu as attending
from kdecore.kernels.runtime.threads import team
from kdecore.methods import METHODS
from kdecore.methods.base import Plan
from kdecore.methods.plan import make_plan
from kdecore.methods.treecode import Treecode

GIB = 2**30


def sdpa(q: Any, k: Any, v: Any, scale: float) -> Any:
    """Exact attention by torch's fused kernel, on NumPy arrays without a copy."""
    return backend_named("torch").exact_attention(q, k, v, scale)


def released(q: Any, v: Any, scale: float, seed: int) -> Any:
    """Self-attention by KDEformer's released code, 128 keys in a block and 256 samples, on NumPy arrays without a copy."""
    queries, values = (torch.from_numpy(array)[None] for array in (q, v))
    return kdeformer_released.attend(queries, queries, values, scale, 384, seed)[0].numpy()


LAYER_BARS = {0: 0.0040, 1: 0.0105, 3: 0.027, 6: 0.0150, 9: 0.0115, 11: 0.0040}
"""Spectral errors on layers of a vision transformer."""


def treecode_error() -> Figures:
    """Errors of `treecode`: six heads of a vision transformer at 896 px (n = 4,097), and GloVe words (n = 8,192)."""
    from bench import vit

    figures, of_layers = {}, []
    for layer, (q, k, v) in vit.qkv(896).items():
        once, twice, sampled = treecode_errors(q, k, v, None, (384, 768, 384))
        of_layers.append([x.spectral for x in (once, twice, sampled)])
        figures[f"layer {layer}, 384 keys"] = Figure(once.spectral, "", at_most=LAYER_BARS[layer])
        figures[f"layer {layer}, 384 keys, Frobenius"] = Figure(once.frobenius, "")
    mean, twice_mean, sampled_mean = np.mean(of_layers, axis=0)
    figures["mean over layers"] = Figure(mean, "")
    figures["mean over layers, 768 keys over 384"] = Figure(twice_mean / mean, "×", at_most=0.6)
    figures["mean over layers, sampled far field"] = Figure(sampled_mean, "")
    case = glove_case(8192)
    for scale, bar, frobenius_bar in ((1.0, None, 0.044), (10**-0.5, None, 0.024), (0.1, 0.0011, None)):
        label = f"words, logit scale {scale:.2f}"
        once, twice, sampled = treecode_errors(case.q[None], case.q[None], case.v[None], scale, (384, 768, 384))
        figures[f"{label}, 384 keys"] = Figure(once.spectral, "", at_most=bar)
        figures[f"{label}, 384 keys, Frobenius"] = Figure(once.frobenius, "", at_most=frobenius_bar)
        figures[f"{label}, 768 keys over 384"] = Figure(twice.spectral / once.spectral, "×")
        figures[f"{label}, sampled far field"] = Figure(sampled.spectral, "")
    return figures


def treecode_errors(q: Any, k: Any, v: Any, scale: float | None, budgets: tuple[int, int, int]) -> list[Errors]:
    """Return the errors for two budgets and for the last with a sampled far field."""
    exact = kdecore.attention(*(x.astype(np.float64) for x in (q, k, v)), method="exact", scale=scale)
    methods = (Treecode(), Treecode(), Treecode(far_field="sample"))
    outs = (
        kdecore.attention(q, k, v, method=method, budget=budget, scale=scale, diagonal=0)
        for method, budget in zip(methods, budgets, strict=True)
    )
    return [errors(host, out, exact) for out in outs]


def treecode_speed() -> Figures:
    """`treecode`, float32, d = 64: speed-up over torch SDPA on a vision transformer at two sizes, and at n = 32,768."""
    from bench import vit

    figures: Figures = {}
    cases = (
        ("ViT at 896 px, 6 heads", vit.qkv(896, (3,))[3], ((256, 3.5), (512, 2.5))),
        ("ViT at 1,540 px, 6 heads", vit.qkv(1540, (3,))[3], ((512, 8.0),)),
        ("n = 32,768, 4 heads", random_inputs(4, 32768), ((256, 38.0), (512, 25.0))),
    )
    for name, (q, k, v), bars in cases:
        calls: dict[str, Callable[[], Any]] = {"SDPA": partial(sdpa, q, k, v, 0.125)}
        for budget, _ in bars:
            calls[f"budget {budget}"] = partial(kdecore.attention, q, k, v, method="treecode", budget=budget, diagonal=0)
        problem = canonicalise(q, k, v)
        plan = make_plan(problem, method="treecode", budget=512)
        calls["trees and pilot"] = partial(prepared, problem, plan)
        seconds = interleaved(calls, repeats=2)
        figures |= {f"{name}: {label}, time": Figure(spent * 1e3, "ms") for label, spent in seconds.items()}
        for budget, bar in bars:
            speedup = seconds["SDPA"] / seconds[f"budget {budget}"]
            figures[f"{name}: budget {budget}, speed-up"] = Figure(speedup, "×", at_least=bar)
    return figures


def prepared(problem: Problem, plan: Plan) -> object:
    """Do what the treecode does before attention."""
    with team():
        return METHODS["treecode"].select(problem, plan)


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
    if kdeformer_released.VARIABLE in os.environ:
        calls["KDEformer as released"] = lambda: released(q, v, scale, 0)
    seconds = interleaved(calls, repeats=2)
    figures = {f"{name}, time": Figure(value * 1e3, "ms") for name, value in seconds.items()}
    for name in calls:
        if name != "torch SDPA":
            bar = 8.3 if name == "sortlsh" else None
            figures[f"{name}, speed-up over torch SDPA"] = Figure(seconds["torch SDPA"] / seconds[name], "×", at_least=bar)
    return figures


def speed_heads() -> Figures:
    """At n = 4,096, 16,384 and 32,768, 4 heads, d = 64, float32, budget 512: speed-up over torch SDPA."""
    figures = {}
    for n, rounds, bar in ((4096, 5, 6.0), (16384, 3, 20.0), (32768, 3, 40.0)):
        q, k, v = random_inputs(4, n)
        calls: dict[str, Callable[[], Any]] = {
            "SDPA": partial(sdpa, q, k, v, 0.125),
            "sortlsh": partial(kdecore.attention, q, k, v, method="sortlsh", budget=512),
        }
        seconds = interleaved(calls, repeats=2, rounds=rounds)
        figures[f"n = {n:,}: torch SDPA"] = Figure(seconds["SDPA"] * 1e3, "ms")
        figures[f"n = {n:,}: sortlsh"] = Figure(seconds["sortlsh"] * 1e3, "ms")
        figures[f"n = {n:,}: speed-up"] = Figure(seconds["SDPA"] / seconds["sortlsh"], "×", at_least=bar)
    problem = canonicalise(q, k, v)
    plan = make_plan(problem, method="sortlsh", budget=512)

    def select() -> None:
        with team():
            METHODS["sortlsh"].select(problem, plan)

    seconds = interleaved({"grouping": select, "sortlsh": calls["sortlsh"]}, repeats=5)
    share = 100 * seconds["grouping"] / seconds["sortlsh"]
    figures[f"n = {n:,}: hashing, ordering and sampling"] = Figure(share, "%", at_most=25.0)
    return figures


def block_rate() -> Figures:
    """`attend_blocks` on 768 blocks of 170 queries and 512 keys, d = 64, float32, over torch SDPA on them gathered."""
    heads, n, blocks, slots, d = 4, 32768, 192, 512, 64
    rows = n // blocks
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, heads * n, d), dtype=np.float32)
    order = np.concatenate([head * n + rng.permutation(n)[: blocks * rows] for head in range(heads)])
    query_index = order.reshape(heads * blocks, rows)
    key_index = np.concatenate([head * n + rng.integers(0, n, (blocks, slots)) for head in range(heads)])
    log_weight = np.zeros(key_index.shape, np.float32)
    gathered = q[query_index], k[key_index], v[key_index]
    square = rng.standard_normal((2, 2048, 2048), dtype=np.float32)

    def attend() -> None:
        with team():
            attending.attend_blocks(host, q, k, v, query_index, key_index, log_weight, 0.125)

    seconds = interleaved(
        {"attend_blocks": attend, "SDPA": partial(sdpa, *gathered, 0.125), "GEMM": lambda: square[0] @ square[1]}, repeats=5
    )
    work = 4.0 * query_index.size * slots * d
    rates = {name: (2.0 * 2048**3 if name == "GEMM" else work) / spent / 1e9 for name, spent in seconds.items()}
    figures = {f"{name}, rate": Figure(rate, "GFLOP/s") for name, rate in rates.items()}
    for name, bar in (("SDPA", 100.0), ("GEMM", 50.0)):
        figures[f"attend_blocks over {name}"] = Figure(100 * rates["attend_blocks"] / rates[name], "%", at_least=bar)
    return figures


def many_words(n: int) -> list[np.ndarray[Any, Any]]:
    """Return q, k and v, each (n, 64) float32: words with a little noise, real directions and norms in any number."""
    rng = np.random.default_rng(0)
    (words,) = files.load(GLOVE, ("vectors",))
    base = words[:, :64].astype(np.float32)
    return [base[rng.integers(0, len(base), n)] + 0.1 * rng.standard_normal((n, 64), dtype=np.float32) for _ in range(3)]


def growth() -> Figures:
    """From n = 16,384 to 1,048,576, d = 64, one head, budget 512, float32: time a token, and memory above the inputs."""
    small, large, largest = (many_words(n) for n in (16384, 131072, 1048576))
    call = partial(kdecore.attention, method="sortlsh", budget=512, scale=0.1)
    seconds = interleaved({"16,384": lambda: call(*small), "131,072": lambda: call(*large)}, repeats=3)
    seconds |= interleaved({"1,048,576": lambda: call(*largest)}, repeats=2)
    peaks = {"131,072": peak_memory(lambda: call(*large)), "1,048,576": peak_memory(lambda: call(*largest))}
    figures = {f"time at {n}": Figure(spent * 1e3, "ms") for n, spent in seconds.items()}
    figures["time at 131,072 over that at 16,384"] = Figure(seconds["131,072"] / seconds["16,384"], "×", at_most=9.0)
    figures["time a token at 1,048,576 over that at 131,072"] = Figure(
        seconds["1,048,576"] / seconds["131,072"] / 8, "×", at_most=1.3
    )
    for (n, peak), bar in zip(peaks.items(), (1.0, 6.0), strict=True):
        if peak is not None:
            figures[f"peak memory above the inputs at {n}"] = Figure(peak / GIB, "GiB", at_most=bar)
    return figures


def treecode_growth() -> Figures:
    """`treecode` from n = 16,384 to 1,048,576, d = 64, one head, budget 512, float32: time, and memory above the inputs."""
    figures, a_token = {}, {}
    for n, bar in ((16384, None), (65536, None), (262144, None), (1048576, 3.5)):
        inputs = many_words(n)
        call = partial(kdecore.attention, *inputs, method="treecode", budget=512, scale=0.1)
        seconds = interleaved({"treecode": call}, repeats=1)["treecode"]
        a_token[n] = seconds / n
        figures[f"time at {n:,}"] = Figure(seconds, "s", at_most=bar)
    figures["time a token at 1,048,576 over that at 16,384"] = Figure(a_token[1048576] / a_token[16384], "×")
    if (peak := peak_memory(call)) is not None:
        figures["peak memory above the inputs at 1,048,576"] = Figure(peak / GIB, "GiB")
    return figures


def all_words() -> Figures:
    """All 341,479 words of GloVe 6B attending to each other, d = 100, float32, from 512 exact rows."""
    words = glove_full.load()
    rows = np.sort(np.random.default_rng(0).choice(len(words), 512, replace=False))
    figures = {}
    for scale in (0.1, 10**-0.5):
        exact = kdecore.attention(*(x.astype(np.float64) for x in (words[rows], words, words)), method="exact", scale=scale)
        for budget in (256, 512):
            call = partial(kdecore.attention, words, words, words, method="treecode", budget=budget, scale=scale, diagonal=0)
            found = errors(host, call()[rows], exact)
            label = f"logit scale {scale:.2f}, budget {budget}"
            figures[f"{label}: spectral error"] = Figure(found.spectral, "")
            figures[f"{label}: Frobenius error"] = Figure(found.frobenius, "", at_most=0.08 if budget == 512 else None)
            seconds = interleaved({"treecode": call}, repeats=1)["treecode"]
            figures[f"{label}: time"] = Figure(seconds, "s", at_most=10.0)
    return figures


def key_index() -> Figures:
    """`KeyIndex` at budget 512, d = 64, float32: a step of decoding over 131,072 keys, and 100 batches of 64 queries."""
    figures = {}
    for heads in (1, 8):
        rng = np.random.default_rng(0)
        k, v = rng.standard_normal((2, heads, 131072, 64), dtype=np.float32)
        steps = rng.standard_normal((64, heads, 1, 64), dtype=np.float32)
        index = kdecore.KeyIndex(k, v, budget=512)
        seconds = interleaved(
            {
                "SDPA": lambda: [sdpa(q, k, v, 0.125) for q in steps],  # noqa: B023
                "KeyIndex": lambda: [index.attend(q) for q in steps],  # noqa: B023
            },
            repeats=2,
        )
        label = f"{heads} head{'s' * (heads > 1)}"
        for name, spent in seconds.items():
            figures[f"{label}, a step: {name}"] = Figure(spent / len(steps) * 1e3, "ms")
        figures[f"{label}, a step: speed-up"] = Figure(seconds["SDPA"] / seconds["KeyIndex"], "×", at_least=20.0)
    k, v = rng.standard_normal((2, 4, 32768, 64), dtype=np.float32)
    batches = rng.standard_normal((100, 4, 64, 64), dtype=np.float32)

    def build_and_ask() -> None:
        built = kdecore.KeyIndex(k, v, budget=512)
        for q in batches:
            built.attend(q)

    seconds = interleaved(
        {
            "build once, ask 100 times": build_and_ask,
            "100 calls of treecode": lambda: [kdecore.attention(q, k, v, method="treecode", budget=512) for q in batches],
            "100 calls of SDPA": lambda: [sdpa(q, k, v, 0.125) for q in batches],
        },
        repeats=1,
        rounds=1,
    )
    figures |= {f"100 batches of 64 queries, 32,768 keys, 4 heads: {name}": Figure(s, "s") for name, s in seconds.items()}
    return figures


def tolerance_worst() -> Figures:
    """`rtol` where no estimate is good enough, i.i.d. q, k and v, d = 64, float32: time over that of exact attention."""
    figures, worst = {}, 0.0
    for heads in (1, 8):
        for n in (512, 1024, 2048, 4096, 8192, 16384):
            if heads * n > 2**16:
                continue
            q, k, v = random_inputs(heads, n)
            calls: dict[str, Callable[[], Any]] = {"exact": partial(kdecore.attention, q, k, v, method="exact")}
            calls |= {f"rtol {rtol}": partial(kdecore.attention, q, k, v, rtol=rtol) for rtol in (0.02, 0.1, 0.3)}
            seconds = interleaved(calls, repeats=2, rounds=20 if n <= 1024 else 5)
            for name in list(calls)[1:]:
                ratio = seconds[name] / seconds["exact"]
                worst = max(worst, ratio)
                figures[f"{heads} head{'s' * (heads > 1)}, n = {n:,}, {name}"] = Figure(ratio, "×")
    return {"worst": Figure(worst, "×", at_most=1.3)} | figures


def crossover() -> Figures:
    """Where "auto" leaves exact: times over one another, d = 64, float32, budget 512, one head and 8, n of 64 to 16,384."""
    figures, worst = {}, 0.0
    for heads in (1, 8):
        for n in (64, 128, 256, 512, 768, 1024, 1280, 2048, 3072, 4096, 6144, 8192, 16384):
            q, k, v = random_inputs(heads, n)
            calls = {
                "exact": partial(kdecore.attention, q, k, v, method="exact"),
                "auto": partial(kdecore.attention, q, k, v),
            }
            if n > 512:
                calls["treecode"] = partial(kdecore.attention, q, k, v, method="treecode")
            seconds = interleaved(calls, repeats=2, rounds=50 if n <= 1024 else 5)
            worst = max(worst, seconds["auto"] / seconds["exact"])
            label = f"{heads} head{'s' * (heads > 1)}, n = {n:,}"
            figures[f"{label}: auto over exact"] = Figure(seconds["auto"] / seconds["exact"], "×")
            if n > 512:
                figures[f"{label}: treecode over exact"] = Figure(seconds["treecode"] / seconds["exact"], "×")
    return {"worst, auto over exact": Figure(worst, "×", at_most=1.1)} | figures


def random_inputs(heads: int, n: int) -> Any:
    """Return q, k and v of standard normal numbers, each (heads, n, 64) float32."""
    return np.random.default_rng(0).standard_normal((3, heads, n, 64), dtype=np.float32)


MEASURES: dict[str, Callable[[], Figures]] = {
    function.__name__: function
    for function in (
        treecode_error,
        treecode_speed,
        treecode_growth,
        all_words,
        speed_16k,
        speed_heads,
        block_rate,
        growth,
        key_index,
        estimators,
        estimator_certificates,
        tolerance_worst,
        crossover,
        causal_speed,
        causal_error,
        padding,
        grouped_heads,
        training_speed,
        adapter_overhead,
        minilm,
        diffusion,
        contention,
        sharded_speed,
        ring_error,
    )
}
"""Measure name → function."""
