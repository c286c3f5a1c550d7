"""Correctness, times and errors on a CUDA device in one command of at most five minutes; see bench/gpu/METHOD.md.

`python -m bench.gpu --out FOLDER` writes gpu.json and gpu.txt, and prints that table last. Sections run in processes of
their own: what crashes or hangs takes nothing else with it, and what was found before stays.
"""

import argparse
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any, NamedTuple

import torch

from bench.gpu.calls import check_all_gradients, check_calls
from bench.gpu.checks import check_kernels
from bench.gpu.errors import error_rows, export_vit
from bench.gpu.peers import peer_rows
from bench.gpu.profile import bounded
from bench.gpu.session import Findings, Row, Session, attempted, failure, out_of_time
from bench.gpu.speed import ceilings, cupy_timings, float32, graphs, others, timings
from bench.gpu.suite import suite
from bench.gpu.table import failed, finite, table, verdicts
from kdecore.compare.machine import this_machine
from kdecore.kernels.registry import cuda_problem
from kdecore_adapters import register_backends

# Where a device is lent, kdecore is not installed.
register_backends()

SECONDS = 300.0


class Section(NamedTuple):
    """What yields rows, and the part of all time at whose end it is stopped."""

    rows: Callable[[Session], Findings]
    end: float


CHECKS = {
    f"{what} {dtype}": Section(partial(check, dtype=dtype), 0.3)
    for what, check in (("kernels", check_kernels), ("calls", check_calls))
    for dtype in ("bfloat16", "float32", "float16", "float64")
}
SECTIONS = CHECKS | {
    "ceilings": Section(ceilings, 0.34),
    "timings": Section(timings, 0.54),
    "errors": Section(error_rows, 0.64),
    "peers": Section(peer_rows, 0.72),
    "graphs": Section(graphs, 0.76),
    "float32": Section(float32, 0.84),
    "cupy": Section(cupy_timings, 0.88),
    "gradients": Section(check_all_gradients, 0.91),
    "others": Section(others, 0.95),
    "tests": Section(suite, 0.98),
}
"""What is most important first; what a section leaves of its time the next ones have."""
STAGES = (
    tuple((name,) for name in CHECKS),
    (("ceilings", "timings", "errors"),),
    # Packages that a user brings see no other section.
    (("peers",),),
    (("graphs", "float32", "cupy", "gradients", "others", "tests"),),
)
"""Stages follow each other; the processes of one run beside each other: what is timed runs alone."""
FEWEST_SECONDS = 8.0
"""Within which a process hardly begins."""
GRACE = 2.0
"""Seconds before its end from which a section begins nothing more."""
LATE, NO_DEVICE = 3, 2
"""Exit codes: of a process whose section was stopped, and of the command without a device."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line: 0, 1 where a test or check failed, or 2 without a device."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.txt")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of time")
    parser.add_argument("--vit", type=Path, help="file with a vision transformer's q, k and v")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="with other packages of attention, to be timed beside")
    parser.add_argument("--export-vit", type=Path, metavar="FILE", help="write that file, and do nothing else")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--commit", help="to be noted in place of git's")
    parser.add_argument("--seed", type=int, help="of random inputs; a new one by default")
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, help=argparse.SUPPRESS)
    # The clock of `time.monotonic` is that of the machine: what a process takes to start counts too.
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.export_vit is not None:
        print(export_vit(options.export_vit))
        return 0
    if options.out is None:
        parser.error("--out is needed")
    if options.peers is not None and not options.peers.is_dir():
        parser.error(f"--peers is to be a folder, got {options.peers}")
    if reason := None if options.rehearse else device_problem():
        print(f"bench.gpu needs a CUDA device: {reason}")
        return NO_DEVICE
    options.seed = int.from_bytes(os.urandom(6), "little") if options.seed is None else options.seed
    if not options.sections:
        return run_all(options)
    session = Session("cpu" if options.rehearse else "cuda", 0.0, options.seed, options.vit, options.peers)
    run_sections(session, options.sections, limits(options.started, options.seconds), rows_path(options.out))
    return 0


def device_problem() -> str | None:
    """Return why there is no device that all kernels run on, or None.

    Without Numba's, the tests and figures would be of array operations.
    """
    if not torch.version.cuda:
        return f"PyTorch {torch.__version__} is built without CUDA"
    return cuda_problem() if torch.cuda.is_available() else "PyTorch finds none"


def limits(started: float, seconds: float) -> dict[str, float]:
    """Return when each section is stopped, on the clock of `time.monotonic`."""
    return {name: started + section.end * seconds for name, section in SECTIONS.items()}


def rows_path(out: Path) -> Path:
    """Return where processes write what they find, a line each: what they wrote stays when they end early."""
    return out / "gpu.rows.jsonl"


def run_sections(session: Session, names: Sequence[str], ends: Mapping[str, float], path: Path) -> None:
    """Run some sections in this process, one after another, each until its end."""
    with path.open("a", encoding="utf-8") as file:
        for name in names:
            started = time.monotonic()
            own = replace(session, until=ends[name] - GRACE)
            if not own.has(0.0):
                continue
            write(file, "begun", {"name": name})
            with stopped_after(ends[name] - started):
                for kind, row in attempted(name, partial(SECTIONS[name].rows, own)):
                    write(file, kind, {"section": name, **row})
            write(file, "section", {"name": name, "seconds": time.monotonic() - started})


def write(file: Any, kind: str, row: Row) -> None:
    """Write a row at once."""
    file.write(json.dumps({"kind": kind, **row}, ensure_ascii=False) + "\n")
    file.flush()


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """End this process where the context takes longer, and say where it was."""

    def stop() -> None:
        faulthandler.dump_traceback(file=sys.__stderr__ or 2)
        os._exit(LATE)

    timer = Timer(max(seconds, 0.0), stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def run_all(options: argparse.Namespace) -> int:
    """Run all sections in their processes; write and print what they found, though a signal ends it early."""
    started, path = time.monotonic(), rows_path(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"seed {options.seed}", flush=True)
    header: Row = {"machine": asdict(this_machine()), "device": None if options.rehearse else device_header()}
    header |= {"commit": options.commit or commit(), "seed": options.seed}
    path.write_text("", encoding="utf-8")
    # On a CPU checks run one after another.
    stages = ((tuple(CHECKS),), *STAGES[1:]) if options.rehearse else STAGES
    crashes: list[tuple[str, Row]] = []
    try:
        with ended_by_signals(), (options.out / "gpu.log").open("w", encoding="utf-8") as log:
            for stage in stages:
                crashes.extend(run_stage(stage, options, started, log))
    finally:
        rows = complete(grouped(path, crashes))
        conclude(options.out, header | {"seconds": time.monotonic() - started}, rows)
        path.unlink()
    return 1 if failed(rows) else 0


def conclude(out: Path, header: Row, rows: dict[str, list[Row]]) -> None:
    """Write gpu.json and gpu.txt, and print the table."""
    record = {**header, "goals": verdicts(rows) if header["device"] else [], "failed": failed(rows), "found": rows}
    (out / "gpu.json").write_text(json.dumps(finite(record), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = table(header, rows)
    (out / "gpu.txt").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within the context, let what asks this process to end raise SystemExit."""

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_stage(stage: Sequence[Sequence[str]], options: argparse.Namespace, started: float, log: Any) -> Findings:
    """Run processes beside each other; yield what crashed. Sections behind one that ended its process get another."""
    ends = limits(started, options.seconds)
    waiting = [names for names in stage if ends[names[-1]] - time.monotonic() >= FEWEST_SECONDS]
    while waiting:
        commands = [command(options, started, names) for names in waiting]
        codes = run_processes(commands, max(ends[names[-1]] for names in waiting) + GRACE - time.monotonic(), log)
        begun = {row["name"] for row in grouped(rows_path(options.out), ()).get("begun", ())}
        behind = []
        for names, code in zip(waiting, codes, strict=True):
            last = max((number for number, name in enumerate(names) if name in begun), default=0)
            if code not in (0, LATE, None):
                said = last_line(options.out / "gpu.log")
                yield failure(names[last], RuntimeError(f"the process ended with code {code}; {said}"))
            behind.append(names[last + 1 :] if code else ())
        waiting = [names for names in behind if names and ends[names[-1]] - time.monotonic() >= FEWEST_SECONDS]


