"""How errors behave over seeds. All seeds are fixed, so a pass stays a pass; the rates are those over fresh seeds."""

import numpy as np
import pytest

from kdecore import Hyper, SortLSH, attention
from tests import oracles


def make(seed, n_q, n_k, d, d_v):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((1, n_q, d)), rng.standard_normal((1, n_k, d)), rng.standard_normal((1, n_k, d_v))


def slope(method, first_seed):
    """Slope of log error against log samples, over a decade, 24 seeds a point; i.i.d. data, on which strata gain nothing."""
    q, k, v = make(first_seed, 256, 8192, 24, 4)
    scale = 0.06  # weights within a factor of a few, so that the ratio's bias is small at 24 samples
    truth, _ = oracles.exact_attention(q, k, v, scale)
    samples = np.array([24, 52, 112, 240])
    errors = []
    for m in samples:
        options = method(block_size=0, num_samples=int(m), num_hashes=8)
        squares = [
            np.mean((attention(q, k, v, method=options, scale=scale, seed=first_seed + s) - truth) ** 2) for s in range(24)
        ]
        errors.append(np.sqrt(np.mean(squares)))
    return np.polyfit(np.log(samples), np.log(errors), 1)[0]


@pytest.mark.parametrize("method", [SortLSH, Hyper])
def test_errors_fall_like_one_over_root_samples(method):
    """The slope is −0.5 with a standard deviation of 0.02: 0 false alarms in 80 runs with fresh data and seeds."""
    assert -0.6 < slope(method, 1000) < -0.4


@pytest.mark.parametrize("method", ["sortlsh", "hyper"])
@pytest.mark.parametrize("heavy", [False, True])
def test_unnormalised_estimates_are_right_on_average(method, heavy):
    """Largest of 18 z-scores over 400 seeds: 3.5 in 160 runs with fresh seeds, so 0 false alarms (normal: 1 in 10⁵)."""
    zs = mean_zs(method, heavy, 0)
    assert np.abs(zs).max() < 5


def mean_zs(method, heavy, first_seed, seeds=400):
    """z-scores of the mean over seeds of Σ exp(logit) v and Σ exp(logit), for each query and column."""
    q, k, v = make(3, 6, 50, 3, 2)
    if heavy:
        v *= np.exp(2 * np.random.default_rng(4).standard_normal((1, 50, 1)))
    truth, true_lse = oracles.exact_attention(q, k, v)
    total = np.exp(true_lse)[..., None]
    truth = np.concatenate([truth * total, total], axis=-1)[0]
    found = []
    for seed in range(first_seed, first_seed + seeds):
        out, lse = attention(q, k, v, method=method, budget=9, seed=seed, return_lse=True)
        total = np.exp(lse)[..., None]
        found.append(np.concatenate([out * total, total], axis=-1)[0])
    found = np.array(found)
    return (found.mean(axis=0) - truth) / (found.std(axis=0, ddof=1) / np.sqrt(seeds))


def clustered_errors(first_seed, seeds=10):
    """Root mean square errors over seeds: sortlsh at three budgets, hyper at three, and sortlsh without blocks."""
    rng = np.random.default_rng(8)
    points = np.repeat(3 * rng.standard_normal((20, 8)), 40, axis=0) + 0.3 * rng.standard_normal((800, 8))
    v = rng.standard_normal((800, 4))
    truth, _ = oracles.exact_attention(points, points, v)

    def error(method, budget):
        found = [attention(points, points, v, method=method, budget=budget, seed=first_seed + s) for s in range(seeds)]
        return np.sqrt(np.mean((np.array(found) - truth) ** 2))

    budgets = (30, 120, 480)
    return (
        [error("sortlsh", budget) for budget in budgets],
        [error("hyper", budget) for budget in budgets],
        error(SortLSH(block_size=0), 120),
    )


def test_budgets_and_blocks_help_on_clustered_data():
    """Errors fall by more than 1.9 for 4 times the budget, and blocks take off 22 %: 0 false alarms in 60 runs."""
    sortlsh, hyper, without_blocks = clustered_errors(0)
    for errors in (sortlsh, hyper):
        assert errors[0] > 1.5 * errors[1]
        assert errors[1] > 1.5 * errors[2]
    assert sortlsh[1] < 0.85 * without_blocks
