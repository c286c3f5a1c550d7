"""What pictures of a comparison show, drawn or interactive: curves, looks, and the limits and numbers of axes."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import product

from kdecore.compare.baselines import known_methods
from kdecore.compare.rows import Row
from kdecore.compare.verdict import plain

# Okabe and Ito's palette, told apart with any common colour blindness; markers and dashes say the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)))
LOOKS = [
    (COLOURS[number], (number - turn) % len(MARKERS)) for turn, number in product(range(len(COLOURS)), range(len(COLOURS)))
]
"""Colour, and the number of marker and dash; beyond six methods colours come again with others."""
FIRST = ("treecode", "sortlsh", "hyper", "kdeformer", "auto")
"""Methods whose looks come first."""
DARK = "#222222"
Format = Callable[[float], str]
"""How numbers of an axis are written."""
TIME = "time per call, median (log scale)"
ERROR = "Frobenius error, which rtol bounds"
"""What the axes show."""
# Axes of fewer decades than the first number get numbers at these multiples of powers of ten.
SUBDIVISIONS = (
    (0.45, (1, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)),
    (0.75, (1, 1.5, 2, 3, 4, 5, 6, 8)),
    (1.3, (1, 2, 3, 5)),
    (3, (1, 2, 5)),
    (math.inf, (1,)),
)


def looks(methods: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Return colour, and number of marker and dash, for each name: the same whatever else is shown."""
    methods = list(dict.fromkeys(methods))
    every = list(dict.fromkeys([*FIRST, *known_methods(methods), *methods]))
    return {name: LOOKS[every.index(name) % len(LOOKS)] for name in methods}


def is_point(row: Row) -> bool:
    """Return whether a row has a place in axes of logarithms, and is no exact result, whose error is of rounding alone."""
    return row.ran != "exact" and 0 < row.errors.frobenius < math.inf


def curves(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the points of each method, by budget."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.rtol is None and is_point(row):
            found.setdefault(row.method, []).append(row)
    return {method: sorted(points, key=lambda row: row.budget or 0) for method, points in found.items()}


def tolerances(rows: Sequence[Row]) -> list[Row]:
    """Return the points that a tolerance led to."""
    return [row for row in rows if row.rtol is not None and is_point(row)]


def lines(rows: Sequence[Row]) -> dict[str, float]:
    """Return label → milliseconds of what is drawn as a line: exact results of what has no curve."""
    drawn = curves(rows)
    return {
        row.label: row.milliseconds
        for row in reversed(rows)
        if row.ran == "exact" and (row.rtol is not None or row.method not in drawn)
    }


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis of logarithms that leaves room for labels."""
    low, high = min(values), max(values)
    margin = max(1.3, (high / low) ** 0.12)
    return low / margin, high * margin


def error_limits(points: Sequence[Row], bound: float) -> tuple[float, float]:
    """Return the ends of the axis of errors, with the bound among them unless it is far away."""
    errors = [row.errors.frobenius for row in points] or [bound]
    return limits([*errors, min(max(bound, min(errors) / 5), 5 * max(errors))])


def ticks(low: float, high: float) -> list[float]:
    """Return where an axis of logarithms has numbers: few round ones, a decade more on either side."""
    subs = next(subs for limit, subs in SUBDIVISIONS if math.log10(high / low) < limit)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    return [sub * 10.0**decade for decade in decades for sub in subs]


def seconds(value: float) -> str:
    """Return a time as an axis has it."""
    return f"{plain(value)} s"


def share(value: float) -> str:
    """Return an error as an axis has it."""
    return f"{plain(100 * value)} %"
