"""`compare.png`: error against time, a curve for each method, a star for each tolerance, exact attention a vertical line."""

import io
import math
from collections.abc import Sequence
from itertools import chain, cycle, pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from kdecore.compare.cases import Case
from kdecore.compare.machine import Machine
from kdecore.compare.picture import (
    DARK,
    DASHES,
    ERROR,
    MARKERS,
    TIME,
    curves,
    error_limits,
    limits,
    lines,
    looks,
    seconds,
    share,
    ticks,
    tolerances,
)
from kdecore.compare.rows import Row

BOUND_COLOUR = "#666666"
LINE_LABEL_HEIGHT = 15  # points
# Offsets in points at which a label is tried, nearest first.
OFFSETS = [
    (radius * x, radius * y)
    for radius in (8, 14, 22, 32)
    for x, y in ((0, 1), (0, -1), (1, 1), (-1, -1), (1, 0), (-1, 0), (-1, 1), (1, -1))
]


def comparison_png(case: Case, rows: Sequence[Row], machine: Machine, library: str, bound: float) -> bytes:
    """Draw the Frobenius error against time.

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
    bound
        Largest error that the verdict allows, a horizontal line.

    Returns
    -------
    bytes
        A PNG image, 1350 × 900 pixels.
    """
    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)  # its methods are untyped
    axes = figure.add_subplot()
    drawn, chosen, exact = curves(rows), tolerances(rows), lines(rows)
    look = looks(drawn)
    for method, points in drawn.items():
        colour, number = look[method]
        axes.plot(
            *_places(points),
            color=colour,
            marker=MARKERS[number],
            linestyle=DASHES[number],
            linewidth=1.8,
            markersize=7,
            label=points[0].label,
        )
    if chosen:
        axes.plot(*_places(chosen), color=DARK, marker="*", linestyle="none", markersize=11, label="rtol (Frobenius)")
    _dress(axes, case, rows, machine, library, len(exact))
    _limits(axes, [*chain.from_iterable(drawn.values()), *chosen], exact, bound)
    _draw_bound(axes, bound)
    scaled = f", scaled up from {rows[0].timed_rows:,} queries" if rows[0].timed_rows < case.n_q else ""
    _draw_lines(axes, {label + (scaled if label == rows[0].label else ""): time for label, time in exact.items()})
    if entries := len(drawn) + bool(chosen):
        columns, below = min(entries, 6), (0.5, -0.12)
        axes.legend(loc="upper center", bbox_to_anchor=below, ncols=columns, columnspacing=1.5, frameon=False, fontsize=11)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed in this layout
    _label_points(canvas, axes, drawn, chosen, list(exact.values()), bound)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _places(points: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Return seconds and errors."""
    return [point.milliseconds / 1e3 for point in points], [point.errors.frobenius for point in points]


def _dress(axes: Axes, case: Case, rows: Sequence[Row], machine: Machine, library: str, labels: int) -> None:
    n_q, n_k, d = case.n_q, case.n_k, case.q.shape[-1]
    sizes = f"n = {n_k:,}" if n_q == n_k else f"{n_q:,} queries, {n_k:,} keys"
    several = f"{case.groups} × " if case.groups > 1 else ""
    title = f"{case.name}: {several}{sizes}, d = {d}, {case.q.dtype}"
    cores = f"{machine.cores} core" + ("s" if machine.cores != 1 else "")
    subtitle = f"{library} on {_shorten(machine.cpu, 40)}, {cores}; the numbers at the points are keys per query"
    if rows[0].error_rows < n_q:
        subtitle += f"\nerrors on {rows[0].error_rows:,} of {n_q:,} queries, drawn at random"
    axes.set_title(f"{_shorten(title)}\n{subtitle}", fontsize=11.5, pad=8 + LINE_LABEL_HEIGHT * labels, parse_math=False)
    axes.set_xlabel(TIME, fontsize=11)
    axes.set_ylabel(rf"{ERROR}: $‖E‖_F\,/\,‖O‖_F$ (log scale)", fontsize=11)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(which="major", color="#cccccc", linewidth=0.7)
    axes.grid(which="minor", color="#eeeeee", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_lines(axes: Axes, exact: dict[str, float]) -> None:
    """Draw exact methods as vertical lines, labelled above the frame, where no curve can be."""
    for level, ((label, milliseconds), dash) in enumerate(zip(reversed(exact.items()), cycle(DASHES), strict=False)):
        time = milliseconds / 1e3
        axes.axvline(time, color=DARK, linewidth=1.6, linestyle=dash)
        low, high = axes.get_xlim()
        on_the_right = math.log(time / low) > 0.5 * math.log(high / low)
        axes.annotate(
            f"{label}: {seconds(float(f'{time:.3g}'))} ▾" if on_the_right else f"▾ {label}: {seconds(float(f'{time:.3g}'))}",
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


def _draw_bound(axes: Axes, bound: float) -> None:
    axes.axhline(bound, color=BOUND_COLOUR, linewidth=1.1, linestyle=(0, (6, 4)), zorder=1)
    axes.annotate(
        f"{share(bound)}: the verdict takes nothing above",
        (0.0, bound),
        xycoords=("axes fraction", "data"),
        xytext=(5, 3),
        textcoords="offset points",
        va="bottom",
        fontsize=9.5,
        color=BOUND_COLOUR,
        annotation_clip=True,
    )


def _limits(axes: Axes, points: Sequence[Row], exact: dict[str, float], bound: float) -> None:
    """Leave room for labels, and put readable numbers on the axes however short they are."""
    times = [milliseconds / 1e3 for milliseconds in [*(row.milliseconds for row in points), *exact.values()]]
    for (low, high), axis, set_limits, text in (
        (limits(times), axes.xaxis, axes.set_xlim, seconds),
        (error_limits(points, bound), axes.yaxis, axes.set_ylim, share),
    ):
        set_limits(low, high)
        axis.set_major_locator(FixedLocator(ticks(low, high)))
        axis.set_major_formatter(FuncFormatter(lambda value, position, text=text: text(value)))
        axis.set_minor_locator(LogLocator(base=10, subs=range(1, 10)))
        axis.set_minor_formatter(NullFormatter())


def _label_points(
    canvas: Any,
    axes: Axes,
    drawn: dict[str, list[Row]],
    chosen: Sequence[Row],
    exact: Sequence[float],
    bound: float,
) -> None:
    """Write every point's budget or tolerance beside it, where it covers no marker, curve or other label."""
    renderer = canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    taken = [box for points in (*drawn.values(), *([row] for row in chosen)) for box in _occupied(axes, points)]
    for time in exact:
        x, _ = axes.transData.transform((time / 1e3, 1.0))
        taken.append(Bbox.from_extents(x - 2, frame.y0, x + 2, frame.y1))
    _, y = axes.transData.transform((axes.get_xlim()[0], bound))
    taken.append(Bbox.from_extents(frame.x0, y - 2, frame.x1, y + 2))
    taken += [text.get_window_extent(renderer) for text in axes.texts]
    look = looks(drawn)
    labels = [
        (point, f"{point.budget}", look[method][0])
        for method, points in drawn.items()
        for point in points
        if point.budget is not None
    ]
    labels += [(row, f"rtol {row.rtol:g}", DARK) for row in chosen]
    for point, text, colour in labels:
        note = axes.annotate(
            text,
            (point.milliseconds / 1e3, point.errors.frobenius),
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
    pixels: Any = axes.transData.transform(list(zip(*_places(points), strict=True)))
    boxes = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in pixels]
    for (x0, y0), (x1, y1) in pairwise(pixels):
        steps = max(1, int(math.hypot(x1 - x0, y1 - y0) / 4))
        for step in range(steps):
            x, y = x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps
            boxes.append(Bbox.from_bounds(x - 2, y - 2, 4, 4))
    return boxes
