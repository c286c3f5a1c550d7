"""How calls are timed: after a pause, and an untimed call."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")
SETTLE_SECONDS = 0.1
"""Pause before timing: worker threads of a BLAS library go on spinning for tens of milliseconds after their last task."""


def time_calls(call: Callable[[], Any], repeats: int, *, untimed: Callable[[], Result]) -> tuple[list[float], Result]:
    """Time a call: a pause in which earlier work's threads go to sleep, an untimed call to wake the processor, then these.

    Parameters
    ----------
    call
        What is timed; it returns when all its work is done.
    repeats
        Number of timed calls.
    untimed
        The call before: the same work, and whatever else its result is wanted for.

    Returns
    -------
    seconds
        Wall time of each timed call.
    result
        What the untimed call returned.
    """
    time.sleep(SETTLE_SECONDS)
    result = untimed()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds, result
