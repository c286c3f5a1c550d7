"""How Numba CUDA kernels are launched, without a device: what is passed to the driver, and what Numba compiles for it."""

import ctypes
import re
from importlib.util import find_spec
from threading import Thread
from time import sleep
from types import SimpleNamespace

import numpy as np
import pytest
import torch

if find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from cuda.core.utils import StridedMemoryView
from numba import cuda, types
from numba.cuda.args import ArgHint
from numba.cuda.dispatcher import _Kernel

from kdecore.arrays import backend
from kdecore.arrays.backend import on_device
from kdecore.arrays.errors import KernelUnavailable
from kdecore.arrays.memory import contiguous, cuda_address
from kdecore.kernels.registry import cuda_problem
from kdecore.kernels.runtime import cuda_jit
from kdecore.kernels.runtime.cuda_jit import CudaKernel, launch, numba_type, parameters, word_format, words
from tests.cuda_compile import declared, signatures

INDEX, STREAM = 1, 0xABC0
CONTEXTS = {0: 0x1000, 1: 0x2000}
FUNCTION = 0x77
DTYPES = ("bool", "int16", "int32", "int64", "uint16", "float16", "bfloat16", "float32", "float64")
NUMBERS = (True, False, -(2**40), 0.1, np.float32(0.1), np.float64(0.1), np.int64(7), np.bool_(True))
SHAPES = ((7,), (3, 4), (2, 3, 5), (1, 4, 1), (0,), (0, 3), (2, 0, 5))


class View(ArgHint):
    """An array as Numba's own launch sees it on a device."""

    def to_device(self, retr, stream=0):
        return StridedMemoryView.from_dlpack(self.value, stream_ptr=-1)


def packed_by_numba(argument):
    """Return the parameters that Numba's own launch passes."""
    given, found = argument, []
    if isinstance(argument, torch.Tensor):
        given = View(argument.view(torch.uint16) if argument.dtype == torch.bfloat16 else argument)
    _Kernel._prepare_args(SimpleNamespace(extensions=()), numba_type(argument), given, 0, [], found)
    return [x.value if isinstance(x, ctypes._SimpleCData) else x for x in found]


def read(place, form):
    """Read a parameter as the driver does: as many bytes of it as its type has."""
    of = {"q": ctypes.c_int64, "?7x": ctypes.c_bool, "f4x": ctypes.c_float, "d": ctypes.c_double}[form]
    return of.from_address(place).value


def forms_of(arguments):
    """Return the format of every parameter, in the terms of `struct`."""
    every = (["q"] * (5 + 2 * x.ndim) if isinstance(x, torch.Tensor) else [word_format(x)] for x in arguments)
    return [form for forms in every for form in forms]


class Driver:
    """Keeps what is launched, and reads the parameters when it is, as the CUDA driver does."""

    CUresult = cuda_jit.driver.CUresult

    def __init__(self):
        self.stack, self.calls, self.launched, self.forms, self.result = [CONTEXTS[INDEX]], [], [], (), 0

    def _done(self, *answers):
        return (self.CUresult.CUDA_SUCCESS, *answers)

    def cuCtxGetCurrent(self):  # noqa: N802
        return self._done(self.stack[-1])

    def cuCtxPushCurrent(self, context):  # noqa: N802
        self.calls.append(("push", context))
        self.stack.append(context)
        return self._done()

    def cuCtxPopCurrent(self):  # noqa: N802
        self.calls.append(("pop", self.stack[-1]))
        return self._done(self.stack.pop())

    def cuLaunchKernel(self, *given):  # noqa: N802
        function, *blocks, shared, stream, places, extra = given
        assert (shared, extra) == (0, 0)
        self.calls.append(("launch", self.stack[-1]))
        sleep(0.001)
        each = (ctypes.c_void_p * len(self.forms)).from_address(places)
        found = [read(place, form) for place, form in zip(each, self.forms, strict=True)]
        self.launched.append((function, tuple(blocks), stream, found))
        return (self.CUresult(self.result),)


class Compiled:
    """Stands for Numba's dispatcher: keeps what it compiles."""

    def __init__(self):
        self.signatures, self.bound, self.library = [], 0, self

    def compile(self, signature):
        self.signatures.append(signature)
        return self

    def bind(self):
        self.bound += 1

    def get_cufunc(self):
        return SimpleNamespace(handle=FUNCTION)


