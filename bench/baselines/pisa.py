"""PISA: Li et al., Piecewise sparse attention is wiser for efficient diffusion transformers, 2026, arXiv 2602.01077.

Queries and keys are cut into blocks in the order that they come in. For each block of queries, the key blocks whose
mean key has the largest product with its mean query are attended to exactly. Of any other block B with mean key k̄ the
sum Σ exp(s q·kᵢ) vᵢ is expanded around k̄: exp(s q·k̄) (Σ vᵢ + s q·H_B), H_B = Σ (kᵢ − k̄) vᵢᵀ, and |B| exp(s q·k̄) in
the denominator, where the first order is zero. The second term has one matrix for all blocks: the mean of H over all
keys.

`budget` = chosen blocks · block + the means of the others. Blocks have the paper's 64 rows, and more only where the
means alone would exceed the budget.

Pitfalls: the order has to be meaningful, since blocks of unlike keys have useless means; budgets below n / 64 + 63
leave no block exact; the first-order term isn't bounded, and large logits make it larger than the values; choosing
takes n_q n_k / 64² products of means, which aren't counted.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from bench.baselines.arguments import check

BLOCK = 64


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int, seed: int) -> Tensor:
    """Return PISA's estimate, (G, n_q, d_v), for q (G, n_q, d), k (G, n_k, d) and v (G, n_k, d_v); ``seed`` is not used."""
    check(q, k, v, scale, budget)
    (groups, n_q, _), n_k = q.shape, k.shape[1]
    size, chosen = layout(n_k, budget)
    queries, keys, values = (in_blocks(x, size) for x in (q, k, v))
    counts = in_blocks(torch.ones_like(k[:1, :, :1]), size).sum(2)[..., 0]  # (1, blocks), the keys in each
    mean_keys, mean_values = keys.sum(2) / counts[..., None], values.sum(2) / counts[..., None]
    # Rows behind the last have values of zero: nothing is left of them here.
    first_order = torch.einsum("gbid,gbiv->gdv", keys - mean_keys[:, :, None], values) / n_k

    # The sums of queries: a block's choice doesn't depend on their number.
    best = (scale * queries.sum(2) @ mean_keys.mT).topk(chosen).indices  # (G, query blocks, chosen)
    hidden = torch.zeros(groups, queries.shape[1], keys.shape[1], dtype=torch.bool, device=q.device).scatter(2, best, True)
    of_means = scale * queries @ mean_keys[:, None].mT + counts.log()[:, None, None]
    of_means = of_means.masked_fill(hidden[:, :, None], -torch.inf)

    group = torch.arange(groups, device=q.device)[:, None, None]
    own_keys, own_values = (x[group, best].flatten(2, 3) for x in (keys, values))  # (G, query blocks, chosen · size, d)
    behind = (best[..., None] * size + torch.arange(size, device=q.device)).flatten(2) >= n_k
    of_keys = (scale * queries @ own_keys.mT).masked_fill(behind[:, :, None], -torch.inf)

    shares = torch.cat([of_keys, of_means], -1).softmax(-1)
    exact, rest = shares.split([own_keys.shape[2], keys.shape[1]], -1)
    out: Tensor = exact @ own_values + rest @ mean_values[:, None]
    out = out + rest.sum(-1, keepdim=True) * (scale * queries @ first_order[:, None])
    return out.flatten(1, 2)[:, :n_q]


def layout(n_k: int, budget: int) -> tuple[int, int]:
    """Return the rows of a block, and how many key blocks a block of queries attends to exactly."""
    size = BLOCK
    while -(-n_k // size) > budget:
        size *= 2
    blocks = -(-n_k // size)
    return size, blocks if budget >= n_k else (budget - blocks) // (size - 1)


def in_blocks(x: Tensor, size: int) -> Tensor:
    """Return (G, n, d) as (G, blocks, size, d), with rows of zeros behind the last."""
    blocks: Tensor = pad(x, (0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))
    return blocks
