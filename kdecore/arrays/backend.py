"""`Backend`: what array libraries do that the array API has no words for; adapters bring those of theirs.

NumPy and array-api-strict need no other package. One brings the backend of another library by an entry
point of the group `kdecore.backends`, of that library's name, which is loaded when the first of its arrays is seen.
"""

from contextlib import nullcontext
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from os import PathLike
from typing import Any, ClassVar

import numpy as np

from kdecore.arrays.errors import DeviceError, DTypeError, OptionError
from kdecore.arrays.namespace import (
    SUPPORTED,
    Array,
    Namespace,
    check_plain,
    device_name,
    namespace_name,
    namespace_of,
    type_name,
)

GROUP = "kdecore.backends"
LIBRARIES = ("numpy", "torch", "cupy")
"""Those that a user names."""


class Backend:
    """A library on the CPU that records no gradients; what else libraries differ in, theirs say.

    Attributes
    ----------
    recorded_kernels
        Name of the module of kernels whose gradients are known; None where none is recorded.
    """

    recorded_kernels: ClassVar[str | None] = None

    def version(self) -> str:
        """Return the library's version."""
        raise NotImplementedError

    def unusable(self) -> str | None:
        """Return why no device can be used, or None where one can."""
        return None

    def devices(self) -> list[str]:
        """Return the names of the devices that arrays can lie on."""
        raise NotImplementedError

    def card(self, device: str) -> str:
        """Return the name of the hardware that a device is, such as ``"NVIDIA H200"``; the device's own where it has none.

        Asked only of devices that arrays lie on; waits for none.
        """
        return device

    def threads(self) -> int | None:
        """Return how many threads the library uses on the CPU; None where it doesn't tell."""
        return None

    def to_numpy(self, array: Array) -> Any:
        """Return a NumPy array, which shares memory where it can; bfloat16 becomes float32."""
        raise NotImplementedError

    def from_numpy(self, array: Any, device: str | None = None) -> Array:
        """Return a NumPy array as the library's on a device, its usual one if None, without a copy where it can be."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Wait until all work on the current device is done."""

    def exact_attention(self, q: Array, k: Array, v: Array, scale: float) -> Array:
        """Return exact attention by the library's own function, what one would otherwise call."""
        raise NotImplementedError

    def load(self, path: str | PathLike[str]) -> Any:
        """Return what a file of the library holds."""
        raise NotImplementedError

    def device_context(self, device: int) -> Any:
        """Return a context in which the CUDA device of that number is the current one."""
        raise NotImplementedError

    def current_stream(self, device: int) -> int:
        """Return the pointer to the stream that the library works on now, on the CUDA device of that number."""
        raise NotImplementedError

    def gradient_mode(self, *arrays: Array) -> str:
        """Return ``"forward"`` or ``"reverse"`` where what is done with any of the arrays is differentiated, else ""."""
        return ""

    def operations_traced(self) -> bool:
        """Return whether a compiler or tracer follows each operation, to do it again with other numbers."""
        return False

    def operations_watched(self) -> bool:
        """Return whether someone else than automatic differentiation follows each operation."""
        return False


class NumpyBackend(Backend):
    """NumPy's own arrays."""

    def version(self) -> str:
        """Return NumPy's version."""
        return np.__version__

    def devices(self) -> list[str]:
        """Return the names of the devices that arrays can lie on."""
        return ["cpu"]

    def to_numpy(self, array: Array) -> Any:
        """Return the same array."""
        return np.asarray(array)

    def from_numpy(self, array: Any, device: str | None = None) -> Array:
        """Return the same array; ``device`` is ``"cpu"`` or None."""
        if device not in (None, "cpu"):
            raise ValueError(f"NumPy arrays lie on cpu only, not on {device}")
        return np.asarray(array)


class StrictBackend(Backend):
    """Arrays of array-api-strict, which do what the array API says and nothing else: for tests."""

    def version(self) -> str:
        """Return the library's version."""
        return version("array-api-strict")

    def unusable(self) -> str | None:
        """Return that the library isn't installed, or None where it is."""
        return None if find_spec("array_api_strict") else "not installed"

    def devices(self) -> list[str]:
        """Return the name of the one device that is meant to be computed on."""
        return ["cpu"]

    def to_numpy(self, array: Array) -> Any:
        """Return a NumPy array that shares memory."""
        return np.asarray(array)

    def from_numpy(self, array: Any, device: str | None = None) -> Array:
        """Return a copy of a NumPy array; ``device`` is ``"cpu"`` or None."""
        if device not in (None, "cpu"):
            raise ValueError(f"array-api-strict computes on cpu, not on {device}")
        return import_module("array_api_strict").asarray(array, copy=True)


