"""CUDA kernels on a machine without a device: simulated, and compiled for sm_80 and sm_90."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent

if find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)


def run(*command, **environment):
    """Run Python in a process of its own and return its output, which is printed if it fails."""
    found = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "adapters"))), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    print(found.stdout, found.stderr)
    assert found.returncode == 0
    return found.stdout


@pytest.mark.parametrize("file", sorted(path.name for path in (HERE / "simulated").glob("test_*.py")))
def test_kernels_in_the_simulator(file):
    out = run("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/simulated/{file}", NUMBA_ENABLE_CUDASIM="1")
    assert "passed" in out
    assert "skipped" not in out


def test_kernels_compile_without_a_device(capsys):
    """Registers, spills, arrays in local memory, shared memory and float64: `tests/cuda_compile.py` has the limits."""
    table = run("-m", "tests.cuda_compile")
    with capsys.disabled():
        print("", table, sep="\n")
    assert len(table.splitlines()) > 1
