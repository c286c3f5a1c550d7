"""`compare.png`: error against time, a curve for each method, a star for each tolerance, exact attention a vertical line."""

import io
import math
from collections.abc import Sequence
from itertools import chain, cycle, pairwise, product
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from kdecore.compare.cases import Case
from kdecore.compare.comparison import Row
from kdecore.compare.machine import Machine

# Okabe and Ito's palette, told apart with any common colour blindness; markers and dashes say the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)))
STYLES = [
    (COLOURS[number], MARKERS[number - turn], DASHES[number - turn])
    for turn, number in product(range(len(COLOURS)), range(len(COLOURS)))
]
"""Of curves; beyond six, colours come again with other markers and dashes."""
# Axes of fewer decades than the first number get numbers at these multiples of powers of ten.
SUBDIVISIONS = (
    (0.45, (1, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)),
    (0.75, (1, 1.5, 2, 3, 4, 5, 6, 8)),
    (1.3, (1, 2, 3, 5)),
    (3, (1, 2, 5)),
    (math.inf, (1,)),
)
DARK = "#222222"
LINE_LABEL_HEIGHT = 15  # points
# Offsets in points at which a label is tried, nearest first.
OFFSETS = [
    (radius * x, radius * y)
    for radius in (8, 14, 22, 32)
    for x, y in ((0, 1), (0, -1), (1, 1), (-1, -1), (1, 0), (-1, 0), (-1, 1), (1, -1))
]


def comparison_png(case: Case, rows: Sequence[Row], machine: Machine, library: str) -> bytes:
    """Draw spectral error against time.

    Parameters
    ----------
    case
        Inputs that were measured.
    rows
        Rows of `kdecore.compare.comparison.measure`, the baseline first. Exact results are vertical lines.
    machine
        What they were measured on.
    library
        Array library they were measured with.

    Returns
    -------
    bytes
        A PNG image, 1350 × 900 pixels.
    """
    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)  # its methods are untyped
    axes = figure.add_subplot()
    curves = _curves(rows)
    for points, (colour, marker, dash) in zip(curves.values(), STYLES, strict=False):
        times, errors = [point.milliseconds for point in points], [point.errors.spectral for point in points]
        axes.plot(
            times, errors, color=colour, marker=marker, linestyle=dash, linewidth=1.8, markersize=7, label=points[0].label
        )
    chosen = [row for row in rows if row.rtol is not None and _is_point(row)]
    if chosen:
        times, errors = [row.milliseconds for row in chosen], [row.errors.spectral for row in chosen]
        label = "rtol (Frobenius)"
        axes.plot(times, errors, color=DARK, marker="*", linestyle="none", markersize=11, label=label)
    lines = {row.label: row.milliseconds for row in reversed(rows) if _is_line(row, curves)}
    _dress(axes, case, rows, machine, library, len(lines))
    _limits(axes, [*chain.from_iterable(curves.values()), *chosen], list(lines.values()))
    scaled = f", scaled up from {rows[0].timed_rows:,} queries" if rows[0].timed_rows < case.q.shape[-2] else ""
    _draw_lines(axes, {label + (scaled if label == rows[0].label else ""): time for label, time in lines.items()})
    if entries := len(curves) + bool(chosen):
        columns, below = min(entries, 6), (0.5, -0.12)
        axes.legend(loc="upper center", bbox_to_anchor=below, ncols=columns, columnspacing=1.5, frameon=False, fontsize=11)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed in this layout
    _label_points(canvas, axes, curves, chosen, list(lines.values()))
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _is_point(row: Row) -> bool:
    """Return whether a row has a place in axes of logarithms, and is no exact result, whose error is of rounding alone."""
    return row.ran != "exact" and 0 < row.errors.spectral < math.inf


def _is_line(row: Row, curves: dict[str, list[Row]]) -> bool:
    """Return whether a row is drawn as a line: an exact result of what has no curve."""
    return row.ran == "exact" and (row.rtol is not None or row.method not in curves)


def _curves(rows: Sequence[Row]) -> dict[str, list[Row]]:
    curves: dict[str, list[Row]] = {}
    for row in rows:
        if row.rtol is None and _is_point(row):
            curves.setdefault(row.method, []).append(row)
    return {method: sorted(points, key=lambda row: row.budget or 0) for method, points in curves.items()}


