"""The bridge to array libraries: namespaces, dtypes and devices; only this package imports `array_api_compat`.

Everything else in kdecore is written against the array API namespace ``xp`` found here, so that one source serves NumPy,
CuPy, PyTorch and array-api-strict. Importing this file imports no array library but NumPy.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import array_api_compat
import array_api_compat.numpy
import numpy as np

from kdecore.arrays.errors import DeviceError, DTypeError

Array: TypeAlias = Any
"""An array of one of the libraries in `SUPPORTED`."""
ArrayT = TypeVar("ArrayT")
"""The type of an array that comes back as it went in."""
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

Those that a backend is brought for are taken too. Others follow the array API, and yet fail late: they know of no
assignment, or of no devices.
"""

ACCUMULATION = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}
"""Name of each dtype taken in → name of the dtype that it is computed in."""


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


def dtype_name(array: Array) -> str:
    """Return the dtype's plain name, such as ``"float32"``, whatever the library calls it."""
    return str(getattr(array.dtype, "name", None) or array.dtype).rpartition(".")[2]


def accumulation_dtype(xp: Namespace, name: str) -> Any:
    """Return the dtype object in which inputs of dtype ``name`` are computed."""
    return getattr(xp, ACCUMULATION[name])
