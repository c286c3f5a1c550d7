"""Peers, run from their authors' own code where a copy of it is at hand; nothing of it is kept here.

`KDEFORMER_REPO` names a checkout of the KDEformer authors' repository (its KDEformer.py needs torch and einops).
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Peer = Callable[[Any, Any, Any, float, int], Any]
"""(q, k, v, scale, seed) → output, all NumPy (n, d)."""


def kdeformer(*, block_size: int, num_samples: int, num_hashes: int = 7) -> Peer | None:
    """Return the released KDEformer (Algorithm 3), or None where `KDEFORMER_REPO` names no checkout.

    It has no scale, so queries are scaled before; n must be divisible by block_size.
    """
    path = Path(os.environ.get("KDEFORMER_REPO", "")) / "KDEformer.py"
    if not path.is_file():
        return None
    import torch

    spec = importlib.util.spec_from_file_location("kdeformer_released", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(q: Any, k: Any, v: Any, scale: float, seed: int) -> Any:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            layer = module.KDEformer(
                num_projs=num_hashes, Bucket_size=block_size, sample_size=num_samples, mask_size=num_samples * len(q)
            )
            # With K = Q the released protocol scales both by the root; the logits are what counts.
            root = abs(scale) ** 0.5
            query, key, value = (torch.from_numpy(x)[None, :, None, :] for x in (q * root, k * root, v))
            return layer(query=query, key=key, value=value)[0, 0].numpy()

    return call
