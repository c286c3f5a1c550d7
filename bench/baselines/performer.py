"""Performer: Choromanski et al., *Rethinking Attention with Performers*, ICLR 2021 (FAVOR+).

exp(q·k) is the mean of exp(w·q − ‖q‖²/2) exp(w·k − ‖k‖²/2) over normal w, and so, of m of them, about φ(q)·φ(k) with
φ(x) = exp(Wx − ‖x‖²/2)/√m, x times √scale. Then out = φ(q) (φ(K)ᵀV) / (φ(q)·Σφ(k)), never a matrix of n_q × n_k. Rows of W
are orthogonal within blocks of d, which errs less, and as long as normal ones (χ_d). `budget` is m.

Pitfalls: φ(q)·φ(k) has the relative variance (exp(‖q + k‖²) − 1)/m, so that features in reach say nothing of peaked
attention (‖q + k‖² is some 32 where d = 64 and logits deviate by 2). Exponents are kept in range by maxima, one a query and
one for the keys; keys far below theirs underflow. Here it is one for each feature instead, and given to the queries'
exponents before their maximum is taken: the same φ(q)·φ(k), but nothing that counts underflows, and denominators are 1 or
more. The authors' code and performer-pytorch add 1e-4 to features after the maxima: `attend_with_eps`. Where attention is
peaked that outweighs the features, and pulls results to the mean of the values. A QR decomposition by Householder's
reflections is uniform among orthogonal matrices only with the signs of R's diagonal, which performer-pytorch leaves out.
"""

import torch
from torch import Tensor

from bench.baselines.arguments import check, check_positive, normal, seeded


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int, seed: int) -> Tensor:
    """Attend by FAVOR+ with ``budget`` features, the same ones in all groups.

    Parameters
    ----------
    q, k, v
        (G, n_q, d), (G, n_k, d), (G, n_k, d_v), float32 or float64.
    scale
        Of the logits, positive.
    budget
        Features, 1 or more.
    seed
        Of the features.

    Returns
    -------
    Tensor
        (G, n_q, d_v) in q's dtype. Cost: (n_q + n_k)·budget·(d + d_v) multiply-accumulates a group, about.

    Raises
    ------
    ValueError
        An argument has the wrong shape, dtype or size.
    """
    check(q, k, v, scale, budget)
    check_positive(scale)
    rows = projection(q.shape[2], budget, seeded(seed)).to(q)
    log_k = log_features(k, rows, scale)
    top = log_k.amax(dim=1, keepdim=True)
    log_q = log_features(q, rows, scale) + top
    return linear_attention((log_q - log_q.amax(dim=2, keepdim=True)).exp(), (log_k - top).exp(), v)


def attend_with_eps(q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int, seed: int, *, eps: float = 1e-4) -> Tensor:
    """Attend as the authors' code does: ``eps`` is added to features, whose maxima are those of Wx; else as `attend`."""
    check(q, k, v, scale, budget)
    check_positive(scale)
    rows = projection(q.shape[2], budget, seeded(seed)).to(q)

    def features(x: Tensor, axes: tuple[int, ...]) -> Tensor:
        x = scale**0.5 * x
        projected = x @ rows.mT
        return (projected - projected.amax(dim=axes, keepdim=True) - 0.5 * x.square().sum(dim=2, keepdim=True)).exp() + eps

    return linear_attention(features(q, (2,)), features(k, (1, 2)), v)


def projection(d: int, features: int, generator: torch.Generator) -> Tensor:
    """Return W (features, d) in float64: blocks of d orthogonal rows with norms of normal vectors."""
    basis, triangle = torch.linalg.qr(normal(generator, -(-features // d), d, d))
    basis = basis * triangle.diagonal(dim1=1, dim2=2).sign()[:, None, :]
    rows: Tensor = normal(generator, features, d).norm(dim=1, keepdim=True) * basis.reshape(-1, d)[:features]
    return rows


def log_features(x: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Return log φ(x) + ½ log m for x (G, n, d) and W (m, d): (G, n, m)."""
    x = scale**0.5 * x
    return x @ rows.mT - 0.5 * x.square().sum(dim=2, keepdim=True)


def linear_attention(phi_q: Tensor, phi_k: Tensor, v: Tensor) -> Tensor:
    """Return φ(q) (φ(K)ᵀV) over φ(q)·Σφ(k), features (G, n_q, m) and (G, n_k, m)."""
    out: Tensor = phi_q @ (phi_k.mT @ v) / (phi_q @ phi_k.sum(dim=1)[:, :, None])
    return out
