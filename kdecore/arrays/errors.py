"""Errors that `kdecore` raises: each names the argument, what was expected and what came."""

from collections.abc import Iterable
from difflib import get_close_matches


class KdecoreError(Exception):
    """Base of every error that kdecore raises on purpose."""


class ShapeError(KdecoreError, ValueError):
    """An array has the wrong rank, or its dimensions do not fit the other arrays'."""


class DTypeError(KdecoreError, TypeError):
    """An argument is not an array, or its dtype is not a real floating-point one."""


class DeviceError(KdecoreError, ValueError):
    """Arrays come from different libraries or lie on different devices."""


class OptionError(KdecoreError, ValueError):
    """An option (method, budget, scale, seed, …) has a value outside its range."""


class KernelUnavailable(KdecoreError, RuntimeError):
    """A kernel that was asked for by name cannot run here; the message says why."""


class MemoryLimitError(KdecoreError, MemoryError):
    """A call cannot be made to fit into ``max_memory``; the message says how much it needs."""


class InputFileError(KdecoreError, ValueError):
    """An input file cannot be read or does not hold what is needed; the message names the file."""


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """Return the end of a message, ``"; did you mean 'treecode'?"``, or "" where no known name is like the given one.

    Upper and lower case count as the same; of a class, its name is looked at.
    """
    name = given.__name__ if isinstance(given, type) else given
    by_lower = {one.lower(): one for one in known}
    found = get_close_matches(name.lower(), by_lower, n=1) if isinstance(name, str) else []
    return f"; did you mean {by_lower[found[0]]!r}?" if found else ""
