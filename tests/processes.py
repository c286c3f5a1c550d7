"""Tests that need a process of their own."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
THINNED = ("--every", "5")
"""Of the tests that simulate or interpret kernels for devices, which take as long as all others: `make kernels` runs all."""


@dataclass(frozen=True)
class Command:
    """Arguments of Python, and one environment variable that is set to 1."""

    arguments: tuple[str, ...]
    variable: str = ""

    def __str__(self):
        return self.arguments[-1]


def run(command):
    """Return what a command prints, or fail with it."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "adapters")))
    found = subprocess.run(
        [sys.executable, *command.arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            **({command.variable: "1"} if command.variable else {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(found.stdout)
    assert found.returncode == 0
    return found.stdout
