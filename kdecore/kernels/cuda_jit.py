"""Numba CUDA kernels: how they are declared, launched on the arrays of any library, and read half precision.

A kernel is compiled for a device and for the dtypes of its arguments when it is launched first. It runs on the device that
the arrays lie on and on the stream that their library works on at the time, and nothing waits for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import config, cuda

from kdecore.namespaces import Array, contiguous, cuda_memory, dtype_name, on_device

SIMULATED = bool(config.ENABLE_CUDASIM)
"""Whether Numba simulates CUDA (NUMBA_ENABLE_CUDASIM=1): kernels run in Python on NumPy arrays, to test their logic."""


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
    """

    name: str
    function: Callable[..., None]
    arguments: str
    stored: str
    threads: int
    compiled: Any


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


def launch(kernel: CudaKernel, grid: int | tuple[int, ...], threads: int, *arguments: Any) -> None:
    """Launch a kernel on the device and current stream of its first argument that is an array.

    Parameters
    ----------
    kernel
        As declared.
    grid
        Blocks, groups first: of the other axes a device has 65,535 blocks at most. Without any, nothing is launched.
    threads
        Threads of a block.
    *arguments
        Arrays on one device, and numbers. What is written to must lie row by row in memory; of what doesn't, the kernel gets
        a copy. bfloat16 arrives as its bits, uint16.
    """
    if 0 in (grid if isinstance(grid, tuple) else (grid,)):
        return
    given = [cuda_memory(contiguous(x)) if hasattr(x, "shape") and x.shape else x for x in arguments]
    if SIMULATED:
        kernel.compiled[grid, threads](*given)
        return
    first = next(x for x in arguments if hasattr(x, "shape") and x.shape)
    index, stream = on_device(first)
    with cuda.gpus[index]:
        kernel.compiled[grid, threads, cuda.external_stream(stream) if stream else 0](*given)


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


def for_each_reader(make: Callable[[str, Any], CudaKernel]) -> Callable[[Array], CudaKernel]:
    """Make a kernel for each of `READERS`, and return what finds the one for an array."""
    made = {name: make(name, read) for name, read in READERS.items()}
    return lambda rows: made.get(dtype_name(rows), made["number"])
