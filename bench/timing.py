"""Timing: calls taken in turn, so that a busy spell of a shared machine falls on all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def interleaved(calls: Mapping[str, Callable[[], Any]], *, repeats: int, warm_up: int = 1) -> dict[str, float]:
    """Return each call's median wall time in seconds over ``repeats`` rounds, each round running every call once."""
    for call in calls.values():
        for _ in range(warm_up):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}
