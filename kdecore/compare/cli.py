"""The command `kdecore`: it measures methods, checks them, says what runs where, and compiles kernels ahead."""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from kdecore import __version__
from kdecore.arrays.errors import KdecoreError, OptionError
from kdecore.arrays.scalars import integer_at_least
from kdecore.compare import comparison
from kdecore.compare.cases import READERS, Case, glove_case, install, load_case
from kdecore.compare.comparison import Progress
from kdecore.compare.info import info_lines
from kdecore.compare.machine import Machine, this_machine
from kdecore.compare.notes import notes
from kdecore.compare.output import OUTPUTS, output_folder, to_json, write_together
from kdecore.compare.rows import Row
from kdecore.compare.table import print_table
from kdecore.compare.verdict import Verdict, largest_error, verdict
from kdecore.compare.warmup import DTYPES, kept_in, warm_up
from kdecore.core.problem import canonicalise
from kdecore.methods import METHODS

USAGE_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
FILE_KINDS = (".npy", *READERS)
PACKAGES = ("rich", "matplotlib", "plotly", "jinja2")
"""What only `kdecore compare` needs; the extra `cli` brings them."""


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

    warmup = commands.add_parser(
        "warmup",
        help="compile the kernels ahead of the first call",
        description="Compile the kernels of all methods, for NumPy and PyTorch, and keep them for all later processes.",
    )
    warmup.add_argument("--dtypes", nargs="+", type=_names, action=_Flatten, default=["float32"], metavar="DTYPE",
        help=f"{' or '.join(DTYPES)}; default: float32")  # fmt: skip
    warmup.set_defaults(run=_warm_up)

    compare = commands.add_parser(
        "compare",
        usage="kdecore compare [FILE ...] [OPTION ...]   (kdecore compare --help lists the options)",
        help="measure time, error and memory of methods against exact attention",
        description="Measure methods against exact attention; print a table and a verdict, write "
        "compare.html, compare.png and compare.json.",
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
        help="relative Frobenius errors that kdecore is to find method and budget for; the smallest also bounds the "
        "error of the verdict; default: none, and 0.05 for the verdict")  # fmt: skip
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


def _warm_up(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    bar = _progress() if importlib.util.find_spec("rich") else nullcontext(lambda done, total, label: None)
    with bar as progress:
        for line in warm_up(arguments.dtypes, progress):
            print(line, flush=True)
    print(f"{time.perf_counter() - started:.1f} s in all. {kept_in()}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    _check_installed("compare", "cli", *PACKAGES)
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
        from kdecore.compare.page import comparison_html
        from kdecore.compare.plots import comparison_png

        found = verdict(case, rows, largest_error(arguments.rtol))
        png = comparison_png(case, rows, machine, arguments.library, found.bound)
        html = comparison_html(case, rows, machine, arguments.library, arguments.seeds, found, png)
        contents = (html, png, to_json(_record(arguments, case, machine, rows, found)))
        write_together(arguments.out, dict(zip(OUTPUTS, contents, strict=True)))
    print_table(case, rows, machine, arguments.library, arguments.seeds, arguments.out, found)
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


def _record(arguments: argparse.Namespace, case: Case, machine: Machine, rows: list[Row], found: Verdict) -> dict[str, Any]:
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
        "verdict": {"sentence": found.sentence, "reason": found.reason, "call": found.call, "bound": found.bound},
        "notes": notes(case, rows),
        "rows": [asdict(row) for row in rows],
    }
