"""Exact attention, softmax(scale · q kᵀ) v, by PyTorch's own function: what all others approximate.

`budget` and `seed` are not used: a result is made of all keys.
"""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.baselines.arguments import check


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int, seed: int) -> Tensor:
    """Return exact attention, (G, n_q, d_v), for q (G, n_q, d), k (G, n_k, d) and v (G, n_k, d_v)."""
    check(q, k, v, scale, budget)
    return scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0]
