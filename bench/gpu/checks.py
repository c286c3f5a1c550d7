"""Every kernel of `bench.gpu`'s device on fresh random inputs, against its array-API reference in float64 on the host.

Memory that an implementation asks for comes filled with garbage, so that what it leaves unwritten shows.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import array_api_compat.torch
import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from bench.gpu.arguments import ARGUMENTS, LARGE, for_library, for_reference
from bench.gpu.session import Findings, Row, Session, left_out, out_of_time
from kdecore.arrays.backend import backend_named, unusable
from kdecore.arrays.namespace import ACCUMULATION, Array, Namespace, host, namespace_name
from kdecore.kernels.pick_threshold.contract import STEPS
from kdecore.kernels.registry import KERNELS, Implementation
from kdecore.kernels.site import Site

LIMITS = {"float64": 1e-10, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""Relative error in the Frobenius norm, at most, of what is multiplied in a dtype."""
ROUNDED_ROWS = {
    "attend_blocks": ("out", "lse"),
    "attend_dense": ("out", "lse"),
    "attend_tree": ("out", "lse"),
    "node_summaries": ("keys", "values"),
    "spoil_rows": ("out",),
}
"""Results that are as accurate as the dtype that rows are stored in; the others are as accurate as the one computed in."""
ROUNDED = {"hash_codes": 1e-4, "tree_order": 2e-2, "open_tree": 5e-2, "attend_tree": 5e-2, "draw_indices": 1e-4}
"""Part of a kernel's integers that rounding may change: where a number is next to a plane, two projections are alike, …; of
`attend_tree`, of its results, since lists are made in it."""
DEVICE_TARGETS = ("numba-cuda", "triton")
LISTS = frozenset(["open_tree"])
"""Kernels that return lists, which may end with empty slots."""
BINNED = {"pick_threshold": 2.0 ** (1 / STEPS) * 1.03 - 1.0}
"""What accelerators find in bins errs by as much as one is wide, and by what rounding opens."""
SIZES = (1001, 37, 65_537)
REHEARSED_SIZES = (37,)
GARBAGE = 77
"""What integers are filled with, in every byte."""


@dataclass(frozen=True)
class Library:
    """An array library on a device, with converters: to it, with a dtype's name or None for the array's own, and back."""

    xp: Namespace
    device: str
    convert: Callable[[Array, str | None], Any]
    back: Callable[[Any], Array]
    dtypes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Plain name."""
        return namespace_name(self.xp)


class FilledMemory(TorchFunctionMode):
    """While it is entered, PyTorch's empty tensors hold garbage."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Fill what `torch.empty` and its like return."""
        found = function(*args, **(kwargs or {}))
        if function in (torch.empty, torch.empty_like, torch.Tensor.new_empty):
            fill(found)
        return found


@dataclass(frozen=True)
class FilledNamespace:
    """A namespace whose empty arrays hold garbage."""

    xp: Namespace

    def __getattr__(self, name: str) -> Any:
        return getattr(self.xp, name)

    def empty(self, *args: Any, **kwargs: Any) -> Any:
        """Return an array full of garbage."""
        return fill(self.xp.empty(*args, **kwargs))


def fill(array: Any) -> Any:
    """Fill an array with NaN, or, of integers, with large ones; return it."""
    kind = str(array.dtype)
    if "bool" in kind:
        array[...] = True
    else:
        array[...] = float("nan") if "float" in kind else int.from_bytes(bytes([GARBAGE]) * array.dtype.itemsize, "little")
    return array


@contextmanager
def garbage(xp: Namespace) -> Iterator[Namespace]:
    """Return a namespace, of the same library, whose empty arrays hold garbage within the context."""
    if namespace_name(xp) == "torch":
        # Triton's kernels ask PyTorch itself for memory.
        with FilledMemory():
            yield xp
    else:
        yield FilledNamespace(xp)


