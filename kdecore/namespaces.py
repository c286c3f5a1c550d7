"""The bridge to array libraries: the only importer of `array_api_compat`.

Everything else in kdecore is written against the array API namespace ``xp`` found here, so that one source serves NumPy,
CuPy, PyTorch and array-api-strict. Importing this file imports no array library but NumPy.
"""

import math
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeAlias

import array_api_compat
import array_api_compat.numpy
import numpy as np

from kdecore.errors import DeviceError, DTypeError, OptionError

Array: TypeAlias = Any
"""An array of one of the libraries in `SUPPORTED`."""
Namespace: TypeAlias = Any
"""An array API namespace, such as ``array_api_compat.numpy``."""

host: Namespace = array_api_compat.numpy
"""NumPy, for small arrays made on the host."""

SUPPORTED: dict[str, Callable[[object], bool]] = {
    "NumPy": array_api_compat.is_numpy_array,
    "CuPy": array_api_compat.is_cupy_array,
    "PyTorch": array_api_compat.is_torch_array,
    "array-api-strict": lambda array: (
        hasattr(array, "__array_namespace__") and type_name(array).startswith("array_api_strict.")
    ),
}
"""Array libraries that kdecore is written for, the last one for tests → whether an object is an array of theirs.

Others follow the array API too, and yet fail late: they know of no assignment, or of no devices.
"""

ACCUMULATION = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}
"""Name of each dtype taken in → name of the dtype that it is computed in."""

# A tile of this many logits is 1 MiB in float32: measured best on two cores with 512 KiB of L2 each (bench/NOTES.md).
TILE_ELEMENTS = 2**18
# Multiplications of one matrix product: of more, NumPy's threads would spin for long afterwards (bench/NOTES.md).
SMALL_PRODUCT = 2**18
WIDE_ROW = 4096
FEWEST_ROWS = 16

__all__ = [
    "ACCUMULATION",
    "SMALL_PRODUCT",
    "SUPPORTED",
    "TILE_ELEMENTS",
    "Array",
    "Namespace",
    "accumulation_dtype",
    "chebyshev_coefficients",
    "check_floating",
    "check_not_traced",
    "check_plain",
    "column_ranges",
    "common_device",
    "common_namespace",
    "contiguous",
    "cross_moment",
    "cuda_address",
    "device_context",
    "device_name",
    "dtype_name",
    "first_places",
    "from_host",
    "from_host_like",
    "gradient_mode",
    "host",
    "host_bits",
    "host_memory",
    "host_view",
    "host_views",
    "in_library_of",
    "invert_permutation",
    "is_boolean",
    "is_contiguous",
    "namespace_name",
    "namespace_of",
    "on_accelerator",
    "on_device",
    "outside_inference_mode",
    "quiet",
    "recorded",
    "recording",
    "row_norms",
    "searchsorted_integers",
    "searchsorted_rows",
    "spans",
    "take_along_rows",
    "take_columns",
    "take_rows",
    "to_float",
    "to_host",
    "to_integer",
    "type_name",
    "without_gradient",
]


def namespace_of(array: Array) -> Namespace:
    """Return the array API namespace that ``array`` belongs to."""
    return array_api_compat.array_namespace(array, use_compat=None)


def namespace_name(xp: Namespace) -> str:
    """Return the library's plain name: ``"numpy"``, ``"torch"``, ``"cupy"``, ``"array_api_strict"``."""
    return str(xp.__name__).removeprefix("array_api_compat.").partition(".")[0]


def type_name(value: object) -> str:
    """Return the name of a value's type, with its module where that is not Python's own, as in ``"numpy.matrix"``."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def common_namespace(**arrays: Array) -> Namespace:
    """Return the one namespace of all named arrays.

    Raises
    ------
    DTypeError
        An argument is no array of a library in `SUPPORTED`, or not a plain one (`check_plain`).
    DeviceError
        Two arguments come from different libraries.
    """
    found = {}
    for name, array in arrays.items():
        if not any(is_array(array) for is_array in SUPPORTED.values()):
            known = ", ".join(SUPPORTED)
            raise DTypeError(
                f"{name} must be an array of one of {known}, got {type_name(array)}; {_conversion(name, array)}"
            )
        check_plain(name, array)
        found[name] = namespace_of(array)
    first, *others = found
    for name in others:
        if found[name] is not found[first]:
            raise DeviceError(
                f"{name} must come from the same library as {first} ({namespace_name(found[first])}), "
                f"got {namespace_name(found[name])}"
            )
    return found[first]


def _conversion(name: str, array: object) -> str:
    """Return how an array in the sense of no supported library becomes one."""
    dense = next((method for method in ("toarray", "todense") if hasattr(array, method)), None)
    if dense is not None:
        return f"pass {name}.{dense}()"
    return f"np.asarray({name}) makes one of lists and of other libraries' arrays"


def check_plain(name: str, array: Array) -> None:
    """Raise `DTypeError` where an array of a library in `SUPPORTED` isn't numbers in rows, saying what to pass instead."""
    what = _masked_or_matrix(name, array) if isinstance(array, np.ndarray) else _special_tensor(name, array)
    if what:
        raise DTypeError(f"{name} must be a plain array, got {what}")


