"""What a measurement runs on: the machine, and memory in use."""

import ctypes
import gc
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from kdecore.arrays.backend import backend_named, unusable


@dataclass(frozen=True)
class Machine:
    """What a measurement ran on.

    Attributes
    ----------
    cpu
        Model name.
    cores
        Cores that this process may use.
    memory_bytes
        Main memory; None where not known.
    system, python
        Operating system and Python version.
    versions
        Distribution → version, of those installed.
    threads
        Library, or environment variable that limits threads → number.
    """

    cpu: str
    cores: int
    memory_bytes: int | None
    system: str
    python: str
    versions: dict[str, str]
    threads: dict[str, str]


def peak_memory(call: Callable[[], Any]) -> int | None:
    """Return the peak of resident memory during ``call`` above that before it, in bytes; None where not known.

    Works on Linux, where the process may reset its high-water mark; a few 100 KiB are noise.
    """
    try:
        gc.collect()
        # What the allocator kept from earlier calls would be used again without showing.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before, resident = _process_status("VmHWM"), _process_status("VmRSS")
    except (OSError, TypeError, KeyError):
        return None
    if before > resident + 2**22:  # some sandboxes take the write and reset nothing
        return None
    call()
    return max(0, _process_status("VmHWM") - before)


def _process_status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    kibibytes = dict(line.split(":", 1) for line in lines)[field].removesuffix("kB")
    return int(kibibytes) * 1024


def this_machine() -> Machine:
    """Describe this machine."""
    from kdecore.kernels.runtime.threads import thread_count  # imports numba, which takes a while

    distributions = ("kdecore", "numpy", "numba", "array-api-compat", "torch", "cupy-cuda13x", "numba-cuda", "triton")
    threads = {"kdecore": str(thread_count())}
    if unusable("torch") is None:
        threads["torch"] = str(backend_named("torch").threads())
    limits = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=_memory_bytes(),
        system=platform.platform(),
        python=platform.python_version(),
        versions={name: version for name in distributions if (version := _version(name)) is not None},
        threads=threads | {name: os.environ[name] for name in limits if name in os.environ},
    )


def _version(distribution: str) -> str | None:
    if distribution == "kdecore":
        from kdecore import __version__

        return __version__
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
