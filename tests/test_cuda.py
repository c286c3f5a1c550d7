"""Numba CUDA kernels without a device: some tests in the simulator, and compiled for sm_80; `make kernels` does all."""

import re
from importlib.util import find_spec

import pytest

from tests.processes import THINNED, Command, run

if find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

SIMULATED = Command(("-m", "pytest", "-q", "-p", "no:cacheprovider", *THINNED, "tests/simulated"), "NUMBA_ENABLE_CUDASIM")


@pytest.mark.parametrize("command", [SIMULATED], ids=str)
def test_kernels_in_the_simulator(command):
    summary = next(line for line in run(command).splitlines() if re.search(r"\d+ passed", line))
    assert "skipped" not in summary


@pytest.mark.parametrize("command", [Command(("-m", "tests.cuda_compile", "sm_80"))], ids=str)
def test_kernels_compile_without_a_device(command, record_property):
    """Registers, spills, arrays in local memory, shared memory and float64: `tests/cuda_compile.py` has the limits."""
    out = run(command)
    record_property(str(command), out)
    assert len(out.splitlines()) > 1