def _dress(axes: Axes, case: Case, rows: Sequence[Row], machine: Machine, library: str, lines: int) -> None:
    n_q, n_k, d = case.q.shape[-2], case.k.shape[-2], case.q.shape[-1]
    groups = math.prod(case.q.shape[:-2])
    sizes = f"n = {n_k:,}" if n_q == n_k else f"{n_q:,} queries, {n_k:,} keys"
    several = f"{groups} × " if groups > 1 else ""
    title = f"{case.name}: {several}{sizes}, d = {d}, {case.q.dtype}"
    cores = f"{machine.cores} core" + ("s" if machine.cores != 1 else "")
    subtitle = f"{library} on {_shorten(machine.cpu, 40)}, {cores}; the numbers at the points are keys per query"
    if rows[0].error_rows < n_q:
        subtitle += f"\nerrors on {rows[0].error_rows:,} of {n_q:,} queries, drawn at random"
    axes.set_title(f"{_shorten(title)}\n{subtitle}", fontsize=11.5, pad=8 + LINE_LABEL_HEIGHT * lines, parse_math=False)
    axes.set_xlabel("time per call (ms, median; log scale)", fontsize=11)
    axes.set_ylabel("relative spectral error ‖E‖₂ / ‖O‖₂ (log scale)", fontsize=11)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(which="major", color="#cccccc", linewidth=0.7)
    axes.grid(which="minor", color="#eeeeee", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_lines(axes: Axes, lines: dict[str, float]) -> None:
    """Draw exact methods as vertical lines, labelled above the frame, where no curve can be."""
    for level, ((label, time), dash) in enumerate(zip(reversed(lines.items()), cycle(DASHES), strict=False)):
        axes.axvline(time, color=DARK, linewidth=1.6, linestyle=dash)
        low, high = axes.get_xlim()
        on_the_right = math.log(time / low) > 0.5 * math.log(high / low)
        axes.annotate(
            f"{label}: {time:.3g} ms ▾" if on_the_right else f"▾ {label}: {time:.3g} ms",
            (time, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(5 if on_the_right else -5, 3 + LINE_LABEL_HEIGHT * level),
            textcoords="offset points",
            ha="right" if on_the_right else "left",
            va="bottom",
            fontsize=10.5,
            color=DARK,
        )


def _shorten(text: str, length: int = 85) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _limits(axes: Axes, points: Sequence[Row], lines: list[float]) -> None:
    """Leave room for labels, and put readable numbers on the axes however short they are."""
    times = [row.milliseconds for row in points] + lines
    errors = [row.errors.spectral for row in points] or [0.1, 1.0]
    for values, axis, set_limits in ((times, axes.xaxis, axes.set_xlim), (errors, axes.yaxis, axes.set_ylim)):
        low, high = min(values), max(values)
        margin = max(1.3, (high / low) ** 0.12)
        set_limits(low / margin, high * margin)
        decades = math.log10(high / low) + 2 * math.log10(margin)
        subs = next(subs for limit, subs in SUBDIVISIONS if decades < limit)
        axis.set_major_locator(LogLocator(base=10, subs=subs))
        axis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:.4g}"))
        axis.set_minor_locator(LogLocator(base=10, subs=range(1, 10)))
        axis.set_minor_formatter(NullFormatter())


def _label_points(
    canvas: Any, axes: Axes, curves: dict[str, list[Row]], chosen: Sequence[Row], lines: Sequence[float]
) -> None:
    """Write every point's budget or tolerance beside it, where it covers no marker, curve or other label."""
    renderer = canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    taken = [box for points in (*curves.values(), *([row] for row in chosen)) for box in _occupied(axes, points)]
    for time in lines:
        x, _ = axes.transData.transform((time, 1.0))
        taken.append(Bbox.from_extents(x - 2, frame.y0, x + 2, frame.y1))
    labels = [
        (point, f"{point.budget}", colour)
        for points, (colour, *_) in zip(curves.values(), STYLES, strict=False)
        for point in points
        if point.budget is not None
    ]
    labels += [(row, f"rtol {row.rtol:g}", DARK) for row in chosen]
    for point, text, colour in labels:
        note = axes.annotate(
            text,
            (point.milliseconds, point.errors.spectral),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=10,
            color=colour,
        )
        choices = []
        for offset in OFFSETS:
            note.set_position(offset)
            box = note.get_window_extent(renderer)
            outside = not (frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)
            overlaps = sum(box.overlaps(other) for other in taken)
            choices.append((outside, overlaps, offset, box))
            if not outside and not overlaps:
                break
        _, _, offset, box = min(choices, key=lambda choice: choice[:2])
        note.set_position(offset)
        taken.append(box)


def _occupied(axes: Axes, points: list[Row]) -> list[Bbox]:
    """Small boxes, in pixels, along a curve and on its markers."""
    pixels: Any = axes.transData.transform([(point.milliseconds, point.errors.spectral) for point in points])
    boxes = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in pixels]
    for (x0, y0), (x1, y1) in pairwise(pixels):
        steps = max(1, int(math.hypot(x1 - x0, y1 - y0) / 4))
        for step in range(steps):
            x, y = x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps
            boxes.append(Bbox.from_bounds(x - 2, y - 2, 4, 4))
    return boxes
