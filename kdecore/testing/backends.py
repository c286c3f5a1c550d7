"""What a library's arrays have to give: exact attention where the budget covers all keys, elsewhere NumPy's estimates."""

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from kdecore.api.attention import attention
from kdecore.arrays.namespace import device_name, dtype_name, namespace_name, namespace_of
from kdecore.methods.base import METHODS
from kdecore.testing.evaluation import Method, Place, evaluator, name_of, place, rounded, rounding
from kdecore.testing.examples import Measured, PropertyFailed, figures_of
from kdecore.testing.strategies import AttentionProblem, dtype, mild_problems
from kdecore.testing.strategies import problems as any_problems
from kdecore.testing.strategies import seed as any_seed

DRAWS_ALIKE = ("exact", "sortlsh", "hyper", "kdeformer")
"""Methods that choose the same keys on every library; the treecode orders rows otherwise on accelerators."""
EVERY = 10**6
"""A budget that covers all keys."""


def check_backend(
    library: str,
    *,
    device: int | None = None,
    method: Method | None = None,
    problems: SearchStrategy[AttentionProblem] | None = None,
    examples: int = 50,
    seconds: float = math.inf,
) -> Measured:
    """Check that `kdecore.attention` on a library's arrays computes what it should.

    Parameters
    ----------
    library
        Name of the library, such as ``"numpy"``, ``"torch"``, ``"cupy"``, ``"array-api-strict"``, or one whose backend a
        package brings or `kdecore.arrays.backend.register` has.
    device
        Number of the CUDA device that arrays lie on; None for the library's usual one.
    method
        Name of one method, or an options object that leaves the budget open; each of the library's in turn if None.
    problems
        Strategy of problems; `strategies.problems` if None: up to 150 rows, grouped heads, causal, windows, lengths, masks,
        structured keys, magnitudes up to 1e4.
    examples
        Problems, at most.
    seconds
        After these no other problem begins.

    Returns
    -------
    Measured
        ``worst`` is the largest error in units of what rounding allows, and the bound is 1.

    Raises
    ------
    PropertyFailed
        An `AssertionError`: what doesn't hold, by how much.
    OptionError
        An argument is out of its range, or the library can't be used.

    Notes
    -----
    With a budget that covers all keys: out is that of an oracle in long double up to rounding, whatever is hidden, in
    float32 and float64; queries that see no key give 0; what keys hold that no query sees changes
    no bit, and NaN there nothing beyond rounding; out has q's library, device and dtype; q, k and v are left as they were.
    With half of the keys, in float64 and for methods that draw the same on every library: out is NumPy's up to rounding.
    There are no false alarms: in every run of a program the examples are the same. O(examples) calls.
    """
    where, here = place(library, device), place("numpy", None)
    names = [name for name in METHODS if name != "auto"] if method is None else [method]

    def measure(problem: AttentionProblem, mild: AttentionProblem, number: int, seed: int, dtype: str) -> float:
        one = names[number]
        worst = exact_error(where, rounded(problem, dtype), one, seed, dtype)
        if (one if isinstance(one, str) else getattr(one, "name", "")) in DRAWS_ALIKE:
            found, expected = (evaluator(one, None, at)(mild, seed, "float64")[0] for at in (where, here))
            off = float(np.abs(found - expected).max()) / rounding(mild, "float64")
            require(off, f"{name_of(one)} on {library} with seed {seed} is not what it is on NumPy", mild)
            worst = max(worst, off)
        return worst

    numbers = st.integers(0, len(names) - 1)
    drawn = st.tuples(any_problems() if problems is None else problems, mild_problems(), numbers, any_seed, dtype)
    count, worst = figures_of(drawn, measure, examples, seconds)
    subject = library if method is None else f"{name_of(method)} on {library}"
    return Measured("exact with all keys", subject, count, worst, 1.0)


def exact_error(where: Place, problem: AttentionProblem, method: Any, seed: int, dtype: str) -> float:
    """Return how far off a result of all keys is, in units of what rounding allows; or raise `PropertyFailed`."""
    words = (
        f"{name_of(method)} on {namespace_name(namespace_of(where.array(problem.q)))} with a budget of all keys, {dtype},"
    )
    arrays = [where.array(x, dtype) for x in problem[:3]]
    options = on_library(where, problem.options, dtype)
    out = attention(*arrays, method=method, budget=EVERY, seed=seed, **options)
    truth, lse = problem.exact()
    found = where.backend.to_numpy(out).astype(np.float64)
    if found.shape != truth.shape:
        raise PropertyFailed(f"{words} gives an array of shape {found.shape}, expected {truth.shape}", problem)
    off = float(np.abs(found - truth).max(initial=0.0)) / rounding(problem, dtype)
    require(off, f"{words} is not exact", problem)
    if found[np.isneginf(lse)].any():
        raise PropertyFailed(f"{words} is not 0 for a query that sees no key", problem)
    for name, given, x in zip("qkv", arrays, problem, strict=False):
        if not np.array_equal(where.backend.to_numpy(given), x.astype(dtype)):
            raise PropertyFailed(f"{words} changes {name}", problem)
    kept = [(device_name(x), dtype_name(x), namespace_of(x)) for x in (out, arrays[0])]
    if kept[0] != kept[1]:
        raise PropertyFailed(f"{words} gives an array of {kept[0]}, where q is one of {kept[1]}", problem)
    for number, allowed in ((7.0, 0.0), (np.nan, rounding(problem, dtype))):
        other = [where.array(x, dtype) for x in with_hidden(problem, number)]
        again = where.backend.to_numpy(attention(*other, method=method, budget=EVERY, seed=seed, **options))
        if not np.abs(again - found).max(initial=0.0) <= allowed:
            raise PropertyFailed(f"{words} depends on keys that no query sees, where these hold {number}", problem)
    return off


def on_library(where: Place, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return options of a call, the mask as an array of the library."""
    return {name: where.array(x, dtype if x.dtype != bool else None) if name == "mask" else x for name, x in options.items()}


def with_hidden(problem: AttentionProblem, number: float) -> tuple[Any, Any, Any]:
    """Return q, k, v in which keys that no query sees hold a number, and their values too."""
    q, k, v = problem[:3]
    bias: Any = np.broadcast_to(problem.bias, (*q.shape[:-1], k.shape[-2]))
    seen = (bias > -np.inf).any(axis=-2)
    # Query heads that share a key head see alike.
    seen = seen.reshape(*k.shape[:-2], -1, k.shape[-2]).any(axis=-2)[..., None]
    return q, np.where(seen, k, number), np.where(seen, v, number)


def require(off: float, words: str, problem: AttentionProblem) -> None:
    """Raise `PropertyFailed` where an error is more than rounding allows."""
    if not off <= 1.0:
        raise PropertyFailed(f"{words}: it is off by {off:.3g} times what rounding allows", problem, off, 1.0)
