"""`compare.html`: the comparison as one page that loads nothing; verdict, call, curve, table, certificates, worst rows."""

import math
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from itertools import chain, cycle
from pathlib import Path

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from kdecore import __version__
from kdecore.compare import picture
from kdecore.compare.cases import Case
from kdecore.compare.machine import Machine
from kdecore.compare.notes import holds, notes, place, sizes
from kdecore.compare.picture import DARK
from kdecore.compare.rows import Row, WorstRow
from kdecore.compare.table import outwards
from kdecore.compare.verdict import Verdict, percent, plain, shows_gain, times

SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")
DASHES = ("solid", "dash", "dashdot", "dot", "longdash", "longdashdot")
"""Plotly's names for the markers and dashes of `kdecore.compare.picture`."""
CONTROLS = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtons": [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
}
AXIS = {
    "type": "log",
    "gridcolor": "#dddddd",
    "linecolor": "#888888",
    "showline": True,
    "zeroline": False,
    "automargin": True,
}


def comparison_html(
    case: Case, rows: Sequence[Row], machine: Machine, library: str, seeds: int, found: Verdict, png: bytes
) -> bytes:
    """Write the page.

    Parameters
    ----------
    case
        Inputs that were measured.
    rows
        Rows of `kdecore.compare.comparison.measure`, the baseline first.
    machine, library
        What they were measured on, with which array library.
    seeds
        How many the errors are means over.
    found
        The verdict.
    png
        The picture that is printed, and shown where no script runs.

    Returns
    -------
    bytes
        HTML in UTF-8, some 5 MB: Plotly is within. Its security policy forbids to load anything; all text is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plotted = figure(rows, found).to_html(full_html=False, include_plotlyjs=True, config=CONTROLS, div_id="curve")
    page = environment.get_template("page.html").render(
        found=found,
        sizes=sizes(case),
        place=place(machine, library),
        seeds=seeds,
        curve=Markup(plotted),
        png=b64encode(png).decode("ascii"),
        rows=rows,
        certified_rows=[row for row in rows if row.certificate],
        notes=notes(case, rows),
        sampled=rows[0].timed_rows < case.n_q,
        version=__version__,
        **{function.__name__: function for function in (bytes_shown, certified, named, percent, seconds)},
        **{function.__name__: function for function in (holds, plain, shows_gain, times)},
    )
    return page.encode()


def figure(rows: Sequence[Row], found: Verdict) -> go.Figure:
    """Return error against time, as `comparison_png` draws it, for a mouse or a finger."""
    drawn, chosen, exact = picture.curves(rows), picture.tolerances(rows), picture.lines(rows)
    points = [*chain.from_iterable(drawn.values()), *chosen]
    all_times = [row.milliseconds / 1e3 for row in points] + [time / 1e3 for time in exact.values()]
    across, up = picture.limits(all_times), picture.error_limits(points, found.bound)
    shown = go.Figure()
    if found.row in points:
        ring = {"symbol": "circle-open", "size": 20, "color": DARK, "line": {"width": 2}}
        shown.add_trace(_trace([found.row], "the verdict", mode="markers", marker=ring))
    for method, (colour, number) in picture.looks(drawn).items():
        marker, line = {"symbol": SYMBOLS[number], "size": 9}, {"dash": DASHES[number], "width": 2}
        curve = drawn[method]
        shown.add_trace(
            _trace(
                curve,
                curve[0].label,
                mode="lines+markers",
                line={"color": colour, **line},
                marker={"color": colour, **marker},
            )
        )
    if chosen:
        shown.add_trace(_trace(chosen, "rtol", mode="markers", marker={"symbol": "star", "size": 12, "color": DARK}))
    for (label, time), dash in zip(reversed(exact.items()), cycle(DASHES), strict=False):
        x, line = [time / 1e3] * 2, {"color": DARK, "dash": dash, "width": 2}
        text = f"{escape(label)}<br>{seconds(time)}"
        shown.add_scatter(x=x, y=up, name=escape(label), mode="lines", line=line, hoverinfo="text", text=text)
    line = {"color": "#666666", "dash": "dash", "width": 1}
    name = f"{percent(found.bound)}: largest error allowed"
    shown.add_scatter(x=across, y=[found.bound] * 2, name=name, mode="lines", line=line, hoverinfo="skip")
    shown.update_layout(
        template="none",
        xaxis=AXIS | _axis(across, picture.TIME, picture.seconds),
        yaxis=AXIS | _axis(up, picture.ERROR, picture.share),
        margin={"l": 8, "r": 12, "t": 36, "b": 8},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "xref": "paper"},
        font={"size": 13, "color": DARK, "family": "system-ui, sans-serif"},
        hovermode="closest",
        dragmode=False,  # a finger that moves the page is not caught
        height=480,
    )
    return shown


def _trace(rows: Sequence[Row], name: str, **look: object) -> go.Scatter:
    texts = [f"{escape(row.setting)}<br>{seconds(row.milliseconds)}, {percent(row.errors.frobenius)} error" for row in rows]
    x, y = [row.milliseconds / 1e3 for row in rows], [row.errors.frobenius for row in rows]
    return go.Scatter(x=x, y=y, name=escape(name), text=texts, hoverinfo="text", **look)


def _axis(ends: tuple[float, float], title: str, text: picture.Format) -> dict[str, object]:
    places = picture.ticks(*ends)
    return {
        "range": [math.log10(end) for end in ends],
        "tickvals": places,
        "ticktext": [text(one) for one in places],
        "title": {"text": title, "font": {"size": 13}},
    }


def seconds(milliseconds: float) -> str:
    """Return a time with three digits."""
    return f"{plain(milliseconds / 1e3, 3)} s"


def certified(row: Row) -> str:
    """Return the limits of a certificate."""
    if row.certificate is None:
        return "–"
    low, high = outwards(*row.certificate.frobenius_interval)
    return percent(high) if low == high else f"{plain(100 * low, 2)} to {percent(high)}"


def named(row: WorstRow) -> str:
    """Return which query a row is, and of which leading indices."""
    *lead, query = row.place
    return f"{query:,}" if not lead else f"{query:,} of head {', '.join(map(str, lead))}"


def bytes_shown(count: int | None) -> str:
    """Return memory in MiB."""
    return "–" if count is None else f"{count / 2**20:.1f} MiB"
