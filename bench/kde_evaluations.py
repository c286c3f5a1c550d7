"""Kernel evaluations per query at ε = 0.3 against n, for each primitive.

`python -m bench.kde_evaluations [--out FOLDER]`. Counts do not depend on the machine.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.kde_cases import Case, clustered, evaluate, glove, relative_error
from bench.study import run_study

EPS = 0.3
QUERIES = 256
CASES: dict[str, tuple[Callable[[int, int], Case], range]] = {
    "clustered": (clustered, range(10, 17)),
    "GloVe words, Gaussian kernel, bandwidth 1.6": (partial(glove, bandwidth=1.6), range(10, 16)),
    "GloVe words, exponential kernel, scale 10^-0.25": (glove, range(10, 16)),
}
PRIMITIVES = ("uniform", "neighbours", "hbe")


def exponent(sizes: list[int], evaluations: list[float]) -> float:
    """Return the slope of log evaluations on log n, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(evaluations), 1)[0])


def measure() -> dict[str, Any]:
    """Return, for each data set and primitive, evaluations, misses and levels by n."""
    results: dict[str, Any] = {}
    for name, (make, powers) in CASES.items():
        rows: dict[str, list[Any]] = {primitive: [] for primitive in PRIMITIVES}
        for n in (2**power for power in powers):
            case = make(n, QUERIES)
            exact, _ = evaluate(case, "exact", EPS, dtype="float64")
            for primitive in PRIMITIVES:
                found, report = evaluate(case, primitive, EPS)
                error = relative_error(found, exact)
                rows[primitive].append(
                    {
                        "n": n,
                        "evaluations": report.evaluations_per_query,
                        "setup": report.setup_per_query,
                        "exact_share": report.exact_queries / QUERIES,
                        "missed": float(np.mean(np.abs(error) > EPS)),
                        "rms": math.sqrt(float(np.mean(error**2))),
                        "levels": [vars(level) for level in report.levels],
                    }
                )
                row = rows[primitive][-1]
                print(
                    f"{name[:30]:<30} {n:>6} {primitive:<10} " + "  ".join(f"{k} {row[k]:.3g}" for k in list(row)[1:6]),
                    flush=True,
                )
        results[name] = {"by_primitive": rows, "exponents": {}}
        for primitive, found in rows.items():
            sizes, spent = [row["n"] for row in found], [row["evaluations"] for row in found]
            results[name]["exponents"][primitive] = {
                "all": exponent(sizes, spent),
                "upper_half": exponent(sizes[len(sizes) // 2 :], spent[len(sizes) // 2 :]),
            }
        print(name, json.dumps(results[name]["exponents"]), flush=True)
    return results


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw one panel for each data set."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(5.2 * len(results), 4.4), sharey=True, layout="constrained")
    for panel, (name, found) in zip(panels, results.items(), strict=True):
        for primitive, marker in zip(PRIMITIVES, "osD", strict=True):
            rows = found["by_primitive"][primitive]
            slope = found["exponents"][primitive]["all"]
            panel.plot(
                [row["n"] for row in rows],
                [row["evaluations"] for row in rows],
                marker=marker,
                label=f"{primitive}: n^{slope:.2f}",
            )
        sizes = np.asarray([row["n"] for row in found["by_primitive"]["hbe"]], dtype=float)
        panel.plot(sizes, sizes, color="black", linewidth=1, label="exact: n^1.00")
        anchor = found["by_primitive"]["hbe"][0]["evaluations"]
        panel.plot(sizes, anchor * np.sqrt(sizes / sizes[0]), color="grey", linestyle=":", label="slope 0.5")
        panel.set(xscale="log", yscale="log", title=name, xlabel="points n")
        panel.set_xscale("log", base=2)
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"kernel evaluations per query, ε = {EPS}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    run_study("kde_evaluations", __doc__, measure, plot)
