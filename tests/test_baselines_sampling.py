"""Baselines that choose or summarise keys: against their papers' definitions in loops, and where they are to be exact."""

import math
import os
from functools import partial

import numpy as np
import pytest
import torch

from bench.baselines import exact, kdeformer_released, mean, monarch, pisa, thinformer, uniform, wildcat
from tests import oracles

ALL = {"exact": exact, "mean": mean, "uniform": uniform, "pisa": pisa, "monarch": monarch, "wildcat": wildcat,
       "thinformer": thinformer}  # fmt: skip
ESTIMATES = {name: module for name, module in ALL.items() if name not in ("exact", "mean")}
DRAWN = {"uniform", "wildcat", "thinformer"}
every = pytest.mark.parametrize("name", ALL)
every_estimate = pytest.mark.parametrize("name", ESTIMATES)


def inputs(groups=2, n_q=53, n_k=77, d=5, d_v=3, seed=0, dtype=np.float64):
    """Rows that follow each other smoothly, so that blocks of them are alike."""
    random = np.random.default_rng(seed)
    sizes = ((n_q, d), (n_k, d), (n_k, d_v))
    return tuple(torch.from_numpy(random.standard_normal((groups, *size)).cumsum(1).astype(dtype) / 4) for size in sizes)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def by_group(oracle, q, k, v):
    """Apply an oracle of NumPy matrices to each group."""
    return np.stack([oracle(*(x.numpy() for x in one)) for one in zip(q, k, v, strict=True)])


def exactly(q, k, v, scale):
    return oracles.exact_attention(q.numpy(), k.numpy(), v.numpy(), scale)[0]


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@every
@pytest.mark.parametrize("n", [77, 78, 128])
def test_a_budget_of_all_keys_is_exact(name, n):
    q, k, v = inputs(n_k=n)
    out = ALL[name].attend(q, k, v, 0.7, n, 3).numpy()
    expected = np.broadcast_to(v.numpy().mean(1, keepdims=True), out.shape) if name == "mean" else exactly(q, k, v, 0.7)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6 if name == "wildcat" else 1e-12)


@every
@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_rows_and_scale_together_are_what_counts(name, scale):
    q, k, v = inputs()
    call = partial(ALL[name].attend, budget=40, seed=1)
    # Powers of two change no rounding, and so no draw.
    torch.testing.assert_close(call(2 * q, 2 * k, v, scale / 4), call(q, k, v, scale), rtol=1e-9, atol=1e-9)


@every
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_logits_do_not_overflow(name, dtype):
    q, k, v = inputs(dtype=dtype)
    scale = 30.0 / (q @ k.mT).abs().max().item()
    for factor in (1.0, 10.0):  # logits up to 30, and up to 300
        out = ALL[name].attend(q, k, v, factor * scale, 40, 0)
        assert out.dtype == v.dtype
        assert out.isfinite().all()
        if name != "pisa":  # whose first-order term has no bound
            low, high = (limit[:, None] for limit in (v.amin(1), v.amax(1)))
            slack = 1e-5 * v.abs().max()
            assert ((low - slack <= out) & (out <= high + slack)).all()


@every
@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (1, 50), (50, 1), (7, 3), (64, 64), (130, 129), (5, 131)])
def test_any_sizes(name, n_q, n_k):
    q, k, v = inputs(n_q=n_q, n_k=n_k)
    for budget in (1, 2, 3, 50, 64, 128, 10**6):
        if name == "monarch" and budget < min(n_k, 4 * math.isqrt(n_k) + 4):
            continue
        out = ALL[name].attend(q, k, v, 0.5, budget, 0)
        assert out.shape == (2, n_q, 3)
        assert out.isfinite().all()


@every
def test_nothing_global_is_drawn_from(name):
    q, k, v = inputs()
    before = torch.get_rng_state()
    first, again, other = (ALL[name].attend(q, k, v, 0.5, 40, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name not in DRAWN)


@every
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda q, k, v: (q[0], k, v, 9), "q must"),
        (lambda q, k, v: (q, k.float(), v, 9), "k must be"),
        (lambda q, k, v: (q, k[..., 1:], v, 9), "k must have"),
        (lambda q, k, v: (q, k[:1], v, 9), "k must have"),
        (lambda q, k, v: (q, k[:, :0], v[:, :0], 9), "k must have"),
        (lambda q, k, v: (q, k, v[:, 1:], 9), "v must have"),
        (lambda q, k, v: (q, k, v, 0), "budget must be at least 1, got 0"),
    ],
)
def test_wrong_sizes_are_named(name, wrong, named):
    q, k, v, budget = wrong(*inputs())
    with pytest.raises(ValueError, match=named):
        ALL[name].attend(q, k, v, 0.5, budget, 0)


