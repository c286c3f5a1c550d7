"""The command `kdecore`: `compare` measures methods on the user's data, `verify` checks them, `info` says what runs."""

import argparse
import importlib.util
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from pathlib import Path
from typing import Any, NoReturn

from kdecore import __version__
from kdecore.arrays.errors import KdecoreError, OptionError
from kdecore.arrays.scalars import integer_at_least
from kdecore.compare import comparison
from kdecore.compare.cases import READERS, Case, glove_case, install, load_case
from kdecore.compare.comparison import Progress, Row
from kdecore.compare.info import info_lines
from kdecore.compare.machine import Machine, this_machine
from kdecore.compare.output import OUTPUTS, output_folder, to_json, write_together
from kdecore.core.problem import Problem, canonicalise
from kdecore.methods import METHODS

USAGE_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
FILE_KINDS = (".npy", *READERS)
HEADINGS = (
    "keys/\nquery",
    "ms",
    "speed-\nup",
    "spectral\nerror",
    "Frobenius\nerror",
    "certified",
    "worst\nrow",
    "peak\nMiB",
)
NARROWEST, UNLIMITED = 74, 10_000
"""Columns of a terminal below which folding the table would lose numbers, and in which nothing is folded."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv
        Arguments; those of the process if None.

    Returns
    -------
    int
        Exit status: 0; 1 where `verify` finds a property that fails; 2 for a mistake, an unusable file or library, after one
        line on stderr; 130 for Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without Unicode gets ? and no traceback
            stream.reconfigure(errors="replace")
    try:
        arguments = _parse(argv)
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KdecoreError as error:
        return _fail(str(error))
    except MemoryError as error:
        return _fail(f"not enough memory: {error}")
    except KeyboardInterrupt:
        print("kdecore: interrupted, nothing was written", file=sys.stderr)
        return INTERRUPTED
    return status


def _fail(message: str) -> int:
    print(f"kdecore: error: {' '.join(message.split())}", file=sys.stderr)
    return USAGE_ERROR


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}; see {self.prog} --help")


class _Flatten(argparse.Action):
    """Store a list of lists as one list."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option_string: object = None) -> None:
        setattr(namespace, self.dest, [item for value in values for item in value])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        reason = next(filter(None, map(_misplaced_file, unknown)), "see kdecore --help")
        raise OptionError(f"unknown arguments: {' '.join(unknown)}; {reason}")
    return arguments


def _names(text: str) -> list[str]:
    if reason := _misplaced_file(text):
        raise argparse.ArgumentTypeError(f"got {text!r}; {reason}")
    return [name.strip() for name in text.split(",") if name.strip()]


