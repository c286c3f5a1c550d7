"""Saying that kernels are being compiled, to who waits for it at a terminal."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

AFTER = 2.0
"""Seconds before it is said. A compiled kernel is loaded in less."""
LINE = "kdecore: compiling kernels for the first time (once for each machine; `kdecore warmup` does it ahead)"

_SAID = threading.Lock()
"""Taken for good by who says it: once in a process."""


@contextmanager
def notice() -> Iterator[None]:
    """Write `LINE` to stderr, if that is a terminal and what is within takes longer than `AFTER`, once in a process.

    A thread waits for that, and ends before the context does.
    """
    if _SAID.locked() or not _terminal():
        yield
        return
    timer = threading.Timer(AFTER, _say)
    timer.daemon = True
    try:
        timer.start()
    except RuntimeError:  # no more threads to be had
        yield
        return
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _terminal() -> bool:
    with suppress(AttributeError, ValueError):  # there is no stderr, or it is closed
        return bool(sys.stderr.isatty())
    return False


def _say() -> None:
    if _SAID.acquire(blocking=False):
        with suppress(AttributeError, ValueError, OSError):
            print(LINE, file=sys.stderr, flush=True)
