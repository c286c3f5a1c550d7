"""Methods in all layers of a network: budgets that follow the number of keys, and times beside exact attention's."""

import itertools
import time
from collections.abc import Callable
from functools import partial

from torch import Tensor

from bench.baselines import Attend
from bench.experiments.methods import sdpa

PARTS = (16, 8, 4)
"""Budgets: a call evaluates n_k // part keys for each query."""
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "hubble_deep_field")
"""Of scikit-image; a seed has one."""
Seconds = dict[str, float]
"""``seconds`` of a method and ``exact_seconds``, as rows have them."""
Layer = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(q, k, v, scale) → out, the shapes of `Attend`."""


def nothing_yet() -> Seconds:
    """Return what `beside_exact` adds to."""
    return {"seconds": 0.0, "exact_seconds": 0.0}


def keys_of(k: Tensor, part: int | None) -> int:
    """Return the budget of a call with keys k (G, n_k, d): n_k // part, or 1; n_k if None."""
    return max(1, k.shape[1] // (part or 1))


def beside_exact(attend: Attend, part: int | None, seed: int, seconds: Seconds) -> Layer:
    """Return a method as a network's attention, which times itself.

    Parameters
    ----------
    attend
        The method.
    part
        As `keys_of` takes it.
    seed
        Of the network's run; each call draws numbers of its own.
    seconds
        Added to: wall time of the method, and of PyTorch's exact attention on the same arrays right before, so that a busy
        spell of a shared machine falls on both. The first call is made once more before it is timed.

    Returns
    -------
    callable
        Raises `FloatingPointError` where a result isn't finite, beside what the method raises.
    """
    first = 1000 * seed
    seeds = itertools.count(first)

    def call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        number = next(seeds)
        estimate = partial(attend, q, k, v, scale, keys_of(k, part), number)
        if number == first:
            estimate()
        started = time.perf_counter()
        sdpa(q, k, v, scale)
        between = time.perf_counter()
        out = estimate()
        seconds["exact_seconds"] += between - started
        seconds["seconds"] += time.perf_counter() - between
        if not bool(out.isfinite().all()):
            raise FloatingPointError(f"call {number - first + 1} of attention has a result that isn't finite")
        return out

    return call
