"""Running Numba kernels on several threads, without Numba's threading layers.

Plain Python threads that live for one call: concurrent callers, forked children and nested use are all safe, nothing of the
process's state is changed, and no result depends on the number of threads, since every task writes its own rows.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

from numba import config

SMALL_STEPS = 2**13
"""Scalar steps that take about as long as waking a thread."""

_CALLER = threading.local()


def thread_count(threads: int | None = None) -> int:
    """Return ``threads``, or as many as NUMBA_NUM_THREADS and the processors this process may use allow."""
    if threads is not None:
        return threads
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, int(config.NUMBA_NUM_THREADS))


def small_tasks(steps: int) -> int:
    """Return how many tasks of about ``steps`` scalar steps to take at a time, so that they are worth a thread."""
    return max(1, SMALL_STEPS // max(1, steps))


def fair_chunk(tasks: int, most: int) -> int:
    """Return how many tasks to take at a time, at most ``most``, so that each thread of the caller's `team` gets some."""
    with team() as own:
        return max(1, min(most, -(-tasks // own.threads)))


def insist(step: Callable[[], object], failures: list[BaseException]) -> None:
    """Call ``step`` again until it returns, and note what interrupts it in ``failures``."""
    while True:
        try:
            step()
            return
        except BaseException as failure:
            failures.append(failure)


class Team:
    """The calling thread and helpers that wait for work, started when they are first asked."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._helpers: list[threading.Thread] = []
        self._asked: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def ask(self, work: Callable[[], None], helpers: int) -> None:
        """Have up to ``helpers`` helpers call ``work``, which must not raise."""
        while len(self._helpers) < min(helpers, self.threads - 1):
            helper = threading.Thread(target=self._help, daemon=True)
            # Listed first: an interrupt may leave `start` when the thread already runs.
            self._helpers.append(helper)
            try:
                helper.start()
            except RuntimeError:  # no more threads to be had: fewer will do
                self._helpers.remove(helper)
                break
        for _ in range(min(helpers, len(self._helpers))):
            self._asked.put(work)

    def close(self) -> None:
        """End the helpers, whatever interrupts it, and raise the first interrupt then."""
        failures: list[BaseException] = []
        # One word more than needed does no harm.
        insist(lambda: self._asked.put(None), failures)
        insist(self._join, failures)
        if failures:
            raise failures[0]

    def _join(self) -> None:
        for helper in self._helpers:
            if helper.is_alive():  # one whose start was interrupted may not be yet, and cannot be joined
                helper.join()

    def _help(self) -> None:
        while (work := self._asked.get()) is not None:
            work()
        self._asked.put(None)  # one word to leave serves all


@contextmanager
def team(threads: int | None = None) -> Iterator[Team]:
    """Keep a `Team` of `thread_count` threads for every `run_tasks` of this thread within; inside another, that one."""
    outer = getattr(_CALLER, "team", None)
    if outer is not None:
        yield outer
        return
    _CALLER.team = own = Team(thread_count(threads))
    try:
        yield own
    finally:
        _CALLER.team = None
        own.close()


def run_tasks(work: Callable[[int, int], None], tasks: int, *, chunk: int) -> None:
    """Call ``work(first, last)`` for chunks that cover ``range(tasks)``, on the threads of the caller's `team`.

    ``work`` should release the GIL. An exception in any thread ends the others after their chunk and is raised here.
    """
    starts = iter(range(0, tasks, chunk))
    lock = threading.Lock()
    failures: list[BaseException] = []
    running: list[threading.Event] = []

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

    def help_out() -> None:
        ended = threading.Event()
        running.append(ended)
        loop()
        ended.set()

    with team() as own:
        try:
            own.ask(help_out, -(-tasks // chunk) - 1)
            loop()
        except BaseException as failure:  # an interrupt outside a task
            failures.append(failure)
        # A helper that has not begun by now will find nothing left to do.
        insist(lambda: [ended.wait() for ended in running], failures)
    if failures:
        raise failures[0]
