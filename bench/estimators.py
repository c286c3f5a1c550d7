"""Measure: Nadaraya–Watson regression over many rows, beside exact evaluation and scikit-learn's nearest neighbours."""

import itertools
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


def estimator_certificates(fitted: int = 20_000, predicted: int = 8_000, samples: int = 20) -> Figures:
    """Upper limits of certificates that hold: smooth functions of four kinds of rows, 48 settings, each of 20 samples."""
    figures, held = Figures(), []
    settings = itertools.product(KINDS, (2, 6), (0.05, 0.2, 0.5), (64, 512))
    for kind, d, bandwidth, budget in settings:
        rng = np.random.default_rng(0)
        rows = KINDS[kind](rng, fitted + predicted, d)
        values = np.sin(rows[:, 0]) + rows[:, -1] ** 2 / (1.0 + rows[:, -1] ** 2) + 0.3 * rng.standard_normal(len(rows))
        training, queries = (rows[:fitted], values[:fitted]), rows[fitted:]
        width = bandwidth * float(np.sqrt(training[0].var(axis=0).mean()))
        exact = KernelRegressor(width, budget=fitted).fit(*training).predict(queries)
        within = []
        for seed in range(samples):
            model = KernelRegressor(width, budget=budget, random_state=seed).fit(*training)
            found, report = model.predict(queries, return_report=True)
            error = norm(found - exact) / norm(exact - training[1].mean())
            within.append(report.certificate is None or error <= report.certificate.upper("frobenius"))
        held.append(np.mean(within))
        figures[f"{kind}, d = {d}, bandwidth {bandwidth}, budget {budget}: upper limits held"] = Figure(float(held[-1]), "")
    figures["all: upper limits held"] = Figure(float(np.mean(held)), "", at_least=0.95)
    return figures


def clusters(rng: np.random.Generator, n: int, d: int) -> Any:
    """Return rows (n, d) around 20 points, each with a width of its own."""
    centres, widths, of = 3.0 * rng.standard_normal((20, d)), rng.uniform(0.1, 1.0, 20), rng.integers(0, 20, n)
    return centres[of] + widths[of, None] * rng.standard_normal((n, d))


def curve(rng: np.random.Generator, n: int, d: int) -> Any:
    """Return rows (n, d) along a curve."""
    along = rng.uniform(0.0, 6.0, n)[:, None]
    return np.sin(0.5 * along * np.arange(1, d + 1)) + 0.05 * rng.standard_normal((n, d))


KINDS: dict[str, Callable[[np.random.Generator, int, int], Any]] = {
    "normal": lambda rng, n, d: rng.standard_normal((n, d)),
    "Student's t of 3": lambda rng, n, d: rng.standard_t(3, (n, d)),
    "clusters": clusters,
    "curve": curve,
}


def budget_of(name: str) -> int | None:
    """Return the budget that a model's name says."""
    return int(name.removeprefix("budget ").replace(",", "")) if name.startswith("budget") else None


def norm(x: Any) -> float:
    """Return the Euclidean norm."""
    return float(np.linalg.norm(x))


def deviation(found: Any, truth: Any) -> float:
    """Return the root mean square of a difference."""
    return float(np.sqrt(np.mean((found - truth) ** 2)))
