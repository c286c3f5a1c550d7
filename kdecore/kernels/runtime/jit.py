"""`kernel` and `helper`: Numba's njit as every CPU kernel uses it, and what kernels call."""

import hashlib
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba import njit
from numba.extending import register_jitable

from kdecore.kernels.runtime.notice import notice


def _sources_digest() -> str:
    """Return a digest of all kernels' sources."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


FOLDERS: set[str] = set()
"""Where compiled kernels are kept."""

_DIGEST = _sources_digest()
_CLOCK = threading.local()


def compile_seconds() -> float:
    """Return how long the calling thread has compiled kernels, loaded compiled ones, or waited for either, in its life."""
    return float(getattr(_CLOCK, "seconds", 0.0))


def _timed(compile_for: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Count the time of the outermost compilation: a kernel compiles those that it calls."""

    def compile_and_count(signature: Any) -> Any:
        if getattr(_CLOCK, "counting", False):
            return compile_for(signature)
        started, _CLOCK.counting = time.perf_counter(), True
        try:
            with notice():
                return compile_for(signature)
        finally:
            _CLOCK.counting = False
            _CLOCK.seconds = compile_seconds() + time.perf_counter() - started

    return compile_and_count


def kernel(*, fastmath: bool | set[str] = False) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function on its first call, without the GIL, and cache it on disk where a folder can be written.

    Numba stamps a cache file with the source file of the function alone, and would go on using code compiled from an older
    `simd.py`: here the stamp covers the sources of all kernels.
    """

    def compile_lazily(function: Callable[..., Any]) -> Any:
        dispatcher = njit(nogil=True, error_model="numpy", fastmath=fastmath, no_cfunc_wrapper=True)(function)
        if not hasattr(dispatcher, "compile"):  # compilation is switched off
            return dispatcher
        dispatcher.compile = _timed(dispatcher.compile)
        with suppress(RuntimeError):  # no folder can be written
            dispatcher.enable_caching()
            FOLDERS.add(dispatcher._cache.cache_path)
            cache_file = dispatcher._cache._cache_file
            cache_file._source_stamp = (cache_file._source_stamp, _DIGEST)
        return dispatcher

    return compile_lazily


def helper(*, fastmath: bool | set[str] = False) -> Callable[[Callable[..., Any]], Any]:
    """Let kernels call a function, which is compiled into them.

    Without an entry from Python, compiling which takes about as long as a small function, and a file of its own. Called from
    Python it is plain Python.
    """
    callable_from_kernels: Callable[[Callable[..., Any]], Any] = register_jitable(
        error_model="numpy", fastmath=fastmath, no_cfunc_wrapper=True
    )
    return callable_from_kernels
