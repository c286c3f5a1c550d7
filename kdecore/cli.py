"""The command `kdecore`: `compare` measures methods on the user's data, `info` says what is installed and runs where."""

import argparse
import importlib.util
import json
import math
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kdecore import __version__, comparison
from kdecore.comparison import Progress, Row
from kdecore.errors import KdecoreError, OptionError
from kdecore.inputs import Problem, canonicalise
from kdecore.kernels.registry import KERNELS, Implementation, Site, choose
from kdecore.loading import Case, glove_case, load_case
from kdecore.machine import LIBRARIES, Machine, library_problem, load_adapter, this_machine
from kdecore.options import METHODS, integer_at_least

USAGE_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
DTYPES = ("float32", "float64")
OUTPUTS = ("compare.json", "compare.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv
        Arguments; those of the process if None.

    Returns
    -------
    int
        Exit status: 0, or 2 for a mistake or an unusable file, after one line on stderr, or 130 for Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without Unicode gets ? and no traceback
            stream.reconfigure(errors="replace")
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
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
    return 0


def _fail(message: str) -> int:
    print(f"kdecore: error: {' '.join(message.split())}", file=sys.stderr)
    return USAGE_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kdecore", description="Softmax attention in near-linear time, and its error.")
    parser.add_argument("--version", action="version", version=f"kdecore {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    info = commands.add_parser("info", help="show versions, devices, and which kernels run where")
    info.set_defaults(run=lambda arguments: print("\n".join(_info_lines())))

    compare = commands.add_parser(
        "compare",
        usage="kdecore compare [FILE ...] [OPTION ...]   (kdecore compare --help lists the options)",
        help="measure time, error and memory of methods against exact attention",
        description="Measure methods against exact attention; print a table, write compare.json and compare.png.",
        epilog=f"Methods: auto, {', '.join(METHODS)}. Without FILE, a sample of GloVe word vectors is used.",
    )
    add = compare.add_argument
    add("files", nargs="*", metavar="FILE", help="one .npz or .safetensors with q, k, v; or three .npy in the order q k v")
    add("--methods", nargs="+", default=["sortlsh", "hyper"], metavar="NAME", help="default: sortlsh hyper")
    add("--budgets", nargs="+", type=int, default=[128, 256, 384, 512, 1024], metavar="N",
        help="keys per query; default: 128 256 384 512 1024")  # fmt: skip
    add("--seeds", type=int, default=5, metavar="N", help="errors are means over the seeds 0 … N−1; default: 5")
    add("--repeats", type=int, default=3, metavar="N", help="timed calls for each seed; default: 3")
    add("--scale", type=float, metavar="S", help="factor on ⟨q, k⟩; default: 1/√d, and 1/√10 for GloVe")
    add("--n", type=int, default=8192, metavar="N", help="words of GloVe; default: 8192")
    add("--exact-rows", type=int, metavar="N", help="compute exact attention and errors on N random queries of each group; "
        "default: all, up to 2^28 pairs of query and key")  # fmt: skip
    add("--library", choices=("numpy", "torch"), default="numpy", help="array library to run on; default: numpy")
    add("--out", type=Path, default=Path("kdecore-compare"), metavar="DIR", help="default: kdecore-compare")
    compare.set_defaults(run=_compare)
    return parser


def _compare(arguments: argparse.Namespace) -> None:
    for package in ("rich", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise OptionError(f"kdecore compare needs {package}: pip install 'kdecore[cli]'")
    methods = comparison.check_methods(arguments.methods)
    seeds = list(range(integer_at_least(1, "seeds", arguments.seeds)))
    case = _case(arguments)
    prepare_folder(arguments.out)
    machine = this_machine()
    with _progress() as progress:
        rows = comparison.measure(
            case,
            methods,
            arguments.budgets,
            seeds,
            library=arguments.library,
            repeats=arguments.repeats,
            exact_rows=arguments.exact_rows,
            progress=progress,
        )
    from kdecore.plots import comparison_png

    record = _record(arguments, case, seeds, machine, rows)
    contents = (to_json(record), comparison_png(case, rows, machine, arguments.library))
    write_together(arguments.out, dict(zip(OUTPUTS, contents, strict=True)))
    _print_table(case, rows, machine, arguments)


def _case(arguments: argparse.Namespace) -> Case:
    if arguments.files:
        return load_case(arguments.files, arguments.scale)
    case = glove_case(arguments.n)
    return case if arguments.scale is None else replace(case, scale=arguments.scale)


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


def prepare_folder(folder: Path) -> None:
    """Create the output folder, and find out before anything is measured whether files can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in OUTPUTS:
        if (folder / name).is_dir():
            raise IsADirectoryError(None, "is a folder, but a file is to be written there", str(folder / name))
    trial = _temporary(folder, "trial")
    trial.write_bytes(b"")
    trial.unlink()


def write_together(folder: Path, contents: dict[str, bytes]) -> None:
    """Write files so that each appears whole, and none if one cannot be written."""
    temporary = {name: _temporary(folder, name) for name in contents}
    try:
        for name, content in contents.items():
            temporary[name].write_bytes(content)
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _temporary(folder: Path, name: str) -> Path:
    return folder / f".{name}.{os.getpid()}.tmp"


def _record(
    arguments: argparse.Namespace, case: Case, seeds: list[int], machine: Machine, rows: list[Row]
) -> dict[str, Any]:
    problem = canonicalise(case.q, case.k, case.v, case.scale)
    given = {name: value for name, value in vars(arguments).items() if name != "run"}
    return {
        "command": "kdecore compare",
        "machine": asdict(machine),
        "arguments": given | {"out": str(arguments.out), "files": [str(file) for file in arguments.files]},
        "seeds": seeds,
        "case": {
            "name": case.name,
            "q": list(case.q.shape),
            "k": list(case.k.shape),
            "v": list(case.v.shape),
            "dtype": problem.input_dtype,
            "scale": problem.scale,
            "library": arguments.library,
        },
        "exact": _exact_notes(problem, rows),
        "rows": [asdict(row) for row in rows],
    }


def to_json(record: dict[str, Any]) -> bytes:
    """Encode as JSON (RFC 8259, so NaN and infinity become null)."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return (json.dumps(finite(record), indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _exact_notes(problem: Problem, rows: list[Row]) -> str:
    """Say what exact attention was, and whether it is from a sample of the queries."""
    note = f"Speed-up is over {rows[0].method}; errors are against kdecore's exact attention in float64"
    if rows[0].timed_rows == problem.n_q:
        return f"{note}, on all queries."
    some = f"{rows[0].timed_rows:,} of {problem.n_q:,} queries, drawn at random"
    return f"{note}, and only on a sample: {some}. The exact time is measured on that sample and scaled up."


def _print_table(case: Case, rows: list[Row], machine: Machine, arguments: argparse.Namespace) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    problem = canonicalise(case.q, case.k, case.v, case.scale)
    console = Console(markup=False, highlight=False, emoji=False)
    groups = f"{problem.groups} × " if problem.groups > 1 else ""
    console.print(
        f"{case.name}: {groups}{problem.n_q:,} queries, {problem.n_k:,} keys, d = {problem.d}, d_v = {problem.d_v}, "
        f"{problem.input_dtype}, scale {problem.scale:.4g}"
    )
    console.print(f"{arguments.library} on {machine.cpu}, {machine.cores} cores; mean errors over {arguments.seeds} seed(s)")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column("method", overflow="fold")
    for heading in ("keys/\nquery", "ms", "speed-\nup", "spectral\nerror", "Frobenius\nerror", "worst\nrow", "peak\nMiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    sampled = rows[0].timed_rows < problem.n_q
    for row in rows:
        table.add_row(
            row.method if row.ran == row.method or row is rows[0] else f"{row.method} ({row.ran})",
            f"{row.keys_per_query:.0f}",
            f"{'~' if sampled and row is rows[0] else ''}{_three_digits(row.milliseconds)}",
            f"{row.speedup:.1f}×",
            *(_three_digits(error) for error in (row.errors.spectral, row.errors.frobenius, row.errors.worst_row)),
            "–" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
        )
    console.print(table)
    console.print(_exact_notes(problem, rows))
    console.print(f"Written: {arguments.out / OUTPUTS[0]} and {arguments.out / OUTPUTS[1]}", soft_wrap=True)


def _three_digits(value: float) -> str:
    if 100 <= value < 1e6:
        return f"{value:.0f}"
    return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:#.3g}"


def _info_lines() -> list[str]:
    machine = this_machine()
    lines = [f"kdecore {__version__}, Python {machine.python}, {machine.system}"]
    memory = "" if machine.memory_bytes is None else f", {machine.memory_bytes / 2**30:.0f} GiB"
    threads = ", ".join(f"{name} {count}" for name, count in machine.threads.items())
    lines += [f"{machine.cpu}, {machine.cores} cores{memory}; threads: {threads}", "", "Array libraries"]
    devices: list[tuple[str, str]] = []
    for library in LIBRARIES:
        reason = library_problem(library)
        if reason is None:
            adapter = load_adapter(library)
            names = adapter.devices()
            devices += [(library, name) for name in names]
            lines += _item(library, f"{adapter.version()}, devices: {', '.join(names)}")
        else:
            lines += _item(library, reason)
    other = [f"{name} {version}" for name, version in machine.versions.items() if name not in ("kdecore", *LIBRARIES)]
    lines += _item("also", ", ".join(other))
    lines += ["", "Kernels, and where each of their targets runs (* where it is the first choice)"]
    for kernel, implementations in KERNELS.items():
        lines.append(f"  {kernel}")
        for implementation in implementations:
            places: dict[str, list[str]] = {}
            for library, device in devices:
                found = [_where(kernel, implementation, Site(library, device, dtype)) for dtype in DTYPES]
                for dtype, (first, reason) in zip(DTYPES, found, strict=True):
                    place = f"{library} {device}" + ("" if found[0] == found[-1] else f" {dtype}") + first
                    if place not in places.setdefault(reason, []):
                        places[reason].append(place)
            runs = ", ".join(places.pop("", [])) or "nowhere here"
            lines += _item(f"  {implementation.target}", runs)
            for reason, where in places.items():
                lines += _item("", f"not {', '.join(where)}: {reason}")
    return lines


def _where(kernel: str, implementation: Implementation, site: Site) -> tuple[str, str]:
    """Return ("*" where it is the first choice, the reason why it cannot run or "")."""
    reason = implementation.unsupported(site)
    if reason is not None:
        return "", reason
    return "*" if choose(kernel, site).target == implementation.target else "", ""


def _item(name: str, text: str) -> list[str]:
    indent = f"  {name:<12}"
    return textwrap.wrap(text, 80, initial_indent=indent, subsequent_indent=" " * 14, break_long_words=False) or [indent]
