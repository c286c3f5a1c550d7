"""What `bench.gpu` measured on a card, as an entry of the table that ``method="auto"`` goes by on CUDA devices.

``python -m bench.cards bench/results/gpu_h200.json "trees opened in sweeps"`` prints it, for kdecore/methods/devices.py.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.inputs import FULL, D
from kdecore.methods.devices import Card, Line

LAUNCHED = 0.8
"""Calls that the host took this part of their time to launch were launched as fast as could be."""


def fitted(results: dict[str, Any], code: str) -> Card:
    """Return the card of a run; ``code`` says what of kdecore was measured, besides its commit.

    Parameters
    ----------
    results
        The run's JSON: ``device.name``, ``commit``, and in ``found`` the rows of ``ceiling`` (copy) and ``timing`` (of
        PyTorch arrays the treecode, two budgets at several n, and PyTorch's attention beside it).
    """
    found = results["found"]
    timings = [row for row in found["timing"] if row["library"] == "torch" and row["method"] == "treecode"]
    dtypes = sorted({row["dtype"] for row in timings})
    copy = next(row["value"] for row in found["ceiling"] if row["name"] == "copy")
    measured = [row for row in timings if not row["sdpa_predicted"]]
    rates = {dtype: max(exact_rate(row) for row in measured if row["dtype"] == dtype) for dtype in dtypes}
    return Card(
        name=results["device"]["name"],
        code=f"commit {results['commit']}, {code}",
        opener="triton",
        width=D,
        copy=rounded(copy * 1e12),
        exact={dtype: rounded(rate) for dtype, rate in rates.items()},
        treecode={dtype: line([row for row in timings if row["dtype"] == dtype]) for dtype in dtypes},
    )


def exact_rate(row: dict[str, Any]) -> float:
    """Return the operations a second of PyTorch's attention in a row: 4 d of them for a query and a key."""
    return FULL.heads * 4 * D * float(row["n"]) ** 2 / (1e-3 * float(row["sdpa_ms"]))


def line(timings: list[dict[str, Any]]) -> Line:
    """Fit times by relative least squares, of rows and listed keys, where the device was waited for; elsewhere the longest.

    Hosts take twice as long in one call as in another of the same size, and an estimate should never lose by that.
    """
    seconds, issued, n, budget = (
        np.array([row[name] for row in timings], dtype=float) for name in ("ms", "issue_ms", "n", "budget")
    )
    seconds, issued = seconds * 1e-3, issued * 1e-3
    launched = issued >= LAUNCHED * seconds
    work = FULL.heads * np.stack([2 * n, n * budget], axis=1)[~launched] / seconds[~launched, None]
    row, listed_key = np.linalg.lstsq(work, np.ones(len(work)), rcond=None)[0]
    return Line(rounded(seconds[launched].max()), rounded(row), rounded(listed_key))


def rounded(number: float) -> float:
    """Return a number to four digits."""
    return float(f"{number:.4g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="JSON of bench.gpu")
    parser.add_argument("code", help="what of kdecore was measured")
    arguments = parser.parse_args()
    print(fitted(json.loads(arguments.results.read_text(encoding="utf-8")), arguments.code))
