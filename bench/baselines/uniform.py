"""Attention to a uniform sample of the keys, drawn without replacement, one for all queries of a group: a control.

Numerator and denominator are unbiased with the weight n / m on each of m keys, log(n / m) on its logit; as all have the
same, it cancels in their ratio and isn't computed. `budget` is m.

Pitfall: a key that carries much of a query's attention is missed with probability 1 − m / n, and the error is of order
one then.
"""

import torch
from torch import Tensor

from bench.baselines import exact
from bench.baselines.arguments import check


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int, seed: int) -> Tensor:
    """Return attention to a sample of the keys, (G, n_q, d_v), for q (G, n_q, d), k (G, n_k, d) and v (G, n_k, d_v)."""
    check(q, k, v, scale, budget)
    drawn = sample(k, min(budget, k.shape[1]), torch.Generator(k.device).manual_seed(seed))[..., None]
    return exact.attend(q, k.take_along_dim(drawn, 1), v.take_along_dim(drawn, 1), scale, budget, seed)


def sample(k: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return the numbers of ``count`` keys of each group, drawn without replacement, ascending, (G, count) int64."""
    ranks = torch.rand(k.shape[:2], generator=generator, device=k.device, dtype=torch.float64)
    return ranks.topk(count, sorted=False).indices.sort().values
