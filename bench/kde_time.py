"""Wall time of each primitive over exact's, float32, ε = 0.3, as many queries as points: python -m bench.kde_time [folder].

Primitives take turns within each repetition, and the least time of each counts. Writes kde_time.json and kde_time.png.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.kde_cases import Case, clustered, evaluate, gaussian, glove

EPS = 0.3
POWERS = range(10, 15)
CASES: dict[str, Callable[[int, int], Case]] = {
    "clustered, d = 16": clustered,
    "Gaussian, d = 4": partial(gaussian, d=4),
    "GloVe words, exponential kernel": glove,
}
PRIMITIVES = ("exact", "uniform", "neighbours", "hbe", "auto")
HASHING_LIMIT = 2**11
"""Largest n at which hashing is timed: it takes an order of magnitude longer than exact."""


def repeated(case: Case, n: int) -> dict[str, Any]:
    """Return least seconds, evaluations and reason for each primitive."""
    best: dict[str, Any] = {}
    for _ in range(5 if n <= 2**11 else 3 if n <= 2**13 else 2):
        for primitive in PRIMITIVES:
            if primitive == "hbe" and (n > HASHING_LIMIT or "hbe" in best):
                continue
            start = time.perf_counter()
            _, report = evaluate(case, primitive, EPS)
            seconds = time.perf_counter() - start
            if primitive not in best or seconds < best[primitive]["seconds"]:
                best[primitive] = {
                    "seconds": seconds,
                    "evaluations": report.evaluations_per_query,
                    "primitive": report.primitive,
                    "reason": report.reason,
                }
    return best


def measure() -> dict[str, Any]:
    """Return times by data set and n."""
    results: dict[str, Any] = {}
    for name, make in CASES.items():
        results[name] = {}
        for n in (2**power for power in POWERS):
            found = repeated(make(n, n), n)
            results[name][n] = found
            exact = found["exact"]["seconds"]
            others = [found[p]["seconds"] for p in found if p != "auto"]
            ratios = "  ".join(f"{p} {f['seconds'] / exact:.2f}" for p, f in found.items())
            line = f"auto/best {found['auto']['seconds'] / min(others):.2f} ({found['auto']['primitive']})"
            print(f"{name:<32} {n:>6}  exact {exact:.3f} s  {ratios}  {line}", flush=True)
    return results


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw time over exact's, one panel for each data set."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(5.2 * len(results), 4.4), sharey=True, layout="constrained")
    for panel, (name, found) in zip(panels, results.items(), strict=True):
        for primitive, marker in zip(PRIMITIVES, "xosD*", strict=True):
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


def main() -> None:
    """Measure, write and draw."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results")
    folder.mkdir(parents=True, exist_ok=True)
    results = measure()
    threads = os.environ.get("OPENBLAS_NUM_THREADS", "default")
    (folder / "kde_time.json").write_text(json.dumps({"blas_threads": threads, "results": results}, indent=1) + "\n")
    plot(results, folder / "kde_time.png")


if __name__ == "__main__":
    main()
