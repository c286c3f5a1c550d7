"""What every study shares: its command line, and a JSON with a machine header beside a picture."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdecore.compare.machine import this_machine


def run_study(
    name: str, text: str | None, measure: Callable[[], Any], plot: Callable[[Any, Path], None] | None = None
) -> None:
    """Measure, and write ``name``.json, and ``name``.png where it is plotted, into the folder that the command line names.

    Parameters
    ----------
    name
        Module of the study in ``bench``.
    text
        Its docstring, for ``--help``.
    measure
        Returns what JSON can hold: a figure for each case.
    plot
        Draws that into a file; None for no picture.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=text)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for what is written")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    cases = measure()
    record = {"machine": asdict(this_machine()), "cases": cases}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if plot is not None:
        plot(cases, path.with_suffix(".png"))