def _masked_or_matrix(name: str, array: Array) -> str:
    if isinstance(array, np.ma.MaskedArray):
        return f"{type_name(array)}, whose mask would be ignored"
    return f"{type_name(array)}; pass np.asarray({name})" if isinstance(array, np.matrix) else ""


def _special_tensor(name: str, array: Array) -> str:
    if not array_api_compat.is_torch_array(array):
        return ""
    if array.is_nested:
        return (
            f"a nested tensor; pass torch.nested.to_padded_tensor({name}, 0.0) with key_lengths=, "
            "or samples one after another to packed_attention"
        )
    if array.is_quantized:
        return f"a quantized tensor; pass {name}.dequantize()"
    if str(array.layout) != "torch.strided":
        return f"a tensor of layout {array.layout}; pass {name}.to_dense()"
    # Subclasses that do this hold no memory of their own: masked, distributed and fake tensors.
    if type(array).__torch_dispatch__ is not namespace_of(array).Tensor.__torch_dispatch__:
        return f"{type_name(array)}, whose operations are its own; pass a tensor of plain numbers"
    return ""


def check_floating(name: str, array: Array) -> None:
    """Raise `DTypeError` unless the dtype is one of `ACCUMULATION`, saying what to do about it."""
    found = dtype_name(array)
    if found in ACCUMULATION:
        return
    advice = ""
    if found.startswith("complex"):
        advice = "; attention of complex numbers is not defined"
    elif found.startswith(("bool", "int", "uint", "float")):
        advice = "; cast it to float32"
    raise DTypeError(f"{name} must have one of the dtypes {', '.join(ACCUMULATION)}, got {found}{advice}")


def check_not_traced(array: Array, kernels: str) -> None:
    """Raise `OptionError` where PyTorch traces operations, and kernels are others, whose results a trace would keep."""
    if kernels != "array-api" and array_api_compat.is_torch_array(array) and _adapter(array).operations_traced():
        raise OptionError(
            f'kernels must be "array-api" where torch.compile or torch.jit traces operations, got {kernels!r}; '
            "kdecore_adapters.torch_adapter.scaled_dot_product_attention is an operation itself, with any kernels"
        )


def common_device(**arrays: Array) -> Any:
    """Return the one device of all named arrays, or raise `DeviceError` naming the odd one."""
    devices = {name: array_api_compat.device(array) for name, array in arrays.items()}
    first, *others = devices
    for name in others:
        if devices[name] != devices[first]:
            raise DeviceError(f"{name} must be on the same device as {first} ({devices[first]}), got {devices[name]}")
    return devices[first]


def device_name(array: Array) -> str:
    """Return the device's plain name, such as ``"cpu"`` or ``"cuda:0"``, whatever the library calls it."""
    device = array_api_compat.device(array)
    return f"cuda:{device.id}" if array_api_compat.is_cupy_array(array) else str(device)


@dataclass(frozen=True)
class NamedDevice:
    """A device that can be looked up by its name: CuPy's have no hash."""

    name: str
    device: object = field(compare=False)


def named_device(array: Array) -> NamedDevice:
    """Return the device of an array, for what is kept for later calls."""
    return NamedDevice(device_name(array), array_api_compat.device(array))


def on_accelerator(array: Array) -> bool:
    """Return whether the array lies elsewhere than in the host's memory, so that reading it waits for a device."""
    return not array_api_compat.is_numpy_array(array) and "cpu" not in device_name(array).lower()


def device_context(array: Array) -> Any:
    """Return a context in which the CUDA device that the array lies on is the current one; of no effect on the CPU."""
    if not device_name(array).startswith("cuda"):
        return nullcontext()
    return _adapter(array).device_context(on_device(array)[0])


def on_device(array: Array) -> tuple[int, int]:
    """Return the number of the CUDA device that the array lies on, and its library's current stream there, as a pointer."""
    device = array.device
    index = int(device.id if hasattr(device, "id") else device.index)
    return index, int(_adapter(array).current_stream(index))


