"""Error against budget on GloVe words and on three layers of a vision transformer.

`python -m bench.budgets [--out FOLDER]`. Both variants of kdeformer get exact densities, so that what differs is the
sampling and the division, not the density estimate; those densities take all pairs, which the budget does not count.
"""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import kdecore
from bench.study import run_study
from kdecore.accuracy.metrics import errors
from kdecore.arrays.namespace import host
from kdecore.compare.cases import Case, glove_case
from kdecore.core.options import Options
from kdecore.methods.kdeformer import KDEformer

BUDGETS = (128, 256, 384, 768, 1536)
SEEDS = range(5)
IMAGE_SIZE, LAYERS = 896, (0, 3, 9)
METHODS: dict[str, str | Options] = {
    "kdeformer, kde": KDEformer(normaliser="kde", primitive="exact"),
    "kdeformer, sampled": KDEformer(normaliser="sampled", primitive="exact"),
    "sortlsh": "sortlsh",
    "hyper": "hyper",
}
NORMS = ("spectral", "frobenius", "worst_row")
# Where two methods' curves coincide, the larger markers of the one show around the smaller ones of the other.
MARKER_SIZES = (8, 8, 11, 5.5)


def load_cases() -> Iterator[Case]:
    """Yield GloVe words (one head, n = 8192) and each layer (six heads, n = 4097), float32."""
    from bench import vit

    found = vit.qkv(IMAGE_SIZE, LAYERS)  # first, so that a missing package shows before the measurement
    yield glove_case(8192)
    for layer, (q, k, v) in found.items():
        yield Case(f"ViT-S/14 at {IMAGE_SIZE} px, layer {layer}", q, k, v, None, 0)


def measure_case(case: Case) -> dict[str, Any]:
    """Return, for each method and budget, every seed's errors (means over heads), and the slopes."""
    exact = kdecore.attention(*(x.astype("float64") for x in (case.q, case.k, case.v)), method="exact", scale=case.scale)
    result: dict[str, Any] = {"shape": list(case.q.shape), "scale": case.scale, "methods": {}}
    for name, method in METHODS.items():
        rows = []
        for budget in BUDGETS:
            call = partial(kdecore.attention, case.q, case.k, case.v, method=method, budget=budget, scale=case.scale)
            outs = (call(diagonal=case.diagonal, seed=seed) for seed in SEEDS)
            found = [asdict(errors(host, out, exact)) for out in outs]
            rows.append({"budget": budget} | {norm: [x[norm] for x in found] for norm in NORMS})
            print(
                f"{case.name:<28} {name:<18} {budget:>5}", *(f"{np.mean(rows[-1][norm]):.4f}" for norm in NORMS), flush=True
            )
        result["methods"][name] = {"budgets": rows, "slopes": {norm: slope(rows, norm) for norm in NORMS}}
    return result


def measure() -> dict[str, Any]:
    """Return what `measure_case` finds for each case."""
    return {case.name: measure_case(case) for case in load_cases()}


def slope(rows: list[dict[str, Any]], norm: str) -> float:
    """Return the slope of log mean error on log budget, by least squares."""
    means = [np.mean(row[norm]) for row in rows]
    return float(np.polyfit(np.log([row["budget"] for row in rows]), np.log(means), 1)[0])


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw one panel for each data set: a colour and a marker for each method, filled and solid for the spectral norm."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    from kdecore.compare.picture import COLOURS, MARKERS

    methods: dict[str, dict[str, Any]] = {
        method: {"color": colour, "marker": marker, "markersize": size, "linewidth": 1.8}
        for method, colour, marker, size in zip(METHODS, COLOURS, MARKERS, MARKER_SIZES, strict=False)
    }
    norms: dict[str, dict[str, Any]] = {
        "spectral": {"linestyle": "-"},
        "frobenius": {"linestyle": (0, (4, 2)), "markerfacecolor": "white"},
    }
    figure, panels = plt.subplots(2, 2, figsize=(12, 10.5), layout="constrained")
    for panel, (name, found) in zip(panels.flat, results.items(), strict=True):
        for method, look in methods.items():
            rows = found["methods"][method]["budgets"]
            for norm, line in norms.items():
                means = [np.mean(row[norm]) for row in rows]
                panel.plot([row["budget"] for row in rows], means, **look, **line)
        heads = found["shape"][0] if len(found["shape"]) == 3 else 1
        panel.set(xscale="log", yscale="log", title=f"{name}\nn = {found['shape'][-2]:,}, {heads} head{'s' * (heads > 1)}")
        panel.xaxis.set_major_locator(FixedLocator(BUDGETS))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.grid(alpha=0.3)
    figure.supxlabel("budget: keys evaluated per query")
    figure.supylabel(f"relative error, mean over heads and {len(SEEDS)} seeds")
    handles = [Line2D([], [], label=method, **look) for method, look in methods.items()]
    for norm, line in norms.items():
        handles.append(Line2D([], [], color="black", marker="o", markersize=8, label=f"{norm.capitalize()} norm", **line))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, handlelength=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    run_study("budgets", __doc__, measure, plot)
