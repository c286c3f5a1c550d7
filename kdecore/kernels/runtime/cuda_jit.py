"""Numba CUDA kernels: how they are declared, launched on the arrays of any library, and read half precision.

A kernel is compiled for a device and for the dtypes of its arguments when it is launched first. It runs on the device that
the arrays lie on and on the stream that their library works on at the time, and nothing waits for it.

Numba compiles and loads; the driver is called without it, for its own launch takes longer than most kernels here run. An
array is passed as Numba's kernels take one: two pointers that are null on a device (memory to count references to, and a
Python object), its number of elements, bytes of one, address, shape and strides in bytes, each a parameter of 8 bytes.
"""

import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
from cuda.bindings import driver
from numba import config, cuda, types

from kdecore.arrays.backend import on_device
from kdecore.arrays.memory import contiguous, cuda_address, host_bits
from kdecore.arrays.namespace import Array, dtype_name
from kdecore.kernels.runtime.grids import flat_grid

SIMULATED = bool(config.ENABLE_CUDASIM)
"""Whether Numba simulates CUDA (NUMBA_ENABLE_CUDASIM=1): kernels run in Python on NumPy arrays, to test their logic."""

NUMBERS = (bool, int, float, np.generic)
"""What is passed by value; anything else is an array."""
STORED = {"bool": "boolean", "bfloat16": "uint16"}
"""Name of a dtype → that of the Numba type that it is passed as, where they differ."""
FORMATS = {"bool": "?7x", "int64": "q", "float32": "f4x", "float64": "d"}
"""Name of a number's dtype → its format in `struct`, in 8 bytes of which the driver reads the first."""


@dataclass(frozen=True)
class Loaded:
    """A kernel that is compiled for the types of its arguments and loaded on a device.

    Attributes
    ----------
    function
        What the driver launches, as a pointer; so is ``context``.
    context
        The device's primary context.
    words
        Format of the parameters, 8 bytes each.
    memory
        The parameters of the launch in progress: the driver copies them before it returns.
    places
        Addresses of the parameters in ``memory``.
    lock
        Held while ``memory`` is in use.
    code
        Numba's kernel: the device's code is unloaded with it.
    """

    function: int
    context: int
    words: struct.Struct
    memory: Any
    places: Any
    lock: Lock
    code: Any


@dataclass(frozen=True)
class CudaKernel:
    """A kernel and what it takes.

    Attributes
    ----------
    name
        For tables.
    function
        The Python function.
    arguments
        Numba types as text. ``number`` stands for the dtype computed in, ``stored`` for that of rows in memory.
    stored
        The name in `READERS` of how the kernel reads rows.
    threads
        Threads of a block, at most.
    compiled
        Numba's dispatcher.
    loaded
        Device and types of the arguments → what is launched for them.
    """

    name: str
    function: Callable[..., None]
    arguments: str
    stored: str
    threads: int
    compiled: Any
    loaded: dict[tuple[Any, ...], Loaded] = field(default_factory=dict, repr=False, compare=False)


DECLARED: list[CudaKernel] = []
"""All kernels declared so far, for tests that compile them without a device."""


def cuda_kernel(arguments: str, threads: int, stored: str = "number") -> Callable[[Callable[..., None]], CudaKernel]:
    """Declare a kernel; see `CudaKernel` for the parameters. Nothing is compiled, nor a device needed, before a launch."""

    def declare(function: Callable[..., None]) -> CudaKernel:
        name = f"{function.__module__.split('.')[-2]}.{function.__name__}"
        found = CudaKernel(name, function, arguments, stored, threads, cuda.jit(function))
        DECLARED.append(found)
        return found

    return declare


def launch(kernel: CudaKernel, blocks: int, threads: int, *arguments: Any) -> None:
    """Launch a kernel on the device and current stream of its first argument that is an array.

    Parameters
    ----------
    kernel
        As declared.
    blocks
        Thread blocks, along one axis. Without any, nothing is launched.
    threads
        Threads of a block.
    *arguments
        Arrays on one device, and numbers. What is written to must lie row by row in memory; of what doesn't, the kernel gets
        a copy. bfloat16 arrives as its bits, uint16.

    Raises
    ------
    KernelUnavailable
        A grid has no room for so many blocks.
    """
    grid = flat_grid(kernel.name, blocks)
    if blocks == 0:
        return
    given = [x if isinstance(x, NUMBERS) else contiguous(x) for x in arguments]
    if SIMULATED:
        kernel.compiled[grid, threads](*(x if isinstance(x, NUMBERS) else host_bits(x) for x in given))
        return
    index, stream = on_device(next(x for x in given if not isinstance(x, NUMBERS)))
    key = (index, *(kind(x) for x in given))
    found = kernel.loaded.get(key)
    if found is None:
        found = kernel.loaded[key] = load(kernel.compiled, index, given)
    start(found, *grid, threads, stream, [word for x in given for word in words(x)])


