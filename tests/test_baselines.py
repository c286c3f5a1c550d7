"""Baselines against slow oracles of their papers' definitions, at their limits, and what counts their work."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import kdecore
from bench.baselines import BASELINES, nystromformer, performer, reformer, scatterbrain_lsh
from bench.baselines.arguments import normal, seeded
from bench.baselines.counting import multiply_accumulates
from tests import oracles

MINE = ("nystromformer", "performer", "reformer", "scatterbrain_lsh", "scatterbrain_window")
RECORDED = Path(__file__).parent.parent / "bench" / "results" / "baseline_packages.json"


def draw(n_q, n_k, d=8, d_v=5, *, groups=2, size=1.0, seed=0, dtype=torch.float64):
    """Normal queries, keys and values; logits at scale 0.3 deviate by 0.85 size²."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((groups, n_q, d), (groups, n_k, d), (groups, n_k, d_v))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return (size * q).to(dtype), (size * k).to(dtype), v.to(dtype)


def exact(q, k, v, scale):
    return oracles.exact_attention(q.numpy(), k.numpy(), v.numpy(), scale)[0]


def weighted(weights, v):
    return np.stack([row @ v / row.sum() for row in weights])


def feature_weights(q, k, rows, scale):
    """φ(q)·φ(k) for one group, pair by pair from the paper's definition."""
    q, k = math.sqrt(scale) * q, math.sqrt(scale) * k
    weights = np.zeros((len(q), len(k)))
    for i, j in np.ndindex(*weights.shape):
        for w in rows:
            weights[i, j] += np.exp(w @ q[i] - q[i] @ q[i] / 2) * np.exp(w @ k[j] - k[j] @ k[j] / 2) / len(rows)
    return weights


def buckets_of(x, rotation):
    return [int(np.argmax(np.concatenate([row @ rotation, -(row @ rotation)]))) for row in x]


# What all share.


def test_baselines_are_the_files_in_order_and_imported_late():
    names = list(BASELINES)
    assert names == sorted(names)
    assert set(MINE) <= set(names)
    assert not {"arguments", "counting"} & set(names)
    late = "import sys, bench.baselines as b; assert not [m for m in sys.modules if m.startswith(b.__name__ + '.')]"
    subprocess.run([sys.executable, "-c", late], check=True, cwd=Path(__file__).parent.parent)


