"""Do certificates hold, and is `rtol` met? 200 runs of each on mixed data: `python -m bench.certificates`.

Every run has a seed, and so sampled queries, of its own; the data are layers of a vision transformer, words, and clusters.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import kdecore
from bench import vit
from bench.measures import many_words
from bench.study import run_study
from kdecore.accuracy.metrics import Errors, errors
from kdecore.arrays.namespace import host
from kdecore.compare.cases import glove_case

RUNS = 200
SETTINGS = [(method, budget) for budget in (96, 384, 1024) for method in ("treecode", "sortlsh")]
TOLERANCES = [(rtol, norm) for rtol in (0.02, 0.05, 0.1, 0.2) for norm in ("frobenius", "spectral")]


@dataclass(frozen=True)
class Case:
    """Inputs, NumPy float32 (G, n, d), and exact attention in float64."""

    name: str
    q: Any
    k: Any
    v: Any
    scale: float
    exact: Any


def load_cases() -> Iterator[Case]:
    """Yield the data: six layers at 896 px, words at three scales, more words, clusters."""
    words = glove_case(8192)
    inputs: list[tuple[str, Any, Any, Any, float]] = []
    inputs += [(f"layer {layer}", q, k, v, 0.125) for layer, (q, k, v) in vit.qkv(896).items()]
    inputs += [(f"words, scale {s:.2f}", words.q[None], words.k[None], words.v[None], s) for s in (1.0, 10**-0.5, 0.1)]
    q, k, v = (x[None] for x in many_words(32768))
    inputs.append(("words with noise", q, k, v, 0.1))
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((2, 200, 32))
    points = [centres[:, rng.integers(0, 200, 24000)] + 0.3 * rng.standard_normal((2, 24000, 32)) for _ in range(3)]
    q, k, v = (x.astype(np.float32) for x in points)
    inputs.append(("clusters", q, k, v, 32**-0.5))
    for name, q, k, v, scale in inputs:
        exact = kdecore.attention(*(x.astype(np.float64) for x in (q, k, v)), method="exact", scale=scale)
        yield Case(name, q, k, v, scale, exact)


def measure() -> dict[str, Any]:
    """Run all: name of the study → a list of runs."""
    cases = list(load_cases())
    print(f"{len(cases)} data sets")
    certified = [certified_run(case, setting, seed) for seed, (case, setting) in enumerate(mixed(cases, SETTINGS))]
    met = [tolerant_run(case, setting, seed) for seed, (case, setting) in enumerate(mixed(cases, TOLERANCES))]
    for norm in ("frobenius", "spectral"):
        inside = [run[norm]["lower"] <= run[norm]["true"] <= run[norm]["upper"] for run in certified]
        below = [run[norm]["true"] <= run[norm]["upper"] for run in certified]
        ratio = np.median([run[norm]["upper"] / run[norm]["true"] for run in certified])
        print(f"{norm}: inside {np.mean(inside):.3f}, below the upper limit {np.mean(below):.3f}, upper / true {ratio:.2f}")
    share = np.median([run["certificate_seconds"] / run["seconds"] for run in certified])
    print(f"certificate's part of the call's time, median: {share:.3f}")
    kept = [run["error"] <= run["rtol"] for run in met]
    estimated = [run["error"] <= run["rtol"] for run in met if run["method"] != "exact"]
    print(f"rtol met: {np.mean(kept):.3f}; of {len(estimated)} that were not exact {np.mean(estimated):.3f}")
    return {"certificates": certified, "tolerances": met}


def mixed(cases: list[Case], settings: list[Any]) -> Iterator[tuple[Case, Any]]:
    """Yield `RUNS` pairs in which every case meets every setting, about equally often."""
    pairs = [(case, settings[(i + shift) % len(settings)]) for shift in range(len(settings)) for i, case in enumerate(cases)]
    return islice(cycle(pairs), RUNS)


def certified_run(case: Case, setting: tuple[str, int], seed: int) -> dict[str, Any]:
    """Return what the certificate says of one call with a method and a budget, and the truth."""
    method, budget = setting
    call: dict[str, Any] = {"method": method, "budget": budget, "scale": case.scale, "diagonal": 0, "seed": seed}
    out, report = kdecore.attention(case.q, case.k, case.v, return_report=True, **call)
    found, true = report.certificate, true_errors(out, case)
    run = {"data": case.name, "method": method, "budget": budget, "rows": found.rows}
    run |= {"seconds": report.seconds, "certificate_seconds": report.certificate_seconds}
    for norm in ("frobenius", "spectral"):
        lower, upper = getattr(found, f"{norm}_interval")
        run[norm] = {"true": getattr(true, norm), "estimate": getattr(found, norm), "lower": lower, "upper": upper}
    return run


def tolerant_run(case: Case, setting: tuple[float, str], seed: int) -> dict[str, Any]:
    """Return what one call with ``rtol`` in a norm did, and its true error."""
    rtol, norm = setting
    call: dict[str, Any] = {"rtol": rtol, "rtol_norm": norm, "scale": case.scale, "diagonal": 0, "seed": seed}
    out, report = kdecore.attention(case.q, case.k, case.v, return_report=True, **call)
    run = {"data": case.name, "rtol": rtol, "norm": norm, "error": getattr(true_errors(out, case), norm)}
    return run | {"method": report.method, "keys_per_query": report.keys_per_query, "rounds": len(report.rounds)}


def true_errors(out: Any, case: Case) -> Errors:
    """Return the errors of all rows."""
    return errors(host, out, case.exact)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw each run's interval over its true error, one panel a norm."""
    figure = Figure(figsize=(11, 5.5), dpi=130, layout="constrained")
    for axes, norm in zip(figure.subplots(1, 2), ("frobenius", "spectral"), strict=True):
        runs = [run[norm] for run in results["certificates"]]
        inside = [run["lower"] <= run["true"] <= run["upper"] for run in runs]
        for kind, colour, label in ((True, "#0072B2", "holds the true error"), (False, "#D55E00", "does not")):
            some = [run for run, found in zip(runs, inside, strict=True) if found is kind]
            true, estimate = ([run[name] for run in some] for name in ("true", "estimate"))
            reach = [[run["estimate"] - run["lower"] for run in some], [run["upper"] - run["estimate"] for run in some]]
            axes.errorbar(
                true, estimate, reach, fmt="o", ms=2.5, lw=0.9, color=colour, label=f"{label}: {len(some)} of {len(runs)}"
            )
        ends = [min(run["true"] for run in runs) / 1.5, max(run["true"] for run in runs) * 1.5]
        axes.plot(ends, ends, color="#222222", lw=1.0, zorder=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"true relative {norm.capitalize() if norm == 'frobenius' else norm} error (log scale)")
        axes.set_ylabel("estimate and 95 % interval (log scale)")
        axes.legend(frameon=False, title="the interval")
        axes.grid(which="major", color="#dddddd", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Certificates of treecode and sortlsh, 96 to 1,024 keys per query, against the truth")
    figure.savefig(path)


if __name__ == "__main__":
    run_study("certificates", __doc__, measure, plot)
