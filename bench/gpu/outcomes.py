"""A pytest plug-in that writes each test's outcome as soon as it is there: of a run that is cut off, those before stay."""

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the file to write to."""
    parser.addoption("--outcomes", type=Path)


def pytest_configure(config: pytest.Config) -> None:
    """Write in the process that the others report to."""
    if config.getoption("outcomes") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(config.getoption("outcomes")))


class Outcomes:
    """Writes a line for each test: of its call, or of what went wrong before and after it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note an outcome."""
        if report.when == "call" or not report.passed:
            row = {"name": report.nodeid, "outcome": report.outcome, "error": last_error(report) if report.failed else None}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def last_error(report: pytest.TestReport) -> str:
    """Return the last line that says what went wrong."""
    lines = report.longreprtext.strip().splitlines() or [""]
    marked = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (marked or lines)[-1][:300]
