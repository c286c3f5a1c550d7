"""What every baseline asks of its arguments."""

from torch import Tensor


def check(q: Tensor, k: Tensor, v: Tensor, budget: int) -> None:
    """Raise ValueError naming the argument that has a wrong shape, or a budget below 1; there is to be a key."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3 or not x.is_floating_point() or x.dtype != q.dtype:
            raise ValueError(f"{name} must be (groups, rows, columns) of one float dtype, got {tuple(x.shape)} {x.dtype}")
    if k.shape[1] == 0 or (k.shape[0], k.shape[2]) != (q.shape[0], q.shape[2]):
        raise ValueError(f"k must have q's groups and columns, and a row, got {tuple(k.shape)} for q {tuple(q.shape)}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v must have k's groups and rows, got {tuple(v.shape)} for k {tuple(k.shape)}")
    if budget < 1:
        raise ValueError(f"budget must be at least 1, got {budget}")
