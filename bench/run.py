"""Run measures, print them, and write them with a machine header: `python -m bench.run [MEASURE …] --out DIR`."""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from bench.figures import Figure
from bench.measures import MEASURES
from kdecore.compare.machine import this_machine
from kdecore.methods import METHODS
from kdecore.testing import check_backend, check_spectral_bound


def main() -> int:
    """Run the command line; return 1 where a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help=f"of {', '.join(MEASURES)}; all by default")
    parser.add_argument("--out", type=Path, help="folder for NAME.json, one a measure")
    arguments = parser.parse_args()
    if unknown := set(arguments.measures) - set(MEASURES):
        parser.error(f"unknown measures {', '.join(sorted(unknown))}; known: {', '.join(MEASURES)}")
    # What is timed computes what it should.
    check_backend("numpy")
    for method in METHODS.keys() - {"auto"}:
        check_spectral_bound(method)
    header = asdict(this_machine())
    missed = 0
    for name in arguments.measures or MEASURES:
        started = time.perf_counter()
        figures = MEASURES[name]()
        print(f"\n{name}: {MEASURES[name].__doc__}")
        for label, figure in figures.items():
            print(f"  {label:<52} {figure.value:>10.4g} {figure.unit:<4} {verdict(figure)}")
        missed += sum(figure.met is False for figure in figures.values())
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            record = {
                "measure": name,
                "text": MEASURES[name].__doc__,
                "machine": header,
                "seconds": time.perf_counter() - started,
                "figures": {label: asdict(figure) for label, figure in figures.items()},
            }
            (arguments.out / f"{name}.json").write_text(
                json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
    return 1 if missed else 0


def verdict(figure: Figure) -> str:
    """Say what the bar is and whether it is reached."""
    if figure.met is None:
        return ""
    bar = f"at most {figure.at_most:g}" if figure.at_most is not None else f"at least {figure.at_least:g}"
    return f"{'reached' if figure.met else 'MISSED'} ({bar})"


if __name__ == "__main__":
    sys.exit(main())
