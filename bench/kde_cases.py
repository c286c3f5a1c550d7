"""Data for the measurements of `kdecore.kde`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GLOVE = Path(__file__).parent.parent / "kdecore" / "compare" / "data" / "glove_6b_100d_sample.npz"
GLOVE_SCALE = 10**-0.25
"""The released code's: divides both the words that act as keys and those that act as queries."""


@dataclass(frozen=True)
class Case:
    """Points x (n, d) and queries y (m, d), float32, and the bandwidth, or None for the exponential kernel."""

    name: str
    x: Any
    y: Any
    bandwidth: float | None


def clustered(n: int, m: int, *, size: int = 64, d: int = 16, spread: float = 0.3, seed: int = 0) -> Case:
    """Return n/size clusters of ``size`` points far apart, and queries in them: densities fall as 1/n."""
    generator = np.random.default_rng(seed)
    centres = 3.0 * generator.standard_normal((n // size, d))
    x = np.repeat(centres, size, axis=0) + spread * generator.standard_normal((n, d))
    y = centres[generator.integers(0, len(centres), m)] + spread * generator.standard_normal((m, d))
    return Case("clustered", x.astype("float32"), y.astype("float32"), 1.0)


def glove(n: int, m: int, *, bandwidth: float | None = None, seed: int = 0) -> Case:
    """Return n words as points and m others, or the same ones where the sample is used up, as queries, all centred.

    Without a bandwidth: the exponential kernel, and words scaled by `GLOVE_SCALE`.
    """
    words = np.load(GLOVE)["vectors"].astype("float32")
    words = (words - words.mean(axis=0)) * (GLOVE_SCALE if bandwidth is None else 1.0)
    order = np.random.default_rng(seed).permutation(len(words))
    return Case("GloVe" if bandwidth is None else "GloVe, Gaussian", words[order[:n]], words[order[-m:]], bandwidth)


def gaussian(n: int, m: int, *, d: int = 8, seed: int = 0) -> Case:
    """Return standard normal points and queries."""
    generator = np.random.default_rng(seed)
    x, y = generator.standard_normal((n, d)), generator.standard_normal((m, d))
    return Case("Gaussian", x.astype("float32"), y.astype("float32"), 1.0)


def evaluate(case: Case, primitive: str, eps: float, seed: int = 0, dtype: str = "float32") -> Any:
    """Return natural logs (m,) and the report."""
    from kdecore.kde import log_gaussian_kde, log_weighted_exponential_kde

    x, y = case.x.astype(dtype), case.y.astype(dtype)
    if case.bandwidth is None:
        return log_weighted_exponential_kde(x, y, eps=eps, primitive=primitive, seed=seed, return_report=True)
    return log_gaussian_kde(x, y, case.bandwidth, eps=eps, primitive=primitive, seed=seed, return_report=True)


def relative_error(estimate: Any, exact: Any) -> Any:
    """Return estimate/exact − 1 from natural logs (m,), in float64."""
    return np.expm1(estimate.astype("float64") - exact)
