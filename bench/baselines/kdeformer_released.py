"""KDEformer (Zandieh, Han, Daliri and Karbasi, ICML 2023, arXiv 2302.02451) as its authors released it: Algorithm 3.

`KDEFORMER_REPO` names a checkout of their repository, whose KDEformer.py needs einops; nothing of it is kept here.
kdecore's `sortlsh` is the same algorithm.

`budget`: blocks of a third of it, or the next number below that divides n_k, and samples for the rest: 384 are 128 +
256.

Pitfalls: no maximum is subtracted before exp, so large logits become NaN; n_k must be divisible by the size of a block,
and n_q by the number of blocks: a prime n_k leaves blocks of one key. No budget makes it exact.
"""

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.baselines.arguments import check

VARIABLE = "KDEFORMER_REPO"
HASHES = 7


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int, seed: int) -> Tensor:
    """Return what the released code does, (G, n_q, d_v), for q (G, n_q, d), k (G, n_k, d) and v (G, n_k, d_v).

    Raises FileNotFoundError where `KDEFORMER_REPO` names no checkout.
    """
    check(q, k, v, scale, budget)
    (n_q, n_k), layer = (q.shape[1], k.shape[1]), released(os.environ.get(VARIABLE, ""))
    block = max(size for size in range(1, max(1, min(budget // 3, n_k)) + 1) if n_k % size == 0)
    if n_q % (n_k // block):
        raise ValueError(f"q must have a multiple of {n_k // block} rows, one for each block of keys, got {n_q}")
    # It has no scale: the root goes into both, as in its own experiments.
    root = abs(scale) ** 0.5
    q = q * (root if scale >= 0 else -root)
    samples = max(1, budget - block)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        call = layer(num_projs=HASHES, Bucket_size=block, sample_size=samples, mask_size=samples * n_q)
        ones = [[x[None, :, None, :] for x in one] for one in zip(q, k * root, v, strict=True)]
        return torch.stack([call(query=one[0], key=one[1], value=one[2])[0, 0] for one in ones])


@cache
def released(folder: str) -> Callable[..., Any]:
    """Return the authors' class out of a checkout of their repository."""
    path = Path(folder) / "KDEformer.py"
    if not folder or not path.is_file():
        raise FileNotFoundError(f"{VARIABLE} must name a folder with the authors' KDEformer.py, got {folder!r}")
    spec = importlib.util.spec_from_file_location("_kdeformer_released", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layer: Callable[..., Any] = module.KDEformer
    return layer
