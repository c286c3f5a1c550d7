"""Rows over seeds: a table of means and deviations, and a figure with a curve for each method.

Rows have ``size`` and ``method``, ``budget`` (a number or None), ``seconds`` and ``exact_seconds`` beside what is measured.
Where an experiment has ``operations`` too, a size, method and budget has ``multiply_accumulates`` and
``exact_multiply_accumulates``.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from bench.baselines import BASELINES
from bench.experiments.methods import KDECORE
from bench.experiments.rows import Results, Row
from kdecore.compare.picture import COLOURS, DASHES, MARKERS

Curves = dict[str, dict[float | None, list[Row]]]
"""Method → budget → rows; methods as in `ORDER`, budgets ascending, None alone."""
ORDER = tuple(dict.fromkeys([*KDECORE, *BASELINES]))
"""Of methods in tables; a method looks the same in every figure."""
LIMITS = (0.125, 0.25, 0.5, 1.0)
"""Times and operations over exact attention's within which the best result is told."""
Style = dict[str, Any]
"""What matplotlib takes of a curve."""


def series(results: Results) -> dict[str, Curves]:
    """Return size → the rows by method and budget."""
    found: dict[str, Curves] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in results["rows"].values():
        found[row["size"]][row["method"]][row["budget"]].append(row)
    return {
        size: {name: dict(sorted(curves[name].items(), key=lambda one: one[0] or 0.0)) for name in sorted(curves, key=place)}
        for size, curves in found.items()
    }


def place(method: str) -> int:
    """Return a method's number in `ORDER`; those that aren't there are last."""
    return ORDER.index(method) if method in ORDER else len(ORDER)


def numbers(rows: Sequence[Row], name: str) -> list[float]:
    """Return what rows have under a name, NaN where it isn't a number."""
    return [math.nan if row.get(name) is None else float(row[name]) for row in rows]


def mean(rows: Sequence[Row], name: str) -> float:
    """Return the mean over rows; NaN where one isn't a number."""
    return float(np.mean(numbers(rows, name)))


def deviation(rows: Sequence[Row], name: str) -> float:
    """Return the sample's deviation over rows, 0 of a single one; NaN where one isn't a number."""
    return float(np.std(numbers(rows, name), ddof=1)) if len(rows) > 1 else 0.0


def time_share(rows: Sequence[Row]) -> float:
    """Return the median of times over exact attention's, measured beside them."""
    pairs = zip(numbers(rows, "seconds"), numbers(rows, "exact_seconds"), strict=True)
    return float(np.median([mine / exact for mine, exact in pairs]))


def work_shares(results: Results) -> dict[tuple[str, str, float | None], float]:
    """Return size, method and budget → operations over exact attention's; without those that couldn't be counted."""
    return {
        (row["size"], row["method"], row["budget"]): row["multiply_accumulates"] / row["exact_multiply_accumulates"]
        for row in results.get("operations", {}).values()
        if "failed" not in row
    }


def table(results: Results, budget: str, quantities: Mapping[str, str]) -> str:
    """Return a line for each size, method and budget.

    Parameters
    ----------
    results
        An experiment's.
    budget
        What the budget is called.
    quantities
        Name in rows → what it is called; mean and deviation are shown.
    """
    lines, works = [], work_shares(results)
    for size, curves in series(results).items():
        for method, curve in curves.items():
            for number, rows in curve.items():
                spent = "" if number is None else f"{number:g}"
                cells = [shown(rows, name) for name in quantities]
                work = [f"{works.get((size, method, number), math.nan):.3g}"] * bool(works)
                lines.append([size, method, spent, str(len(rows)), *cells, f"{time_share(rows):.2g}", *work])
    head = ["size", "method", budget, "seeds", *quantities.values(), "time / exact", *["operations / exact"] * bool(works)]
    return markdown(head, lines)


def within(results: Results, name: str, best: Callable[..., float]) -> str:
    """Return tables of the best mean of a quantity within shares of exact attention's time, and of its operations.

    Parameters
    ----------
    results
        An experiment's.
    name
        Of the quantity in rows.
    best
        `max` or `min`.
    """
    works, tables = work_shares(results), []
    for spent in ("time", "operations"):
        lines = []
        for size, curves in series(results).items():
            for method, curve in curves.items():
                reached = [
                    (time_share(rows) if spent == "time" else works.get((size, method, number), math.nan), mean(rows, name))
                    for number, rows in curve.items()
                ]
                found = [best((x for share, x in reached if share <= limit), default=math.nan) for limit in LIMITS]
                lines.append([size, method, *(f"{x:.3g}" for x in found)])
        head = ["size", f"best {name} within so much of exact attention's {spent}", *(f"{limit:g}" for limit in LIMITS)]
        tables.append(markdown(head, lines))
    return "\n\n".join(tables)