@pytest.fixture
def driver(monkeypatch):
    found = Driver()

    class Device:
        def __init__(self, index):
            self.context = CONTEXTS[index]

        def __enter__(self):
            found.stack.append(self.context)

        def __exit__(self, *_):
            found.stack.pop()

    monkeypatch.setattr(cuda_jit, "driver", found)
    monkeypatch.setattr(cuda_jit, "cuda", SimpleNamespace(gpus={i: Device(i) for i in CONTEXTS}))
    monkeypatch.setattr(cuda_jit, "on_device", lambda array: (INDEX, STREAM))
    return found


@pytest.fixture
def kernel():
    return CudaKernel("test", lambda: None, "", "number", 128, Compiled())


def tensor(dtype, shape):
    return torch.arange(np.prod(shape)).reshape(shape).to(getattr(torch, dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_are_passed_as_numba_passes_them(dtype, shape):
    array = tensor(dtype, shape)
    found, expected = list(words(array)), packed_by_numba(array)
    if 0 in shape:  # the strides of an array without elements reach nothing
        found, expected = (x[: 5 + len(shape)] for x in (found, expected))
    assert found == expected


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_numbers_are_passed_as_numba_passes_them(number):
    packed, memory, places = parameters(word_format(number))
    packed.pack_into(memory, 0, *words(number))
    assert [read(places[0], word_format(number))] == packed_by_numba(number)
    assert packed.size == 8


def test_parameters_have_the_sizes_that_compiled_kernels_take():
    def kernel(rows, again, count, scale, wide, bits):
        if again:
            rows[0, count] = scale + wide + bits[0]

    given = torch.ones(2, 3), True, 5, np.float32(0.5), 0.5, tensor("bfloat16", (4,))
    ptx, _ = cuda.compile(kernel, tuple(numba_type(x) for x in given), device=False, abi="numba", cc=(9, 0))
    names = {"u64": "q", "u8": "?7x", "f32": "f4x", "f64": "d"}
    assert [names[x] for x in re.findall(r"\.param \.(\w+) ", ptx)] == forms_of(given)


def test_kernels_are_compiled_for_the_types_they_declare():
    every = {x for one in declared() for _, signature in signatures(one) for x in signature}
    assert len(every) > 10
    for wanted in every:
        if isinstance(wanted, types.Array):
            example = tensor(str(wanted.dtype), (1,) * wanted.ndim)
        else:
            example = {"bool": True, "int64": 3, "float32": np.float32(3), "float64": np.float64(3)}[str(wanted)]
        assert numba_type(example) == wanted


def test_bfloat16_arrives_as_its_bits():
    assert numba_type(tensor("bfloat16", (2, 2))) == types.uint16[:, ::1]


@pytest.mark.parametrize("blocks", [5, 2**16, 2**31 - 1])
def test_the_driver_gets_grid_block_stream_and_parameters(driver, kernel, blocks):
    given = tensor("float32", (2, 3, 4)), True, -5, np.float32(0.25), tensor("bool", (0, 2)), 0.1, tensor("bfloat16", (9,))
    driver.forms = forms_of(given)
    launch(kernel, blocks, 64, *given)
    expected = [word for x in given for word in packed_by_numba(x)]
    ((function, dimensions, stream, found),) = driver.launched
    assert (function, dimensions, stream) == (FUNCTION, (blocks, 1, 1, 64, 1, 1), STREAM)
    assert found == expected


def test_without_blocks_nothing_is_launched(driver, kernel):
    launch(kernel, 0, 64, tensor("float32", (0, 3)))
    assert driver.launched == []


def test_more_blocks_than_a_grid_has_room_for_are_refused(driver, kernel):
    with pytest.raises(KernelUnavailable, match=r"at most 2147483647 blocks, got 2147483648 of test"):
        launch(kernel, 2**31, 64, tensor("float32", (3,)))
    assert driver.launched == []


def test_arrays_that_do_not_lie_row_by_row_are_copied(driver, kernel):
    array = tensor("float32", (3, 4)).T
    driver.forms = forms_of([array])
    launch(kernel, 1, 8, array)
    ((*_, found),) = driver.launched
    assert found[4] != array.data_ptr()
    assert found[5:] == [4, 3, 12, 4]


def test_a_kernel_is_loaded_once_for_the_types_of_its_arguments(driver, kernel, monkeypatch):
    def run(*given):
        driver.forms = forms_of(given)
        launch(kernel, 1, 8, *given)
        return len(kernel.compiled.signatures)

    array = tensor("float32", (2, 3))
    assert run(array, 1) == 1
    assert run(tensor("float32", (5, 7)), -8) == 1
    assert run(array.T, 2) == 1
    assert run(array, True) == 2
    assert run(array, 0.5) == 3
    assert run(array, np.float32(0.5)) == 4
    assert run(tensor("float64", (2, 3)), 1) == 5
    assert run(tensor("float32", (2, 3, 1)), 1) == 6
    monkeypatch.setattr(cuda_jit, "on_device", lambda array: (0, STREAM))
    assert run(array, 1) == 7
    assert kernel.compiled.bound == 7
    assert driver.calls[-3:] == [(x, CONTEXTS[0]) for x in ("push", "launch", "pop")]
    assert len(driver.launched) == 9


@pytest.mark.parametrize("current", [0, CONTEXTS[0]], ids=["none", "another"])
def test_the_arrays_device_is_current_while_a_kernel_is_launched(driver, kernel, current):
    array = tensor("float32", (2,))
    driver.forms = forms_of([array])
    launch(kernel, 1, 8, array)
    assert driver.calls == [("launch", CONTEXTS[INDEX])]
    driver.stack = [current]
    launch(kernel, 1, 8, array)
    assert driver.calls[1:] == [(x, CONTEXTS[INDEX]) for x in ("push", "launch", "pop")]
    assert driver.stack == [current]


def test_what_the_driver_reports_is_raised_and_the_device_switched_back(driver, kernel):
    array = tensor("float32", (2,))
    driver.forms, driver.stack, driver.result = forms_of([array]), [CONTEXTS[0]], 1
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        launch(kernel, 1, 2048, array)
    assert driver.stack == [CONTEXTS[0]]


def test_threads_do_not_mix_their_parameters(driver, kernel):
    array = tensor("float32", (2,))
    driver.forms = forms_of([array, 1])
    launch(kernel, 1, 8, array, -1)
    threads = [Thread(target=launch, args=(kernel, 1, 8, array, i)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found[-1] for *_, found in driver.launched) == [-1, *range(20)]


@pytest.mark.parametrize("device", [SimpleNamespace(id=2), torch.device("cuda:2")], ids=["cupy", "torch"])
def test_device_and_stream_are_the_arrays(monkeypatch, device):
    array = SimpleNamespace(device=device)
    monkeypatch.setitem(backend._BY_TYPE, SimpleNamespace, SimpleNamespace(current_stream=lambda index: 100 + index))
    assert on_device(array) == (2, 102)


def test_addresses_are_those_of_the_memory():
    array = tensor("float32", (4,))[1:]
    assert cuda_address(contiguous(array)) == array.data_ptr()
    assert cuda_address(SimpleNamespace(data=SimpleNamespace(ptr=64))) == 64


@pytest.fixture
def no_problem_kept():
    cuda_problem.cache_clear()
    yield
    cuda_problem.cache_clear()


def test_a_compiler_that_fails_is_a_reason_not_to_use_kernels(monkeypatch, no_problem_kept):
    compiled = []

    def jit(signature):
        def compile_it(function):
            compiled.append((signature, function.__code__.co_argcount))
            if len(compiled) > 1:
                raise AttributeError("module 'numpy' has no attribute 'row_stack'")

        return compile_it

    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "jit", jit)
    assert cuda_problem() is None
    cuda_problem.cache_clear()
    assert "AttributeError: module 'numpy' has no attribute 'row_stack'" in cuda_problem()
    assert cuda_problem() is not None
    assert compiled == [("void()", 0)] * 2


def test_compiling_needs_a_device(monkeypatch, no_problem_kept):
    if cuda.is_available():
        pytest.skip("there is a device")
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    assert "Numba does not compile for the device" in cuda_problem()