@pytest.mark.parametrize("name", MINE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_seeds_alone_decide(name, dtype):
    """The same in one group as beside another, without global random numbers, whose state stays as it was."""
    q, k, v = draw(40, 40, dtype=dtype)
    state = torch.get_rng_state()
    out = BASELINES[name](q, k, v, 0.3, 16, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert (out.dtype, out.shape) == (dtype, v.shape)
    assert torch.equal(out, BASELINES[name](q, k, v, 0.3, 16, 5))
    alone = BASELINES[name](q[1:], k[1:], v[1:], 0.3, 16, 5)
    torch.testing.assert_close(out[1:], alone, rtol=1e-4, atol=1e-4)
    other = BASELINES[name](q, k, v, 0.3, 16, 6)
    assert torch.equal(out, other) == (name == "nystromformer")


@pytest.mark.parametrize("name", MINE)
def test_wrong_arguments_are_named(name):
    q, k, v = draw(24, 24)
    attend = BASELINES[name]
    for arguments, message in [
        ((q[0], k, v, 0.3, 16), r"q must have shape .* got \(24, 8\)"),
        ((q, k[..., :7], v, 0.3, 16), r"k must have q's groups and columns, 2 and 8, got \(2, 24, 7\)"),
        ((q, k[:1], v, 0.3, 16), "k must have q's groups"),
        ((q, k, v[:, :20], 0.3, 16), r"v must have k's groups and rows, \(2, 24\), got \(2, 20, 5\)"),
        ((q, k, v[:, :, :0], 0.3, 16), "v must have shape .* none of them 0"),
        ((q, k, v.float(), 0.3, 16), "v must be .* of q's dtype, got torch.float32"),
        ((q.half(), k, v, 0.3, 16), "q must be float32 or float64, and of q's dtype, got torch.float16"),
        ((q, k, v, math.inf, 16), "scale must be finite, got inf"),
        *(
            ((q, k, v, scale, 16), f"scale must be positive, got {scale}")
            for scale in (0.0, -0.3)
            # Nyströmformer multiplies by no root of it.
            if name != "nystromformer"
        ),
        ((q, k, v, 0.3, 0), "budget must be at least [128], got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            attend(*arguments, 0)


@pytest.mark.parametrize("name", MINE)
def test_large_logits(name):
    """Logits to ±30 and beyond: float32 stays finite, and near what float64 makes of the same draws."""
    q, k, v = draw(64, 64, size=3.2)
    logits = 0.3 * q @ (functional.normalize(q, dim=2) * 10 if name == "reformer" else k).mT
    assert logits.min() < -25
    assert logits.max() > 30
    scale = 3.0 if name == "reformer" else 0.3
    expected = BASELINES[name](q, k, v, scale, 32, 1)
    found = BASELINES[name](q.float(), k.float(), v.float(), scale, 32, 1)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)


# Performer.


@pytest.mark.parametrize(("n_q", "n_k", "features"), [(7, 7, 8), (5, 11, 13), (9, 4, 3)])
def test_performer_follows_its_definition(n_q, n_k, features):
    q, k, v = draw(n_q, n_k)
    rows = performer.projection(8, features, seeded(3)).numpy()
    found = performer.attend(q, k, v, 0.3, features, 3)
    for group in range(2):
        weights = feature_weights(q[group].numpy(), k[group].numpy(), rows, 0.3)
        np.testing.assert_allclose(found[group], weighted(weights, v[group].numpy()), rtol=1e-10, atol=1e-12)


def test_performer_with_eps_follows_the_authors_code():
    q, k, v = (x[:1] for x in draw(6, 9))
    rows = performer.projection(8, 12, seeded(3)).numpy()
    x, y = math.sqrt(0.3) * q[0].numpy(), math.sqrt(0.3) * k[0].numpy()
    top_k = max(w @ row for w in rows for row in y)
    phi_k = np.array([[np.exp(w @ row - row @ row / 2 - top_k) + 1e-2 for w in rows] for row in y])
    phi_q = np.array([[np.exp(w @ row - row @ row / 2 - max(rows @ row)) + 1e-2 for w in rows] for row in x])
    found = performer.attend_with_eps(q, k, v, 0.3, 12, 3, eps=1e-2)
    np.testing.assert_allclose(found[0], weighted(phi_q @ phi_k.T, v[0].numpy()), rtol=1e-10)
    without = performer.attend_with_eps(q, k, v, 0.3, 12, 3, eps=0.0)
    torch.testing.assert_close(without, performer.attend(q, k, v, 0.3, 12, 3), rtol=1e-10, atol=1e-12)


def test_projection_is_orthogonal_in_blocks_and_isotropic():
    """False alarms: 16 entries at five deviations, below 1 in 50,000; without signs the first one's mean is −0.42."""
    rows = performer.projection(8, 20, seeded(1))
    for block in rows.split(8):
        norms = block.norm(dim=1)
        torch.testing.assert_close(block @ block.mT, torch.diag(norms**2), rtol=1e-12, atol=1e-12)
        assert norms.unique().numel() == len(norms)
    many = torch.stack([performer.projection(4, 4, seeded(seed)) for seed in range(400)])
    directions = functional.normalize(many, dim=2)
    assert directions.mean(dim=0).abs().max() < 5 * math.sqrt(1 / 4 / 400)
    # χ² with four degrees of freedom: mean 4, variance 8.
    assert abs(many.square().sum(dim=2).mean() - 4) < 5 * math.sqrt(8 / 1600)


def test_features_are_unbiased():
    """Mean of 3,000 draws within five deviations, taken from the variance of independent rows, which is larger."""
    q, k = torch.tensor([[[0.5, -0.2, 0.1, 0.3]]]).double(), torch.tensor([[[0.2, 0.4, -0.3, 0.6]]]).double()
    found = []
    for seed in range(3000):
        rows = performer.projection(4, 4, seeded(seed))
        phi_q, phi_k = (performer.log_features(x, rows, 1.0).exp() / 2 for x in (q, k))
        found.append(float((phi_q * phi_k).sum()))
    true = math.exp(float((q * k).sum()))
    assert abs(np.mean(found) / true - 1) < 5 * math.sqrt((math.exp(float((q + k).square().sum())) - 1) / 4 / 3000)


def test_performer_converges_as_one_over_the_root():
    """Root mean square over 20 seeds, each query's within the bound of independent features; 16 times as many: a quarter.

    To first order out − exact is Σ aⱼ εⱼ (vⱼ − exact), where εⱼ² has the mean (exp(‖q + kⱼ‖²) − 1)/m. A tenth is for what
    lies beyond.
    """
    q, k, v = draw(16, 40, groups=1, size=0.5)
    truth = torch.from_numpy(exact(q, k, v, 0.3))
    weights = (0.3 * q @ k.mT).softmax(dim=2)
    relative = ((0.3 * (q[:, :, None] + k[:, None]).square().sum(dim=3)).exp() - 1).sqrt()
    bound = (weights * relative * (v[:, None] - truth[:, :, None]).norm(dim=3)).sum(dim=2)
    errors = {}
    for features in (256, 4096):
        outs = torch.stack([performer.attend(q, k, v, 0.3, features, seed) for seed in range(20)])
        error = (outs - truth).square().sum(dim=3).mean(dim=0).sqrt()
        assert (error <= 1.1 * bound / math.sqrt(features)).all()
        errors[features] = float(error.square().mean().sqrt())
    assert 2.8 < errors[256] / errors[4096] < 5.6


# Reformer.


def shared_attention(q, v, scale, seen):
    """Each row's attention over what it sees, a set, with keys of length 1, itself at −10⁵."""
    keys = q / np.linalg.norm(q, axis=1, keepdims=True)
    out = np.zeros((len(q), v.shape[1]))
    for i, keys_seen in enumerate(seen):
        index = sorted(keys_seen)
        logits = np.array([scale * (q[i] @ keys[j]) - 1e5 * (i == j) for j in index])
        weights = np.exp(logits - logits.max())
        out[i] = weights @ v[index] / weights.sum()
    return out


@pytest.mark.parametrize(("n", "chunk", "rounds"), [(24, 4, 1), (24, 3, 4), (29, 5, 3), (7, 1, 2), (9, 8, 2), (1, 1, 1)])
def test_reformer_follows_its_definition(n, chunk, rounds):
    """The union of what a row sees in all rounds, each key once; chunks that do not divide n too."""
    q, _, v = draw(n, n)
    chunks = math.ceil(n / chunk)
    rotations = normal(seeded(3), rounds, 8, math.ceil(chunks / 2)).numpy()
    found = reformer.attend(q, q, v, 0.3, 2 * chunk * rounds, 3, rounds=rounds)
    for group in range(2):
        seen = [set() for _ in range(n)]
        for rotation in rotations:
            codes = buckets_of(q[group].numpy(), rotation)
            of = {row: place // chunk for place, row in enumerate(sorted(range(n), key=lambda row: (codes[row], row)))}
            for i, j in np.ndindex(n, n):
                if of[i] - 1 <= of[j] <= of[i]:
                    seen[i].add(j)
        expected = shared_attention(q[group].numpy(), v[group].numpy(), 0.3, seen)
        np.testing.assert_allclose(found[group], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rounds", [1, 4])
def test_reformer_with_everything_in_one_chunk_is_exact(rounds):
    q, k, v = draw(50, 50)
    expected = [shared_attention(q[g].numpy(), v[g].numpy(), 0.3, [range(50)] * 50) for g in range(2)]
    np.testing.assert_allclose(reformer.exact_shared(q, v, 0.3), expected, rtol=1e-10, atol=1e-12)
    found = reformer.attend(q, k, v, 0.3, 100 * rounds, 0, rounds=rounds)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_reformer_ignores_keys_and_needs_as_many_as_queries():
    q, k, v = draw(32, 32)
    assert torch.equal(reformer.attend(q, k, v, 0.3, 32, 0), reformer.attend(q, 7 - k, v, 0.3, 32, 0))
    with pytest.raises(ValueError, match="q must have as many rows as v, since keys are the queries: 32, got 31"):
        reformer.attend(q[:, :31], k, v, 0.3, 32, 0)
    with pytest.raises(ValueError, match="budget must be at least 8, got 7"):
        reformer.attend(q, k, v, 0.3, 7, 0)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        reformer.attend(q, k, v, 0.3, 32, 0, rounds=0)


def test_reformer_finds_its_neighbours():
    """Pairs of twins, which peaked attention sees alone: three times as many are found as a budget of 64 finds by chance."""
    q, _, v = draw(256, 256, d=16)
    q = 60 * functional.normalize(q, dim=2)
    q[:, 128:] = q[:, :128]
    truth = reformer.exact_shared(q, v, 1.0)
    found = reformer.attend(q, q, v, 1.0, 64, 0)
    assert ((found - truth).norm(dim=2) < 1e-2 * truth.norm(dim=2)).double().mean() > 3 * 64 / 256


# ScatterBrain.


def scattered(q, k, v, rows, seen, scale):
    """Features' weights, but exp of the logits where seen (n_q, n_k)."""
    weights = np.where(seen, np.exp(scale * q @ k.T), feature_weights(q, k, rows, scale))
    return weighted(weights, v)


@pytest.mark.parametrize(("n_q", "n_k", "budget"), [(20, 20, 8), (23, 17, 9), (11, 40, 13), (9, 5, 4), (4, 6, 2)])
def test_scatterbrain_window_follows_its_definition(n_q, n_k, budget):
    q, k, v = draw(n_q, n_k)
    features, width = budget // 2, budget - budget // 2
    seen, size = np.zeros((n_q, n_k), dtype=bool), max(1, width // 2)
    for i in range(n_q):
        middle = int((i // size + 0.5) * size * n_k / n_q)
        start = min(max(middle - width // 2, 0), n_k - width)
        seen[i, start : start + width] = True
    rows = performer.projection(8, features, seeded(3)).numpy()
    found = BASELINES["scatterbrain_window"](q, k, v, 0.3, budget, 3)
    for g in range(2):
        expected = scattered(q[g].numpy(), k[g].numpy(), v[g].numpy(), rows, seen, 0.3)
        np.testing.assert_allclose(found[g], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("n_q", "n_k", "budget"), [(20, 20, 8), (23, 17, 9), (11, 40, 13), (9, 5, 4), (4, 6, 2)])
def test_scatterbrain_lsh_follows_its_definition(n_q, n_k, budget):
    q, k, v = draw(n_q, n_k)
    features, width = budget // 2, budget - budget // 2
    generator = seeded(3)
    rows = performer.projection(8, features, generator).numpy()
    rotation = normal(generator, 8, math.ceil(n_k / (2 * width))).numpy()
    found = BASELINES["scatterbrain_lsh"](q, k, v, 0.3, budget, 3)
    for g in range(2):
        of_query, of_key = buckets_of(q[g].numpy(), rotation), buckets_of(k[g].numpy(), rotation)
        queries = sorted(range(n_q), key=lambda i, code=of_query: (code[i], i))
        keys = sorted(range(n_k), key=lambda j, code=of_key: (code[j], j))
        seen, size = np.zeros((n_q, n_k), dtype=bool), max(1, width // 2)
        for first in range(0, n_q, size):
            block = [queries[min(place, n_q - 1)] for place in range(first, first + size)]
            places = [sum(c < of_query[i] for c in of_key) + of_key.count(of_query[i]) / 2 for i in block]
            start = min(max(int(sum(places) / size) - width // 2, 0), n_k - width)
            seen[np.ix_(block, keys[start : start + width])] = True
        expected = scattered(q[g].numpy(), k[g].numpy(), v[g].numpy(), rows, seen, 0.3)
        np.testing.assert_allclose(found[g], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["scatterbrain_lsh", "scatterbrain_window"])
@pytest.mark.parametrize(("n_q", "n_k"), [(30, 30), (17, 30), (41, 19)])
def test_scatterbrain_with_all_keys_in_the_support_is_exact(name, n_q, n_k):
    q, k, v = draw(n_q, n_k)
    found = BASELINES[name](q, k, v, 0.3, 2 * n_k, 0)
    np.testing.assert_allclose(found, exact(q, k, v, 0.3), rtol=1e-9, atol=1e-10)


def test_hashing_finds_what_a_window_misses():
    """Keys are shuffled queries: each query's large logit is far away in position, and near in hash."""
    q, k, v = draw(256, 256, d=16)
    q = 4 * functional.normalize(q, dim=2)
    k = q[:, torch.randperm(256, generator=seeded(2))]
    query_index, key_index = scatterbrain_lsh.support(
        *(reformer.buckets(x, normal(seeded(1), 1, 16, 4))[:, 0] for x in (q, k)), 32
    )
    meets = [
        bool((k[g, key_index[g, b]] == q[g, i]).all(dim=1).any())
        for g in range(2)
        for b in range(query_index.shape[1])
        for i in query_index[g, b]
    ]
    assert np.mean(meets) > 0.6  # 32 of 256 by chance
    truth = torch.from_numpy(exact(q, k, v, 0.5))
    errors = {
        name: float((BASELINES[name](q, k, v, 0.5, 64, 0) - truth).norm())
        for name in ("scatterbrain_lsh", "scatterbrain_window")
    }
    assert errors["scatterbrain_lsh"] < 0.8 * errors["scatterbrain_window"]


# Nyströmformer.


def nystrom(q, k, v, scale, count, invert):
    """One group by the paper's equation, row by row; runs of n rows are those with the same i · count // n."""

    def means(x):
        runs = [[] for _ in range(count)]
        for i, row in enumerate(x):
            runs[i * count // len(x)].append(row)
        return np.array([np.mean(run, axis=0) for run in runs])

    def softmax(x, y):
        rows = [np.exp(scale * y @ row - (scale * y @ row).max()) for row in x]
        return np.array([row / row.sum() for row in rows])

    few_q, few_k = means(q), means(k)
    return softmax(q, few_k) @ invert(softmax(few_q, few_k)) @ softmax(few_q, k) @ v


def six_steps(a):
    """The iteration of the paper's equation 11."""
    one = np.eye(len(a))
    z = a.T / (np.linalg.norm(a, 1) * np.linalg.norm(a, np.inf))
    for _ in range(6):
        z = z @ (13 * one - a @ z @ (15 * one - a @ z @ (7 * one - a @ z))) / 4
    return z


@pytest.mark.parametrize(("n_q", "n_k", "landmarks"), [(24, 24, 6), (25, 18, 7), (13, 40, 13), (9, 9, 1)])
def test_nystromformer_follows_its_definition(n_q, n_k, landmarks):
    q, k, v = draw(n_q, n_k)
    for attend, invert in (
        (nystromformer.attend, six_steps),
        (nystromformer.attend_with_exact_inverse, np.linalg.pinv),
    ):
        found = attend(q, k, v, 0.3, landmarks, 0)
        for g in range(2):
            expected = nystrom(q[g].numpy(), k[g].numpy(), v[g].numpy(), 0.3, landmarks, invert)
            np.testing.assert_allclose(found[g], expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("n_q", "n_k"), [(30, 30), (20, 30)])
def test_nystromformer_with_a_landmark_for_each_query_is_exact(n_q, n_k):
    """A A⁺ A = A; with fewer queries than keys means stand for the keys, and A is square and regular still."""
    q, k, v = draw(n_q, n_k)
    found = nystromformer.attend_with_exact_inverse(q, k, v, 0.3, n_q, 0)
    np.testing.assert_allclose(found, exact(q, k, v, 0.3), rtol=1e-5, atol=1e-6)


def test_steps_lead_to_the_pseudo_inverse():
    q, k, _ = draw(10, 10)
    a = (q @ k.mT).softmax(dim=2)
    true = torch.linalg.pinv(a)
    away = [float((nystromformer.pseudo_inverse(a, steps) - true).norm() / true.norm()) for steps in (6, 12, 40)]
    assert away[0] > away[1] > away[2]
    assert away[2] < 1e-8


def test_nystromformer_has_no_more_landmarks_than_rows():
    q, k, v = draw(20, 12)
    with pytest.raises(ValueError, match="budget must be at most the number of queries and of keys, 12, got 13"):
        nystromformer.attend(q, k, v, 0.3, 13, 0)


# Counting.

G, N_Q, N_K, D, D_V = 2, 96, 64, 8, 5


def test_exact_attention_counts_the_same_for_everyone():
    q, k, v = draw(N_Q, N_K)
    for call in (
        lambda: (0.3 * q @ k.mT).softmax(dim=2) @ v,
        lambda: torch.einsum("gqk,gkc->gqc", torch.einsum("gqd,gkd->gqk", q, k).softmax(dim=2), v),
        lambda: [v[g].mT @ (k[g] @ row).softmax(dim=0) for g in range(G) for row in q[g]],
        lambda: functional.scaled_dot_product_attention(q, k, v),
        lambda: kdecore.attention(q, k, v, method="exact", kernels="array-api"),
    ):
        assert multiply_accumulates(call) == G * N_Q * N_K * (D + D_V)
    assert multiply_accumulates(lambda: reformer.exact_shared(k, v, 0.3)) == G * N_K * N_K * (D + D_V)


def test_fused_attention_of_the_cpu_counts():
    """PyTorch takes its fused kernel for four axes and d_v = d, and counts nothing there itself."""
    q, k, _ = (x[None] for x in draw(N_Q, N_K))
    with FlopCounterMode(display=False) as counter:
        functional.scaled_dot_product_attention(q, k, k)
    assert counter.get_total_flops() == 0
    assert multiply_accumulates(lambda: functional.scaled_dot_product_attention(q, k, k)) == G * N_Q * N_K * 2 * D


def test_products_of_vectors_count():
    a, x = torch.ones(6, 4), torch.ones(4)
    assert multiply_accumulates(lambda: a @ x) == 24
    assert multiply_accumulates(lambda: torch.addmv(torch.ones(6), a, x)) == 24
    assert multiply_accumulates(lambda: torch.addmm(torch.ones(6, 3), a, torch.ones(4, 3))) == 72
    assert multiply_accumulates(lambda: x @ x) == 4
    assert multiply_accumulates(lambda: (x * x).sum()) == 0


def test_a_budget_of_kdecore_counts_as_keys_do():
    """Blocks and samples take budget · (d + d_v) a query, and little more for hashes and norms."""
    q, k, v = draw(512, 512, d=16, d_v=16)
    counted = multiply_accumulates(
        lambda: kdecore.attention(q, k, v, method="sortlsh", budget=64, kernels="array-api", seed=0)
    )
    assert 1.0 <= counted / (2 * 512 * 64 * 32) < 1.3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nystromformer", 16 * (N_Q + N_K) * (D + D_V) + 16**2 * (D + D_V) + 24 * 16**3),
        ("performer", 16 * ((N_Q + N_K) * (D + D_V) + N_Q)),
        # Three windows of 8 keys by eight features, 24 blocks of 4 queries.
        ("scatterbrain_window", 8 * ((N_Q + N_K) * (D + D_V) + N_Q) + N_Q * 8 * (D + 8 + D_V)),
        ("scatterbrain_lsh", 8 * ((N_Q + N_K) * (D + D_V) + N_Q) + N_Q * 8 * (D + 8 + D_V) + (N_Q + N_K) * D * 4),
    ],
)
def test_what_a_budget_of_16_counts(name, expected):
    q, k, v = draw(N_Q, N_K)
    assert multiply_accumulates(lambda: BASELINES[name](q, k, v, 0.3, 16, 0)) == G * expected


def test_what_reformer_counts():
    q, k, v = draw(N_Q, N_Q)
    counted = multiply_accumulates(lambda: reformer.attend(q, k, v, 0.3, 48, 0))
    assert counted == G * N_Q * (48 * (D + D_V) + 4 * D * 8)


# Packages.


def test_performer_is_performer_pytorch_with_the_same_features():
    package = pytest.importorskip("performer_pytorch.performer_pytorch", exc_type=ImportError)
    q, k, v = (x[:1] for x in draw(40, 50, d=16))
    rows = performer.projection(16, 40, seeded(3))
    for eps, found in (
        (0.0, performer.attend(q, k, v, 1 / 4, 40, 3)),
        (1e-4, performer.attend_with_eps(q, k, v, 1 / 4, 40, 3)),
    ):
        phi_q, phi_k = (
            package.softmax_kernel(x[None], projection_matrix=rows, is_query=is_query, eps=eps)
            for x, is_query in ((q, True), (k, False))
        )
        torch.testing.assert_close(found, package.linear_attention(phi_q, phi_k, v[None])[0], rtol=1e-9, atol=1e-10)


def test_recorded_errors_are_those_of_the_packages():
    """What `python -m bench.baseline_packages` last wrote."""
    rows = json.loads(RECORDED.read_text(encoding="utf-8"))["cases"]["rows"]
    assert len(rows) == 40
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ours"] / row["package"])
        assert row["ratio"] <= 1.1
        assert row["ratio"] >= 0.9 or row["pair"] == "reformer-pytorch"