_ADAPTERS: dict[type, Any] = {}


def _adapter(array: Array) -> Any:
    # Kept by type: to find an array's namespace takes as long as to launch a kernel.
    found = _ADAPTERS.get(type(array))
    if found is None:
        found = import_module(f"kdecore_adapters.{namespace_name(namespace_of(array))}_adapter")
        _ADAPTERS[type(array)] = found
    return found


def cuda_address(array: Array) -> int:
    """Return where on its CUDA device the array's memory begins; 0 where it has none."""
    return int(array.data_ptr() if hasattr(array, "data_ptr") else array.data.ptr)


def host_bits(array: Array) -> Array:
    """Return the memory of an array on the CPU as a NumPy array, with the bits of bfloat16 as uint16."""
    array = without_gradient(array)
    return np.asarray(array.view(namespace_of(array).uint16) if dtype_name(array) == "bfloat16" else array)


def is_contiguous(array: Array) -> bool:
    """Return whether the array lies in memory row by row; True where its library does not tell."""
    if hasattr(array, "is_contiguous"):
        return bool(array.is_contiguous())
    return bool(getattr(getattr(array, "flags", None), "c_contiguous", True))


def contiguous(array: Array) -> Array:
    """Return the array laid out row by row: itself where it is, a copy otherwise."""
    if is_contiguous(array):
        return array
    return array.contiguous() if hasattr(array, "contiguous") else array.copy(order="C")


def dtype_name(array: Array) -> str:
    """Return the dtype's plain name, such as ``"float32"``, whatever the library calls it."""
    return str(getattr(array.dtype, "name", None) or array.dtype).rpartition(".")[2]


def accumulation_dtype(xp: Namespace, name: str) -> Any:
    """Return the dtype object in which inputs of dtype ``name`` are computed."""
    return getattr(xp, ACCUMULATION[name])


def from_host(xp: Namespace, array: Array, *, dtype: Any, device: Any) -> Array:
    """Copy a NumPy array to the namespace ``xp``, with the given dtype and device."""
    # A copy on the host first: PyTorch warns of sharing read-only memory.
    return xp.asarray(array.copy(), dtype=dtype, device=device)


def host_view(array: Array) -> Array:
    """Return a read-only, aligned, C-contiguous NumPy array of the same numbers: a view of arrays on the CPU where possible.

    One layout and mutability means one compiled version of a Numba kernel for each dtype.
    """
    plain = without_gradient(array)
    if hasattr(plain, "resolve_neg"):  # PyTorch negates some tensors lazily, which NumPy does not know of
        plain = plain.resolve_neg()
    view = np.asarray(plain)
    if not (view.flags.c_contiguous and view.flags.aligned):
        view = np.require(view, requirements=["C", "A"])
    view = view.view()
    view.flags.writeable = False
    return view


def host_views(*arrays: Array, recorded: Sequence[Array | None] = ()) -> tuple[Array, ...] | None:
    """Return PyTorch tensors on the CPU as NumPy arrays that share their memory, bfloat16 as a copy in float32.

    None for arrays of other libraries, on other devices, whose gradients, or those of a tensor in ``recorded``, are
    recorded, for what stands for a tensor that isn't there, as within torch.func, and where operations are traced.
    """
    if not array_api_compat.is_torch_array(arrays[0]) or device_name(arrays[0]) != "cpu":
        return None
    if _adapter(arrays[0]).operations_watched():
        return None
    others = filter(array_api_compat.is_torch_array, recorded)
    try:
        if gradient_mode(*arrays, *others):
            return None
        return tuple(_adapter(array).to_numpy(array) for array in arrays)
    except RuntimeError:  # of PyTorch, where there is no memory to share
        return None


def in_library_of(like: Array, array: Array) -> Array:
    """Return an array on the CPU in the library of another one, NumPy's or the other way round, sharing its memory.

    Itself where it is one of these already.
    """
    from_numpy, to_numpy = (array_api_compat.is_numpy_array(x) for x in (array, like))
    if from_numpy == to_numpy:
        return array
    return _adapter(like).from_numpy(array) if from_numpy else _adapter(array).to_numpy(array)


def host_memory(array: Array) -> Array:
    """Return a C-contiguous NumPy array that can be written to: the array's own memory where it is so, else a copy."""
    view = np.asarray(without_gradient(array))
    return view if view.flags.c_contiguous and view.flags.aligned and view.flags.writeable else np.array(view, order="C")


