"""ScatterBrain with a window: Chen et al., *Scatterbrain: Unifying Sparse and Low-rank Attention*, NeurIPS 2021.

Performer's features for all pairs, put right on a sparse support S of pairs: weights are φ(q)·φ(k) everywhere, and
exp(q·k) − φ(q)·φ(k) is added on S, which makes them exact there. Here S has, for each block of queries that follow each
other, the keys in a window around the block's place: what KDEformer's tables call ScatterBrain. `budget` is half features,
half keys of the window; blocks have half as many queries as windows have keys.

Pitfalls: what φ makes of S is added up with all of φ and then subtracted. Where features overestimate pairs of S by orders
of magnitude, rounding is all that is left, and denominators may be about 0. A window knows positions only.
"""

import math

import torch
from torch import Tensor

from bench.baselines.arguments import check, check_positive, seeded
from bench.baselines.performer import log_features, projection


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int, seed: int) -> Tensor:
    """Attend by features, and exactly within a window.

    Parameters
    ----------
    q, k, v
        (G, n_q, d), (G, n_k, d), (G, n_k, d_v), float32 or float64. Query i stands at key i · n_k / n_q.
    scale
        Of the logits, positive.
    budget
        Features and keys of a window together, 2 or more.
    seed
        Of the features.

    Returns
    -------
    Tensor
        (G, n_q, d_v) in q's dtype. Cost: (n_q + n_k)·(budget/2)·(d + d_v) multiply-accumulates a group for features, and
        n_q·(budget/2)·(d + d_v + budget/2) on windows.

    Raises
    ------
    ValueError
        An argument has the wrong shape, dtype or size.
    """
    check(q, k, v, scale, budget, least=2)
    check_positive(scale)
    features, width = halves(budget, k.shape[1])
    index = blocks(q.shape[1], max(1, width // 2)).to(q.device)
    middle = (2 * index[:, 0] + index.shape[1]) * k.shape[1] // (2 * q.shape[1])
    positions = torch.arange(k.shape[1], device=q.device)
    key_index = windows(middle[None], positions[None], width)
    lead = (q.shape[0], -1, -1)
    rows = projection(q.shape[2], features, seeded(seed)).to(q)
    return features_and_support(q, k, v, scale, rows, index.expand(lead), key_index.expand(lead))


def halves(budget: int, n_k: int) -> tuple[int, int]:
    """Return how many features and how many keys of the support a budget gives."""
    return budget // 2, min(budget - budget // 2, n_k)


def blocks(n: int, size: int) -> Tensor:
    """Return 0 … n − 1 in blocks (B, size); the last one is filled up with n − 1."""
    return torch.arange(-(-n // size) * size).clamp_max(n - 1).view(-1, size)


def windows(middle: Tensor, order: Tensor, width: int) -> Tensor:
    """Return the keys around each middle (G, B), a place in order (G, n_k): (G, B, width), all within the order."""
    n_k = order.shape[1]
    start = (middle - width // 2).clamp(0, n_k - width)
    place = start[..., None] + torch.arange(width, device=order.device)
    return order.gather(1, place.flatten(1)).view_as(place)


def features_and_support(
    q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Tensor, query_index: Tensor, key_index: Tensor
) -> Tensor:
    """Attend by features, and exactly where each block of queries meets its keys.

    Parameters
    ----------
    q, k, v, scale
        As in `attend`.
    rows
        W (m, d).
    query_index, key_index
        (G, B, c) and (G, B, s) int64: queries of each block, all of them and the last one repeated at the end, and the keys
        of each, none twice.

    Returns
    -------
    Tensor
        (G, n_q, d_v).
    """
    log_k = log_features(k, rows, scale)
    top = log_k.amax(dim=1, keepdim=True)
    phi_k = (log_k - top).exp()
    log_q = log_features(q, rows, scale) + top - math.log(rows.shape[0])
    group = torch.arange(q.shape[0], device=q.device)[:, None, None]
    exponents = log_q[group, query_index]
    logits = scale * q[group, query_index] @ k[group, key_index].mT
    # One offset for a query's features and logits, so that they can be added up.
    offset = torch.maximum(exponents.amax(dim=3), logits.amax(dim=3))[..., None]
    phi_q = (exponents - offset).exp()
    sparse = (logits - offset).exp() - phi_q @ phi_k[group, key_index].mT
    numerator = sparse @ v[group, key_index] + phi_q @ (phi_k.mT @ v)[:, None]
    denominator = sparse.sum(dim=3, keepdim=True) + phi_q @ phi_k.sum(dim=1)[:, None, :, None]
    found = (numerator / denominator).flatten(1, 2)[:, : q.shape[1]]
    out = torch.empty_like(found)
    out[group[..., 0], query_index.flatten(1)[:, : q.shape[1]]] = found
    return out
