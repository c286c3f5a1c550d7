"""Tests that need a process of their own: one after another beside the other tests, on another core where there is one.

`python -m tests.processes FOLDER ARGUMENTS …` runs them: a process, so that no thread runs beside tests that count threads.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
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

    @property
    def file(self):
        """Name of the file with its outcome."""
        return "-".join((*self.arguments, self.variable)).replace("/", "-") + ".json"


class Runner:
    """The process that runs commands, and the folder with their outcomes."""

    def __init__(self):
        self.folder, self.process, self.commands = None, None, []

    def start(self, commands):
        """Run commands one after another, in the background."""
        self.commands, self.folder = commands, tempfile.TemporaryDirectory(prefix="kdecore-tests-")
        given = json.dumps([(command.file, command.arguments, command.variable) for command in commands])
        self.process = subprocess.Popen([sys.executable, "-m", "tests.processes", self.folder.name, given], cwd=ROOT)

    def finish(self, command, capsys=None):
        """Return what a command printed, or fail with it; it is shown anyway where ``capsys`` is given."""
        found = Path(self.folder.name) / command.file
        while not found.exists():
            assert self.process.poll() is None or found.exists(), "the process of these tests has ended"
            time.sleep(0.2)
        code, out = json.loads(found.read_text(encoding="utf-8"))
        print(out)
        assert code == 0
        if capsys is not None:
            with capsys.disabled():
                print("", out, sep="\n")
        return out

    def stop(self):
        """End the process, where tests ended early."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.folder.cleanup()


RUNNER = Runner()


def finish(command, capsys=None):
    """See `Runner.finish`."""
    return RUNNER.finish(command, capsys)


def main(folder, commands):
    """Run commands, and write the outcome of each when it ends."""
    for file, arguments, variable in json.loads(commands):
        paths = os.pathsep.join((str(ROOT), str(ROOT / "adapters")))
        found = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **({variable: "1"} if variable else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        written = Path(folder) / (file + ".part")
        written.write_text(json.dumps((found.returncode, found.stdout)), encoding="utf-8")
        written.rename(Path(folder) / file)


if __name__ == "__main__":
    main(*sys.argv[1:])
