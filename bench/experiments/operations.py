"""Multiply-accumulates of a method in all layers of a network, over exact attention's.

Of the calls of each shape one is counted, that of the middle layer, and stands for all: counts follow from shapes, but for
the treecode's and Algorithm 1's densities, which follow from data a little. kdecore's methods run in the array API,
unpadded.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.baselines import Attend
from bench.baselines.counting import multiply_accumulates
from bench.experiments.methods import sdpa
from bench.experiments.networks import Layer, keys_of
from bench.experiments.rows import Row
from bench.experiments.unpadded import unpadded


class Call(NamedTuple):
    """One attention in a network: q (G, n_q, d), k (G, n_k, d), v (G, n_k, d_v) and scale."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    @property
    def exact(self) -> int:
        """Multiply-accumulates of exact attention."""
        return self.q.shape[0] * self.q.shape[1] * self.k.shape[1] * (self.q.shape[2] + self.v.shape[2])


Calls = Sequence[Call]


def recorded(run: Callable[..., object], kinds: int = 1) -> list[list[Call]]:
    """Run a network with exact attention, and return the calls of each kind of attention in it.

    Parameters
    ----------
    run
        Called with a layer for each kind.
    kinds
        How many.
    """
    found: list[list[Call]] = [[] for _ in range(kinds)]

    def layer(calls: list[Call]) -> Layer:
        def call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            calls.append(Call(q.contiguous(), k.contiguous(), v.contiguous(), scale))
            return sdpa(q, k, v, scale)

        return call

    run(*map(layer, found))
    return found


def counted(attends: Iterable[Attend], calls: Iterable[Calls], part: int | None) -> Row:
    """Return a method's ``multiply_accumulates`` in a network, and ``exact_multiply_accumulates``.

    Parameters
    ----------
    attends
        The method, for each kind of attention.
    calls
        Those of each kind, as `recorded` returns them.
    part
        As `bench.experiments.networks.beside_exact` takes it.
    """
    mine = exact = 0
    with torch.inference_mode(), unpadded():
        for attend, of_kind in zip(attends, calls, strict=True):
            shapes: dict[tuple[int, ...], list[Call]] = defaultdict(list)
            for call in of_kind:
                shapes[(*call.q.shape, *call.k.shape)].append(call)
            for alike in shapes.values():
                one = alike[len(alike) // 2]
                number = multiply_accumulates(partial(attend, *one, keys_of(one.k, part), 0))
                mine, exact = mine + len(alike) * number, exact + len(alike) * one.exact
    return {"multiply_accumulates": mine, "exact_multiply_accumulates": exact}
