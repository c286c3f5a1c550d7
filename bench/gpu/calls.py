"""`kdecore.attention` on `bench.gpu`'s device against the host in float64: forward, twice the same, and gradients."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

import kdecore
from bench.gpu.arguments import rounded
from bench.gpu.checks import LIMITS, Library, difference, failed, other_library, torch_library
from bench.gpu.session import Findings, Row, Session, left_out, out_of_time
from kdecore.arrays.namespace import Array

N, REHEARSED_N = 1501, 151
HEADS, D = 3, 32
FACTOR = 1.2
"""An estimate on the device errs at most so many times what the host's errs, and by what the dtype's rounding adds."""
GRADIENTS = {"float32": 1e-4, "bfloat16": 3e-2}
ESTIMATORS = ("treecode", "sortlsh", "hyper")
CUPY_DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class Inputs:
    """Queries, keys and values in float64, as the dtype holds them, and exact attention to them."""

    arrays: tuple[Array, ...]
    exact: Array
    causal: Array


def check_calls(session: Session, dtype: str) -> Findings:
    """Yield one row for each library and call in a dtype."""
    n = REHEARSED_N if session.rehearsal else N
    libraries, other = [torch_library(session.device)], other_library(session.device)
    if isinstance(other, str):
        yield left_out(f"calls by CuPy, {dtype}", other)
    elif dtype in CUPY_DTYPES:
        libraries.append(other)
    for library in libraries:
        inputs = make_inputs(session.numbers(n, *library.name.encode(), *dtype.encode()), n, dtype)
        arrays = [library.convert(x, dtype) for x in inputs.arrays]
        for name, check in checks_of(library, dtype, arrays, inputs, n // 4):
            name = f"{name} ({library.name}, {dtype}, n = {n})"
            yield ("check", checked(check) | {"name": name}) if session.has(1.0) else out_of_time(name)


def checked(check: Callable[[], Row]) -> Row:
    """Return a check's row; whatever a call raises is what is to be reported."""
    try:
        return check()
    except Exception as error:
        return failed("", f"{type(error).__name__}: {error}")


def check_all_gradients(session: Session) -> Findings:
    """Yield one row for each dtype and call."""
    for dtype in GRADIENTS:
        for options in ({"method": "exact"}, {"method": "sortlsh", "budget": 64}, {"method": "exact", "causal": True}):
            name = f"gradients, {', '.join(map(str, options.values()))} ({dtype})"
            check = partial(check_gradients, session, dtype, options)
            yield ("check", checked(check) | {"name": name}) if session.has(1.0) else out_of_time(name)


def make_inputs(rng: np.random.Generator, n: int, dtype: str) -> Inputs:
    """Make clustered queries and keys, and values far from a mean of 0."""
    centres = rng.standard_normal((HEADS, 10, D))
    member = rng.integers(0, 10, (2, n))
    q, k = (centres[:, member[i]] + 0.5 * rng.standard_normal((HEADS, n, D)) for i in range(2))
    v = centres[:, member[1]] + rng.standard_normal((HEADS, n, D)) + 1.0
    q, k, v = (rounded(x, dtype) for x in (q, k, v))
    return Inputs((q, k, v), softmax_attention(q, k, v, False), softmax_attention(q, k, v, True))


def softmax_attention(q: Array, k: Array, v: Array, causal: bool) -> Array:
    """Return exact attention, of NumPy alone."""
    logits = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if causal:
        logits = np.where(np.tri(q.shape[-2], dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights @ v / weights.sum(-1, keepdims=True)


def checks_of(
    library: Library, dtype: str, arrays: list[Any], inputs: Inputs, budget: int
) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield a library's checks in one dtype, by name."""
    yield "exact", partial(covering, library, dtype, arrays, inputs.exact, {"method": "exact"})
    calls: list[dict[str, Any]] = [{"method": method, "budget": budget} for method in ESTIMATORS]
    for options in [*calls, {"method": "sortlsh", "budget": budget, "causal": True}]:
        name = f"{'causal ' * ('causal' in options)}{options['method']}, budget {budget}"
        yield name, partial(estimated, library, dtype, arrays, inputs, options)
        yield f"{name}, twice", partial(same_twice, library, arrays, options)
    for options in calls:
        every = options | {"budget": inputs.exact.shape[-2]}
        yield f"{options['method']}, all keys", partial(covering, library, dtype, arrays, inputs.exact, every)


def reported(measured: float, limit: float, **more: Any) -> Row:
    """Return the row of a check."""
    return {"measured": measured, "limit": limit, "passed": bool(measured <= limit), **more}


def covering(library: Library, dtype: str, arrays: list[Any], exact: Array, options: dict[str, Any]) -> Row:
    """Check a call that looks at all keys."""
    return reported(difference(library.back(kdecore.attention(*arrays, **options)), exact), LIMITS[dtype])


def estimated(library: Library, dtype: str, arrays: list[Any], inputs: Inputs, options: dict[str, Any]) -> Row:
    """Check that a call errs hardly more than the host's in float64, with the same seed, on the same numbers.

    In float64, in which no bucket is likely to differ, sortlsh and hyper have the host's result. A treecode hasn't: the
    signs of its directions are left open.
    """
    exact = inputs.causal if options.get("causal") else inputs.exact
    found = library.back(kdecore.attention(*arrays, **options)).astype(np.float64)
    on_host = kdecore.attention(*inputs.arrays, **options | as_on_devices(options))
    apart = difference(found, on_host)
    if dtype == "float64" and options["method"] != "treecode":
        return reported(apart, 1e-9)
    limit = FACTOR * difference(on_host, exact) + LIMITS[dtype]
    return reported(difference(found, exact), limit, from_host=apart)


def as_on_devices(options: dict[str, Any]) -> dict[str, Any]:
    """Return what an accelerator takes where it is left open."""
    return {"method": kdecore.Treecode().at(accelerator=True)} if options["method"] == "treecode" else {}


def same_twice(library: Library, arrays: list[Any], options: dict[str, Any]) -> Row:
    """Check that one seed gives one result, bit by bit: no kernel adds floats in the order in which threads come."""
    first, second = (library.back(kdecore.attention(*arrays, **options, seed=5)) for _ in range(2))
    return reported(float(np.mean(first != second)), 0.0)


def check_gradients(session: Session, dtype: str, options: dict[str, Any]) -> Row:
    """Compare gradients of q, k and v on the device with those in float64 on the host."""
    rng = session.numbers(*dtype.encode(), *str(options).encode())
    *arrays, direction = (rounded(rng.standard_normal((2, 257, 16)), dtype) for _ in range(4))
    found = gradients(arrays, direction, session.device, dtype, options)
    expected = gradients(arrays, direction, "cpu", "float64", options)
    return reported(max(difference(a, b) for a, b in zip(found, expected, strict=True)), GRADIENTS[dtype])


def gradients(
    arrays: list[Array], direction: Array, device: str, dtype: str, options: dict[str, Any]
) -> tuple[Array, Array, Array]:
    """Return the gradients of ⟨out, direction⟩."""
    q, k, v = (torch.tensor(x, device=device, dtype=getattr(torch, dtype)).requires_grad_() for x in arrays)
    out = kdecore.attention(q, k, v, **options)
    found = torch.autograd.grad((out.double() * torch.tensor(direction, device=device)).sum(), (q, k, v))
    q_part, k_part, v_part = (x.double().cpu().numpy() for x in found)
    return q_part, k_part, v_part
