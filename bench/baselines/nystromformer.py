"""Nyströmformer: Xiong et al., *Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention*, AAAI 2021.

Landmarks are the means of runs of rows that follow each other, m of queries and m of keys. With σ the softmax of rows,
out = σ(QK̃ᵀ) Z σ(Q̃Kᵀ)V, where Z is about the pseudo-inverse of A = σ(Q̃K̃ᵀ): six steps of
Z ← ¼ Z (13 − AZ (15 − AZ (7 − AZ))) from Aᵀ/(‖A‖₁ ‖A‖∞), both norms of each group's own matrix. The convolution of values
that the paper's network adds is no part of it. `budget` is m, the landmarks; these see all keys besides.

Pitfalls: order matters, since means of rows that have nothing in common say nothing. Z is no softmax: weights may be
negative. Six steps stay short of the pseudo-inverse wherever A is ill-conditioned, which tempers it: on peaked attention
`attend_with_exact_inverse`, the limit of many steps, explodes. Its decomposition is not counted as multiply-accumulates.
nystrom-attention takes the norms over all groups at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.baselines.arguments import check


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int, seed: int) -> Tensor:
    """Attend through ``budget`` landmarks, with the paper's six steps for the pseudo-inverse.

    Parameters
    ----------
    q, k, v
        (G, n_q, d), (G, n_k, d), (G, n_k, d_v), float32 or float64.
    scale
        Of the logits, positive.
    budget
        Landmarks, no more than n_q and n_k; runs differ by one row where it doesn't divide these.
    seed
        Not used: nothing is drawn.

    Returns
    -------
    Tensor
        (G, n_q, d_v) in q's dtype. Cost: (n_q + n_k)·budget·(d + d_v) + 24·budget³ multiply-accumulates a group, about.

    Raises
    ------
    ValueError
        An argument has the wrong shape, dtype or size.
    """
    return attend_by(pseudo_inverse, q, k, v, scale, budget)


def attend_with_exact_inverse(q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int, seed: int) -> Tensor:
    """Attend as `attend` does, with the pseudo-inverse itself."""
    return attend_by(torch.linalg.pinv, q, k, v, scale, budget)


def attend_by(invert: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int) -> Tensor:
    """Attend as `attend` does; ``invert`` takes A (G, m, m) to Z."""
    check(q, k, v, scale, budget)
    if budget > (most := min(q.shape[1], k.shape[1])):
        raise ValueError(f"budget must be at most the number of queries and of keys, {most}, got {budget}")
    few_q, few_k = run_means(q, budget), run_means(k, budget)
    near = (scale * q @ few_k.mT).softmax(dim=2)
    middle = (scale * few_q @ few_k.mT).softmax(dim=2)
    far = (scale * few_q @ k.mT).softmax(dim=2)
    return near @ (invert(middle) @ (far @ v))


def run_means(x: Tensor, count: int) -> Tensor:
    """Return the means of ``count`` runs of rows: (G, n, d) → (G, count, d)."""
    run = torch.arange(x.shape[1], device=x.device) * count // x.shape[1]
    sums = torch.zeros((x.shape[0], count, x.shape[2]), dtype=x.dtype, device=x.device).index_add_(1, run, x)
    return sums / run.bincount(minlength=count)[:, None]


def pseudo_inverse(a: Tensor, steps: int = 6) -> Tensor:
    """Return the paper's iterate for the pseudo-inverse of a (G, m, m) with entries of 0 and more."""
    z = a.mT / (a.sum(dim=1).amax(dim=1) * a.sum(dim=2).amax(dim=1))[:, None, None]
    one = torch.eye(a.shape[1]).to(a)
    for _ in range(steps):
        az = a @ z
        z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
    return z