def command(options: argparse.Namespace, started: float, names: Sequence[str]) -> list[str]:
    """Return the command line of a process that runs some sections."""
    given = [f"--out={options.out}", f"--seed={options.seed}", f"--seconds={options.seconds}", f"--started={started}"]
    given += [f"--{name}={value}" for name in ("vit", "peers") if (value := getattr(options, name)) is not None]
    given += ["--rehearse"] if options.rehearse else []
    return [sys.executable, "-m", "bench.gpu", *given, "--sections", *names]


def run_processes(commands: list[list[str]], seconds: float, log: Any) -> list[int | None]:
    """Run processes beside each other; return their exit codes, None for those that were killed after so many seconds.

    They share the processors' threads, and what they start ends with them.
    """
    until = time.monotonic() + seconds
    threads = str(max(1, (os.cpu_count() or 1) // len(commands)))
    environment = {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads} | os.environ
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.extend(
            subprocess.Popen(one, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
            for one in commands
        )
        return [exit_code(process, until - time.monotonic()) for process in started]
    finally:
        for process in started:
            end(process)


def exit_code(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Wait for a process; return its exit code, or None after so many seconds."""
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, and those that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(path: Path) -> str:
    """Return the last line of a log that says something."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"


def grouped(path: Path, own: Iterable[tuple[str, Row]]) -> dict[str, list[Row]]:
    """Return what processes wrote, and what this one has to say, by kind; a line that was not finished is not read."""
    rows: dict[str, list[Row]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row.pop("kind")].append(row)
    for kind, row in own:
        rows[kind].append(row)
    return dict(rows)


def complete(rows: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Add sections that did not end to what was left out, most important first, and to profiles their time on paper."""
    done = {row["name"] for row in rows.get("section", ())} | {row["what"] for row in rows.get("failure", ())}
    late = [{"section": name, **out_of_time(name)[1]} for name in SECTIONS if name not in done]
    order = {name: number for number, name in enumerate(SECTIONS)}
    ceiling = {row["name"]: row["value"] for row in rows.get("ceiling", ())}
    found = {kind: every for kind, every in rows.items() if kind != "begun"}
    found["left_out"] = sorted([*rows.get("left_out", ()), *late], key=lambda row: order[row["section"]])
    found["profile"] = [bounded(row, ceiling) for row in rows.get("profile", ())]
    return found


def device_header() -> Row:
    """Describe the device."""
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "l2_bytes": getattr(found, "L2_cache_size", None),
        "memory_bytes": found.total_memory,
        "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
    }


def commit() -> str | None:
    """Return the git commit, with a + where files differ from it; None where it isn't known."""
    found = said_by("git", "rev-parse", "--short=12", "HEAD")
    return None if found is None else found + ("+" if said_by("git", "status", "--porcelain", "-uno") else "")


def said_by(*arguments: str) -> str | None:
    """Return the first line that a command writes, or None where there is none or it fails."""
    try:
        found = subprocess.run(arguments, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(found.stdout.splitlines()), None)
