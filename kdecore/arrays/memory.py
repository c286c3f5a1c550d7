"""Where the numbers of arrays lie: views and copies on the host, layouts, addresses; and work there without warnings."""

from collections.abc import Sequence
from typing import Any

import array_api_compat
import numpy as np

from kdecore.arrays.backend import backend_of
from kdecore.arrays.gradients import gradient_mode, without_gradient
from kdecore.arrays.namespace import Array, Namespace, device_name, dtype_name, namespace_of


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
    if backend_of(arrays[0]).operations_watched():
        return None
    others = filter(array_api_compat.is_torch_array, recorded)
    try:
        if gradient_mode(*arrays, *others):
            return None
        return tuple(backend_of(array).to_numpy(array) for array in arrays)
    except RuntimeError:  # of PyTorch, where there is no memory to share
        return None


def in_library_of(like: Array, array: Array) -> Array:
    """Return an array on the CPU in the library of another one, NumPy's or the other way round, sharing its memory.

    Itself where it is one of these already.
    """
    from_numpy, to_numpy = (array_api_compat.is_numpy_array(x) for x in (array, like))
    if from_numpy == to_numpy:
        return array
    return backend_of(like).from_numpy(array) if from_numpy else backend_of(array).to_numpy(array)


def host_memory(array: Array) -> Array:
    """Return a C-contiguous NumPy array that can be written to: the array's own memory where it is so, else a copy."""
    view = np.asarray(without_gradient(array))
    return view if view.flags.c_contiguous and view.flags.aligned and view.flags.writeable else np.array(view, order="C")


def to_host(array: Array) -> Array:
    """Return the same numbers as a NumPy array, which may share the memory of an array on the CPU."""
    if array_api_compat.is_torch_array(array) or array_api_compat.is_cupy_array(array):
        array = array_api_compat.to_device(without_gradient(array), "cpu")
    return host_view(array)


def from_host_like(xp: Namespace, array: Array, like: Array) -> Array:
    """Return a NumPy array in the namespace ``xp`` on ``like``'s device, sharing memory where the library can."""
    return xp.asarray(array, device=array_api_compat.device(like))


def quiet() -> Any:
    """Return a context in which NumPy warns of no numbers that are not finite; other libraries never do."""
    return np.errstate(all="ignore")
