"""Where a call's device time goes: a profile's kernels by stage, and the least that each stage has to move and compute."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

import kdecore.kernels
from bench.gpu.session import Row, synchronize
from kdecore.kernels.registry import KERNELS, Implementation

OTHERS, COPIES = "array operations", "copies"
COUNTABLE = ("hash_codes", "row_norms", "finite_rows", "bucket_order", "node_summaries", "attend_blocks", "attend_dense")
"""Stages whose rates are reported: what they move and compute follows from shapes, and they do no more by far."""
MOST_NAMES = 8


class Launch(NamedTuple):
    """What ran on the device: the kernel's name, mangled or not, and its seconds."""

    name: str
    seconds: float


class Work(NamedTuple):
    """The least that calls of a kernel move, in bytes, and compute, in floating-point operations."""

    bytes: int
    operations: int


@cache
def triton_names() -> dict[str, str]:
    """Return the function name of each Triton kernel → the folder that it lies in."""
    folder = Path(kdecore.kernels.__path__[0])
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*/triton*.py"))}
    found = re.compile(r"^@triton\.jit[^@]*?\ndef (\w+)", re.MULTILINE)
    return {name: path.parent.name for path, text in texts.items() for name in found.findall(text)}


def stage_of(name: str) -> str:
    """Return the stage that a device kernel belongs to: its folder in kdecore, by the name that Numba or Triton gives it."""
    if name.startswith(("Memcpy", "Memset")):
        return COPIES
    if "kdecore" in name:
        # Numba mangles module names with their lengths before them, as in 7kernels10hash_codes4cuda; profilers undo that.
        for kernel in sorted(KERNELS, key=len, reverse=True):
            if f"{len(kernel)}{kernel}" in name or f".{kernel}." in name or f"::{kernel}::" in name:
                return kernel
    return triton_names().get(name, OTHERS)


def summarise(launches: Iterable[Launch], calls: int = 1) -> Row:
    """Return how many kernels a call launches, and its device milliseconds, in all and by stage."""
    launches = list(launches)
    seconds: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    by_name: dict[str, list[float]] = defaultdict(list)
    for one in launches:
        stage = stage_of(one.name)
        seconds[stage] += one.seconds
        counts[stage] += 1
        by_name[one.name].append(one.seconds)
    total = sum(seconds.values())
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:MOST_NAMES]
    return {
        "launches": len(launches) / calls,
        "device_ms": 1e3 * total / calls,
        "stages": {
            stage: {
                "ms": 1e3 * seconds[stage] / calls,
                "launches": counts[stage] / calls,
                "share": seconds[stage] / total if total > 0 else 0.0,
            }
            for stage in sorted(seconds, key=lambda stage: -seconds[stage])
        },
        "longest": [
            {"name": name[:160], "stage": stage_of(name), "launches": len(each) / calls, "ms": 1e3 * sum(each) / calls}
            for name, each in longest
        ],
    }


def device_launches(device: str, call: Callable[[], Any], calls: int) -> list[Launch]:
    """Profile some calls; in a rehearsal the host's operations stand for the device's."""
    on_device = device == "cuda"
    activities = [ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU]
    synchronize(device)
    with profile(activities=activities) as recorded:
        for _ in range(calls):
            call()
        synchronize(device)
    return launches_in(recorded.events() or [], on_device)


def launches_in(events: Iterable[Any], on_device: bool) -> list[Launch]:
    """Return what ran on the device, or on the host, of a profile's events; their times are in microseconds."""
    wanted = DeviceType.CUDA if on_device else DeviceType.CPU
    return [
        Launch(event.name, 1e-6 * (event.time_range.elapsed_us() if on_device else event.self_cpu_time_total))
        for event in events
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False)
    ]


@contextmanager
def counted() -> Iterator[dict[str, list[Work]]]:
    """While it is entered, note for each kernel what its calls move and compute at least."""
    work: dict[str, list[Work]] = defaultdict(list)
    before = dict(KERNELS)

    def counting(kernel: str, one: Implementation) -> Implementation:
        def call(xp: Any, *arguments: Any, **named: Any) -> Any:
            found = one.function(xp, *arguments, **named)
            work[kernel].append(work_of(kernel, (*arguments, *named.values()), found))
            return found

        return replace(one, function=call)

    try:
        for kernel, every in before.items():
            KERNELS[kernel] = tuple(counting(kernel, one) for one in every)
        yield work
    finally:
        KERNELS.update(before)


def work_of(kernel: str, arguments: tuple[Any, ...], found: Any) -> Work:
    """Return what a call moves at least, each array given read once and each one returned written once, and computes."""
    counts = OPERATIONS.get(kernel)
    return Work(bytes_of(arguments) + bytes_of(found), 0 if counts is None else counts(*arguments))


def bytes_of(x: Any) -> int:
    """Return the bytes of all arrays in nested tuples and parts."""
    if hasattr(x, "dtype") and hasattr(x, "nbytes"):
        return int(x.nbytes)
    if hasattr(x, "lse"):
        return bytes_of((x.out, x.lse))
    return sum(map(bytes_of, x)) if isinstance(x, tuple) else 0


def operations_of_hash_codes(q: Any, k: Any, planes: Any) -> int:
    """Count a multiplication and an addition for each number of a row and plane."""
    groups, n_q, d = q.shape
    return int(2 * groups * (n_q + k.shape[1]) * d * planes.shape[1])


def operations_of_blocks(q: Any, k: Any, v: Any, query_index: Any, key_index: Any, *others: Any) -> int:
    """Count both matrix products."""
    blocks, rows = query_index.shape
    return int(2 * blocks * rows * key_index.shape[1] * (q.shape[1] + v.shape[1]))


def operations_of_dense(q: Any, k: Any, v: Any, *others: Any) -> int:
    """Count both matrix products."""
    groups, n_q, d = q.shape
    return int(2 * groups * n_q * k.shape[1] * (d + v.shape[2]))


OPERATIONS: dict[str, Callable[..., int]] = {
    "hash_codes": operations_of_hash_codes,
    "attend_blocks": operations_of_blocks,
    "attend_dense": operations_of_dense,
}
"""Kernel → floating-point operations of a call, from its arguments; the others' are nothing beside what they move."""


def rates(stages: Mapping[str, Row], work: Mapping[str, list[Work]]) -> dict[str, Row]:
    """Return the rates that stages reach: TB/s and, where operations are counted, TFLOP/s."""
    found: dict[str, Row] = {}
    for stage in COUNTABLE:
        if stage in stages and stage in work and stages[stage]["ms"] > 0:
            moved, computed = (sum(column) for column in zip(*work[stage], strict=True))
            row = {"bytes": moved, "operations": computed, "tb_s": moved / stages[stage]["ms"] * 1e-9}
            found[stage] = row | ({"tflop_s": computed / stages[stage]["ms"] * 1e-9} if computed else {})
    return found