@every_estimate
def test_better_than_the_control_on_smooth_rows(name):
    """Means over seeds; the mean of the values errs by 10 % there at least."""
    q, k, v = inputs(groups=4, n_q=256, n_k=256)
    expected = exact.attend(q, k, v, 1.0, 1, 0)

    def error(module):
        return np.mean([(module.attend(q, k, v, 1.0, 96, seed) - expected).norm().item() for seed in range(5)])

    assert error(mean) > 0.1 * expected.norm().item()
    assert error(ESTIMATES[name]) < 0.5 * error(mean)


# Uniform


def test_uniform_weighs_each_key_by_n_over_m():
    q, k, v = inputs()
    drawn = uniform.sample(k, 20, seeded(5)).numpy()
    assert [len(set(one)) for one in drawn.tolist()] == [20, 20]
    assert drawn.tolist() != [drawn[0].tolist()] * 2

    def oracle(number, q, k, v):
        rows = []
        for query in q:
            terms = [(np.exp(0.5 * query @ k[i] + np.log(77 / 20)), v[i]) for i in drawn[number]]
            rows.append(sum(weight * value for weight, value in terms) / sum(weight for weight, _ in terms))
        return np.array(rows)

    expected = np.stack([oracle(number, q[number].numpy(), k[number].numpy(), v[number].numpy()) for number in (0, 1)])
    np.testing.assert_allclose(uniform.attend(q, k, v, 0.5, 20, 5).numpy(), expected, rtol=1e-10)


def test_uniform_draws_every_key_equally_often():
    """4,000 groups, 3 of 8 keys: five standard deviations each, so a false alarm in 200,000 runs."""
    counts = np.bincount(uniform.sample(torch.zeros(4000, 8, 1), 3, seeded(0)).numpy().ravel(), minlength=8)
    assert (np.abs(counts - 1500) < 5 * np.sqrt(4000 * 3 / 8 * 5 / 8)).all()


# PISA


def pisa_oracle(q, k, v, scale, size, chosen):
    n_k, d, d_v = len(k), k.shape[1], v.shape[1]
    blocks = [range(first, min(first + size, n_k)) for first in range(0, n_k, size)]
    means = [(k[list(block)].mean(0), v[list(block)].mean(0)) for block in blocks]
    first_order = np.zeros((d, d_v))
    for block, (mean_key, _) in zip(blocks, means, strict=True):
        for i in block:
            first_order += np.outer(k[i] - mean_key, v[i]) / n_k
    rows = []
    for number, query in enumerate(q):
        first = number // size * size
        mean_query = q[first : first + size].mean(0)
        ranked = sorted(range(len(blocks)), key=lambda b: -scale * mean_query @ means[b][0])
        numerator, denominator = np.zeros(d_v), 0.0
        for b in range(len(blocks)):
            if b in ranked[:chosen]:
                for i in blocks[b]:
                    numerator += np.exp(scale * query @ k[i]) * v[i]
                    denominator += np.exp(scale * query @ k[i])
            else:
                weight = len(blocks[b]) * np.exp(scale * query @ means[b][0])
                numerator += weight * (means[b][1] + scale * query @ first_order)
                denominator += weight
        rows.append(numerator / denominator)
    return np.array(rows)


