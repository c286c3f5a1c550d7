"""The `backend` fixture: every test that takes it runs on each array library that is here."""

import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import array_api_compat
import array_api_compat.numpy
import array_api_compat.torch
import array_api_strict
import hypothesis
import numpy as np
import pytest
import torch

from kdecore.arrays import backend as backends
from kdecore.core import problem as problems
from kdecore_adapters import register_backends

# A device runs these where kdecore is not installed.
register_backends()

# What needs an environment of its own: tests/test_cuda.py and tests/test_triton.py start it.
collect_ignore = [
    folder
    for folder, variable in (("simulated", "NUMBA_ENABLE_CUDASIM"), ("interpreted", "TRITON_INTERPRET"))
    if not os.environ.get(variable)
]

# The same examples in every run; `--hypothesis-profile=default` looks for new ones.
hypothesis.settings.register_profile("same-examples", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same-examples")
# What `make fuzz` asks for: new examples every time, and many.
hypothesis.settings.register_profile("fuzz", max_examples=2000, deadline=None, print_blob=True)


def _command(item: pytest.Item) -> Any:
    return getattr(item, "callspec", None) and item.callspec.params.get("command")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every", type=int, default=1, metavar="N", help="every N-th test of each file, and those that start others"
    )
    parser.addoption("--quick", action="store_true", help="every tenth test of each file, and none that starts others")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # What takes longest first: the other processes of `make test` take over what is left behind it.
    items.sort(key=lambda item: _command(item) is None)
    quick = config.getoption("quick")
    step = 10 if quick else config.getoption("every")
    alone = [item for item in items if _command(item) is None]
    kept = {item for path in {item.path for item in alone} for item in [one for one in alone if one.path == path][::step]}
    kept |= set() if quick else {item for item in items if _command(item) is not None}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_collection_finish() -> None:
    """Let garbage be looked for among what tests make alone, not among all that was imported: timings do so before each."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show the tables that tests recorded, though they passed."""
    for report in terminalreporter.getreports("passed"):
        for name, shown in report.user_properties:
            terminalreporter.section(name)
            terminalreporter.write_line(shown)


@dataclass(frozen=True)
class Backend:
    """An array library with converters from and to NumPy."""

    name: str
    xp: Any
    dtypes: tuple[str, ...]
    convert: Callable[[np.ndarray], Any]
    back: Callable[[Any], np.ndarray]
    device: str = "cpu"

    def array(self, x: np.ndarray, dtype: str | None = None) -> Any:
        """Copy a NumPy array to this library; ``dtype`` by name, x's own if None."""
        if dtype == "bfloat16":
            return self.convert(np.asarray(x, dtype=np.float32)).to(torch.bfloat16)
        return self.convert(np.array(x, dtype=dtype))

    def arrays(self, *xs: np.ndarray, dtype: str | None = None) -> tuple[Any, ...]:
        """Copy several NumPy arrays."""
        return tuple(self.array(x, dtype) for x in xs)

    def numpy(self, x: Any) -> np.ndarray:
        """Copy an array of this library to NumPy; bfloat16 comes back as float32."""
        return self.back(x)


def _read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def _from_torch(x: torch.Tensor) -> np.ndarray:
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy().copy()


NUMPY_DTYPES = ("float16", "float32", "float64")
BACKENDS = [
    Backend("numpy", array_api_compat.numpy, NUMPY_DTYPES, np.array, np.array),
    Backend("numpy-readonly", array_api_compat.numpy, NUMPY_DTYPES, _read_only, np.array),
    Backend(
        "torch",
        array_api_compat.torch,
        ("float16", "bfloat16", "float32", "float64"),
        lambda x: torch.tensor(np.ascontiguousarray(x)),
        _from_torch,
    ),
    # As on a device: otherwise tensors on the CPU that record no gradients are computed as NumPy arrays.
    Backend("torch-operations", array_api_compat.torch, ("bfloat16", "float32", "float64"), torch.tensor, _from_torch),
    Backend("array_api_strict", array_api_strict, ("float32", "float64"), array_api_strict.asarray, np.array),
]


def _add_cupy() -> str:
    """Append the CuPy backend where there is a device; return what was done and why."""
    try:
        import cupy
    except ImportError as error:
        return f"cupy left out: {error}"
    if not cupy.cuda.is_available():
        return "cupy left out: no CUDA device"
    import array_api_compat.cupy

    BACKENDS.append(Backend("cupy", array_api_compat.cupy, NUMPY_DTYPES, cupy.asarray, cupy.asnumpy, "cuda:0"))
    return "cupy found"


def _add_torch_cuda() -> str:
    """Append PyTorch on a CUDA device where there is one; return what was done and why."""
    if not torch.cuda.is_available():
        return "torch on CUDA left out: no CUDA device"

    def convert(x: np.ndarray) -> torch.Tensor:
        return torch.tensor(np.ascontiguousarray(x), device="cuda")

    dtypes = ("float16", "bfloat16", "float32", "float64")
    BACKENDS.append(Backend("torch-cuda", array_api_compat.torch, dtypes, convert, _from_torch, "cuda:0"))
    return "torch on CUDA found"


ACCELERATORS = f"{_add_cupy()}; {_add_torch_cuda()}"


def pytest_report_header() -> str:
    return f"kdecore backends: {', '.join(backend.name for backend in BACKENDS)} ({ACCELERATORS})"


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    if request.param.name == "torch-operations":
        monkeypatch.setattr(problems, "host_views", lambda *arrays, **more: None)
    return request.param


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20230702)


@pytest.fixture
def no_torch(monkeypatch):
    """Let PyTorch's backend not import, as where PyTorch isn't installed."""
    monkeypatch.delitem(backends._BY_NAME, "torch", raising=False)
    monkeypatch.setitem(sys.modules, "kdecore_adapters.torch_backend", None)
