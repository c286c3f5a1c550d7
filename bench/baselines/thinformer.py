"""Thinformer: Carrell, Gong, Shetty, Dwivedi and Mackey, Low-rank thinning, 2025, arXiv 2502.12063.

Exact attention to some of the keys, all of the same weight, chosen so that sums over them are near those over all:
pairs (key, value) are points of the kernel exp(s k·k') ⟨ṽ, ṽ'⟩, ṽ = (v, max |v|), which is divided by exp(s max ‖k‖²)
lest it overflow.

Kernel halving goes through pairs of neighbouring points and keeps one of each. With f = h(x) − h(x') and b = ‖f‖, and I
the sum over earlier pairs of what was kept minus what wasn't, x is kept with probability ½ (1 − ⟨I, f⟩ / a), cut to [0,
1], so that I stays small:

    a = max(b σ √(2 log(2 n / δ)), b²),   σ² ← σ² + b² max(0, 1 + (b² − 2 a) σ² / a²),   δ = ½

Compress makes it near-linear: four quarters are compressed by themselves, put together, and halved; the smallest parts
are taken as they are. 2^g √n of n keys are left where those have 4^g.

`budget`: keys are halved until no more are left than it says, so n / 2^D, between half the budget and the whole.

Pitfalls: one set of keys for all queries, as good as attention is of low rank; one that carries much of a query's
attention is missed half of the time by each halving. The paper's n are multiples of 4^D: of others, the rest, drawn at
random, is left out, and parts of fewer than `SMALLEST` keys are not made, so that it is less than a fifth. The choice
is a loop of some 2 · budget steps.
"""

import math

import torch
from torch import Tensor

from bench.baselines import exact
from bench.baselines.arguments import check
from bench.baselines.uniform import sample

FAILURE = 0.5
"""δ, the chance that a probability had to be cut, dealt evenly to all pairs."""
SMALLEST = 4


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int, seed: int) -> Tensor:
    """Return Thinformer's estimate, (G, n_q, d_v), for q (G, n_q, d), k (G, n_k, d) and v (G, n_k, d_v)."""
    check(q, k, v, scale, budget)
    kept = coreset(k, v, scale, budget, seed)[..., None]
    return exact.attend(q, k.take_along_dim(kept, 1), v.take_along_dim(kept, 1), scale, budget, seed)


def coreset(k: Tensor, v: Tensor, scale: float, budget: int, seed: int) -> Tensor:
    """Return the numbers of the keys that are attended to, (G, m) int64, m ≤ budget."""
    n = k.shape[1]
    halvings = (n // (budget + 1)).bit_length()  # the fewest that leave n // 2**halvings ≤ budget
    levels = max(0, min(halvings, ((n // SMALLEST).bit_length() - 1) // 2))  # SMALLEST · 4**levels ≤ n
    points = abs(scale) ** 0.5 * k, torch.cat([v, v.abs().amax((1, 2), keepdim=True).expand(-1, n, 1)], 2)
    shift = points[0].square().sum(2).amax(1)[:, None, None, None]
    generator = torch.Generator(k.device).manual_seed(seed)
    parts: Tensor = sample(k, n - n % 4**levels, generator).unflatten(1, (4**levels, -1))  # (G, parts, keys)
    for number in range(halvings):
        if number < levels:
            parts = parts.unflatten(1, (-1, 4)).flatten(2)
        parts = halve(parts, differences(parts, *points, shift), FAILURE / n, generator)
    return parts[:, 0]


def differences(parts: Tensor, keys: Tensor, values: Tensor, shift: Tensor) -> Tensor:
    """Return ⟨f, f'⟩ of all pairs of neighbours in each part, (G, parts, pairs, pairs); f = h(first) − h(second)."""
    pairs = parts.shape[2] // 2
    group = torch.arange(len(parts), device=parts.device)[:, None, None]
    keys, values = (x[group, parts[..., : 2 * pairs]] for x in (keys, values))
    kernel = (keys @ keys.mT - shift).exp() * (values @ values.mT)
    signs = kernel.new_tensor([1.0, -1.0])
    return torch.einsum("gpxayb,a,b->gpxy", kernel.unflatten(3, (pairs, 2)).unflatten(2, (pairs, 2)), signs, signs)


def halve(parts: Tensor, products: Tensor, failure: float, generator: torch.Generator) -> Tensor:
    """Keep one of each pair of neighbours.

    Parameters
    ----------
    parts
        (G, parts, n) int64; the last of an odd number is left out.
    products
        (G, parts, n // 2, n // 2), `differences`.
    failure
        Chance that the probability of one pair had to be cut.
    generator
        Of the choice.

    Returns
    -------
    Tensor
        (G, parts, n // 2) int64.
    """
    pairs = products.shape[2]
    firsts, seconds = parts[..., : 2 * pairs].unflatten(2, (pairs, 2)).unbind(3)
    drawn = torch.rand(firsts.shape, generator=generator, device=parts.device, dtype=products.dtype)
    length = math.sqrt(2 * math.log(2 / failure))
    imbalance = torch.zeros_like(drawn)  # ⟨I, f⟩ of all pairs
    variance = torch.zeros_like(drawn[..., 0])
    first = torch.empty_like(firsts, dtype=torch.bool)
    for i in range(pairs):
        square = products[..., i, i].clamp(min=0)
        threshold = torch.maximum(length * (square * variance).sqrt(), square).clamp(min=torch.finfo(drawn.dtype).tiny)
        growth = 1 + (square - 2 * threshold) * (variance / threshold / threshold)
        variance = variance + square * growth.clamp(min=0)
        first[..., i] = drawn[..., i] < (1 - imbalance[..., i] / threshold) / 2
        imbalance = imbalance + torch.where(first[..., i, None], products[..., i, :], -products[..., i, :])
    return torch.where(first, firsts, seconds)
