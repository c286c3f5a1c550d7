"""The part of `bench.gpu` that runs the tests which need a device, in a process of their own."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree as ET

from bench.gpu_session import Findings, Row, Session

SECONDS = 200.0
MOST_FAILURES = 20
DEVICE_TESTS = ("tests", "-k", "cupy or torch-cuda")
REHEARSED_TESTS = ("tests/test_metrics.py", "--noconftest")


def suite(session: Session) -> Findings:
    """Run the tests; yield one row."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        selected = REHEARSED_TESTS if session.rehearsal else DEVICE_TESTS
        code, cut, last = run_tests(command(report, selected), min(SECONDS, session.left() - 10.0))
        text = report.read_text(encoding="utf-8") if report.exists() else ""
    row = {"selected": " ".join(selected), "exit_code": code, "cut_off": cut, **read_report(text)}
    # pytest says 5 where nothing was selected.
    yield "tests", row | ({} if row["passed"] or row["failed"] else {"said": last})


def command(report: Path, selected: Iterable[str]) -> list[str]:
    """Return pytest's command line, in several processes and with limits of time where the plug-ins are there."""
    options = ["-q", "-p", "no:cacheprovider", "-W", "default", "-o", "junit_logging=no", f"--junitxml={report}"]
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
                    # An interrupt lets pytest report what it has done.
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


def read_report(text: str) -> Row:
    """Return the counts and the first failures of a JUnit report; none of an empty one."""
    cases = list(ET.fromstring(text).iter("testcase")) if text else []
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    failures = [{"name": f"{x.get('classname')}::{x.get('name')}", "error": last_error(x)} for x in bad[:MOST_FAILURES]]
    return {"passed": len(cases) - len(bad) - skipped, "failed": len(bad), "skipped": skipped, "failures": failures}


def last_error(case: ET.Element) -> str:
    """Return the last line that says what went wrong."""
    found = case.find("failure")
    found = case.find("error") if found is None else found
    assert found is not None
    lines = [line[1:].strip() for line in (found.text or "").splitlines() if line.startswith("E ")]
    message = (found.get("message") or "").strip().splitlines()
    return (lines or message or [""])[-1][:300]
