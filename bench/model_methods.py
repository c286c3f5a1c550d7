"""What can stand in for a model's attention: kdecore's methods and exact attention, with errors and operations counted."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

import kdecore
from kdecore.core.options import Options
from kdecore.methods import METHODS
from kdecore.methods.sortlsh import SortLSH

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""Layer, q (G, n_q, d), k (G, n_k, d), v (G, n_k, d_v) and scale → out (G, n_q, d_v): a model's attention."""
Method = Callable[[Tensor, Tensor, Tensor, float, int, int], Tensor]
"""q, k, v as above, scale, budget and seed → out: any method."""

HASHES = 7
"""Hyperplanes of the paper's experiments."""
POWER_ITERATIONS = 32
"""Of the released code, for the norm of the values."""


def methods(block: int, diagonal: int | None = None) -> dict[str, Method]:
    """Return kdecore's methods by name, and ``"published"``.

    Parameters
    ----------
    block
        Keys of a block in ``"published"``: Algorithm 3 with the paper's block and hyperplanes, and as many samples as the
        budget leaves.
    diagonal
        As in `kdecore.attention`: 0 where q and k are of the same tokens.
    """
    found: dict[str, Method] = {name: partial(estimated, name, diagonal) for name in METHODS if name != "auto"}
    return found | {"published": partial(published, block, diagonal)}


def estimated(
    method: str | Options,
    diagonal: int | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    budget: int,
    seed: int,
    *,
    kernels: str = "auto",
) -> Tensor:
    """Attend by a method of kdecore's."""
    out: Tensor = kdecore.attention(
        q, k, v, method=method, budget=budget, scale=scale, seed=seed, diagonal=diagonal, kernels=kernels
    )
    return out


def published(
    block: int,
    diagonal: int | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    budget: int,
    seed: int,
    *,
    kernels: str = "auto",
) -> Tensor:
    """Attend by Algorithm 3 with the paper's block and hyperplanes; of a small budget half is samples."""
    block = min(block, budget // 2)
    options = SortLSH(block_size=block, num_samples=budget - block, num_hashes=HASHES)
    return estimated(options, diagonal, q, k, v, scale, budget, seed, kernels=kernels)


def exact_attention(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend exactly, by PyTorch's own function."""
    return functional.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0]


def route(method: Method, budgets: Sequence[int], seed: int, errors: Sequence[list[float]] | None = None) -> Attend:
    """Return a model's attention by a method.

    Parameters
    ----------
    method
        Any.
    budgets
        Of each layer.
    seed
        Of the method's random numbers, the same in every layer.
    errors
        For each layer a list, to which a call's relative Frobenius error is added, on the q, k and v that come: in later
        layers those that the method led to in earlier ones. None for no errors, which take exact attention.
    """

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = method(q, k, v, scale, budgets[layer], seed)
        if errors is not None:
            exact = exact_attention(layer, q, k, v, scale)
            errors[layer].append(float(torch.linalg.norm(out - exact) / torch.linalg.norm(exact)))
        return out

    return attend


def multiply_accumulates(groups: int, n_q: int, keys: int, d: int, d_v: int) -> int:
    """Count multiply-accumulates of attention over so many keys a query: logits and weighted values.

    With ``keys`` = n_k that is exact attention. With a budget it is a method's attention to the keys that it chose; what
    chooses them is not counted.
    """
    return groups * n_q * keys * (d + d_v)


def published_multiply_accumulates(
    groups: int, n_q: int, n_k: int, d: int, d_v: int, *, block: int, samples: int, hashes: int = HASHES
) -> int:
    """Count multiply-accumulates of the released Algorithm 3, as the paper's tables have them.

    A column of ones stands beside the values. Hashing, the values' Gram matrix and the power iterations on it count too;
    the published 2.596 G of BigGAN and 8.80 G of T2T-ViT are these.
    """
    width = d_v + 1
    attention = multiply_accumulates(groups, n_q, block + samples, d, width)
    hashing = groups * (n_q + n_k) * d * hashes
    return attention + hashing + groups * (n_k + POWER_ITERATIONS) * width**2


def shown(errors: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean error of each layer; NaN where none was measured."""
    return [sum(layer) / len(layer) if layer else math.nan for layer in errors]