def to_host(array: Array) -> Array:
    """Return the same numbers as a NumPy array, which may share the memory of an array on the CPU."""
    if array_api_compat.is_torch_array(array) or array_api_compat.is_cupy_array(array):
        array = array_api_compat.to_device(without_gradient(array), "cpu")
    return host_view(array)


def without_gradient(array: Array) -> Array:
    """Return the array cut off from automatic differentiation, where its library has it."""
    return array.detach() if hasattr(array, "detach") else array


def gradient_mode(*arrays: Array) -> str:
    """Return ``"reverse"`` or ``"forward"`` where the library differentiates what is done with the arrays, else ""."""
    if namespace_name(namespace_of(arrays[0])) != "torch":
        return ""
    from kdecore_adapters import torch_adapter

    return torch_adapter.gradient_mode(*arrays)


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Make arrays that are kept for later calls: what PyTorch makes in inference mode could not be recorded in these.

    Gradients are recorded in this context where they were outside of it.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def recording() -> Iterator[None]:
    """Record what is made of PyTorch tensors whose gradients are recorded, also where a caller records nothing."""
    torch = sys.modules.get("torch")
    with nullcontext() if torch is None else torch.enable_grad():
        yield


def recorded(result: Array, *inputs: Array | None) -> Array:
    """Return a result that records gradients where an input does: they are 0 where it depends on none of them."""
    some = [x for x in inputs if x is not None and gradient_mode(x)]
    if not some or gradient_mode(result):
        return result
    xp = namespace_of(result)
    # Sums of no numbers are 0 whatever the inputs hold.
    return result + sum(xp.sum(x[..., :0]) for x in some)


def take_rows(xp: Namespace, rows: Array, index: Array) -> Array:
    """Gather ``rows[index]``: rows (n, …), index int64 ≥ 0 of any shape → index.shape + rows.shape[1:]."""
    places = xp.reshape(index, (-1,))
    # PyTorch's own gather: that of the array API looks for negative indices first, in three passes over the index.
    flat = rows.index_select(0, places) if array_api_compat.is_torch_array(rows) else xp.take(rows, places, axis=0)
    return xp.reshape(flat, (*index.shape, *rows.shape[1:]))


def from_host_like(xp: Namespace, array: Array, like: Array) -> Array:
    """Return a NumPy array in the namespace ``xp`` on ``like``'s device, sharing memory where the library can."""
    return xp.asarray(array, device=array_api_compat.device(like))


def take_along_rows(xp: Namespace, rows: Array, index: Array) -> Array:
    """Return rows[g, index[g, …], …] for every group g: (G, n, …) taken at int64 (G, …)."""
    groups, n, *rest = rows.shape
    if array_api_compat.is_torch_array(rows) and not rest:
        return xp.reshape(rows.gather(1, xp.reshape(index, (groups, -1))), index.shape)
    offset = xp.arange(groups, dtype=xp.int64, device=array_api_compat.device(rows)) * n
    # One flat gather: twice as fast in NumPy as take_along_axis.
    flat = xp.reshape(rows, (groups * n, *rest))
    return take_rows(xp, flat, index + xp.reshape(offset, (-1, *(1,) * (index.ndim - 1))))


def take_columns(xp: Namespace, rows: Array, index: Array) -> Array:
    """Return rows[:, index]: (G, n, …) taken at int64 ≥ 0 (m,) → (G, m, …)."""
    return rows.index_select(1, index) if array_api_compat.is_torch_array(rows) else xp.take(rows, index, axis=1)


def invert_permutation(xp: Namespace, order: Array) -> Array:
    """Return ``inverse`` (G, n) with ``inverse[g, order[g, i]] = i``; order is int64 (G, n), one permutation a row."""
    if namespace_name(xp) == "array_api_strict":  # forbids assignment through integer arrays
        return xp.argsort(order, axis=-1)
    groups, n = order.shape
    device = array_api_compat.device(order)
    inverse = xp.empty((groups, n), dtype=order.dtype, device=device)
    inverse[xp.arange(groups, device=device)[:, None], order] = xp.arange(n, dtype=order.dtype, device=device)[None, :]
    return inverse


def first_places(xp: Namespace, index: Array, n: int) -> tuple[Array, Array]:
    """Return where each of 0 … n − 1 first stands in ``index`` (m,), m ≥ 1, and whether it does: int64 and bool (n,)."""
    order = xp.argsort(index, stable=True)
    every = xp.arange(n, dtype=index.dtype, device=array_api_compat.device(index))
    place = xp.clip(xp.searchsorted(xp.take(index, order), every), 0, int(index.shape[0]) - 1)
    first = xp.take(order, place)
    return first, xp.take(index, first) == every


