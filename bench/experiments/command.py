"""Run an experiment of the KDEformer paper, or what stands in for it; print its table, and write NAME.json and NAME.png."""

import argparse
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

from rich.console import Console

from bench.experiments import EXPERIMENTS
from bench.experiments.rows import write
from kdecore.compare.machine import this_machine


class Experiment(Protocol):
    """What a module of an experiment has; ``figure(results, path)`` too where it draws one."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options that it has beside the command's."""

    def run(self, arguments: argparse.Namespace, show: Callable[[str], None]) -> dict[str, Any]:
        """Measure what the arguments ask for.

        ``arguments`` has ``out``, a folder's path, beside what `add_arguments` adds. ``show`` is called with what is being
        done. Returns what JSON can hold; `bench.experiments.rows.collect` keeps it in a file row by row.
        """

    def table(self, results: dict[str, Any]) -> str:
        """Return the results as a table."""


def main(given: Sequence[str] | None = None, show: Callable[[str], None] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    given
        Arguments; the process's own if None.
    show
        Called with what is being done; a line of the terminal if None.

    Returns
    -------
    int
        The exit status, 0; wrong arguments, missing packages and a file of another machine exit with 2 and say why.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.experiments", description=__doc__)
    named = parser.add_subparsers(dest="name", required=True, metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}")
    modules = {name: cast(Experiment, importlib.import_module(path)) for name, path in EXPERIMENTS.items()}
    for name, module in modules.items():
        one = named.add_parser(name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        one.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the JSON file and the figure")
        one.add_argument("--as-is", action="store_true", help="measure nothing: table and figure of what the file has")
        module.add_arguments(one)
    arguments = parser.parse_args(given)
    module, path = modules[arguments.name], arguments.out / f"{arguments.name}.json"
    try:
        if arguments.as_is:
            results = json.loads(path.read_text(encoding="utf-8"))
        else:
            results = measured(module, arguments, show)
            write(path, {"machine": asdict(this_machine())} | results)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.error(str(error))
    print(module.table(results))
    if (figure := getattr(module, "figure", None)) is not None:
        figure(results, path.with_suffix(".png"))
    return 0


def measured(module: Experiment, arguments: argparse.Namespace, show: Callable[[str], None] | None) -> dict[str, Any]:
    """Run an experiment, and show in a line of the terminal what it does."""
    if show is not None:
        return module.run(arguments, show)
    with Console(stderr=True).status("") as status:
        return module.run(arguments, status.update)