def torch_library(device: str) -> Library:
    """Return PyTorch on a device."""

    def convert(x: Array, dtype: str | None) -> Any:
        tensor = torch.tensor(np.ascontiguousarray(x), device=device)
        return tensor if dtype is None else tensor.to(getattr(torch, dtype))

    name = "cuda:0" if device == "cuda" else device
    dtypes = ("bfloat16", "float32", "float16", "float64")
    return Library(array_api_compat.torch, name, convert, backend_named("torch").to_numpy, dtypes)


def other_library(device: str) -> Library | str:
    """Return CuPy, NumPy in a rehearsal, or why it can't be used."""
    dtypes = ("float32", "float16", "float64")
    if device != "cuda":
        return Library(host, "cpu", lambda x, dtype: np.array(x, dtype), np.asarray, dtypes)
    if reason := unusable("cupy"):
        return reason
    library = backend_named("cupy")
    import array_api_compat.cupy

    def convert(x: Array, dtype: str | None) -> Any:
        return library.from_numpy(np.asarray(x, dtype), "cuda:0")

    return Library(array_api_compat.cupy, "cuda:0", convert, library.to_numpy, dtypes)


def check_kernels(session: Session, dtype: str) -> Findings:
    """Yield one row for each size, library, kernel and implementation in a dtype: each kernel once before any twice."""
    other = other_library(session.device)
    if isinstance(other, str):
        yield left_out(f"kernels by CuPy, {dtype}", other)
    libraries = (torch_library(session.device), *(() if isinstance(other, str) else (other,)))
    for size in REHEARSED_SIZES if session.rehearsal else SIZES:
        for library in libraries:
            if dtype in library.dtypes:
                yield from check_size(session, library, dtype, size)


def check_size(session: Session, library: Library, dtype: str, size: int) -> Findings:
    """Yield one row for each kernel and implementation."""
    if size >= LARGE and dtype not in ("bfloat16", "float32"):
        return  # which take seconds on the host
    for kernel, every in KERNELS.items():
        if not any(one.target in DEVICE_TARGETS for one in every):
            continue  # nothing of it runs on a device but array operations
        if kernel not in ARGUMENTS:
            yield "check", failed(f"{kernel}", "no random arguments are known for it")
            continue
        for one in implementations(kernel, library, dtype, session.rehearsal):
            name = f"{kernel} ({one.target}, {library.name}, {dtype}, {size} rows)"
            if session.has(1.0):
                yield "check", check_kernel(kernel, one, library, dtype, size, session, name)
            else:
                yield out_of_time(name)


def implementations(kernel: str, library: Library, dtype: str, rehearsal: bool) -> list[Implementation]:
    """Return the device's implementations that can run; in a rehearsal the array API stands for them."""
    site = Site(library.name, library.device, ACCUMULATION[dtype])
    targets = ("array-api",) if rehearsal else DEVICE_TARGETS
    return [one for one in KERNELS[kernel] if one.target in targets and one.unsupported(site) is None]


def check_kernel(
    kernel: str, one: Implementation, library: Library, dtype: str, size: int, session: Session, name: str
) -> Row:
    """Call an implementation and its reference, and compare them."""
    arguments = ARGUMENTS[kernel](session.numbers(size, *name.encode()), size)
    expected = flat(KERNELS[kernel][-1].function(host, *(for_reference(x, dtype) for x in arguments)), np.asarray)
    try:
        given = [for_library(x, dtype, library.convert) for x in arguments]
        with garbage(library.xp) as xp:
            found = one.function(xp, *given)
        return judged(kernel, flat(found, library.back), expected, dtype) | {"name": name}
    except Exception as error:  # whatever an implementation raises is what is to be reported
        return failed(name, f"{type(error).__name__}: {error}")


def failed(name: str, why: str) -> Row:
    """Return the row of a check that could not be made."""
    return {"name": name, "passed": False, "measured": None, "limit": None, "why": (why.splitlines() or [""])[0][:300]}


