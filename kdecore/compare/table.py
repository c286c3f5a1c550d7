"""The comparison in a terminal: a table of 80 columns at most, notes, the verdict, and the call to copy."""

from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from pathlib import Path

from kdecore.compare.cases import Case
from kdecore.compare.machine import Machine
from kdecore.compare.notes import notes, place, sizes
from kdecore.compare.output import OUTPUTS
from kdecore.compare.rows import Row
from kdecore.compare.verdict import Verdict, shows_gain

HEADINGS = (
    "keys/\nquery",
    "ms",
    "speed-\nup",
    "spectral\nerror",
    "Frobenius\nerror",
    "certified",
    "worst\nrow",
    "peak\nMiB",
)
NARROWEST, WIDEST, UNLIMITED = 74, 80, 10_000
"""Columns below which folding the table would lose numbers, that it fits, and in which nothing is folded."""


def print_table(
    case: Case, rows: Sequence[Row], machine: Machine, library: str, seeds: int, folder: Path, found: Verdict
) -> None:
    """Print the comparison on stdout.

    Parameters
    ----------
    case, rows, machine, library
        What was measured, with what result, on what, with which array library.
    seeds
        How many the errors are means over.
    folder
        Where files were written.
    found
        The verdict, which comes last.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, emoji=False)
    console.width = min(max(console.width, NARROWEST), WIDEST)
    console.print(sizes(case))
    console.print(f"{place(machine, library)}; mean errors over {seeds} seed(s)")
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column("method", overflow="fold")
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    sampled = rows[0].timed_rows < case.n_q
    for row in rows:
        table.add_row(
            row.label,
            f"{row.keys_per_query:.0f}",
            f"{'~' if sampled and row is rows[0] else ''}{digits(row.milliseconds)}",
            f"{row.speedup:.1f}×" if shows_gain(row) else "–",
            digits(row.errors.spectral),
            digits(row.errors.frobenius),
            interval(*row.certificate.frobenius_interval) if row.certificate else "–",
            digits(row.errors.worst_row),
            "–" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
        )
    if console.measure(table, options=console.options.update(width=UNLIMITED)).maximum > console.width:
        table.padding = 0
    console.print("", table, "", sep="\n")
    for note in notes(case, rows):
        console.print(note)
    console.print(f"Written to {folder}: {', '.join(OUTPUTS)}", soft_wrap=True)
    console.print("", found.sentence, found.reason, "", sep="\n")
    console.print(found.call, soft_wrap=True)


def digits(value: float, count: int = 3) -> str:
    """Return a number with so many digits, in few characters."""
    if 10 ** (count - 1) <= value < 1e6:
        return f"{value:.0f}"
    return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:#.{count}g}"


def interval(lower: float, upper: float) -> str:
    """Return limits with two digits, rounded outwards, or one number where there is no more to say."""
    if not lower < upper:
        return digits(upper)
    return "–".join(digits(limit, 2) for limit in outwards(lower, upper))


def outwards(lower: float, upper: float) -> tuple[float, float]:
    """Return limits rounded to two digits, outwards; as they are where there is one number, or none."""
    if not lower < upper:
        return lower, upper
    low, high = (
        float(Context(prec=2, rounding=rounding).create_decimal(str(limit)))
        for limit, rounding in ((lower, ROUND_FLOOR), (upper, ROUND_CEILING))
    )
    return low, high
