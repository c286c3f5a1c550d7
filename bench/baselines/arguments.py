"""What every baseline asks of its arguments, and where its random numbers come from."""

import torch
from torch import Tensor


def check(q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int, *, least: int = 1) -> None:
    """Raise ValueError, naming the argument, unless shapes and dtypes fit, scale is finite, and budget ``least`` or more."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3 or 0 in x.shape:
            raise ValueError(f"{name} must have shape (groups, rows, columns), none of them 0, got {tuple(x.shape)}")
        if x.dtype not in (torch.float32, torch.float64) or x.dtype != q.dtype:
            raise ValueError(f"{name} must be float32 or float64, and of q's dtype, got {x.dtype}")
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(f"k must have q's groups and columns, {q.shape[0]} and {q.shape[2]}, got {tuple(k.shape)}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v must have k's groups and rows, {tuple(k.shape[:2])}, got {tuple(v.shape)}")
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale must be finite, got {scale}")
    if budget < least:
        raise ValueError(f"budget must be at least {least}, got {budget}")


def check_positive(scale: float) -> None:
    """Raise ValueError unless scale is positive, where rows are multiplied by its root."""
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Return standard normal numbers, float64 on the CPU: the same for every dtype and device."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    """Return a generator of its own."""
    return torch.Generator().manual_seed(seed)