_BY_NAME: dict[str, Backend] = {"numpy": NumpyBackend(), "array_api_strict": StrictBackend()}
# By type too: to find an array's namespace takes as long as to launch a kernel.
_BY_TYPE: dict[type, Backend] = {}


def register(library: str, backend: Backend) -> None:
    """Use a backend for a library's arrays, where no installed package says so by an entry point."""
    _BY_NAME[library] = backend
    _BY_TYPE.clear()
    recorded_kernel.cache_clear()


def backend_named(library: str) -> Backend:
    """Return the backend of a library, or raise `OptionError` with the reason why it can't be used."""
    reason = unusable(library)
    if reason is not None:
        raise OptionError(f"library {library!r} cannot be used: {reason}")
    return _BY_NAME[library]


def unusable(library: str) -> str | None:
    """Return why an array library cannot be used, or None where it can; imports it."""
    try:
        found = _load(library)
    except ModuleNotFoundError:
        return "not installed"
    except (ImportError, OSError) as error:
        return f"it does not import: {error}"
    return _missing(library) if found is None else found.unusable()


def _missing(library: str) -> str:
    return (
        f"no entry point of the group {GROUP} brings a backend for {library}: install kdecore, or from its folders call "
        "kdecore.arrays.backend.register"
    )


def backend_of(array: Array) -> Backend:
    """Return the backend of an array's library.

    Raises
    ------
    OptionError
        No backend is there: the package that brings it isn't installed.
    """
    found = _BY_TYPE.get(type(array))
    if found is None:
        library = namespace_name(namespace_of(array))
        found = _load(library)
        if found is None:
            raise OptionError(_missing(library))
        _BY_TYPE[type(array)] = found
    return found


def _load(library: str) -> Backend | None:
    if library not in _BY_NAME:
        entries = list(entry_points(group=GROUP, name=library))
        if len({entry.value for entry in entries}) > 1:
            several = ", ".join(entry.value for entry in entries)
            raise OptionError(f"one backend for {library} is needed, got {several}")
        if not entries:
            return None
        _BY_NAME[library] = entries[0].load()
    return _BY_NAME[library]


@cache
def recorded_kernel(library: str, name: str) -> Any:
    """Return a function of the module of kernels whose gradients a library's backend knows."""
    module = backend_named(library).recorded_kernels
    if module is None:
        raise OptionError(f"the backend of {library} knows no gradients of kernels")
    return getattr(import_module(module), name)


def device_context(array: Array) -> Any:
    """Return a context in which the CUDA device that the array lies on is the current one; of no effect on the CPU."""
    if not device_name(array).startswith("cuda"):
        return nullcontext()
    return backend_of(array).device_context(on_device(array)[0])


def on_device(array: Array) -> tuple[int, int]:
    """Return the number of the CUDA device that the array lies on, and its library's current stream there, as a pointer."""
    device = array.device
    index = int(device.id if hasattr(device, "id") else device.index)
    return index, int(backend_of(array).current_stream(index))


def common_namespace(**arrays: Array) -> Namespace:
    """Return the one namespace of all named arrays.

    Raises
    ------
    DTypeError
        An argument is no array of a library in `SUPPORTED`, or that a backend is brought for, or not a plain one
        (`check_plain`).
    DeviceError
        Two arguments come from different libraries.
    """
    found = {}
    for name, array in arrays.items():
        if not any(is_array(array) for is_array in SUPPORTED.values()) and not _brought(array):
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


def _brought(array: object) -> bool:
    """Return whether an array follows the array API, and a package brings a backend for its library."""
    library = type(array).__module__.partition(".")[0]
    return hasattr(array, "__array_namespace__") and (library in _BY_NAME or bool(entry_points(group=GROUP, name=library)))


def _conversion(name: str, array: object) -> str:
    """Return how an array in the sense of no supported library becomes one."""
    dense = next((method for method in ("toarray", "todense") if hasattr(array, method)), None)
    if dense is not None:
        return f"pass {name}.{dense}()"
    return f"np.asarray({name}) makes one of lists and of other libraries' arrays"
