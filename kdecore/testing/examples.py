"""Running a check on examples that Hypothesis makes, within a time, and saying which one fails."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from kdecore.arrays.errors import OptionError
from kdecore.arrays.scalars import integer_at_least
from kdecore.testing.strategies import AttentionProblem

SHRINK_SECONDS = 5.0
"""What looking for a smaller failing example may take."""
PRINTED = 12
"""Numbers of an array that a message shows all of."""


@dataclass(frozen=True)
class Measured:
    """What a check measured.

    Attributes
    ----------
    property
        What was checked, in words.
    subject
        The method, or the library, in words.
    examples
        Problems that it was checked on.
    worst
        The largest figure of them; the check's docstring says which.
    bound
        What no figure may exceed.
    """

    property: str
    subject: str
    examples: int
    worst: float
    bound: float


class PropertyFailed(AssertionError):
    """A property doesn't hold; the message names it, the figures and the example.

    Attributes
    ----------
    problem
        The `AttentionProblem` that it doesn't hold on.
    worst, bound
        The figure there, and what it may not exceed.
    """

    def __init__(self, words: str, problem: AttentionProblem, worst: float = np.inf, bound: float = np.nan) -> None:
        super().__init__(f"{words}; failing example: {described(problem)}")
        self.problem = problem
        self.worst = worst
        self.bound = bound


class _OutOfTime(BaseException):
    """The time is over. No `Exception`, which Hypothesis would look for a smaller example of."""


def figures_of(
    drawn: SearchStrategy[Any], measure: Callable[..., float], examples: int, seconds: float
) -> tuple[int, float]:
    """Measure examples, the same in every run, until there are enough of them or the time is over; one at least.

    Parameters
    ----------
    drawn
        Strategy of tuples.
    measure
        Called with what a tuple holds; returns a figure, or raises `PropertyFailed`.
    examples
        So many at most.
    seconds
        No other example begins that would end after these, if it took as long as the longest so far.

    Returns
    -------
    count, worst
        Examples that were measured, and the largest figure.

    Raises
    ------
    PropertyFailed
        Of the smallest example found that fails.
    OptionError
        ``examples`` is no integer of at least 1, or ``seconds`` isn't positive.
    """
    integer_at_least(1, "examples", examples)
    if not seconds > 0.0:
        raise OptionError(f"seconds must be positive, got {seconds!r}")
    end = time.perf_counter() + seconds
    longest = 0.0
    figures: list[float] = []
    failures: list[PropertyFailed] = []

    def check(example: tuple[Any, ...]) -> None:
        nonlocal end, longest
        began = time.perf_counter()
        if (figures or failures) and began + longest > end:
            raise _OutOfTime
        try:
            figures.append(measure(*example))
        except PropertyFailed as failure:
            if not failures:
                end = min(end, time.perf_counter() + SHRINK_SECONDS)
            failures.append(failure)
            raise
        finally:
            longest = max(longest, time.perf_counter() - began)

    same = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    with suppress(_OutOfTime, PropertyFailed):
        given(drawn)(same(check))()
    if failures:
        raise min(failures, key=lambda failure: sum(x.size for x in failure.problem[:3])) from None
    return len(figures), max(figures)


def described(problem: AttentionProblem) -> str:
    """Return a problem in a line: shapes and largest numbers, or all numbers where there are few, and options."""
    arrays = (f"{name} {shown(x)}" for name, x in zip("qkv", problem, strict=False))
    options = (f"{name}={shown(x) if isinstance(x, np.ndarray) else x!r}" for name, x in problem.options.items())
    return ", ".join((*arrays, *options))


def shown(x: Any) -> str:
    """Return an array's numbers where there are few, and else its shape and largest number."""
    if x.size <= PRINTED:
        return str(np.array(x).tolist())
    largest = "" if x.dtype == bool else f", at most {np.abs(x[np.isfinite(x)]).max(initial=0.0):.3g}"
    return f"of shape {x.shape}{largest}"
