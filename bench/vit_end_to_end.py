"""A vision transformer, every attention replaced by `with reroute(rtol=…)`: `python -m bench.vit_end_to_end`.

Features and saliency map against exact attention, and each layer's attention time against torch's, at 896 and 1540 pixels.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import kdecore
from bench import vit
from bench.study import run_study
from bench.timing import interleaved
from kdecore_adapters.torch_modules import reroute

TOLERANCES = (0.05, 0.1)
SIZES = (896, 1540)


def measure() -> dict[str, Any]:
    """Run both sizes with both tolerances: "pixels px, rtol tolerance" → figures."""
    return {f"{size} px, rtol {rtol}": measure_one(size, rtol) for size in SIZES for rtol in TOLERANCES}


def measure_one(size: int, rtol: float) -> dict[str, Any]:
    """Compare the whole network with each of its attentions replaced, and time attention layer by layer."""
    model, pixels = vit.load(), vit.photograph(size)
    layers: list[dict[str, Any]] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        call = partial(kdecore.attention, q, k, v, rtol=rtol, diagonal=0)
        out: Tensor
        out, report = call(return_report=True)
        calls = {"rtol": call, "SDPA": partial(vit.exact_attention, layer, q, k, v)}
        seconds = interleaved(calls, repeats=2, rounds=2)
        exact = vit.exact_attention(layer, q, k, v)
        error = torch.linalg.matrix_norm(out - exact) / torch.linalg.matrix_norm(exact)
        one = {
            "layer": layer,
            "method": report.method,
            "keys_per_query": report.keys_per_query,
            "rounds": len(report.rounds),
        }
        layers.append(one | {"error": float(error.mean()), "seconds": seconds, "speedup": seconds["SDPA"] / seconds["rtol"]})
        print(f"{size} px, rtol {rtol}, {layers[-1]}", flush=True)
        return out

    exact, _ = model(pixels)
    with reroute(rtol=rtol) as rerouted:
        found, _ = model(pixels)
    print(rerouted, flush=True)
    model(pixels, attend=attend)
    maps = [model.saliency(features, (size, size)).numpy().ravel() for features in (exact, found)]
    total = {name: sum(one["seconds"][name] for one in layers) for name in ("rtol", "SDPA")}
    figures = {
        "tokens": int(exact.shape[1]),
        "feature_error": float(torch.linalg.norm(found - exact) / torch.linalg.norm(exact)),
        "saliency_correlation": float(np.corrcoef(maps)[0, 1]),
        "attention_speedup": total["SDPA"] / total["rtol"],
        "mean_speedup": float(np.mean([one["speedup"] for one in layers])),
        "layers": layers,
    }
    print({name: value for name, value in figures.items() if name != "layers"}, flush=True)
    return figures


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw each layer's speed-up, one panel a size and tolerance."""
    figure = Figure(figsize=(10, 8.0), dpi=130, layout="constrained")
    panels = figure.subplots(len(SIZES), len(TOLERANCES), sharey="row").ravel()
    for axes, (name, found) in zip(panels, results.items(), strict=True):
        layers = found["layers"]
        colours = ["#999999" if one["method"] == "exact" else "#0072B2" for one in layers]
        bars = axes.bar([one["layer"] for one in layers], [one["speedup"] for one in layers], color=colours)
        axes.bar_label(bars, labels=[f"{one['keys_per_query']:.0f}" for one in layers], fontsize=8)
        axes.axhline(1.0, color="#222222", lw=1.0)
        axes.set_title(f"{name}, {found['tokens']:,} tokens; feature error {found['feature_error']:.1%}", fontsize=11)
        axes.set_xlabel("layer (numbers: keys per query; grey: exact)")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[:: len(TOLERANCES)]:
        axes.set_ylabel("speed-up of attention over torch SDPA")
    figure.savefig(path)


if __name__ == "__main__":
    run_study("vit_end_to_end", __doc__, measure, plot)
