"""Evaluating a method, of kdecore or from outside, on NumPy arrays, by a library on a device."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from kdecore.api.attention import attention
from kdecore.arrays.backend import Backend, backend_named
from kdecore.arrays.errors import OptionError
from kdecore.arrays.scalars import integer_at_least
from kdecore.core.options import Options
from kdecore.methods.base import METHODS
from kdecore.testing.examples import PropertyFailed
from kdecore.testing.oracle import default_scale
from kdecore.testing.strategies import AttentionProblem

Method: TypeAlias = str | Options | Callable[..., Any]
"""A name, an options object, or a function (q, k, v, *, seed, scale) → out, or (out, lse)."""
Evaluate: TypeAlias = Callable[[AttentionProblem, int, str], tuple[Any, Any]]
"""(problem, seed, dtype) → out and lse, float64 NumPy; lse is None where a function says none."""
EPS = {"float32": 2.0**-23, "float64": 2.0**-52}


class Place(NamedTuple):
    """Where arrays lie.

    Attributes
    ----------
    backend
        Of the library.
    device
        Its name; None for the library's usual one.
    """

    backend: Backend
    device: str | None

    def array(self, x: Any, dtype: str | None = None) -> Any:
        """Return a NumPy array as one of the library's, a copy."""
        return self.backend.from_numpy(np.array(x, dtype=dtype), self.device)


def place(library: str, device: int | None) -> Place:
    """Return where a library's arrays lie: on the CUDA device of that number, or on its usual device if None.

    Raises
    ------
    OptionError
        The library can't be used, or has no such device.
    """
    backend = backend_named(library.replace("-", "_"))
    if device is None:
        return Place(backend, None)
    name, known = f"cuda:{integer_at_least(0, 'device', device)}", backend.devices()
    if name not in known:
        raise OptionError(
            f"device must be the number of a CUDA device of {library}, got {device}; it has {', '.join(known)}"
        )
    return Place(backend, name)


def keys_per_query(method: Method, budget: int | None, n_k: int) -> int | None:
    """Return the budget that a method has on so many keys: as asked for, or as its options say, or half of them.

    None where nobody says it: of functions, and where it follows from other options.
    """
    own = method.budget if isinstance(method, Options) else None
    if budget is not None or own is not None:
        return budget or own
    left_open = isinstance(method, str) or (isinstance(method, Options) and getattr(method, "eps", None) is None)
    return max(1, n_k // 2) if left_open else None


def evaluator(method: Method, budget: int | None, where: Place) -> Evaluate:
    """Return the function that evaluates a method on problems.

    Raises
    ------
    OptionError
        ``method`` is neither a known name, nor options of a known method, nor a function; ``budget`` is no integer of at
        least 1.
    """
    if budget is not None:
        integer_at_least(1, "budget", budget)
    if not isinstance(method, str | Options) and not callable(method):
        raise OptionError(f"method must be a name, an options object or a function, got {method!r}")
    if isinstance(method, str) and method not in METHODS:
        raise OptionError(f"method must be one of {', '.join(METHODS)}, got {method!r}")

    def evaluate(problem: AttentionProblem, seed: int, dtype: str) -> tuple[Any, Any]:
        arrays = [where.array(x, dtype) for x in problem[:3]]
        if isinstance(method, str | Options):
            options = {
                name: where.array(x, dtype if x.dtype != bool else None) if name == "mask" else x
                for name, x in problem.options.items()
            }
            own = isinstance(method, Options) and method.budget is not None
            asked = None if own else keys_per_query(method, budget, problem.k.shape[-2])
            returned = attention(*arrays, method=method, budget=asked, seed=seed, return_lse=True, **options)
        else:
            scale = problem.options.get("scale", default_scale(problem.q.shape[-1]))
            returned = method(*arrays, seed=seed, scale=scale)
        out, lse = returned if isinstance(returned, tuple) else (returned, None)
        out = where.backend.to_numpy(out).astype(np.float64)
        lse = None if lse is None else where.backend.to_numpy(lse).astype(np.float64)
        expected = (*problem.q.shape[:-1], problem.v.shape[-1])
        if out.shape != expected:
            raise PropertyFailed(f"{name_of(method)} gives an array of shape {out.shape}, expected {expected}", problem)
        return out, lse

    return evaluate


def name_of(method: Method) -> str:
    """Return what a method is called in messages."""
    return method if isinstance(method, str) else getattr(method, "__name__", None) or repr(method)


def unrestricted(problem: AttentionProblem) -> AttentionProblem:
    """Return the problem, or raise `OptionError` where it has options that a function isn't told of."""
    if others := problem.options.keys() - {"scale"}:
        raise OptionError(f"problems must have no options but scale here, got {', '.join(sorted(others))}")
    return problem


def rounded(problem: AttentionProblem, dtype: str) -> AttentionProblem:
    """Return the problem whose numbers are those that a dtype holds of its own."""
    q, k, v = (x.astype(dtype).astype(np.float64) for x in problem[:3])
    options, bias = problem.options, problem.bias
    if "mask" in options and options["mask"].dtype != bool:
        mask = options["mask"].astype(dtype).astype(np.float64)
        with np.errstate(invalid="ignore"):
            options, bias = options | {"mask": mask}, np.where(np.isneginf(bias), bias, bias - options["mask"] + mask)
    return AttentionProblem(q, k, v, options, bias)


def rounding(problem: AttentionProblem, dtype: str) -> float:
    """Return what rounding may change of a result: errors of logits, bounded by Cauchy–Schwarz, and of a sum of n_k terms.

    Errors of a sum are those of a random walk, √n in place of n.
    """
    q, k = (np.sqrt(np.sum(x * x, axis=-1).max(initial=0.0)) for x in (problem.q, problem.k))
    bias = np.asarray(problem.bias)
    d = problem.q.shape[-1]
    logits = abs(problem.options.get("scale", default_scale(d))) * q * k + np.abs(bias[np.isfinite(bias)]).max(initial=0.0)
    terms = (np.sqrt(d) + 4) * logits + np.sqrt(problem.k.shape[-2]) + 4
    return float(2 * EPS[dtype] * terms * np.abs(problem.v).max(initial=0.0) + 1e-300)
