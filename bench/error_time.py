"""Error against wall time of every method on six layers of a vision transformer and on GloVe words at three logit scales.

`python -m bench.error_time [--out FOLDER]`. Times are medians of calls that take turns, errors medians over seeds, float32;
kdeformer is left out: it takes longer than exact attention.
"""

import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import kdecore
from bench.study import run_study
from bench.timing import interleaved
from kdecore.accuracy.metrics import errors
from kdecore.arrays.namespace import host
from kdecore.compare.cases import Case, glove_case

BUDGETS = {
    "treecode": (64, 128, 192, 256, 384, 512, 768),
    "sortlsh": (128, 256, 384, 768, 1536, 2304),
    "hyper": (128, 256, 384, 768, 1536, 2304),
}
SEEDS = range(5)
REFERENCE_BUDGET = 384
"""Budget of treecode at whose time the others' errors are compared."""


def load_cases() -> Iterator[Case]:
    """Yield layers (six heads, n = 4097) and words (one head, n = 8192)."""
    from bench import vit

    for layer, (q, k, v) in vit.qkv(896).items():
        yield Case(f"vision transformer, layer {layer}", q, k, v, None, 0)
    words = glove_case(8192)
    for scale in (1.0, 10**-0.5, 0.1):
        yield Case(f"GloVe words, logit scale {scale:.2f}", words.q, words.k, words.v, scale, 0)


def measure_case(case: Case) -> dict[str, Any]:
    """Return exact's milliseconds, each method's by budget with its errors, and how many times more the others err."""
    arrays = case.q, case.k, case.v
    exact = kdecore.attention(*(x.astype("float64") for x in arrays), method="exact", scale=case.scale)
    calls = {("exact", 0): partial(kdecore.attention, *arrays, method="exact", scale=case.scale)}
    for method, budgets in BUDGETS.items():
        for budget in budgets:
            options: dict[str, Any] = {"method": method, "budget": budget}
            options |= {"scale": case.scale, "diagonal": case.diagonal}
            calls[method, budget] = partial(kdecore.attention, *arrays, **options)
    seconds = interleaved({f"{method} {budget}": call for (method, budget), call in calls.items()}, repeats=1)
    result: dict[str, Any] = {"shape": list(case.q.shape), "exact_ms": 1e3 * seconds["exact 0"], "methods": {}}
    for (method, budget), call in calls.items():
        if method == "exact":
            continue
        seeds = SEEDS if method != "treecode" else (0,)
        error = statistics.median(errors(host, call(seed=seed), exact).spectral for seed in seeds)
        row = {"budget": budget, "ms": 1e3 * seconds[f"{method} {budget}"], "spectral": error}
        result["methods"].setdefault(method, []).append(row)
    tree = next(row for row in result["methods"]["treecode"] if row["budget"] == REFERENCE_BUDGET)
    result["treecode_over"] = {
        other: tree["spectral"] / at_time(result["methods"][other], tree["ms"]) for other in ("sortlsh", "hyper")
    }
    ratios = ", ".join(f"{ratio:.2f} of {other}'s" for other, ratio in result["treecode_over"].items())
    print(f"{case.name:<36} treecode errs {tree['spectral']:.4f} in {tree['ms']:.0f} ms: {ratios} in that time", flush=True)
    return result


def at_time(rows: list[dict[str, Any]], milliseconds: float) -> float:
    """Return the error in a given time, interpolated between logarithms; that of the last row beyond it."""
    rows = sorted(rows, key=lambda row: row["ms"])
    logs = np.interp(np.log(milliseconds), np.log([row["ms"] for row in rows]), np.log([row["spectral"] for row in rows]))
    return float(np.exp(logs))


def measure() -> dict[str, Any]:
    """Return what `measure_case` finds for each case."""
    return {case.name: measure_case(case) for case in load_cases()}


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw one panel for each data set."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from kdecore.compare.picture import COLOURS, MARKERS

    figure, panels = plt.subplots(3, 3, figsize=(13, 12), layout="constrained")
    for panel, (name, found) in zip(panels.flat, results.items(), strict=True):
        for method, colour, marker in zip(BUDGETS, COLOURS, MARKERS, strict=False):
            rows = found["methods"][method]
            times, spectral = [row["ms"] for row in rows], [row["spectral"] for row in rows]
            panel.plot(times, spectral, color=colour, marker=marker, label=method)
        panel.axvline(found["exact_ms"], color="black", linestyle=":", label="exact")
        heads = found["shape"][0] if len(found["shape"]) == 3 else 1
        panel.set(xscale="log", yscale="log", title=f"{name}\nn = {found['shape'][-2]:,}, {heads} head{'s' * (heads > 1)}")
        for axis, subdivisions in ((panel.xaxis, (1, 2, 3, 5)), (panel.yaxis, (1, 2, 5))):
            axis.set_major_locator(LogLocator(subs=subdivisions))
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axis.set_minor_locator(NullLocator())
        panel.grid(alpha=0.3)
    figure.supxlabel("wall time of a call, ms")
    figure.supylabel("relative spectral error")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    run_study("error_time", __doc__, measure, plot)