def searchsorted_rows(xp: Namespace, ascending: Array, values: Array, *, side: str) -> Array:
    """Search each row of ``values`` (G, …) in the same row of ``ascending`` (G, n) → int64 (G, …)."""
    found = [
        xp.reshape(xp.searchsorted(ascending[g, :], xp.reshape(values[g, ...], (-1,)), side=side), values.shape[1:])
        for g in range(values.shape[0])
    ]
    return xp.astype(xp.stack(found), xp.int64, copy=False)


def searchsorted_integers(xp: Namespace, ascending: Array, values: Array, *, side: str) -> Array:
    """Do what `searchsorted_rows` does for integers in [0, 2**31), in one search for all rows."""
    groups, n = ascending.shape
    group = xp.arange(groups, dtype=xp.int64, device=array_api_compat.device(ascending))[:, None]
    rows, wanted = (xp.reshape(xp.astype(x, xp.int64) + group * 2**31, (-1,)) for x in (ascending, values))
    return xp.reshape(xp.astype(xp.searchsorted(rows, wanted, side=side), xp.int64), values.shape) - group * n


def row_norms(xp: Namespace, rows: Array) -> Array:
    """Return Euclidean norms over the last axis, (…, d) → (…)."""
    return xp.linalg.vector_norm(rows, axis=-1)


def quiet() -> Any:
    """Return a context in which NumPy warns of no numbers that are not finite; other libraries never do."""
    return np.errstate(all="ignore")


def spans(length: int, step: int) -> Iterator[slice]:
    """Cut ``range(length)`` into slices of ``step``, the last one ragged."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def cross_moment(xp: Namespace, x: Array, y: Array) -> Array:
    """Return the mean of x yᵀ over rows (G, n, d) and (G, n, e): (G, d, e)."""
    # Of so wide rows, small products would be mostly sums of their results.
    rows = SMALL_PRODUCT // max(1, int(x.shape[2]) * int(y.shape[2]))
    step = rows if rows >= FEWEST_ROWS and not on_accelerator(x) else max(1, int(x.shape[1]))
    parts = [xp.matrix_transpose(x[:, part, :]) @ y[:, part, :] for part in spans(int(x.shape[1]), step)]
    return sum(parts[1:], start=parts[0]) / int(x.shape[1])


def column_ranges(xp: Namespace, x: Array) -> tuple[Array, Array]:
    """Return the least and the largest of each column of rows (G, n, d), n ≥ 1: (G, d) each.

    On the CPU of rows put side by side first: NumPy takes a fifth of the time where it compares more numbers in a go.
    """
    groups, n, d = x.shape
    if on_accelerator(x) or d == 0:
        return xp.min(x, axis=1), xp.max(x, axis=1)
    beside = max(1, min(n, WIDE_ROW // d))
    whole = n // beside * beside
    parts = [(xp.reshape(x[:, :whole, :], (groups, whole // beside, beside * d)), beside)]
    if whole < n:
        parts.append((x[:, whole:, :], 1))

    def of_all(reduce: Callable[..., Array]) -> Array:
        return reduce(xp.concat([xp.reshape(reduce(rows, axis=1), (groups, m, d)) for rows, m in parts], axis=1), axis=1)

    return of_all(xp.min), of_all(xp.max)


def is_boolean(value: object) -> bool:
    """Return whether a value is True or False, Python's or in an array."""
    return isinstance(value, bool) or (hasattr(value, "dtype") and dtype_name(value) == "bool")


def to_float(value: Any) -> float:
    """Return a number or 0-d array as a Python float; NaN where that is impossible, and for text and booleans."""
    try:
        return math.nan if isinstance(value, str | bytes) or is_boolean(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def to_integer(value: Any) -> int | None:
    """Return an integer or 0-d array of one as a Python int; None for anything else, booleans among it."""
    try:
        return None if is_boolean(value) else operator.index(value)
    except TypeError:
        return None


def chebyshev_coefficients(function: Callable[[Array], Array], degree: int) -> tuple[float, ...]:
    """Return the polynomial, lowest power first, that interpolates ``function`` on [-1/2, 1/2] in the Chebyshev points."""
    polynomial = np.polynomial.Chebyshev.interpolate(function, degree, domain=[-0.5, 0.5])
    return tuple(float(c) for c in polynomial.convert(kind=np.polynomial.Polynomial, domain=[-1, 1]).coef)
