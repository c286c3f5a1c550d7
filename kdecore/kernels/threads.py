"""Running Numba kernels on several threads, without Numba's threading layers.

Plain Python threads that live for one call: concurrent callers, forked children and nested use are all safe, nothing of the
process's state is changed, and no result depends on the number of threads, since every task writes its own rows.
"""

import os
import threading
from collections.abc import Callable

from numba import config

SMALL_STEPS = 2**15
"""Scalar steps that take about as long as starting a thread."""


def thread_count(threads: int | None = None) -> int:
    """Return ``threads``, or as many as NUMBA_NUM_THREADS and the processors this process may use allow."""
    if threads is not None:
        return threads
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, int(config.NUMBA_NUM_THREADS))


def small_tasks(steps: int) -> int:
    """Return how many tasks of about ``steps`` scalar steps to take at a time, so that a thread is worth its start."""
    return max(1, SMALL_STEPS // max(1, steps))


def run_tasks(work: Callable[[int, int], None], tasks: int, *, threads: int, chunk: int) -> None:
    """Call ``work(first, last)`` for chunks that cover ``range(tasks)``, on ``threads`` threads; the caller is one of them.

    ``work`` should release the GIL. An exception in any thread ends the others after their chunk and is raised here.
    """
    starts = iter(range(0, tasks, chunk))
    lock = threading.Lock()
    failures: list[BaseException] = []

    def loop() -> None:
        try:
            while not failures:
                with lock:
                    first = next(starts, None)
                if first is None:
                    return
                work(first, min(first + chunk, tasks))
        except BaseException as failure:
            failures.append(failure)

    helpers: list[threading.Thread] = []
    try:
        for _ in range(min(threads, -(-tasks // chunk)) - 1):
            helper = threading.Thread(target=loop)
            try:
                helper.start()
            except RuntimeError:  # no more threads to be had: fewer will do
                break
            helpers.append(helper)
        loop()
        for helper in helpers:
            helper.join()
    except BaseException as failure:  # an interrupt outside a task
        failures.append(failure)
        for helper in helpers:
            helper.join()
    if failures:
        raise failures[0]
