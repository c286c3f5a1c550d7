"""Checks before timing: what is timed computes what it should, against a float64 oracle of its own."""

from typing import Any

import numpy as np

import kdecore
from kdecore.methods import METHODS


def verify() -> None:
    """Raise AssertionError unless every method is exact at full budget, and estimates at 3/4 of it are close."""
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((3, 777, 24))
    v = v + 2.0  # so that the output is not near zero
    logits = q @ k.T / np.sqrt(24)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    exact = weights @ v / weights.sum(axis=1, keepdims=True)

    def error(**options: Any) -> float:
        out = kdecore.attention(q, k, v, **options)
        return float(np.linalg.norm(out - exact) / np.linalg.norm(exact))

    for method in METHODS.keys() - {"auto"}:
        assert error(method=method, budget=777) < 1e-12, method
        if method != "exact":
            assert 1e-6 < error(method=method, budget=582) < 0.5, method
