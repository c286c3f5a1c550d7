"""WildCat: Schröder and Mackey, WildCat: near-linear attention in theory and practice, 2026, arXiv 2602.10056.

Keys are centred, which changes no softmax. r of them, S, are chosen by randomly pivoted Cholesky of the kernel h(k, k')
= exp(s k·k' / τ²): the next one with probability proportional to what is left of h(k, k). The function exp(s ⟨·, kᵢ⟩)
is replaced by Σ_S W[S, i] exp(s ⟨·, k_S⟩) with W = h(S, S)⁻¹ h(S, all), numerator and denominator by exp(s q·k_S) W [v,
1]. Their ratio is clipped to the range that each column of the values has: without, negative weights put it anywhere.

The temperature weighs the rank that h needs against what an error in it costs, with R_Q and R_K the largest norms of
queries and keys, and Lambert's function W₀:

    τ² = ρ R_K / R_Q,   ρ = b / (2 W₀(b / 2ρ₀)),   b = log n / (s R_Q R_K) + 2,   ρ₀ = √(1 + exp(W₀(2/e²) + 2))

`budget` is r, capped at n.

Pitfalls: one set of keys for all queries, so peaked attention errs much; W is found in O(n r²). Everything is computed
in float64, where pivots are told from rounding, with the kernel divided by its diagonal (which changes neither pivots
nor ratio), so that no exponential overflows.
"""

import math

import torch
from torch import Tensor

from bench.baselines.arguments import check

LEAST_PIVOT = 1e-12
"""Of a diagonal of ones: below it a key is a combination of those chosen already, and gets no weight."""
LEAST_NORM = 1e-12
CROSSING = 3.1916010253237044
"""ρ₀."""


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int, seed: int) -> Tensor:
    """Return WildCat's estimate, (G, n_q, d_v), for q (G, n_q, d), k (G, n_k, d) and v (G, n_k, d_v)."""
    check(q, k, v, scale, budget)
    queries, keys, values = (x.double() for x in (q, k, v))
    keys = keys - keys.mean(1, keepdim=True)
    scaled = keys * (abs(scale) / squared_temperature(queries, keys, scale)).sqrt()
    exponents = scaled.square().sum(2) / 2  # h(k, k') = exp(these of both) · the Gaussian kernel of `scaled`
    pivots, weights = coreset(scaled, exponents, min(budget, k.shape[1]), seed)
    # exp(exponents of i − exponents of S) turns weights of the Gaussian kernel into those of h.
    weights = weights * (exponents - exponents.amax(1, keepdim=True)).exp()[:, None]
    sums = weights @ torch.cat([values, torch.ones_like(values[..., :1])], 2)
    logits = scale * queries @ keys.take_along_dim(pivots[..., None], 1).mT - exponents.gather(1, pivots)[:, None]
    out = (logits - logits.amax(2, keepdim=True)).exp() @ sums
    numerator, denominator = out[..., :-1], out[..., -1:]
    ratio = torch.where(denominator > 0, numerator / denominator, 0.0)
    clipped: Tensor = ratio.clamp(values.amin(1, keepdim=True), values.amax(1, keepdim=True))
    return clipped.to(v.dtype)


def squared_temperature(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return τ², (G, 1, 1), of queries (G, n_q, d) and centred keys (G, n_k, d)."""
    of_queries, of_keys = (x.norm(dim=2).amax(1)[:, None, None].clamp(min=LEAST_NORM) for x in (queries, keys))
    largest_logit = (abs(scale) * of_queries * of_keys).clamp(min=LEAST_NORM)
    b = math.log(keys.shape[1]) / largest_logit + 2
    squared: Tensor = of_keys / of_queries * b / (2 * lambert(b / (2 * CROSSING)))
    return squared


def lambert(x: Tensor) -> Tensor:
    """Return w ≥ 0 with w exp(w) = x ≥ 0, by Halley's iteration, which gets three times as many digits each time."""
    w = x.log1p()
    for _ in range(8):
        left = w - x * (-w).exp()
        w = w - left / (w + 1 - (w + 2) * left / (2 * w + 2))
    return w


def coreset(scaled: Tensor, exponents: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose keys by randomly pivoted Cholesky.

    Parameters
    ----------
    scaled
        (G, n, d) float64, keys whose Gaussian kernel exp(−‖x − x'‖² / 2) is approximated.
    exponents
        (G, n): pivots are drawn as from the kernel with the diagonal exp(2 · exponents).
    rank
        Number of pivots, 1 ≤ rank ≤ n.
    seed
        Of the pivots.

    Returns
    -------
    pivots
        (G, rank) int64.
    weights
        (G, rank, n): K_SS⁻¹ K_S of the Gaussian kernel, with rows of zeros where there was nothing left to choose.
    """
    generator = torch.Generator(scaled.device).manual_seed(seed)
    groups, n, _ = scaled.shape
    factor = scaled.new_zeros(groups, n, rank)
    residual = scaled.new_ones(groups, n)
    diagonal = (2 * (exponents - exponents.amax(1, keepdim=True))).exp()
    pivots = torch.zeros(groups, rank, dtype=torch.int64, device=scaled.device)
    for i in range(rank):
        shares = residual * diagonal
        shares = torch.where(shares.sum(1, keepdim=True) > 0, shares, 1.0)
        pivot = torch.multinomial(shares, 1, generator=generator)
        pivots[:, i : i + 1] = pivot
        row = (-(scaled - scaled.take_along_dim(pivot[..., None], 1)).square().sum(2) / 2).exp()
        column = row - (factor @ factor.take_along_dim(pivot[..., None], 1).mT)[..., 0]
        left = residual.gather(1, pivot)
        factor[..., i] = torch.where(left > LEAST_PIVOT, column / left.clamp(min=LEAST_PIVOT).sqrt(), 0.0)
        residual = (residual - factor[..., i].square()).clamp(min=0).scatter(1, pivot, 0.0)
    square = factor.take_along_dim(pivots[..., None], 1).tril()
    # A column of zeros: with 1 on the diagonal the key's own row of weights becomes zero, and no other changes.
    ends = square.diagonal(dim1=1, dim2=2)
    square = square + torch.diag_embed((ends == 0).to(square.dtype))
    return pivots, torch.linalg.solve_triangular(square.mT, factor.mT, upper=True)
