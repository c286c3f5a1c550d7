"""`kdecore verify`: the checks of `kdecore.testing` for every method on one library and device, within a time."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from kdecore.arrays.errors import OptionError
from kdecore.arrays.scalars import to_float
from kdecore.compare.comparison import Progress
from kdecore.compare.machine import this_machine
from kdecore.core.options import Options
from kdecore.methods.treecode import Treecode
from kdecore.testing import Measured, PropertyFailed, check_backend, check_invariances, check_spectral_bound, check_unbiased
from kdecore.testing.evaluation import place

METHODS: dict[str, str | Options] = {
    "exact": "exact",
    "sortlsh": "sortlsh",
    "hyper": "hyper",
    "treecode": "treecode",
    "treecode, sampled": Treecode(far_field="sample"),
    "kdeformer": "kdeformer",
}
BIASED = ("exact", "treecode")
"""Methods that draw nothing, which are the same with every seed."""
NOT_PROMISED = {"treecode": ("shift",), "treecode, sampled": ("shift",), "kdeformer": ("ones",)}
"""Method → invariances that it doesn't have: rounding orders rows of trees; denominators are estimated by themselves."""
SAFETY = 0.9
"""Part of the time that is shared out: imports take some, and an example may take longer than those before it."""


class Check(NamedTuple):
    """A row of the table to be.

    Attributes
    ----------
    property, method
        In words.
    run
        Runs it within so many seconds, or about as long as one example takes.
    """

    property: str
    method: str
    run: Callable[[float], Measured]


@dataclass(frozen=True)
class Verdict:
    """A row of the table.

    Attributes
    ----------
    property, method
        In words.
    examples
        Problems that it was checked on; None where it failed.
    worst, bound
        The largest figure, and what it may not exceed; None where there is none.
    passed
        Whether the property holds.
    words
        Why not; "" where it does.
    """

    property: str
    method: str
    examples: int | None
    worst: float | None
    bound: float | None
    passed: bool
    words: str


def checks(library: str, device: int | None) -> list[Check]:
    """Return what is checked on a library and device."""
    where: dict[str, Any] = {"library": library, "device": device}

    def check(words: str, name: str, function: Callable[..., Measured], *given: Any, **options: Any) -> Check:
        return Check(words, name, lambda seconds: function(*given, **options, seconds=seconds))

    exact = [
        check("exact with all keys", name, check_backend, library, device=device, method=method, examples=200)
        for name, method in METHODS.items()
    ]
    unbiased = [
        check("unbiased", name, check_unbiased, method, examples=8, **where)
        for name, method in METHODS.items()
        if name not in BIASED
    ]
    bounded = [
        check("spectral bound", name, check_spectral_bound, method, examples=20, **where) for name, method in METHODS.items()
    ]
    invariant = [
        check("invariances", name, check_invariances, method, without=NOT_PROMISED.get(name, ()), examples=200, **where)
        for name, method in METHODS.items()
    ]
    return [*exact, *unbiased, *bounded, *invariant]


def verify(library: str, device: int | None, minutes: float, progress: Progress) -> list[Verdict]:
    """Run all checks, each within an equal part of the time that is left.

    Raises
    ------
    OptionError
        The library can't be used, or has no such device; ``minutes`` isn't positive and finite.
    """
    if not 0.0 < to_float(minutes) < math.inf:
        raise OptionError(f"minutes must be positive and finite, got {minutes!r}")
    place(library, device)
    end = time.perf_counter() + 60.0 * minutes * SAFETY
    found, every = [], checks(library, device)
    for number, check in enumerate(every):
        progress(number, len(every), f"{check.property}, {check.method}")
        found.append(verdict(check, max(1e-3, end - time.perf_counter()) / (len(every) - number)))
    return found


def verdict(check: Check, seconds: float) -> Verdict:
    """Run a check. What it raises is a failure, whatever it is: inputs are right."""
    said = check.property, check.method
    try:
        measured = check.run(seconds)
    except PropertyFailed as failure:
        worst, bound = (None if math.isnan(x) else x for x in (failure.worst, failure.bound))
        return Verdict(*said, None, worst, bound, False, str(failure))
    except Exception as error:
        return Verdict(*said, None, None, None, False, f"{type(error).__name__}: {error}")
    return Verdict(*said, measured.examples, measured.worst, measured.bound, True, "")


def record(library: str, device: int | None, minutes: float, seconds: float, verdicts: list[Verdict]) -> dict[str, Any]:
    """Return what was found as plain data."""
    return {
        "command": "kdecore verify",
        "machine": asdict(this_machine()),
        "library": library,
        "device": device,
        "minutes": minutes,
        "seconds": seconds,
        "passed": all(one.passed for one in verdicts),
        "checks": [asdict(one) for one in verdicts],
    }


def print_table(library: str, device: int | None, seconds: float, verdicts: list[Verdict]) -> None:
    """Print a row for each check, in 80 columns, what failed, and a sentence that says whether all hold."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, emoji=False)
    console.width = max(console.width, 80)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("property", "method"):
        table.add_column(heading, no_wrap=True)
    for heading in ("examples", "worst", "bound"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for one in verdicts:
        figures = ("–" if x is None else f"{x:.2g}" for x in (one.worst, one.bound))
        count = "–" if one.examples is None else str(one.examples)
        table.add_row(one.property, one.method, count, *figures, "holds" if one.passed else "FAILS")
    console.print(f"{library}{'' if device is None else f' on device {device}'}", "", table, "", sep="\n")
    failed = [one for one in verdicts if not one.passed]
    for one in failed:
        console.print(f"{one.property}, {one.method}: {one.words}")
    examples = sum(one.examples or 0 for one in verdicts)
    if failed:
        names = "; ".join(f"{one.property}, {one.method}" for one in failed)
        console.print(f"{len(failed)} of {len(verdicts)} properties FAIL on {library}: {names}.")
    else:
        console.print(f"All {len(verdicts)} properties hold on {library}: {examples:,} examples in {seconds:.0f} s.")
