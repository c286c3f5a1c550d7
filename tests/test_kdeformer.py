"""KDEformer's Algorithm 1: unbiased exactly, and within the paper's spectral bound with one constant."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

import kdecore
from kdecore.compare.cases import glove_case
from kdecore.core.problem import canonicalise
from kdecore.engine.attend import attend
from kdecore.kde.problem import Accuracy
from kdecore.kde.wexpkde import wexpkde
from kdecore.methods import kdeformer
from kdecore.methods.kdeformer import KDEformer
from kdecore.methods.plan import make_plan

N = 400


def gaussian(rng):
    q, k, v = rng.standard_normal((3, N, 16))
    return q, k, v, 0.5


def clustered(rng):
    centres = 2 * rng.standard_normal((12, 16))
    q, k, v = (centres[rng.integers(0, 12, N)] + width * rng.standard_normal((N, 16)) for width in (0.4, 0.4, 1.0))
    return q, k, v, 0.25


def glove(rng):
    case = glove_case(2 * N)
    chosen = rng.permutation(2 * N)[:N]
    q = case.q[chosen].astype(np.float64)
    return q, q, case.v[chosen].astype(np.float64), case.scale


DATA = {function.__name__: function for function in (gaussian, clustered, glove)}


def softmax(q, k, scale):
    logits = scale * q @ k.T
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def select(problem, options, seed=0):
    """Select without the rule that a budget of n_k or more is exact, so that any number of samples can be drawn."""
    plan = replace(make_plan(problem, method=KDEformer(num_samples=1), seed=seed), options=options)
    selection = kdeformer.select(problem, plan)
    return plan, selection


@pytest.mark.parametrize("probabilities", ["mixture", "paper"])
@pytest.mark.parametrize("zero_values", [False, True])
def test_each_draw_is_unbiased(monkeypatch, probabilities, zero_values):
    """Σ over draws of probability × weight is 1 / m for every key, from every interval of the one random number."""
    rng = np.random.default_rng(3)
    q, k, v = rng.standard_normal((2, 7, 5)), rng.standard_normal((2, 11, 5)), rng.standard_normal((2, 11, 3))
    v *= np.exp(2 * rng.standard_normal((2, 11, 1))) * (0.0 if zero_values else 1.0)
    problem = canonicalise(q, k, v)
    samples, total = 3, np.zeros((2, 11))
    options = KDEformer(num_samples=samples, probabilities=probabilities, primitive="exact")
    log_rows, log_columns = kdeformer.log_norms(problem, options, 0)
    norms = np.linalg.norm(v, axis=-1)
    norms = norms / (np.abs(v).max(axis=(1, 2), keepdims=True)[..., 0] if not zero_values else 1.0)
    top = kdeformer.operator_norm_squared(problem, log_rows, log_columns, 0) if probabilities == "paper" else None
    p = kdeformer.probabilities(problem, log_columns, norms, top)
    np.testing.assert_allclose(p.sum(axis=1), 1.0)
    breaks = np.unique(np.concatenate([[0.0, 1.0], np.cumsum(p, axis=1).ravel()]).clip(0.0, 1.0))
    original = kdeformer.uniform

    def chosen(u):
        def uniform(xp, seed, stream, count, *, device=None):
            if stream == kdeformer.KEYS_STREAM:
                return np.full(count, u)
            return original(xp, seed, stream, count, device=device)

        return uniform

    for low, high in pairwise(breaks):
        monkeypatch.setattr(kdeformer, "uniform", chosen(0.5 * (low + high)))
        _, selection = select(problem, options)
        for g in range(2):
            np.add.at(total[g], selection.key_index[g, 0], (high - low) * np.exp(selection.log_weight[g, 0]))
    np.testing.assert_allclose(total, 1.0, rtol=0, atol=1e-9)


def test_probabilities_follow_their_definitions():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((30, 4)), rng.standard_normal((40, 4)), rng.standard_normal((40, 6))
    problem = canonicalise(q, k, v, -0.7)
    weights = softmax(q, k, -0.7)
    log_rows, log_columns = kdeformer.log_norms(problem, KDEformer(primitive="exact"), 0)
    np.testing.assert_allclose(log_rows[0], np.log(np.exp(-0.7 * q @ k.T).sum(axis=1)))
    columns, values = (weights**2).sum(axis=0), (v**2).sum(axis=1)
    np.testing.assert_allclose(np.exp(log_columns[0]), columns)
    norms = (np.sqrt(values) / np.abs(v).max())[None, :]
    mixture = 0.5 * (columns / columns.sum() + values / values.sum())
    np.testing.assert_allclose(kdeformer.probabilities(problem, log_columns, norms, None)[0], mixture)
    ratio = np.linalg.norm(weights, 2) ** 2 / np.linalg.norm(v, 2) ** 2
    paper = columns + ratio * values
    found = kdeformer.probabilities(problem, log_columns, norms, np.asarray([np.linalg.norm(weights, 2) ** 2]))
    np.testing.assert_allclose(found[0], paper / paper.sum())


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_the_operator_norm_is_estimated(data):
    """Seen on 512 columns: 0.87 to 1.6 times the true square; at most twice and at least 0.7 asked for, seed fixed."""
    q, k, v, scale = data(np.random.default_rng(0))
    problem = canonicalise(q, k, v, scale)
    logs = kdeformer.log_norms(problem, KDEformer(primitive="exact"), 0)
    found = kdeformer.operator_norm_squared(problem, *logs, 0)[0]
    assert 0.7 < found / np.linalg.norm(softmax(q, k, scale), 2) ** 2 < 2.0


@pytest.mark.parametrize("normaliser", ["kde", "sampled"])
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_the_spectral_bound_holds_with_one_constant(data, normaliser):
    """‖Att − estimate‖ ≤ ε ‖A‖ ‖V‖ at m = C ε⁻² log n (sr(A) + sr(V)), C = `KDEformer.CONSTANT`, in all of 50 seeds.

    The smallest C that would do is 0.17; at 0.4 the error has to exceed its mean by a factor of 2 for a false alarm, which
    no seed of 1,000 did.
    """
    q, k, v, scale = data(np.random.default_rng(1))
    problem = canonicalise(q, k, v, scale)
    weights = softmax(q, k, scale)
    norm_a, norm_v = np.linalg.norm(weights, 2), np.linalg.norm(v, 2)
    ranks = (np.linalg.norm(weights) / norm_a) ** 2 + (np.linalg.norm(v) / norm_v) ** 2
    eps = 0.4
    samples = math.ceil(KDEformer.CONSTANT * math.log(N) * ranks / eps**2)
    for seed in range(50):
        plan, selection = select(problem, KDEformer(num_samples=samples, eps=eps, normaliser=normaliser), seed)
        error = attend(problem, plan, selection).out[0] - weights @ v
        assert np.linalg.norm(error, 2) <= eps * norm_a * norm_v


def test_eps_sets_the_number_of_keys():
    q, k, v, scale = clustered(np.random.default_rng(2))
    weights = softmax(q, k, scale)
    counts = []
    for eps in (0.9, 0.6, 0.45):
        out, report = kdecore.attention(q, k, v, scale=scale, method=KDEformer(eps=eps), return_report=True)
        counts.append(report.keys_per_query)
        assert np.linalg.norm(out - weights @ v, 2) <= eps * np.linalg.norm(weights, 2) * np.linalg.norm(v, 2)
    assert counts[0] < counts[1] < counts[2] < N
    np.testing.assert_allclose(counts[0] / counts[1], (0.6 / 0.9) ** 2, rtol=0.2)
    exact, report = kdecore.attention(q, k, v, scale=scale, method=KDEformer(eps=0.05), return_report=True)
    assert report.keys_per_query == N
    np.testing.assert_allclose(exact, weights @ v, rtol=1e-10)


@pytest.mark.parametrize("normaliser", ["kde", "sampled"])
def test_error_falls_like_one_over_root_m(normaliser):
    """Slope over a decade of m, mean of 20 seeds: −0.5 within 0.1 (seen −0.50, deviation 0.03; seeds fixed)."""
    q, k, v, scale = gaussian(np.random.default_rng(4))
    problem = canonicalise(q, k, v, scale)
    exact = softmax(q, k, scale) @ v
    counts = np.asarray([40, 80, 160, 400])
    found = []
    for samples in counts:
        runs = []
        for seed in range(20):
            plan, selection = select(
                problem, KDEformer(num_samples=int(samples), normaliser=normaliser, primitive="exact"), seed
            )
            runs.append(np.linalg.norm(attend(problem, plan, selection).out[0] - exact))
        found.append(np.mean(runs))
    slope = np.polyfit(np.log(counts), np.log(found), 1)[0]
    assert -0.6 < slope < -0.4


def test_the_kde_normaliser_is_the_estimated_denominator(backend):
    rng = np.random.default_rng(5)
    q, k, v = backend.arrays(*rng.standard_normal((3, 2, 60, 4)))
    _, lse = kdecore.attention(q, k, v, method=KDEformer(primitive="exact"), budget=20, return_lse=True)
    _, exact = kdecore.attention(q, k, v, method="exact", return_lse=True)
    np.testing.assert_allclose(backend.numpy(lse), backend.numpy(exact), rtol=1e-10)


def test_column_norms_are_kernel_sums():
    """β is WExpKDE(√2 Q → √2 K, weights α⁻²), the paper's step 2."""
    rng = np.random.default_rng(6)
    q, k = rng.standard_normal((1, 20, 3)), rng.standard_normal((1, 30, 3))
    log_alpha, _ = wexpkde(k, q, None, Accuracy(0.2, 0.05), primitive="exact")
    beta, _ = wexpkde(math.sqrt(2) * q, math.sqrt(2) * k, -2 * log_alpha, Accuracy(0.2, 0.05), primitive="exact")
    np.testing.assert_allclose(np.exp(beta[0]), (softmax(q[0], k[0], 1.0) ** 2).sum(axis=0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eps": 0.0}, ("eps", "between 0 and 1", "0.0")),
        ({"eps": "x"}, ("eps", "x")),
        ({"num_samples": 0}, ("num_samples", "at least 1", "0")),
        ({"probabilities": "best"}, ("probabilities", "mixture, paper", "best")),
        ({"normaliser": "none"}, ("normaliser", "kde, sampled", "none")),
        ({"primitive": "magic"}, ("primitive", "hbe", "magic")),
    ],
)
def test_options(options, words):
    with pytest.raises(kdecore.OptionError) as caught:
        KDEformer(**options)
    assert all(word in str(caught.value) for word in words)


def test_budget_and_num_samples_must_agree():
    q = np.zeros((5, 2))
    with pytest.raises(kdecore.OptionError, match="budget must be None or num_samples = 3, got 4"):
        kdecore.attention(q, q, q, method=KDEformer(num_samples=3), budget=4)