def _integers(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers, got {text!r}") from None


def _numbers(text: str) -> list[float]:
    with suppress(ValueError):
        if numbers := [float(name) for name in _names(text)]:
            return numbers
    raise argparse.ArgumentTypeError(f"must be numbers, got {text!r}")


def _misplaced_file(text: str) -> str | None:
    if Path(text).suffix.lower() not in FILE_KINDS:
        return None
    return f"files come before the options, as in kdecore compare {text} --methods sortlsh"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kdecore", description="Softmax attention in near-linear time, and its error.")
    parser.add_argument("--version", action="version", version=f"kdecore {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    info = commands.add_parser("info", help="show versions, devices, and which kernels run where")
    info.set_defaults(run=_info)

    verify = commands.add_parser(
        "verify",
        help="check the accuracy of every method on an array library",
        description="Check every method on random problems, the same in every run: that it is exact where the budget covers "
        "all keys, unbiased where it says so, within the spectral bound, and invariant. Exit status 0 if all hold, else 1.",
    )
    verify.add_argument("--library", choices=("numpy", "torch", "cupy", "array-api-strict"), default="numpy",
        help="array library to run on; default: numpy")  # fmt: skip
    verify.add_argument("--device", type=int, metavar="N", help="number of the CUDA device; default: the library's usual "
        "device, of torch the CPU")  # fmt: skip
    verify.add_argument("--minutes", type=float, default=2.0, metavar="M", help="time to share out; default: 2")
    verify.add_argument("--json", action="store_true", help="print JSON in place of the table")
    verify.set_defaults(run=_verify)

    compare = commands.add_parser(
        "compare",
        usage="kdecore compare [FILE ...] [OPTION ...]   (kdecore compare --help lists the options)",
        help="measure time, error and memory of methods against exact attention",
        description="Measure methods against exact attention; print a table, write compare.json and compare.png.",
        epilog=f"Methods: {', '.join(METHODS)}. Lists may have commas: --budgets 128,256. "
        "In a clone of the project, also those of bench/baselines. Without FILE, a sample of GloVe word vectors is used.",
    )
    add = compare.add_argument
    add("files", nargs="*", metavar="FILE", help="one .npz, .safetensors or .pt with q, k, v (or query, key, "
        "value) and, if you like, scale; or three .npy in the order q k v")  # fmt: skip
    add("--methods", nargs="+", type=_names, action=_Flatten, default=["treecode", "sortlsh", "hyper"], metavar="NAME",
        help="default: treecode sortlsh hyper")  # fmt: skip
    add("--budgets", nargs="+", type=_integers, action=_Flatten, default=[128, 256, 384, 512, 1024], metavar="N",
        help="keys per query; default: 128 256 384 512 1024")  # fmt: skip
    add("--rtol", nargs="+", type=_numbers, action=_Flatten, default=[], metavar="R",
        help="relative Frobenius errors that kdecore is to find method and budget for; default: none")  # fmt: skip
    add("--seeds", type=int, default=5, metavar="N", help="errors are means over the seeds 0 … N−1; default: 5")
    add("--repeats", type=int, default=3, metavar="N", help="timed calls for each seed; default: 3")
    add("--scale", type=float, metavar="S", help="factor on ⟨q, k⟩; default: the file's scale, or 1/√d; "
        "1/√10 for GloVe")  # fmt: skip
    add("--diagonal", type=int, metavar="D", help="query i is the row of key i + D: 0 for self-attention, whose own keys "
        "treecode then lists; default: not said; 0 for GloVe")  # fmt: skip
    add("--n", type=int, default=8192, metavar="N", help="words of GloVe; default: 8192")
    add("--exact-rows", type=int, metavar="N", help="compute errors on N random queries of each group, and time exact "
        f"attention on {comparison.TIMED_ROWS:,} at least; default: all, up to 2^28 pairs of query and key")  # fmt: skip
    add("--library", choices=("numpy", "torch"), default="numpy", help="array library to run on; default: numpy")
    add("--out", type=Path, default=Path("kdecore-compare"), metavar="DIR", help="default: kdecore-compare")
    compare.set_defaults(run=_compare)
    return parser


def _info(arguments: argparse.Namespace) -> int:
    print("\n".join(info_lines()))
    return 0


def _check_installed(command: str, extra: str, *packages: str) -> None:
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise OptionError(f"kdecore {command} needs {' and '.join(missing)}: {install(extra)}")


def _verify(arguments: argparse.Namespace) -> int:
    _check_installed("verify", "verify", "hypothesis", "rich")
    from kdecore.compare import verify

    began = time.perf_counter()
    with _progress() as progress:
        verdicts = verify.verify(arguments.library, arguments.device, arguments.minutes, progress)
    seconds = time.perf_counter() - began
    if arguments.json:
        record = verify.record(arguments.library, arguments.device, arguments.minutes, seconds, verdicts)
        print(to_json(record).decode(), end="")
    else:
        verify.print_table(arguments.library, arguments.device, seconds, verdicts)
    return 0 if all(one.passed for one in verdicts) else 1


def _compare(arguments: argparse.Namespace) -> int:
    _check_installed("compare", "cli", "rich", "matplotlib")
    wanted: dict[str, Any] = {
        "methods": arguments.methods,
        "budgets": arguments.budgets,
        "rtols": arguments.rtol,
        "seeds": range(integer_at_least(1, "seeds", arguments.seeds)),
        "library": arguments.library,
        "repeats": arguments.repeats,
        "exact_rows": arguments.exact_rows,
    }
    comparison.check_options(**wanted)
    case = _case(arguments)
    comparison.check_case(case)
    with output_folder(arguments.out):
        machine = this_machine()
        with _progress() as progress:
            rows = comparison.measure(case, **wanted, progress=progress)
        from kdecore.compare.plots import comparison_png

        record = _record(arguments, case, machine, rows)
        contents = (to_json(record), comparison_png(case, rows, machine, arguments.library))
        write_together(arguments.out, dict(zip(OUTPUTS, contents, strict=True)))
    _print_table(case, rows, machine, arguments)
    return 0


def _case(arguments: argparse.Namespace) -> Case:
    if arguments.files:
        return load_case(arguments.files, arguments.scale, arguments.diagonal)
    said = {name: value for name in ("scale", "diagonal") if (value := getattr(arguments, name)) is not None}
    return replace(glove_case(arguments.n), **said)


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show a bar on stderr where that is a terminal, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("loading")
        yield lambda done, total, label: bar.update(task, completed=done, total=total, description=label)


def _record(arguments: argparse.Namespace, case: Case, machine: Machine, rows: list[Row]) -> dict[str, Any]:
    problem = canonicalise(case.q, case.k, case.v, case.scale)
    given = {name: value for name, value in vars(arguments).items() if name != "run"}
    return {
        "command": "kdecore compare",
        "machine": asdict(machine),
        "arguments": given | {"out": str(arguments.out), "files": [str(file) for file in arguments.files]},
        "seeds": list(range(arguments.seeds)),
        "case": {
            "name": case.name,
            "q": list(case.q.shape),
            "k": list(case.k.shape),
            "v": list(case.v.shape),
            "dtype": problem.input_dtype,
            "scale": problem.scale,
            "diagonal": case.diagonal,
            "library": arguments.library,
        },
        "notes": _notes(case, problem, rows),
        "rows": [asdict(row) for row in rows],
    }


def _notes(case: Case, problem: Problem, rows: list[Row]) -> list[str]:
    """Say what was timed and what errors are against, on how many queries, and what the figures leave out."""
    baseline = rows[0]
    each = " of each group" if problem.groups > 1 else ""

    def some(count: int) -> str:
        return "all queries" if count == problem.n_q else f"{count:,} of {problem.n_q:,} queries{each}, drawn at random"

    notes = [case.note] if case.note else []
    notes += [f"Speed-up is over {baseline.method}; errors are against kdecore's exact attention in float64."]
    if baseline.error_rows == problem.n_q:
        notes += ["Times and errors are on all queries."]
    else:
        scaled = "" if baseline.timed_rows == problem.n_q else ", and scaled up; the methods on all queries"
        notes += [
            f"Timed: {baseline.method} on {some(baseline.timed_rows)}{scaled}.",
            f"Errors are on {some(baseline.error_rows)}; the worst row of a sample is a lower bound on the worst of all.",
        ]
    if any(row.certificate for row in rows):
        notes += [_certificate_note(rows, problem)]
    if any(row.rtol is not None for row in rows):
        notes += [
            "rtol: kdecore chose method and budget for that Frobenius error, seed by seed; its time has the search in."
        ]
    if others := list(dict.fromkeys(row.method for row in rows[1:] if row.method not in METHODS)):
        notes += [f"{', '.join(others)}: other papers', from bench.baselines; keys/query are the budget, not measured."]
    if any(row.ran == "kdeformer" for row in rows):
        notes += ["kdeformer's keys/query leave out the keys that its density estimates evaluate; its time has them in."]
    if any(math.isnan(row.errors.spectral) for row in rows):
        notes += [f"nan: the scale {problem.scale:.4g} takes logits or outputs out of {problem.input_dtype}'s range."]
    return notes


def _certificate_note(rows: list[Row], problem: Problem) -> str:
    """Say what the intervals are of, what they were made from, and, where the true error is known, how many hold it."""
    pairs = [(row.certificate, row.first_errors.frobenius) for row in rows if row.certificate]
    fewest, *_, most = sorted(certificate.rows for certificate, _ in pairs * 2)
    count = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    each = " of each group" if problem.groups > 1 else ""
    note = (
        f"certified: {100 * pairs[0][0].confidence:.0f} % interval of the Frobenius error with seed 0, "
        f"from {count} exact rows{each}, not from the comparison"
    )
    known = [] if rows[0].error_rows < problem.n_q else [pair for pair in pairs if not math.isnan(pair[1])]
    held = sum(_holds(certificate.frobenius_interval, error) for certificate, error in known)
    return f"{note}; {held} of {len(known)} hold it (unrounded)." if known else f"{note}."


def _holds(interval: tuple[float, float], error: float) -> bool:
    # Of all rows the interval is a point, and its exact rows aren't computed in float64.
    return interval[0] <= error <= interval[1] or math.isclose(error, interval[1], rel_tol=1e-3)


def _print_table(case: Case, rows: list[Row], machine: Machine, arguments: argparse.Namespace) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    problem = canonicalise(case.q, case.k, case.v, case.scale)
    console = Console(markup=False, highlight=False, emoji=False)
    console.width = max(console.width, NARROWEST)
    groups = f"{problem.groups} × " if problem.groups > 1 else ""
    console.print(
        f"{case.name}: {groups}{problem.n_q:,} queries, {problem.n_k:,} keys, d = {problem.d}, d_v = {problem.d_v}, "
        f"{problem.input_dtype}, scale {problem.scale:.4g}"
    )
    console.print(f"{arguments.library} on {machine.cpu}, {machine.cores} cores; mean errors over {arguments.seeds} seed(s)")
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column("method", overflow="fold")
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    sampled = rows[0].timed_rows < problem.n_q
    for row in rows:
        table.add_row(
            row.label,
            f"{row.keys_per_query:.0f}",
            f"{'~' if sampled and row is rows[0] else ''}{_digits(row.milliseconds)}",
            f"{row.speedup:.1f}×",
            _digits(row.errors.spectral),
            _digits(row.errors.frobenius),
            _interval(*row.certificate.frobenius_interval) if row.certificate else "–",
            _digits(row.errors.worst_row),
            "–" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
        )
    if console.measure(table, options=console.options.update(width=UNLIMITED)).maximum > console.width:
        table.padding = 0
    console.print("", table, "", sep="\n")
    for note in _notes(case, problem, rows):
        console.print(note)
    console.print(f"Written: {arguments.out / OUTPUTS[0]} and {arguments.out / OUTPUTS[1]}", soft_wrap=True)


def _digits(value: float, digits: int = 3) -> str:
    if 10 ** (digits - 1) <= value < 1e6:
        return f"{value:.0f}"
    return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:#.{digits}g}"


def _interval(lower: float, upper: float) -> str:
    """Show limits with two digits, rounded outwards, or one number where there is no more to say."""
    if not lower < upper:
        return _digits(upper)
    limits = ((lower, ROUND_FLOOR), (upper, ROUND_CEILING))
    return "–".join(
        _digits(float(Context(prec=2, rounding=rounding).create_decimal(str(limit))), 2) for limit, rounding in limits
    )
