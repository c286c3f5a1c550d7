"""Numba CUDA kernels on a machine without a device: in the simulator, and compiled for sm_80 and sm_90."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.processes import Command, finish

if find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

FILES = sorted(path.name for path in (Path(__file__).parent / "simulated").glob("test_*.py"))
SIMULATED = [
    Command(("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/simulated/{file}"), "NUMBA_ENABLE_CUDASIM")
    for file in FILES
]


@pytest.mark.parametrize("command", SIMULATED, ids=str)
def test_kernels_in_the_simulator(command):
    out = finish(command)
    assert "passed" in out
    assert "skipped" not in out


@pytest.mark.parametrize("command", [Command(("-m", "tests.cuda_compile"))], ids=str)
def test_kernels_compile_without_a_device(command, capsys):
    """Registers, spills, arrays in local memory, shared memory and float64: `tests/cuda_compile.py` has the limits."""
    assert len(finish(command, capsys).splitlines()) > 1
