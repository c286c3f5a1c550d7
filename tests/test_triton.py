"""Triton kernels without a device: some tests interpreted, and compiled for sm_90; `make kernels` does all."""

import re
from importlib.util import find_spec

import pytest

from tests.processes import THINNED, Command, run

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

INTERPRETED = Command(("-m", "pytest", "-q", "-p", "no:cacheprovider", *THINNED, "tests/interpreted"), "TRITON_INTERPRET")


@pytest.mark.parametrize("command", [INTERPRETED], ids=str)
def test_kernels_in_the_interpreter(command):
    summary = next(line for line in run(command).splitlines() if re.search(r"\d+ passed", line))
    assert "skipped" not in summary


@pytest.mark.parametrize("command", [Command(("-m", "tests.triton_compile", "sm_90"))], ids=str)
def test_kernels_compile_without_a_device(command, record_property):
    """Registers, spills, shared memory, tensor cores and float64: `tests/triton_compile.py` has the limits."""
    out = run(command)
    record_property(str(command), out)
    assert len(out.splitlines()) > 1
