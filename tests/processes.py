"""Tests that need a process of their own: one after another beside the other tests, on another core where there is one."""

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Command:
    """Arguments of Python, and one environment variable that is set to 1."""

    arguments: tuple[str, ...]
    variable: str = ""

    def __str__(self):
        return self.arguments[-1]


_pool = ThreadPoolExecutor(max_workers=1)
_started: dict[Command, Future] = {}


def start(command):
    """Have a command run in its turn; once, however often it is asked for."""
    if command not in _started:
        _started[command] = _pool.submit(_run, command)
    return _started[command]


def finish(command, capsys=None):
    """Return what a command printed, or fail with it; its last lines are shown anyway where ``capsys`` is given."""
    found = start(command).result()
    print(found.stdout, found.stderr)
    assert found.returncode == 0
    if capsys is not None:
        with capsys.disabled():
            print("", found.stdout, sep="\n")
    return found.stdout


def _run(command):
    given = {command.variable: "1"} if command.variable else {}
    paths = os.pathsep.join((str(ROOT), str(ROOT / "adapters")))
    return subprocess.run(
        [sys.executable, *command.arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **given},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
