"""The mean of the values, the same for every query: a control, which no method may be worse than.

A model that does as well with it needs no attention there, and tells nothing of an approximation. `budget`, `scale` and
`seed` are not used.
"""

from torch import Tensor

from bench.baselines.arguments import check


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int, seed: int) -> Tensor:
    """Return the mean of the values for every query, (G, n_q, d_v), for q (G, n_q, d), k (G, n_k, d), v (G, n_k, d_v)."""
    check(q, k, v, scale, budget)
    return v.mean(1, keepdim=True).repeat(1, q.shape[1], 1)
