"""The part of `bench.gpu` that runs the tests which need a device, in a process of their own."""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from bench.gpu.session import Findings, Row, Session

MOST_FAILURES = 200
DEVICE_TESTS, PROCESSES = ("tests", "-k", "cupy or torch-cuda"), 8
REHEARSED_TESTS = ("tests/test_metrics.py", "--noconftest")


def suite(session: Session) -> Findings:
    """Run the tests until there is no time left; yield one row."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "outcomes.jsonl"
        selected, processes = (REHEARSED_TESTS, 1) if session.rehearsal else (DEVICE_TESTS, PROCESSES)
        code, said = run_tests(command(report, selected, processes), session.left())
        text = report.read_text(encoding="utf-8") if report.exists() else ""
    row = {"selected": " ".join(selected), "exit_code": code, "cut_off": code is None, **read_outcomes(text)}
    # pytest says 5 where nothing was selected.
    yield "tests", row | ({} if row["passed"] or row["failed"] else {"said": said})


def command(report: Path, selected: Iterable[str], processes: int = 1) -> list[str]:
    """Return pytest's command line, in several processes and with limits of time where the plug-ins are there."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "bench.gpu.outcomes", "-W", "default", f"--outcomes={report}"]
    if processes > 1 and find_spec("xdist") is not None:
        options += ["-n", str(processes), "--dist", "loadfile"]
    if find_spec("pytest_timeout") is not None:
        options += ["--timeout", "120"]
    return [sys.executable, "-m", "pytest", *options, *selected]


def run_tests(arguments: list[str], seconds: float) -> tuple[int | None, str]:
    """Return pytest's exit code, None where it was killed after so many seconds, and the end of what it said."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        try:
            code = subprocess.run(
                arguments, stdout=said, stderr=subprocess.STDOUT, env=environment, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        said.seek(0)
        return code, said.read()[-1500:]


def read_outcomes(text: str) -> Row:
    """Return counts and first failures of what `bench.gpu.outcomes` wrote; a line that was not finished is not read."""
    outcomes: dict[str, str] = {}
    failures: dict[str, str] = {}
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        # A test that fails after its call has failed.
        if outcomes.get(row["name"]) != "failed":
            outcomes[row["name"]] = row["outcome"]
        if row["outcome"] == "failed":
            failures.setdefault(row["name"], row["error"])
    counts = Counter(outcomes.values())
    first = [{"name": name, "error": error} for name, error in list(failures.items())[:MOST_FAILURES]]
    return {name: counts[name] for name in ("passed", "failed", "skipped")} | {"failures": first}