def kind(argument: Any) -> Any:
    """Return what an argument's type follows from."""
    return type(argument) if isinstance(argument, NUMBERS) else (argument.dtype, argument.ndim)


def numba_type(argument: Any) -> Any:
    """Return the Numba type of an argument: arrays lie row by row."""
    if isinstance(argument, NUMBERS):
        name = np.dtype(type(argument)).name
        return getattr(types, STORED.get(name, name))
    name = dtype_name(argument)
    return types.Array(getattr(types, STORED.get(name, name)), argument.ndim, "C")


def word_format(argument: Any) -> str:
    """Return the format of an argument's `words`."""
    return FORMATS[np.dtype(type(argument)).name] if isinstance(argument, NUMBERS) else f"{5 + 2 * argument.ndim}q"


def words(argument: Any) -> Sequence[Any]:
    """Return the parameters that stand for an argument; the module's docstring has an array's."""
    if isinstance(argument, NUMBERS):
        return (argument,)
    shape, step = argument.shape, argument.itemsize
    strides = []
    for length in reversed(shape):
        strides.append(step)
        step *= length
    strides.reverse()
    return 0, 0, step // argument.itemsize, argument.itemsize, cuda_address(argument), *shape, *strides


def load(compiled: Any, index: int, arguments: Sequence[Any]) -> Loaded:
    """Compile a kernel for the types of arguments, and load it on the device of that number."""
    with cuda.gpus[index]:
        (context,) = ask(driver.cuCtxGetCurrent)
        code = compiled.compile(tuple(numba_type(x) for x in arguments))
        # Compiled for another device before, it is not yet loaded on this one.
        code.bind()
        function = int(code.library.get_cufunc().handle)
    return Loaded(function, int(context), *parameters("".join(word_format(x) for x in arguments)), Lock(), code)


def parameters(formats: str) -> tuple[struct.Struct, Any, Any]:
    """Return the format of parameters, memory for them, and their addresses."""
    packed = struct.Struct(f"<{formats}")
    memory = ctypes.create_string_buffer(packed.size)
    first = ctypes.addressof(memory)
    addresses = range(first, first + packed.size, 8)
    return packed, memory, (ctypes.c_void_p * len(addresses))(*addresses)


def start(loaded: Loaded, blocks: int, threads: int, stream: int, given: Sequence[Any]) -> None:
    """Launch on the device that a kernel is loaded on, whichever is current; ``given`` has the `words` of its arguments."""
    (current,) = ask(driver.cuCtxGetCurrent)
    # None is current in a thread in which nothing has used a device.
    elsewhere = int(current) != loaded.context
    if elsewhere:
        ask(driver.cuCtxPushCurrent, loaded.context)
    try:
        with loaded.lock:
            loaded.words.pack_into(loaded.memory, 0, *given)
            places = ctypes.addressof(loaded.places)
            ask(driver.cuLaunchKernel, loaded.function, blocks, 1, 1, threads, 1, 1, 0, stream, places, 0)
    finally:
        if elsewhere:
            ask(driver.cuCtxPopCurrent)


def ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the driver answers, or raise what it reports."""
    problem, *answers = function(*arguments)
    if problem != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver reports {problem.name}")
    return answers


@cuda.jit(device=True)
def from_number(stored: Any) -> Any:
    """Return a number as it is stored."""
    return stored


@cuda.jit(device=True)
def from_float16(stored: Any) -> Any:
    """Return a float16 number in float32."""
    return np.float32(stored)


@cuda.jit(device=True)
def from_bfloat16(bits: Any) -> Any:
    """Return the float32 number whose upper half ``bits`` (uint16) is."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


READERS = {"number": from_number, "float16": from_float16, "bfloat16": from_bfloat16}
"""How rows are read, by their dtype; ``"number"`` for float32 and float64, in which they are computed too."""


@cuda.jit(device=True)
def to_float16(number: Any) -> Any:
    """Return a float32 number in float16."""
    return np.float16(number)


@cuda.jit(device=True)
def to_bfloat16(number: Any) -> Any:
    """Return the bits (uint16) of a float32 number in bfloat16, rounded to the nearest, of two the even one."""
    bits = np.float32(number).view(np.uint32)
    rounded = np.uint16((np.uint64(bits) + np.uint64(0x7FFF) + np.uint64((bits >> np.uint32(16)) & np.uint32(1))) >> 16)
    return rounded if number == number else np.uint16(0x7FC0)


WRITERS = {"number": from_number, "float16": to_float16, "bfloat16": to_bfloat16}
"""How numbers are stored, by the dtype of rows."""


def for_each_reader(make: Callable[[str, Any], CudaKernel]) -> Callable[[Array], CudaKernel]:
    """Make a kernel for each of `READERS`, and return what finds the one for an array."""
    made = {name: make(name, read) for name, read in READERS.items()}
    return lambda rows: made.get(dtype_name(rows), made["number"])
