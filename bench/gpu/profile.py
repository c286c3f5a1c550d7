"""Where a call's device time goes: a profile's kernels by stage, and what each stage costs on paper."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

import kdecore.kernels
from bench.gpu.session import Row, synchronize
from kdecore.kernels.registry import KERNELS

OTHERS, COPIES = "array operations", "copies"
LAUNCHES = {"exact": 5, "sortlsh": 16, "hyper": 13, "treecode": 38}
"""Of a call with each query's own key known, as tests/test_accelerators.py counts them and allows them at most."""
CACHE_RATE = 5.5e12
"""Bytes a second through the second-level cache of an H100 or H200, which is assumed."""
MOST_NAMES = 8


class Launch(NamedTuple):
    """What ran on the device: the kernel's name, mangled or not, and its seconds."""

    name: str
    seconds: float


class Paper(NamedTuple):
    """What a stage of a call costs on paper: bytes of memory and through the cache, operations, and seconds of waiting.

    All but the last grow with the rows of all heads.
    """

    moved: float = 0.0
    cached: float = 0.0
    operations: float = 0.0
    waiting: float = 0.0


PAPER_ROWS = 16 * 131_072
PAPER = {
    "finite_rows": Paper(0.54e9),
    "spoil_groups": Paper(0.56e9),
    "spoil_rows": Paper(0.81e9),
    "row_norms": Paper(0.55e9),
    "value_sizes": Paper(0.51e9),
    "hash_codes": Paper(0.94e9),
    "bucket_order": Paper(0.13e9),
    "draw_indices": Paper(0.12e9, 1.6e9),
    "attend_blocks": Paper(1.5e9, 2.1e9, 0.27e12),
    "second_moment": Paper(waiting=0.02e-3),
    "balanced_view": Paper(waiting=0.1e-3),
    "project_rows": Paper(0.8e9),
    "rank_codes": Paper(0.28e9, waiting=0.03e-3),
    "node_summaries": Paper(1.7e9),
    "scaled_nodes": Paper(waiting=0.01e-3),
    "pick_threshold": Paper(waiting=0.14e-3),
    "gap_moments": Paper(waiting=0.03e-3),
    "shrink_matrices": Paper(waiting=0.01e-3),
    "open_tree": Paper(0.0, 9.4e9, 0.35e12),
    "attend_tree": Paper(1.5e9, 4.3e9, 0.27e12),
}
"""Of `PAPER_ROWS` rows, d = 64, bfloat16, budget 512: what the kernels' docstrings count, for all launches of a call.

Where instructions bound a kernel, the bytes that would take as long at 3.0 TB/s, or through the cache.
"""


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


def bounded(row: Row, ceiling: Mapping[str, float]) -> Row:
    """Return a profile whose stages have their time on paper, in ms, by the device's rates in TB/s and TFLOP/s."""
    rows = row["heads"] * row["n"] / PAPER_ROWS

    def with_paper(name: str, stage: Row) -> Row:
        paper = PAPER.get(name)
        if paper is None or not {"copy", "product"} <= ceiling.keys():
            return stage
        moved, computed = paper.moved / (ceiling["copy"] * 1e12), paper.operations / (ceiling["product"] * 1e12)
        seconds = max(rows * max(moved, paper.cached / CACHE_RATE, computed), paper.waiting)
        return stage | {"paper_ms": 1e3 * seconds}

    return row | {"stages": {name: with_paper(name, stage) for name, stage in row["stages"].items()}}
