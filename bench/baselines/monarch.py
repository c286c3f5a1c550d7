"""MonarchAttention: Yaras, Xu, Abillama, Lee and Balzano, 2025, arXiv 2505.18698; written from its formulas alone.

Rows are cut into m chunks in the order that they come in: query (l, j) is the j-th of chunk l, key (k, i) the i-th of
chunk k. The matrix of attention is approximated by a Monarch matrix, two block-diagonal factors with a permutation
between: weight L[j, k, l] · R[k, j, i], Σₖ L = Σᵢ R = 1. Among all matrices of that form the one is sought that
maximises what softmax attention maximises among all, ⟨M, s Q Kᵀ⟩ + entropy(M). It is concave in each factor, with the
maximum in closed form:

    R[k, j, :] = softmaxᵢ(s q̄[k, j] · k[k, i]),                         q̄[k, j] = Σₗ L[j, k, l] q[l, j] / Σₗ L[j, k, l]
    L[j, :, l] = softmaxₖ(s q[l, j] · Σᵢ R[k, j, i] k[k, i] + entropy(R[k, j, :]))

L begins as the identity: chunks of queries look at the chunk of keys of their number. Then R and L are updated in turn,
`ROUNDS` times.

`budget` = `ROUNDS` · (m + n_k / m): in each round a query meets n_k / m keys for its share of R, and m of their means for
L. m is the largest that the budget allows, which erred less than the smallest on smooth sequences and as much on words.
n_k keys and more are one chunk, which is exact attention.

Pitfalls: there is nothing below 2 · `ROUNDS` · √n_k keys, where ValueError is raised; m queries, one of each chunk, share a
factor R, so the order has to be meaningful; the alternation finds a local maximum. Rows behind the last are masked.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from bench.baselines.arguments import check

ROUNDS = 2


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int, seed: int) -> Tensor:
    """Return MonarchAttention, (G, n_q, d_v), for q (G, n_q, d), k (G, n_k, d) and v (G, n_k, d_v); ``seed`` is not used."""
    check(q, k, v, scale, budget)
    chunks = chunks_for(k.shape[1], budget)
    queries, keys, values = (in_chunks(x, chunks) for x in (q, k, v))  # (G, chunks, rows, columns)
    rows = in_chunks(torch.ones_like(q[:1, :, :1]), chunks)[..., 0].mT[:, :, None]  # (1, j, 1, l), 0 behind the last query
    behind = in_chunks(torch.ones_like(k[:1, :, :1]), chunks).mT == 0  # (1, k, 1, i)
    left = rows * torch.eye(chunks, dtype=q.dtype, device=q.device)
    for _ in range(ROUNDS):
        mixed = torch.einsum("gjkl,gljd->gkjd", left.expand(len(q), -1, -1, -1), queries)
        mixed = mixed / left.sum(-1).mT[..., None].clamp(min=torch.finfo(q.dtype).tiny)
        right = (scale * mixed @ keys.mT).masked_fill(behind, -torch.inf).softmax(-1)
        logits = scale * torch.einsum("gljd,gkjd->gjkl", queries, right @ keys)
        # The slope of −x log x at 0, where keys are padding, is infinite, and gradients would be NaN.
        entropy = torch.special.entr(right.clamp_min(torch.finfo(q.dtype).tiny)).sum(-1)
        left = rows * (logits + entropy.mT[..., None]).softmax(2)
    out: Tensor = torch.einsum("gjkl,gkjv->gljv", left, right @ values)
    return out.flatten(1, 2)[:, : q.shape[1]]


def chunks_for(n_k: int, budget: int) -> int:
    """Return the largest number of chunks that the budget allows, or raise ValueError where it allows none."""
    if budget >= n_k:
        return 1
    costs = {rows: ROUNDS * (rows + -(-n_k // rows)) for rows in range(1, math.isqrt(n_k) + 2)}
    for rows, cost in costs.items():
        if cost <= budget:
            return -(-n_k // rows)
    raise ValueError(f"budget must be at least {min(costs.values())} for {n_k} keys, got {budget}")


def in_chunks(x: Tensor, chunks: int) -> Tensor:
    """Return (G, n, d) as (G, chunks, rows, d), with rows of zeros behind the last."""
    rows = -(-x.shape[1] // chunks)
    chunked: Tensor = pad(x, (0, 0, 0, chunks * rows - x.shape[1])).unflatten(1, (chunks, rows))
    return chunked
