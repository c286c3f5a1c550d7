"""Published approximations of softmax attention, to compare kdecore with: one file each, written from its paper's formulas.

A baseline is a file of this folder with a function `attend(q, k, v, scale, budget, seed)`. All take and return PyTorch
tensors of float32 or float64 on any device; `budget` is the keys, features or landmarks that a query's result is made of;
`seed` feeds generators of their own. What a budget costs is counted by `bench.baselines.counting`, for all alike.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, float, int, int], Tensor]
"""q (G, n_q, d), k (G, n_k, d), v (G, n_k, d_v), scale, budget, seed → out (G, n_q, d_v)."""


def _attend(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int, seed: int) -> Tensor:
    out: Tensor = import_module(f"{__name__}.{name}").attend(q, k, v, scale, budget, seed)
    return out


BASELINES: dict[str, Attend] = {
    path.stem: partial(_attend, path.stem)
    for path in sorted(Path(__file__).parent.glob("*.py"))
    if "\ndef attend(" in path.read_text(encoding="utf-8")
}
"""Name of a file → its `attend`, imported when it is first called; in alphabetical order."""
