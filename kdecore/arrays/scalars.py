"""Numbers, words and booleans as users may give them."""

import math
import operator
from collections.abc import Sequence
from typing import Any

from kdecore.arrays.errors import OptionError, did_you_mean
from kdecore.arrays.namespace import dtype_name, host


def is_boolean(value: object) -> bool:
    """Return whether a value is True or False, Python's or in an array."""
    return isinstance(value, bool) or (hasattr(value, "dtype") and dtype_name(value) == "bool")


def to_float(value: Any) -> float:
    """Return a number or 0-d array as a Python float; NaN where that is impossible, and for text and booleans."""
    try:
        return math.nan if isinstance(value, str | bytes) or is_boolean(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def to_integer(value: Any) -> int | None:
    """Return an integer or 0-d array of one as a Python int; None for anything else, booleans among it."""
    try:
        return None if is_boolean(value) else operator.index(value)
    except TypeError:
        return None


def integer_at_least(minimum: int, name: str, value: object) -> int:
    """Return ``value`` as an int of at least ``minimum``, or raise `OptionError` naming it; booleans are no integers."""
    number = to_integer(value)
    if number is None or number < minimum:
        got = value if number is None else number
        raise OptionError(f"{name} must be an integer of at least {minimum}, got {got!r}")
    return number


def integer(name: str, value: object) -> int:
    """Return ``value`` as an int, or raise `OptionError` naming it; booleans are no integers."""
    number = to_integer(value)
    if number is None:
        raise OptionError(f"{name} must be an integer, got {value!r}")
    return number


def check_boolean(name: str, value: object) -> bool:
    """Return a boolean of Python or NumPy as a bool, or raise `OptionError` naming it."""
    if not isinstance(value, bool | host.bool):
        raise OptionError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def one_of(known: Sequence[str], name: str, value: object) -> str:
    """Return ``value`` where it is one of the known words, or raise `OptionError` naming it and the word most like it."""
    if not isinstance(value, str) or value not in known:
        raise OptionError(f"{name} must be one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}")
    return value
