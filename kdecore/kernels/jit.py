"""`kernel`: Numba's njit as every CPU kernel uses it."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit


def _sources_digest() -> str:
    """Return a digest of all kernels' sources."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_DIGEST = _sources_digest()


def kernel(*, fastmath: bool | set[str] = False) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function on its first call, without the GIL, and cache it on disk where a folder can be written.

    Numba stamps a cache file with the source file of the function alone, and would go on using code compiled from an older
    `simd.py`: here the stamp covers the sources of all kernels.
    """

    def compile_lazily(function: Callable[..., Any]) -> Any:
        dispatcher = njit(nogil=True, error_model="numpy", fastmath=fastmath)(function)
        try:
            dispatcher.enable_caching()
        except (AttributeError, RuntimeError):  # compilation is switched off; or no folder can be written
            return dispatcher
        cache_file = dispatcher._cache._cache_file
        cache_file._source_stamp = (cache_file._source_stamp, _DIGEST)
        return dispatcher

    return compile_lazily
