"""Wall time of each primitive over exact's, float32.

`python -m bench.kde_time [--out FOLDER]`. As many queries as points, ε = 0.3, but for held-out cases. Primitives take
turns within each repetition; medians of five.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.kde_cases import Case, clustered, evaluate, gaussian, glove
from bench.study import run_study

EPS = 0.3
REPEATS = 5
SIZES = [2**power for power in range(10, 15)]
HELD_OUT_EPS = (0.2, 0.5)
CASES: dict[str, Callable[[int, int], Case]] = {
    "clustered, d = 16": clustered,
    "Gaussian, d = 4": partial(gaussian, d=4),
    "GloVe words, exponential kernel": glove,
}
WITHOUT_HASHING = ("exact", "uniform", "neighbours", "auto")
PRIMITIVES = (*WITHOUT_HASHING, "hbe")
HASHING_LIMIT = 2**11
"""Largest n at which hashing is timed: it takes an order of magnitude longer than exact."""


HELD_OUT: dict[str, Case] = {
    "clustered, 16 a cluster, d = 32": clustered(8192, 8192, size=16, d=32, spread=0.2, seed=301),
    "clustered, d = 8, m = n/8": clustered(16384, 2048, d=8, seed=302),
    "Gaussian, d = 8": gaussian(8192, 8192, d=8, seed=303),
    "Gaussian, d = 2, m = n/16": gaussian(32768, 2048, d=2, seed=304),
    "GloVe, bandwidth 1.6": glove(8192, 8192, bandwidth=1.6, seed=305),
    "GloVe, bandwidth 2.2": glove(8192, 8192, bandwidth=2.2, seed=306),
    "GloVe, exponential, m = n/4": glove(16384, 4096, seed=307),
}
"""Cases on which no constant of `kdecore.kde.auto` was chosen, each at two ε."""


def timed(name: str, case: Case, eps: float, primitives: Sequence[str]) -> dict[str, Any]:
    """Return median seconds, evaluations and reason for each primitive."""
    seconds: dict[str, list[float]] = {}
    reports: dict[str, Any] = {}
    for _ in range(REPEATS):
        for primitive in primitives:
            start = time.perf_counter()
            _, reports[primitive] = evaluate(case, primitive, eps)
            seconds.setdefault(primitive, []).append(time.perf_counter() - start)
    found = {
        primitive: {
            "seconds": statistics.median(spent),
            "evaluations": reports[primitive].evaluations_per_query,
            "primitive": reports[primitive].primitive,
            "reason": reports[primitive].reason,
        }
        for primitive, spent in seconds.items()
    }
    exact = found["exact"]["seconds"]
    ratios = "  ".join(f"{primitive} {row['seconds'] / exact:.2f}" for primitive, row in found.items())
    best = min(row["seconds"] for primitive, row in found.items() if primitive != "auto")
    line = f"auto/best {found['auto']['seconds'] / best:.2f} ({found['auto']['primitive']})"
    print(f"{name:<32} {len(case.x):>6}  exact {exact:.3f} s  {ratios}  {line}", flush=True)
    return found


def measure() -> dict[str, Any]:
    """Return times by data set and n; those of a held-out case by ε instead."""
    return {
        "by_n": {
            name: {n: timed(name, make(n, n), EPS, PRIMITIVES if n <= HASHING_LIMIT else WITHOUT_HASHING) for n in SIZES}
            for name, make in CASES.items()
        },
        "held_out": {
            name: {eps: timed(f"{name}, ε = {eps}", case, eps, WITHOUT_HASHING) for eps in HELD_OUT_EPS}
            for name, case in HELD_OUT.items()
        },
    }


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw time over exact's, one panel for each data set."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    results = results["by_n"]
    figure, panels = plt.subplots(1, len(results), figsize=(5.2 * len(results), 4.4), sharey=True, layout="constrained")
    for panel, (name, found) in zip(panels, results.items(), strict=True):
        for primitive, marker in zip(PRIMITIVES, "xos*D", strict=True):
            sizes = [n for n in found if primitive in found[n]]
            ratio = [found[n][primitive]["seconds"] / found[n]["exact"]["seconds"] for n in sizes]
            style = "--" if primitive == "auto" else "-"
            panel.plot([int(n) for n in sizes], ratio, marker=marker, linestyle=style, label=primitive)
        panel.set(yscale="log", title=name, xlabel="points n = queries m")
        panel.set_xscale("log", base=2)
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("wall time / exact's")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    run_study("kde_time", __doc__, measure, plot)
