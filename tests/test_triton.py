"""Triton kernels on a machine without a device: interpreted, and compiled for sm_80 and sm_90."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.processes import Command, finish

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

FILES = sorted(path.name for path in (Path(__file__).parent / "interpreted").glob("test_*.py"))
INTERPRETED = [
    Command(("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/interpreted/{file}"), "TRITON_INTERPRET")
    for file in FILES
]


@pytest.mark.parametrize("command", INTERPRETED, ids=str)
def test_kernels_in_the_interpreter(command):
    out = finish(command)
    assert "passed" in out
    assert "skipped" not in out


@pytest.mark.parametrize("command", [Command(("-m", "tests.triton_compile"))], ids=str)
def test_kernels_compile_without_a_device(command, capsys):
    """Registers, spills, shared memory, tensor cores and float64: `tests/triton_compile.py` has the limits."""
    assert len(finish(command, capsys).splitlines()) > 1
