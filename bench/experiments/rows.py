"""Rows of an experiment: measured one by one, each written when it is found, so that a run that is cut off goes on."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdecore.compare.machine import this_machine

Row = dict[str, Any]
"""Names → numbers and texts; None for a number that isn't finite, and for a budget where there is none."""
Results = dict[str, Any]
"""``machine``: `Machine` as a dictionary; ``rows``, and ``operations`` where they are counted: key → `Row`."""
Show = Callable[[str], None]
"""Called with what is being done."""
FAILURES = (ValueError, NotImplementedError, OSError, ModuleNotFoundError, FloatingPointError)
"""What methods raise where a shape or a budget isn't for them, a package is missing, or their result isn't finite."""
SAME = ("cpu", "cores", "versions", "threads")
"""What of a machine has to be the same for rows to stand beside each other."""


def collect(path: Path, plan: Mapping[str, Callable[[], Row]], show: Show, section: str = "rows") -> Results:
    """Measure the rows that a file doesn't hold yet, and write each when it is found.

    Parameters
    ----------
    path
        The JSON file, which is made where it isn't there; failed rows in it are tried again.
    plan
        Key → what measures the row. A key says everything that a row depends on but code and machine.
    show
        Called with the key of each row before it is measured.
    section
        Where in the file the rows are.

    Returns
    -------
    Results
        All of the file.

    Raises
    ------
    ValueError
        The file's rows are from another machine, or of other versions.
    """
    results: Results = {"machine": asdict(this_machine()), "rows": {}}
    if path.exists():
        results = read(path, results["machine"])
    rows = results.setdefault(section, {})
    missing = [key for key in plan if key not in rows or "failed" in rows[key]]
    for done, key in enumerate(missing):
        show(f"{done + 1} of {len(missing)}: {key}")
        rows[key] = {name: finite(value) for name, value in plan[key]().items()}
        write(path, results)
    return results


def attempted(identity: Row, measure: Callable[[], Row]) -> Row:
    """Return what a row is of and what is measured, or ``failed`` with the reason where a method fails at it."""
    try:
        return identity | measure()
    except FAILURES as error:
        return identity | {"failed": str(error)}


def read(path: Path, machine: Row) -> Results:
    """Return what a file has, now of this machine, or raise `ValueError` where its rows are from another one."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if differing := [name for name in SAME if record["machine"][name] != machine[name]]:
        raise ValueError(f"{path} must hold rows of this machine, got another {', '.join(differing)}: choose another --out")
    return {**record, "machine": machine}


def write(path: Path, results: Results) -> None:
    """Write a file as a whole, or leave the one that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def finite(value: Any) -> Any:
    """Return a value, or None for a number that isn't finite, which JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
