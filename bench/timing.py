"""Timing: calls taken in turn, so that a busy spell of a shared machine falls on all of them alike."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from kdecore.compare.timing import time_calls


def interleaved(calls: Mapping[str, Callable[[], Any]], *, repeats: int, rounds: int = 3) -> dict[str, float]:
    """Return each call's median wall time in seconds; in every round each call has its turn of `time_calls`."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name] += time_calls(call, repeats, untimed=call)[0]
    return {name: statistics.median(values) for name, values in seconds.items()}
