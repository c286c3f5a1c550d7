"""Reformer: Kitaev, Kaiser, Levskaya, *Reformer: The Efficient Transformer*, ICLR 2020.

Attention whose keys are its normalised queries, kⱼ = qⱼ/‖qⱼ‖, so that k is not used, and n_q = n_k. A round hashes rows to
argmax [xR; −xR], sorts them by that, and cuts them into chunks: row i sees its own chunk and the one before, Pᵢ. Itself it
sees only where it sees nothing else: 10⁵ is taken from that logit. Pairs that meet in N rounds have log N taken from theirs,
and rounds are merged by their log-sum-exp, which makes the result attention over all that a row meets. `budget` is
2 · chunk · rounds, which counts such pairs N times.

Pitfalls: compare with `exact_shared`, not with exact attention. The paper masks what lies in other buckets of Pᵢ, and so has
2n/chunk buckets, two a chunk. reformer-pytorch doesn't mask by default, and has n/chunk; so it is here: those keys cost as
much, and masking would only take keys away. reformer-pytorch lets the first chunk of a round see the last one of the round
before, and leaves out log N by default, so that pairs that meet often weigh more. Told to take it
(allow_duplicate_attention=False), it counts 0 for pairs that meet in such a first chunk alone: they weigh 10⁹ times as much.
"""

import torch
from torch import Tensor
from torch.nn import functional

from bench.baselines.arguments import check, check_positive, normal, seeded

ITSELF = 1e5
"""What is taken from a row's logit with itself."""


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int, seed: int, *, rounds: int = 4) -> Tensor:
    """Attend within chunks of rows sorted by their hashes; k is not used, since keys are the normalised queries.

    Parameters
    ----------
    q, k, v
        (G, n, d), (G, n, d), (G, n, d_v), float32 or float64.
    scale
        Of the logits, positive.
    budget
        Keys that a row is compared with, 2 · chunk · rounds; what is left over by the division isn't used.
    seed
        Of the hashes, which all groups share.
    rounds
        Hashes, 1 or more.

    Returns
    -------
    Tensor
        (G, n, d_v) in q's dtype. Cost: n·budget·(d + d_v) multiply-accumulates a group, and n·d·(n/chunk)·rounds/2 to hash.

    Raises
    ------
    ValueError
        An argument has the wrong shape, dtype or size, or n_q ≠ n_k.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    check(q, k, v, scale, budget, least=2 * rounds)
    check_positive(scale)
    groups, n, d = q.shape
    if v.shape[1] != n:
        raise ValueError(f"q must have as many rows as v, since keys are the queries: {v.shape[1]}, got {n}")
    chunk = min(budget // (2 * rounds), n)
    chunks = -(-n // chunk)
    order = buckets(q, normal(seeded(seed), rounds, d, -(-chunks // 2)).to(q)).argsort(dim=2, stable=True)
    place = order.argsort(dim=2)
    # −1 stands for the chunk before the first one, and for what the last one lacks.
    seen = functional.pad(order, (chunk, chunks * chunk - n), value=-1).unfold(2, 2 * chunk, chunk)
    keys = functional.normalize(q, dim=2)
    group = torch.arange(groups, device=q.device)[:, None, None]
    outs, lses = [], []
    for number in range(rounds):
        key = seen[:, number]
        row, index = key[..., chunk:].clamp_min(0), key.clamp_min(0)
        logits = scale * q[group, row] @ keys[group, index].mT
        logits = logits - ITSELF * (row[..., None] == index[..., None, :])
        # 0 for rows that fill the last chunk up: their results go nowhere, but gradients of infinities would be NaN.
        logits = logits - met(place // chunk, group, row, index).clamp_min(1).to(q).log()
        logits = logits.masked_fill(key[..., None, :] < 0, -torch.inf)
        back = place[:, number]
        outs.append((logits.softmax(dim=3) @ v[group, index]).flatten(1, 2)[group[..., 0], back])
        lses.append(logits.logsumexp(dim=3).flatten(1)[group[..., 0], back])
    share = torch.stack(lses).softmax(dim=0)
    return (share[..., None] * torch.stack(outs)).sum(dim=0)


def exact_shared(q: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return what `attend` approximates, (G, n, d_v): keys are the normalised queries, and rows hardly see themselves."""
    check(q, q, v, scale, 1)
    check_positive(scale)
    logits = scale * q @ functional.normalize(q, dim=2).mT
    return (logits - ITSELF * torch.eye(q.shape[1]).to(q)).softmax(dim=2) @ v


def buckets(x: Tensor, rotations: Tensor) -> Tensor:
    """Return argmax [xR; −xR] for x (G, n, d) and each R of rotations (rounds, d, half the buckets): (G, rounds, n)."""
    turned = x[:, None] @ rotations
    return torch.cat([turned, -turned], dim=3).argmax(dim=3)


def met(chunk_of: Tensor, group: Tensor, row: Tensor, key: Tensor) -> Tensor:
    """Count in how many rounds each row sees each key beside it in this one.

    Parameters
    ----------
    chunk_of
        Each row's chunk in each round, (G, rounds, n) int64.
    group
        0 … G − 1, (G, 1, 1).
    row, key
        Rows and keys of each chunk of this round, (G, chunks, c) and (G, chunks, 2c) int64.

    Returns
    -------
    Tensor
        (G, chunks, c, 2c) int64; 1 or more but for keys that stand for nothing.
    """
    count = torch.zeros((*row.shape, key.shape[2]), dtype=torch.int64, device=row.device)
    for of_round in chunk_of.unbind(dim=1):
        ahead = of_round[group, row][..., None] - of_round[group, key][..., None, :]
        count += (ahead == 0) | (ahead == 1)
    return count
