"""Arrays on a device that are made once and kept for later calls, as many steps and calls make the same."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any

from kdecore.arrays.gradients import outside_inference_mode
from kdecore.arrays.namespace import Array

_met: ContextVar[list[Array] | None] = ContextVar("met", default=None)


def kept_on_device(maxsize: int) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Keep the last so many arrays that a function made, by its arguments, which name the device (`NamedDevice`)."""

    def declare(make: Callable[..., Array]) -> Callable[..., Array]:
        cached = lru_cache(maxsize)(outside_inference_mode()(make))

        @wraps(make)
        def call(*arguments: Any) -> Array:
            found = cached(*arguments)
            met = _met.get()
            if met is not None:
                met.append(found)
            return found

        call.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
        return call

    return declare


@contextmanager
def kept_arrays_met() -> Iterator[list[Array]]:
    """Gather the kept arrays that are used within, for who reads them later by where they lie, as a CUDA graph does."""
    found: list[Array] = []
    token = _met.set(found)
    try:
        yield found
    finally:
        _met.reset(token)