@pytest.mark.parametrize(("n_q", "n_k"), [(192, 192), (131, 201), (300, 140)])
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_pisa_is_its_formula(n_q, n_k, chosen):
    q, k, v = inputs(n_q=n_q, n_k=n_k)
    blocks = -(-n_k // 64)
    budget = blocks + chosen * 63
    assert pisa.layout(n_k, budget) == (64, chosen)
    out = pisa.attend(q, k, v, 0.6, budget, 0).numpy()
    expected = by_group(partial(pisa_oracle, scale=0.6, size=64, chosen=chosen), q, k, v)
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 129, 1000, 8192])
def test_pisa_keeps_to_its_budget(n):
    for budget in (1, 2, 5, 64, 100, 384, n - 1, n):
        size, chosen = pisa.layout(n, max(1, budget))
        blocks = -(-n // size)
        assert 0 <= chosen <= blocks
        assert min(n, chosen * size) + blocks - chosen <= max(1, budget)
        assert size == 64 or -(-n // (size // 2)) > budget


# MonarchAttention


def monarch_oracle(q, k, v, scale, chunks, rounds):
    """Return the output and the objective after each update, in loops."""
    size_q, size_k = -(-len(q) // chunks), -(-len(k) // chunks)

    def query(chunk, j):
        return q[chunk * size_q + j] if chunk * size_q + j < len(q) else None

    keys = [range(chunk * size_k, min((chunk + 1) * size_k, len(k))) for chunk in range(chunks)]
    left = np.zeros((size_q, chunks, chunks))
    left[:, range(chunks), range(chunks)] = 1.0
    right = {}
    objectives = []

    def entropy(weights):
        return -sum(w * np.log(w) for w in weights if w > 0)

    def objective():
        """⟨M, s Q Kᵀ⟩ + entropy(M), entry by entry."""
        total = 0.0
        for j in range(size_q):
            for chunk in range(chunks):
                if query(chunk, j) is None:
                    continue
                for other in range(chunks):
                    for i, key in enumerate(keys[other]):
                        weight = left[j, other, chunk] * right[other, j][i]
                        if weight > 0:
                            total += weight * (scale * query(chunk, j) @ k[key] - np.log(weight))
        return total

    for _ in range(rounds):
        for other in range(chunks):
            for j in range(size_q):
                seen = [(left[j, other, chunk], query(chunk, j)) for chunk in range(chunks) if query(chunk, j) is not None]
                share = sum(weight for weight, _ in seen)
                mixed = sum(weight * row for weight, row in seen) / share if share > 0 else np.zeros(q.shape[1])
                right[other, j] = softmax(np.array([scale * mixed @ k[key] for key in keys[other]]))
        objectives.append(objective())
        for j in range(size_q):
            for chunk in range(chunks):
                if query(chunk, j) is not None:
                    centres = [sum(w * k[key] for w, key in zip(right[o, j], keys[o], strict=True)) for o in range(chunks)]
                    left[j, :, chunk] = softmax(
                        np.array([scale * query(chunk, j) @ centres[o] + entropy(right[o, j]) for o in range(chunks)])
                    )
        objectives.append(objective())
    rows = [
        sum(
            left[row % size_q, other, row // size_q] * weight * v[key]
            for other in range(chunks)
            for weight, key in zip(right[other, row % size_q], keys[other], strict=True)
        )
        for row in range(len(q))
    ]
    return np.array(rows), objectives


@pytest.mark.parametrize(("n_q", "n_k", "budget"), [(36, 36, 24), (35, 35, 25), (23, 45, 29), (41, 20, 19), (5, 40, 27)])
def test_monarch_is_its_formula(n_q, n_k, budget):
    q, k, v = inputs(n_q=n_q, n_k=n_k)
    chunks = monarch.chunks_for(n_k, budget)
    assert monarch.ROUNDS * (chunks + -(-n_k // chunks)) <= budget
    out = monarch.attend(q, k, v, 0.6, budget, 0).numpy()

    def oracle(q, k, v):
        rows, objectives = monarch_oracle(q, k, v, 0.6, chunks, monarch.ROUNDS)
        logits = 0.6 * q @ k.T
        top = logits.max(1)
        assert (np.diff(objectives) > -1e-9).all()  # no update makes it worse
        best = (top + np.log(np.exp(logits - top[:, None]).sum(1))).sum()  # of all matrices
        assert objectives[-1] <= best + 1e-9
        return rows

    np.testing.assert_allclose(out, by_group(oracle, q, k, v), rtol=1e-9, atol=1e-11)


def test_monarch_is_exact_where_attention_is_a_monarch_matrix():
    """Logits a[j, k, l] + b[k, j, i] give L and R by themselves."""
    random = np.random.default_rng(0)
    chunks = rows = 6
    n = chunks * rows
    a, b = 3 * random.standard_normal((rows, chunks, chunks)), 3 * random.standard_normal((chunks, rows, rows))
    q, k = np.zeros((n, n + rows)), np.zeros((n, n + rows))
    for chunk in range(chunks):
        for j in range(rows):
            q[chunk * rows + j, [chunk * rows + j, n + j]] = 1.0
    for other in range(chunks):
        for i in range(rows):
            for j in range(rows):
                k[other * rows + i, n + j] = b[other, j, i]
                for chunk in range(chunks):
                    k[other * rows + i, chunk * rows + j] = a[j, other, chunk]
    q, k, v = (torch.from_numpy(x)[None] for x in (q, k, random.standard_normal((n, 3))))
    assert monarch.chunks_for(n, 24) == chunks
    np.testing.assert_allclose(monarch.attend(q, k, v, 1.0, 24, 0).numpy(), exactly(q, k, v, 1.0), rtol=1e-10)


def test_monarch_says_what_it_needs_at_least():
    q, k, v = inputs(n_k=77)
    with pytest.raises(ValueError, match="budget must be at least 36 for 77 keys, got 35"):
        monarch.attend(q, k, v, 1.0, 35, 0)
    assert monarch.attend(q, k, v, 1.0, 36, 0).isfinite().all()


# WildCat


def inverse(function, y, high):
    """Solve function(x) = y for an increasing function by bisection."""
    low = 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < y else (low, middle)
    return low


def temperature_oracle(q, k, scale):
    """Return τ² of centred keys."""

    def lambert(x):
        return inverse(lambda w: w * np.exp(w), x, 50.0)

    of_queries, of_keys = max(map(np.linalg.norm, q)), max(map(np.linalg.norm, k))
    b = np.log(len(k)) / (scale * of_queries * of_keys) + 2
    crossing = np.sqrt(1 + np.exp(lambert(2 / np.e**2) + 2))
    return of_keys / of_queries * b / (2 * lambert(b / (2 * crossing)))


def wildcat_oracle(q, k, v, scale, pivots, clip=True):
    k = k - k.mean(0)
    tau = temperature_oracle(q, k, scale)
    kernel = np.exp(scale * k @ k.T / tau)
    weights = np.linalg.solve(kernel[np.ix_(pivots, pivots)], kernel[pivots])
    rows = []
    for query in q:
        features = np.array([np.exp(scale * query @ k[s]) for s in pivots])
        denominator = features @ weights.sum(1)
        ratio = features @ weights @ v / denominator
        rows.append(np.clip(ratio if denominator > 0 else 0.0, v.min(0), v.max(0)) if clip else ratio)
    return np.array(rows)


@pytest.fixture
def pivots(monkeypatch):
    """Pivots that WildCat chose, (G, rank) for each call."""
    found = []
    chosen = wildcat.coreset

    def recorded(*arguments):
        result = chosen(*arguments)
        found.append(result[0].numpy())
        return result

    monkeypatch.setattr(wildcat, "coreset", recorded)
    return found


@pytest.mark.parametrize("rank", [1, 2, 5, 12])
@pytest.mark.parametrize("scale", [0.2, 2.0])
def test_wildcat_is_its_formula(pivots, rank, scale):
    q, k, v = inputs()
    out = wildcat.attend(q, k, v, scale, rank, 4).numpy()
    expected = [
        wildcat_oracle(*(x[g].numpy() for x in (q, k, v)), scale, pivots[0][g].tolist()) for g in range(2)
    ]  # fmt: skip
    np.testing.assert_allclose(out, np.stack(expected), rtol=1e-7, atol=1e-8)
    assert [len(set(one)) for one in pivots[0].tolist()] == [rank] * 2


def test_wildcat_temperature_is_that_of_its_paper():
    q, k, _ = inputs()
    for scale in (1e-3, 0.1, 1.0, 40.0):
        found = wildcat.squared_temperature(q, k, scale).numpy()[:, 0, 0]
        expected = [temperature_oracle(q[g].numpy(), k[g].numpy(), scale) for g in range(2)]
        np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_wildcat_draws_pivots_by_what_is_left():
    """Two of 4 keys in 20,000 groups: each of 12 pairs within five standard deviations, a false alarm in 100,000 runs."""
    groups = 20_000
    x = np.random.default_rng(1).standard_normal((4, 2))
    kernel = np.exp(x @ x.T)
    scaled = torch.from_numpy(x).expand(groups, 4, 2)
    pivots, _ = wildcat.coreset(scaled, scaled.square().sum(2) / 2, 2, 0)
    firsts = np.diag(kernel) / np.trace(kernel)
    for i in range(4):
        left = np.diag(kernel) - kernel[:, i] ** 2 / kernel[i, i]
        left[i] = 0.0
        for j in range(4):
            expected = groups * firsts[i] * left[j] / left.sum()
            found = int(((pivots[:, 0] == i) & (pivots[:, 1] == j)).sum())
            assert abs(found - expected) <= 5 * np.sqrt(expected)


def test_wildcat_takes_keys_that_are_the_same():
    q, k, v = inputs()
    k[:, 1::2] = k[:, ::2][:, :-1]
    np.testing.assert_allclose(wildcat.attend(q, k, v, 0.7, 77, 0).numpy(), exactly(q, k, v, 0.7), atol=1e-6)
    same = torch.ones_like(k)
    np.testing.assert_allclose(wildcat.attend(q, same, v, 0.7, 9, 0).numpy(), exactly(q, same, v, 0.7), atol=1e-9)


def test_wildcat_needs_its_clipping(pivots):
    """Where attention is peaked, negative weights take some outputs far out of the range of the values."""
    random = np.random.default_rng(2)
    q, k = (torch.from_numpy(random.standard_normal((1, 100, 2))) for _ in range(2))
    v = k + torch.from_numpy(random.standard_normal((1, 100, 2)))
    scale = 40.0 / (q @ k.mT).abs().max().item()
    out, expected = wildcat.attend(q, k, v, scale, 8, 0)[0].numpy(), exactly(q, k, v, scale)[0]
    unclipped = wildcat_oracle(*(x[0].numpy() for x in (q, k, v)), scale, pivots[0][0].tolist(), clip=False)
    assert np.linalg.norm(out - expected) < 0.5 * np.linalg.norm(expected)
    assert np.linalg.norm(unclipped - expected) > 2 * np.linalg.norm(expected)


# Thinformer


def kernel_oracle(k, v, scale):
    """Return the kernel of all pairs of keys and values, of which a constant factor changes no choice."""
    largest = np.abs(v).max()
    exponents = scale * k @ k.T
    return np.exp(exponents - np.diag(exponents).max()) * (v @ v.T + largest**2)


def halving_oracle(kernel, rows, drawn, failure):
    """Keep one of each pair, by the sum of kernel functions of those kept minus those left out."""
    kept, left_out, variance = [], [], 0.0
    for pair in range(len(rows) // 2):
        x, y = rows[2 * pair], rows[2 * pair + 1]
        square = max(kernel[x, x] + kernel[y, y] - 2 * kernel[x, y], 0.0)
        a = max(np.sqrt(square * variance) * np.sqrt(2 * np.log(2 / failure)), square)
        alpha = sum(kernel[z, x] - kernel[z, y] for z in kept) - sum(kernel[z, x] - kernel[z, y] for z in left_out)
        variance += square * max(0.0, 1 + (square - 2 * a) * variance / a**2) if a > 0 else 0.0
        chance = min(1.0, max(0.0, (1 - alpha / a) / 2)) if a > 0 else 0.5
        first = drawn[pair] < chance
        kept.append(x if first else y)
        left_out.append(y if first else x)
    return kept


def compress_oracle(kernel, rows, drawn, level, number, failure):
    """Compress four quarters, and halve what is left of them; ``drawn`` are the uniform numbers of each level's parts."""
    if level == 0:
        return rows
    size = len(rows) // 4
    parts = [rows[size * c : size * (c + 1)] for c in range(4)]
    left = [row for c, part in enumerate(parts)
            for row in compress_oracle(kernel, part, drawn, level - 1, 4 * number + c, failure)]  # fmt: skip
    return halving_oracle(kernel, left, drawn[level - 1][number], failure)


@pytest.mark.parametrize(
    ("n", "budget", "levels", "halvings"), [(64, 16, 2, 2), (77, 20, 2, 2), (77, 40, 1, 1), (77, 5, 2, 4), (3, 1, 0, 1)]
)
@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_thinformer_is_compress_with_kernel_halving(n, budget, levels, halvings, scale):
    _, k, v = inputs(n_k=n, groups=1)
    found = thinformer.coreset(k, v, scale, budget, 7)[0].tolist()
    generator = seeded(7)
    rows = uniform.sample(k, n - n % 4**levels, generator)[0].tolist()
    drawn, size = [], len(rows) // 4**levels
    for number in range(halvings):
        parts = 4 ** max(0, levels - number - 1)
        size = 2 * size if number < levels else size // 2
        drawn.append(torch.rand(1, parts, size, generator=generator, dtype=torch.float64)[0].numpy())
    kernel = kernel_oracle(k[0].numpy(), v[0].numpy(), scale)
    expected = compress_oracle(kernel, rows, drawn, levels, 0, thinformer.FAILURE / n)
    for number in range(levels, halvings):
        expected = halving_oracle(kernel, expected, drawn[number][0], thinformer.FAILURE / n)
    assert found == expected


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 77, 1000, 1024])
def test_thinformer_keeps_to_its_budget(n):
    _, k, v = inputs(n_k=n, groups=1)
    for budget in {1, 2, 10, 64, 100, n}:
        found = thinformer.coreset(k, v, 0.5, budget, 0)[0].tolist()
        assert len(set(found)) == len(found)
        assert min(n, budget) * 0.4 <= len(found) <= budget
    assert len(thinformer.coreset(k, v, 0.5, n, 0)[0]) == n


def test_thinformer_sums_are_nearer_than_a_random_half():
    """The distance of mean kernel functions that halving is to keep small, over 20 seeds."""
    _, k, v = inputs(n_k=256, groups=1)
    kernel = kernel_oracle(k[0].numpy(), v[0].numpy(), 0.5)

    def distance(rows):
        weights = np.full(256, -1 / 256)
        weights[rows] += 1 / len(rows)
        return weights @ kernel @ weights

    thinned = np.mean([distance(thinformer.coreset(k, v, 0.5, 64, seed)[0].numpy()) for seed in range(20)])
    at_random = np.mean([distance(uniform.sample(k, 64, seeded(seed))[0].numpy()) for seed in range(20)])
    assert thinned < 0.5 * at_random


# KDEformer as released

STAND_IN = """
import torch
asked = []
class KDEformer:
    def __init__(self, **options):
        self.options = options
    def __call__(self, query, key, value):
        asked.append((self.options, query.shape, torch.rand(1).item()))
        q, k, v = (x[:, :, 0] for x in (query, key, value))
        return (torch.softmax(q @ k.mT, -1) @ v)[:, None]
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with a class of the released one's name and arguments, which computes exact attention."""
    (tmp_path / "KDEformer.py").write_text(STAND_IN)
    monkeypatch.setitem(os.environ, kdeformer_released.VARIABLE, str(tmp_path))
    return kdeformer_released.released(str(tmp_path))


@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_released_kdeformer_gets_what_it_takes(checkout, scale):
    q, k, v = inputs(n_q=48, n_k=96)
    before = torch.get_rng_state()
    out = kdeformer_released.attend(q, k, v, scale, 60, 3).numpy()
    np.testing.assert_allclose(out, exactly(q, k, v, scale), rtol=1e-10, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), before)
    asked = checkout.__call__.__globals__["asked"]
    options, shape, drawn = asked[-2]
    # 16 is the largest divisor of 96 that is no more than a third of 60.
    assert options == {"num_projs": 7, "Bucket_size": 16, "sample_size": 44, "mask_size": 44 * 48}
    assert shape == (1, 48, 1, 5)
    kdeformer_released.attend(q, k, v, scale, 60, 3)
    assert asked[-2][2] == drawn


def test_released_kdeformer_needs_queries_for_every_block(checkout):
    q, k, v = inputs(n_q=53, n_k=96)
    with pytest.raises(ValueError, match="q must have a multiple of 6 rows, one for each block of keys, got 53"):
        kdeformer_released.attend(q, k, v, 0.5, 60, 0)


@pytest.mark.parametrize("folder", [None, "", "nowhere"])
def test_released_kdeformer_says_what_it_lacks(monkeypatch, folder):
    monkeypatch.delenv(kdeformer_released.VARIABLE, raising=False)
    if folder is not None:
        monkeypatch.setenv(kdeformer_released.VARIABLE, folder)
    with pytest.raises(FileNotFoundError, match=f"KDEFORMER_REPO must name a folder with .*, got {folder or ''!r}"):
        kdeformer_released.attend(*inputs(), 0.5, 60, 0)
