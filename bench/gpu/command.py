"""Tests, checks, times and errors on a CUDA device in one command of at most eight minutes; see bench/gpu/METHOD.md.

`python -m bench.gpu --out FOLDER` writes gpu.json and gpu.txt, and prints that table last. Sections run in processes of
their own: what crashes or hangs takes nothing else with it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.gpu.calls import check_calls
from bench.gpu.checks import check_kernels
from bench.gpu.errors import error_rows, export_vit
from bench.gpu.session import Findings, Row, Session, attempted, failure, left_out
from bench.gpu.speed import ceilings, graphs, timings
from bench.gpu.suite import suite
from bench.gpu.table import failed, finite, table, verdicts
from kdecore.compare.machine import this_machine
from kdecore.kernels.registry import cuda_problem
from kdecore_adapters import register_backends

# Where a device is lent, kdecore is not installed.
register_backends()

SECONDS = 480.0
SECTIONS: dict[str, Callable[[Session], Findings]] = {
    "tests": suite,
    "calls": check_calls,
    "kernels": check_kernels,
    "ceilings": ceilings,
    "timings": timings,
    "errors": error_rows,
    "graphs": graphs,
}
STAGES = (
    (0.42, (("tests",), ("calls",), ("kernels",))),
    (0.82, (("ceilings", "timings"),)),
    (0.92, (("errors",),)),
    (0.985, (("graphs",),)),
)
"""The part of all time at whose end each stage has to be done, and the sections of each of its processes, which run beside
each other: what is timed runs alone."""
FEWEST_SECONDS = 8.0
GRACE = 4.0
"""Seconds in which a process that is late may end by itself."""
NO_DEVICE = 2


def main(arguments: list[str] | None = None) -> int:
    """Run the command line: 0, 1 where a test or check failed, or 2 without a device."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.txt")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of time")
    parser.add_argument("--vit", type=Path, help="file with a vision transformer's q, k and v")
    parser.add_argument("--export-vit", type=Path, metavar="FILE", help="write that file, and do nothing else")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--commit", help="to be noted in place of git's")
    parser.add_argument("--seed", type=int, help="of random inputs; a new one by default")
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, help=argparse.SUPPRESS)
    # The clock of `time.monotonic` is that of the machine: what a process takes to start counts too.
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.export_vit is not None:
        print(export_vit(options.export_vit))
        return 0
    if options.out is None:
        parser.error("--out is needed")
    if reason := None if options.rehearse else device_problem():
        print(f"bench.gpu needs a CUDA device: {reason}")
        return NO_DEVICE
    seed = int.from_bytes(os.urandom(6), "little") if options.seed is None else options.seed
    device = "cpu" if options.rehearse else "cuda"
    if options.sections:
        session = Session(device, options.until, seed, options.vit)
        run_sections(session, options.sections, rows_path(options.out))
        return 0
    return run_all(options.out, device, options.seconds, seed, options.vit, options.commit)


def device_problem() -> str | None:
    """Return why there is no device that all kernels run on, or None.

    Without Numba's, the tests and figures would be of array operations.
    """
    if not torch.version.cuda:
        return f"PyTorch {torch.__version__} is built without CUDA"
    return cuda_problem() if torch.cuda.is_available() else "PyTorch finds none"


def rows_path(out: Path) -> Path:
    """Return where processes write what they find, a line each: what they wrote stays when they end early."""
    return out / "gpu.rows.jsonl"


def run_sections(session: Session, sections: Sequence[str], path: Path) -> None:
    """Run some sections in this process, one after another; each may take an equal part of the time that is left."""
    with path.open("a", encoding="utf-8") as file:
        for done, section in enumerate(sections):
            started = time.monotonic()
            own = replace(session, until=started + session.left() / (len(sections) - done))
            for kind, row in attempted(section, partial(SECTIONS[section], own)):
                file.write(json.dumps({"kind": kind, **row}, ensure_ascii=False) + "\n")
                file.flush()
            file.write(json.dumps({"kind": "section", "name": section, "seconds": time.monotonic() - started}) + "\n")


def run_all(out: Path, device: str, seconds: float, seed: int, vit: Path | None, known: str | None = None) -> int:
    """Run all sections in their processes; write and print what they found, with the commit that is ``known``, or git's."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}", flush=True)
    rows_path(out).write_text("", encoding="utf-8")
    own: list[tuple[str, Row]] = []
    stages = ((STAGES[-1][0], (tuple(SECTIONS),)),) if device == "cpu" else STAGES
    with (out / "gpu.log").open("w", encoding="utf-8") as log:
        for share, processes in stages:
            left = started + share * seconds - time.monotonic()
            names = [", ".join(sections) for sections in processes]
            if left < FEWEST_SECONDS:
                own += [left_out(name, "no time left") for name in names]
                continue
            options = [f"--until={time.monotonic() + left - GRACE}", f"--seed={seed}", f"--out={out}"]
            options += (["--rehearse"] if device == "cpu" else []) + ([] if vit is None else [f"--vit={vit}"])
            commands = [[sys.executable, "-m", "bench.gpu", *options, "--sections", *sections] for sections in processes]
            for name, problem in zip(names, run_processes(commands, left, log), strict=True):
                if problem is not None:
                    own.append(failure(name, RuntimeError(f"{problem}; {last_line(out / 'gpu.log')}")))
    rows = grouped(rows_path(out), own)
    header: Row = {"machine": asdict(this_machine()), "device": device_header() if device == "cuda" else None}
    header |= {"commit": known or commit(), "seed": seed, "seconds": time.monotonic() - started}
    text = table(header, rows)
    record = {**header, "goals": [] if device == "cpu" else verdicts(rows), "failed": failed(rows), "found": rows}
    (out / "gpu.json").write_text(json.dumps(finite(record), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "gpu.txt").write_text(text + "\n", encoding="utf-8")
    rows_path(out).unlink()
    print(text)
    return 1 if failed(rows) else 0


def run_processes(commands: list[list[str]], seconds: float, log: Any) -> list[str | None]:
    """Run processes beside each other; return what went wrong with each, or None."""
    until = time.monotonic() + seconds
    started = [subprocess.Popen(one, stdout=log, stderr=subprocess.STDOUT, start_new_session=True) for one in commands]
    return [ended(process, until - time.monotonic()) for process in started]


def ended(process: subprocess.Popen[bytes], seconds: float) -> str | None:
    """Wait for a process, and end it and those that it started after so many seconds; return what went wrong, or None."""
    with process:
        try:
            code = process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return "stopped, for it took longer than its limit of time"
    return None if code == 0 else f"the process ended with code {code}"


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
        "cupy": next((f"{name} {metadata.version(name)}" for name in distributions("cupy")), None),
    }


def distributions(prefix: str) -> list[str]:
    """Return the installed distributions whose names begin so: CuPy's depends on CUDA's version."""
    names = {str(one.metadata["Name"]) for one in metadata.distributions()}
    return sorted(name for name in names if name.lower().startswith(prefix))


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
