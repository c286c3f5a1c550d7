"""Every method as the attention of a network that is trained: sequences of different lengths, and gradients.

kdecore's methods go through its adapter for PyTorch, which takes lengths and records gradients. All others are functions
(q, k, v, scale, budget, seed) → out that know of no padding: they get the sequences one by one, each cut to its length.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bench.baselines import BASELINES
from bench.baselines import Attend as Baseline
from kdecore.methods import METHODS
from kdecore_adapters.torch_adapter import scaled_dot_product_attention

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""q, k, v (batch, heads, n, d), lengths (batch,), a seed → (batch, heads, n, d); rows behind a length are any finite."""

EXACT, CONTROL = "exact", "mean"
"""Exact attention; and the mean of the values that count, the same for every query."""
KDECORE = tuple(name for name in METHODS if name not in ("auto", EXACT))
NAMES = (EXACT, *KDECORE, *(name for name in BASELINES if name != EXACT))
WITHOUT_GRADIENTS = ("kdeformer_released", "wildcat")
"""The first records none, the second writes over what they need."""


def attention(name: str, budget: int, dropout: float = 0.0) -> Attend:
    """Return a method's attention.

    Parameters
    ----------
    name
        Of `NAMES`.
    budget
        Keys, features or landmarks for each query; no more than a sequence has tokens.
    dropout
        Part of exact attention's weights that is left out; other methods have no weights to leave out.

    Raises
    ------
    ValueError
        An unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"methods must be of {', '.join(NAMES)}, got {name!r}")
    if name == EXACT and dropout:
        return with_dropout(dropout)
    if name == EXACT:
        return exact
    return estimated(name, budget) if name in KDECORE else one_by_one(BASELINES[name], budget)


def exact(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, seed: int) -> Tensor:
    """Attend exactly, by PyTorch's own function."""
    whole = bool((lengths == q.shape[2]).all())
    seen = None if whole else (torch.arange(q.shape[2], device=q.device) < lengths[:, None])[:, None, None]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def with_dropout(part: float) -> Attend:
    """Return exact attention without a part of its weights, drawn anew in each call from PyTorch's own numbers.

    Weights of one sequence at a time are held, also for gradients, which evaluate them once more.
    """

    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, dropout_p=part)

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, seed: int) -> Tensor:
        return each(lambda *parts: checkpoint(dropped, *parts, use_reentrant=False), q, k, v, lengths)

    return attend


def estimated(name: str, budget: int) -> Attend:
    """Return the attention of one of kdecore's methods, where rows attend to themselves."""

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, seed: int) -> Tensor:
        options: dict[str, Any] = {
            "method": name,
            "budget": budget,
            "seed": seed,
            "diagonal": 0,
            "threads": torch.get_num_threads(),
        }
        counted = None if bool((lengths == q.shape[2]).all()) else lengths.cpu()
        out: Tensor = scaled_dot_product_attention(q, k, v, key_lengths=counted, **options)
        return out

    return attend


def one_by_one(method: Baseline, budget: int) -> Attend:
    """Return the attention of a method that knows of no padding."""

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, seed: int) -> Tensor:
        scale = q.shape[3] ** -0.5
        return each(lambda q, k, v: method(q, k, v, scale, min(budget, q.shape[1]), seed), q, k, v, lengths)

    return attend


def each(call: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Call for each sequence, (heads, its length, d) each, and put zeros behind."""
    outs = []
    for i, length in enumerate(lengths.tolist()):
        out = call(*(x[i, :, :length].contiguous() for x in (q, k, v)))
        outs.append(functional.pad(out, (0, 0, 0, q.shape[2] - length)))
    return torch.stack(outs)
