"""Timing: calls taken in turn, so that a busy spell of a shared machine falls on all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from kdecore.comparison import SETTLE_SECONDS


def interleaved(calls: Mapping[str, Callable[[], Any]], *, repeats: int, rounds: int = 3) -> dict[str, float]:
    """Return each call's median wall time in seconds.

    In every round each call has its turn: a pause in which worker threads of the one before go to sleep, one call that is
    not timed and wakes the processor up, then ``repeats`` timed ones.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(SETTLE_SECONDS)
            call()
            for _ in range(repeats):
                started = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}