def shown(rows: Sequence[Row], name: str) -> str:
    """Return mean and deviation over rows as text; no deviation of a single one."""
    return f"{mean(rows, name):.3g}" + f" ± {deviation(rows, name):.2g}" * (len(rows) > 1)


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; what isn't a number is a dash."""
    cells = ([cell.replace("nan ± nan", "–").replace("nan", "–") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells))


def figure(results: Results, budget: str, quantities: Mapping[str, str], path: Path, scale: str = "log") -> None:
    """Draw each quantity against the budget, and the first against time and operations; a line of panels for each size.

    Parameters
    ----------
    results, budget, quantities
        As in `table`.
    path
        PNG file.
    scale
        Of quantities: ``"log"``, for errors, without exact attention's, which are rounding, or ``"linear"``, for parts of 1.
    """
    found, works, first = series(results), work_shares(results), next(iter(quantities))
    shares = {"wall time over exact attention's, on a shared machine": time_share}
    if works:
        shares["multiply-accumulates over exact attention's"] = lambda rows: works.get(
            tuple(rows[0][part] for part in ("size", "method", "budget")), math.nan
        )
    across = len(quantities) + len(shares)
    drawn = Figure(figsize=(6.0 * across, 0.8 + 5.0 * len(found)), dpi=100, layout="constrained")
    FigureCanvasAgg(drawn)
    grid = drawn.subplots(len(found), across, squeeze=False)
    for panels, (size, curves) in zip(grid, found.items(), strict=True):
        if scale == "log":
            curves.pop("exact", None)
        for name, curve in curves.items():
            draw(panels, curve, list(quantities), list(shares.values()), {"label": name} | look(place(name)))
        for panel, name in zip(panels, [*quantities, *[first] * len(shares)], strict=True):
            panel.set(xscale="log", yscale=scale, ylabel=quantities[name], xlabel=budget, title=size)
            panel.set_ylim((0.0, 1.05) if scale == "linear" else None)
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
            panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            panel.xaxis.set_minor_locator(NullLocator())
        ticks = sorted({number for curve in curves.values() for number in curve if number is not None})
        for panel in panels[: len(quantities)]:
            panel.xaxis.set_major_locator(FixedLocator(ticks))
        for panel, label in zip(panels[len(quantities) :], shares, strict=True):
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            panel.axvline(1.0, color="black", linestyle=":")
            panel.set(xlabel=label)
    handles = [panels[len(quantities)].get_legend_handles_labels() for panels in grid]
    legend = {label: handle for pairs in handles for handle, label in zip(*pairs, strict=True)}
    drawn.legend(legend.values(), legend.keys(), loc="outside upper center", ncols=8, frameon=False, handlelength=3)
    drawn.savefig(path)


def look(number: int) -> Style:
    """Return how the curve of such a number is drawn: colours first, then dashes differ, and markers all along."""
    turn, colour = divmod(number, len(COLOURS))
    return {
        "color": COLOURS[colour],
        "marker": MARKERS[(colour + turn) % len(MARKERS)],
        "linestyle": DASHES[turn % len(DASHES)],
    }


def draw(
    panels: Sequence[Axes],
    curve: Mapping[float | None, list[Row]],
    names: Sequence[str],
    shares: Sequence[Callable[[Sequence[Row]], float]],
    style: Style,
) -> None:
    """Draw one method: quantities against the budget, a line across where there is none, and the first against shares."""
    for panel, name in zip(panels, names, strict=False):
        means = [mean(rows, name) for rows in curve.values()]
        if None in curve:
            panel.axhline(means[0], color=style["color"], linestyle=style["linestyle"])
        else:
            budgets = [number for number in curve if number is not None]
            panel.errorbar(budgets, means, yerr=[deviation(rows, name) for rows in curve.values()], capsize=3, **style)
    for panel, share in zip(panels[len(names) :], shares, strict=True):
        panel.plot(*zip(*((share(rows), mean(rows, names[0])) for rows in curve.values()), strict=True), **style)
