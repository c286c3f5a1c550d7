"""ScatterBrain by hashing: Chen et al., *Scatterbrain: Unifying Sparse and Low-rank Attention*, NeurIPS 2021.

As `bench.baselines.scatterbrain_window`, but the support has pairs that are likely to have large logits: queries and keys
are hashed by the same R to argmax [xR; −xR], as in Reformer, and each sorted by that. A block of queries meets the keys
around the mean place that its queries' buckets have among the keys. `budget` is half features, half keys of the support;
buckets have as many keys, in the mean, as the support has; blocks have half as many queries.

Pitfalls: those of the window's version, but for positions. Buckets are of unequal sizes: of a large one only the middle is
met, and of a small one more than itself. One hash: pairs with large logits are often missed. Angles are hashed, so that long
keys are no likelier to be met than short ones.
"""

import torch
from torch import Tensor

from bench.baselines.arguments import check, check_positive, normal, seeded
from bench.baselines.performer import projection
from bench.baselines.reformer import buckets
from bench.baselines.scatterbrain_window import blocks, features_and_support, halves, windows


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int, seed: int) -> Tensor:
    """Attend by features, and exactly where hashes bring queries and keys together.

    Parameters
    ----------
    q, k, v
        (G, n_q, d), (G, n_k, d), (G, n_k, d_v), float32 or float64.
    scale
        Of the logits, positive.
    budget
        Features and keys of the support together, 2 or more.
    seed
        Of the features and of the hash, which all groups share.

    Returns
    -------
    Tensor
        (G, n_q, d_v) in q's dtype. Cost: that of the window's version, and (n_q + n_k)·d·n_k/budget multiply-accumulates a
        group for the hash.

    Raises
    ------
    ValueError
        An argument has the wrong shape, dtype or size.
    """
    check(q, k, v, scale, budget, least=2)
    check_positive(scale)
    features, width = halves(budget, k.shape[1])
    generator = seeded(seed)
    rows = projection(q.shape[2], features, generator).to(q)
    rotation = normal(generator, 1, q.shape[2], -(-k.shape[1] // (2 * width))).to(q)
    query_index, key_index = support(buckets(q, rotation)[:, 0], buckets(k, rotation)[:, 0], width)
    return features_and_support(q, k, v, scale, rows, query_index, key_index)


def support(query_bucket: Tensor, key_bucket: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return queries sorted by bucket (G, n_q), in blocks (G, B, width/2), and the keys of each (G, B, width)."""
    ranked, order = key_bucket.sort(dim=1, stable=True)
    query_index = query_bucket.argsort(dim=1, stable=True)[:, blocks(query_bucket.shape[1], max(1, width // 2))]
    wanted = query_bucket.gather(1, query_index.flatten(1))
    ends = torch.searchsorted(ranked, wanted) + torch.searchsorted(ranked, wanted, right=True)
    middle = ends.view_as(query_index).sum(dim=2) // (2 * query_index.shape[2])
    return query_index, windows(middle, order, width)
