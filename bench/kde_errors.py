"""Share of queries beyond ε, on seeds and data that no constant was tuned on.

`python -m bench.kde_errors [--out FOLDER]`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.kde_cases import Case, clustered, evaluate, gaussian, glove, relative_error
from bench.study import run_study

DELTA = 0.05
POINTS, QUERIES, MOST_QUERIES = 4096, 256, 4096
"""Points; queries; and queries for auto, which goes exact where there are few."""
SEEDS = range(301, 304)
CASES: dict[str, Callable[..., Case]] = {
    "clustered, d = 16": clustered,
    "clustered, 16 a cluster, d = 32": partial(clustered, size=16, d=32, spread=0.2),
    "Gaussian, d = 4": partial(gaussian, d=4),
    "Gaussian, d = 12": partial(gaussian, d=12),
    "GloVe, exponential": glove,
    "GloVe, bandwidth 1.6": partial(glove, bandwidth=1.6),
    "GloVe, bandwidth 2.2": partial(glove, bandwidth=2.2),
}
PRIMITIVES = ("uniform", "neighbours", "hbe", "auto")


def measure() -> list[dict[str, Any]]:
    """Return one row for each case, ε and primitive, over all seeds."""
    rows = []
    for name, make in CASES.items():
        cases = [make(POINTS, MOST_QUERIES, seed=seed) for seed in SEEDS]
        truths = [evaluate(case, "exact", 0.3, dtype="float64")[0] for case in cases]
        for eps in (0.1, 0.3, 0.5):
            for primitive in PRIMITIVES:
                misses, means, exact, spent = [], [], [], []
                for seed, case, truth in zip(SEEDS, cases, truths, strict=True):
                    count = MOST_QUERIES if primitive == "auto" else QUERIES
                    found, report = evaluate(replace(case, y=case.y[:count, :]), primitive, eps, seed)
                    error = relative_error(found, truth[:count])
                    misses.append(float(np.mean(np.abs(error) > eps)))
                    means.append(float(np.mean(error)))
                    exact.append(report.exact_queries / count)
                    spent.append(report.evaluations_per_query)
                row = {
                    "case": name,
                    "eps": eps,
                    "primitive": primitive,
                    "missed": float(np.mean(misses)),
                    "worst_seed": max(misses),
                    "mean_error": float(np.mean(means)),
                    "exact_share": float(np.mean(exact)),
                    "evaluations": float(np.mean(spent)),
                }
                rows.append(row)
                print(*(f"{v:.4g}" if isinstance(v, float) else f"{v:<12}" for v in row.values()), flush=True)
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the share missed, one panel for each ε."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(15, 4.4), sharey=True, layout="constrained")
    for panel, eps in zip(panels, (0.1, 0.3, 0.5), strict=True):
        for offset, primitive in enumerate(PRIMITIVES):
            found = [row for row in rows if row["eps"] == eps and row["primitive"] == primitive]
            place = np.arange(len(found)) + 0.2 * (offset - 1.5)
            panel.bar(place, [100 * row["missed"] for row in found], width=0.2, label=primitive)
        panel.axhline(100 * DELTA, color="black", linewidth=1, label="allowed")
        panel.set_title(f"ε = {eps}")
        panel.set_xticks(np.arange(len(CASES)), list(CASES), rotation=30, ha="right", fontsize=8)
    panels[0].set_ylabel("queries beyond ε, %")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    run_study("kde_errors", __doc__, measure, plot)
