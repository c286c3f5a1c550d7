"""The part of `bench.gpu` that runs the tests which need a device, in a process of their own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from bench.gpu.session import Findings, Row, Session

SECONDS = 200.0
MOST_FAILURES = 200
DEVICE_TESTS = ("tests", "-k", "cupy or torch-cuda")
REHEARSED_TESTS = ("tests/test_metrics.py", "--noconftest")


def suite(session: Session) -> Findings:
    """Run the tests; yield one row."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "outcomes.jsonl"
        selected = REHEARSED_TESTS if session.rehearsal else DEVICE_TESTS
        code, cut, last = run_tests(command(report, selected), min(SECONDS, session.left() - 10.0))
        text = report.read_text(encoding="utf-8") if report.exists() else ""
    row = {"selected": " ".join(selected), "exit_code": code, "cut_off": cut, **read_outcomes(text)}
    # pytest says 5 where nothing was selected.
    yield "tests", row | ({} if row["passed"] or row["failed"] else {"said": last})


def command(report: Path, selected: Iterable[str]) -> list[str]:
    """Return pytest's command line, in several processes and with limits of time where the plug-ins are there."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "bench.gpu.outcomes", "-W", "default", f"--outcomes={report}"]
    if find_spec("xdist") is not None:
        options += ["-n", "8", "--dist", "loadfile"]
    if find_spec("pytest_timeout") is not None:
        options += ["--timeout", "120"]
    return [sys.executable, "-m", "pytest", *options, *selected]


def run_tests(arguments: list[str], seconds: float) -> tuple[int, bool, str]:
    """Return pytest's exit code, whether it was interrupted after so many seconds, and the end of what it said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        with subprocess.Popen(
            arguments,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            # A shell that runs this in the background has it ignore interrupts.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        ) as process:
            cut = False
            for wait, stop in ((max(seconds, 1.0), signal.SIGINT), (8.0, signal.SIGKILL)):
                try:
                    process.wait(wait)
                    break
                except subprocess.TimeoutExpired:
                    cut = True
                    # An interrupt lets tests end as they should.
                    interrupt(process.pid, stop)
            code = process.wait()
        said.seek(0)
        return code, cut, said.read()[-1500:]


def interrupt(process: int, stop: signal.Signals) -> None:
    """Interrupt a process, or kill it together with those that it started."""
    if stop is signal.SIGKILL:
        os.killpg(process, stop)
    else:
        os.kill(process, stop)


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
