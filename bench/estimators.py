"""Measure: Nadaraya–Watson regression over many rows, beside exact evaluation and scikit-learn's nearest neighbours."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from sklearn.neighbors import KNeighborsRegressor

import kdecore
from bench.figures import Figure, Figures
from bench.timing import interleaved
from bench.vit import needed
from kdecore.arrays.namespace import host
from kdecore.methods.gaussian_tree import gaussian_keys
from kdecore.neighbors import KernelRegressor

IMAGES = ("astronaut", "coffee", "chelsea", "rocket")
"""Photographs of scikit-image's: 895,420 pixels that aren't at an edge."""
BANDWIDTH = 0.05
"""Of 0.02, 0.03, 0.05, 0.1 and 0.2 that with the least exact error on pixels held out."""
NEIGHBOURS = 16


def pixels(count: int) -> tuple[Any, Any]:
    """Return the 24 pixels around random ones of photographs, (n, 24), and these, (n,): grey, float32, 0 … 1."""
    rows, values = [], []
    for name in IMAGES:
        grey = np.asarray(getattr(needed("skimage.data"), name)(), dtype=np.float32).mean(axis=2) / 255
        squares = np.lib.stride_tricks.sliding_window_view(grey, (5, 5)).reshape(-1, 25)
        rows.append(np.delete(squares, 12, axis=1))
        values.append(squares[:, 12])
    chosen = np.random.default_rng(0).permutation(sum(map(len, values)))[:count]
    return np.concatenate(rows)[chosen], np.concatenate(values)[chosen]


def exact_means(rows: Any, values: Any, queries: Any) -> Any:
    """Return exact kernel-weighted means by `kdecore.attention`, whose logits need one column more than rows have."""
    centre = rows.mean(axis=0)
    points, around = (rows - centre) / BANDWIDTH, (queries - centre) / BANDWIDTH
    keys = np.delete(gaussian_keys(host, points, np.zeros(len(rows), np.float32)), np.s_[points.shape[1] : -1], axis=1)
    around = np.concatenate([around, np.ones_like(around[:, :1])], axis=1)
    mean = values.mean()
    return kdecore.attention(around, keys, values[:, None] - mean, scale=1.0, method="exact")[:, 0] + mean


def estimators(fitted: int = 300_000, predicted: int = 100_000, part: int = 5_000) -> Figures:
    """Nadaraya–Watson on 300,000 rows, a pixel from the 24 around it: 100,000 predictions, those of exact from 5,000."""
    rows, values = pixels(fitted + predicted)
    training, queries, truth = (rows[:fitted], values[:fitted]), rows[fitted:], values[fitted:]
    some, times = queries[:part], predicted / part
    exact = exact_means(*training, some)
    figures = {"exact: root mean square error": Figure(deviation(exact, truth[:part]), "")}
    calls: dict[str, Callable[[], Any]] = {"exact": partial(exact_means, *training, some)}
    models: dict[str, Any] = {}
    for budget in (512, 1024, 2048, 4096):
        models[f"budget {budget:,}"] = KernelRegressor(BANDWIDTH, budget=budget)
    for algorithm in ("brute", "kd_tree"):
        models[f"{NEIGHBOURS} neighbours, {algorithm}"] = KNeighborsRegressor(NEIGHBOURS, algorithm=algorithm, n_jobs=-1)
    for name, model in models.items():
        # Kernels are compiled before.
        model.fit(training[0][:2000], training[1][:2000]).predict(some)
        started = time.perf_counter()
        model.fit(*training)
        figures[f"{name}: fit"] = Figure(time.perf_counter() - started, "s")
        asked = some if "neighbours" in name else queries
        found = model.predict(asked)[:part]
        figures[f"{name}: root mean square error"] = Figure(deviation(found, truth[:part]), "")
        calls[name] = partial(model.predict, asked)
        if "budget" in name:
            off = norm(found - exact)
            of_mean = norm(exact - values[:fitted].mean())
            bar = 0.01 if budget_of(name) == 2048 else None
            figures[f"{name}: error over exact's norm"] = Figure(off / norm(exact), "", at_most=bar)
            figures[f"{name}: error over exact's norm about the mean"] = Figure(off / of_mean, "")
    seconds = interleaved(calls, repeats=1)
    scaled = {name: spent * (1.0 if "budget" in name else times) for name, spent in seconds.items()}
    for name, spent in scaled.items():
        figures[f"{name}: predict"] = Figure(spent, "s")
        if name != "exact":
            bar = 10.0 if budget_of(name) == 2048 else None
            figures[f"{name}: speed-up over exact"] = Figure(scaled["exact"] / spent, "×", at_least=bar)
    return figures


def budget_of(name: str) -> int | None:
    """Return the budget that a model's name says."""
    return int(name.removeprefix("budget ").replace(",", "")) if name.startswith("budget") else None


def norm(x: Any) -> float:
    """Return the Euclidean norm."""
    return float(np.linalg.norm(x))


def deviation(found: Any, truth: Any) -> float:
    """Return the root mean square of a difference."""
    return float(np.sqrt(np.mean((found - truth) ** 2)))