def flat(found: Any, back: Callable[[Any], Array]) -> dict[str, Array]:
    """Return what a kernel returned as named NumPy arrays."""
    if dataclasses.is_dataclass(found):
        return {field.name: back(getattr(found, field.name)) for field in dataclasses.fields(found)}
    if isinstance(found, tuple):
        names = getattr(found, "_fields", [str(i) for i in range(len(found))])
        each = ({name: x} if not dataclasses.is_dataclass(x) else vars(x) for name, x in zip(names, found, strict=True))
        return {name: back(x) for one in each for name, x in one.items()}
    return {"": back(found)}


def judged(kernel: str, found: dict[str, Array], expected: dict[str, Array], dtype: str) -> Row:
    """Return the worst of a kernel's results, measured by its limit."""
    loose = 1e-6 if dtype == "float64" and kernel in LISTS else ROUNDED.get(kernel, 0.0) * (dtype != "float64")
    if kernel == "draw_indices":
        loose = ROUNDED[kernel]  # sums are taken in another order, in float64 always
    rows: list[Row] = []
    if kernel in LISTS:
        lists = (list(x.values())[:2] for x in (found, expected))
        rows = [{"of": "lists", "measured": lists_differ(*chain.from_iterable(lists)), "limit": loose}]
    if kernel == "attend_tree":
        # How long lists are rounding changes by a node or two.
        expected = {name: x for name, x in expected.items() if name in ("out", "lse")}
    for name, wanted in {} if rows else expected.items():
        measured = difference(found[name], wanted)
        stored = dtype == "float64" or name in ROUNDED_ROWS.get(kernel, ())
        limit = loose if wanted.dtype.kind in "iub" else max(loose, LIMITS[dtype if stored else "float32"])
        limit = max(limit, BINNED.get(kernel, 0.0))
        rows.append({"of": name, "measured": measured, "limit": 0.0 if kernel == "draw_uniform" else limit})
    worst = max(rows, key=lambda row: row["measured"] / max(row["limit"], 1e-300))
    return worst | {"passed": bool(worst["measured"] <= worst["limit"])}


def difference(found: Array, expected: Array) -> float:
    """Return ‖found − expected‖ / ‖expected‖, of integers the part that is wrong; ∞ for wrong shapes, NaN and infinities."""
    if found.shape != expected.shape:
        return float("inf")
    if expected.dtype.kind in "iub":
        return float(np.mean(found != expected)) if expected.size else 0.0
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(np.where(finite, 0.0, found), np.where(finite, 0.0, expected), equal_nan=True):
        return float("inf")
    found, expected = found[finite], expected[finite]
    length = float(np.linalg.norm(expected))
    off = float(np.linalg.norm(found - expected))
    ratio = off / length if length > 0 else off
    return ratio if np.isfinite(ratio) else float("inf")


def lists_differ(index: Array, weight: Array, expected_index: Array, expected_weight: Array) -> float:
    """Return the part of all rows that only one of two results of `LISTS` has, or whose log-weights are not alike.

    What slots hold that don't count is left open, and how many of them there are.
    """
    if index.shape[:2] != expected_index.shape[:2] or np.isnan(weight).any():
        return float("inf")
    block = np.arange(index.shape[0] * index.shape[1]).reshape(*index.shape[:2], 1) << 40

    def entries(index: Array, weight: Array) -> dict[int, float]:
        counts = weight > -np.inf
        return dict(zip((block + index)[counts].tolist(), weight[counts].tolist(), strict=True))

    mine, wanted = entries(index, weight), entries(expected_index, expected_weight)
    alike = sum(abs(mine[key] - wanted[key]) <= 1e-3 * (1.0 + abs(wanted[key])) for key in mine.keys() & wanted.keys())
    return 1.0 - alike / max(1, len(mine.keys() | wanted.keys()))
