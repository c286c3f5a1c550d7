"""The README's picture: error against time of every method on GloVe words, from what bench/results/glove.json holds.

`python -m bench.overview` draws bench/results/overview.png. It measures nothing: `python -m bench.experiments glove` does.
"""

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.experiments.summary import Curves, mean, series, time_share
from kdecore.compare.picture import COLOURS, MARKERS

RESULTS = Path(__file__).parent / "results"
OURS = ("treecode", "sortlsh", "hyper")
NAMES = {
    "kdeformer_released": ("KDEformer's\nreleased code", (0, 9)),
    "performer": ("Performer", (0, -10)),
    "reformer": ("Reformer", (27, 0)),
    "nystromformer": ("Nyströmformer", (8, -11)),
    "monarch": ("MonarchAttention", (-12, -14)),
    "pisa": ("PISA", (12, -4)),
    "scatterbrain_window": ("ScatterBrain, window", (14, -13)),
    "scatterbrain_lsh": ("ScatterBrain, LSH", (10, 11)),
    "thinformer": ("Thinformer", (22, 6)),
    "wildcat": ("WildCat", (-2, 9)),
    "uniform": ("uniform keys", (0, 8)),
}
"""Other methods → what they are called, and points from their first or last point to the name."""
FIRST = ("kdeformer_released", "nystromformer", "thinformer", "uniform")
"""Those whose name stands at the least budget."""
GREY = "#9a9a9a"


def labelled(panel: Axes, curves: Curves, name: str, text: str, offset: tuple[int, int], **style: object) -> None:
    """Draw one method's errors against its times, with its name at the first or last point."""
    rows = list(curves[name].values())
    times, spectral = [time_share(one) for one in rows], [mean(one, "spectral") for one in rows]
    points = [pair for pair in zip(times, spectral, strict=True) if pair == pair]
    panel.plot(times, spectral, **style)  # type: ignore[arg-type]
    size = 12 if name in OURS else 8.5
    colour = style["color"] if name in OURS else "#666666"
    panel.annotate(
        text,
        points[0 if name in FIRST else -1],
        offset,
        textcoords="offset points",
        color=colour,
        fontsize=size,
        ha="center",
        va="center",
    )


def draw(path: Path) -> None:
    """Draw the picture to a PNG file, kdecore's methods in colour, others' in grey."""
    (curves,) = series(json.loads((RESULTS / "glove.json").read_text(encoding="utf-8"))).values()
    drawn = Figure(figsize=(9, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(drawn)
    panel = drawn.subplots()
    for name, (text, offset) in NAMES.items():
        labelled(panel, curves, name, text, offset, color=GREY, marker="o", markersize=3.5, linewidth=1.0)
    for name, colour, marker, offset in zip(OURS, COLOURS, MARKERS, ((-34, -6), (-6, -16), (16, 12)), strict=False):
        labelled(panel, curves, name, name, offset, color=colour, marker=marker, markersize=7, linewidth=2.2)
    (rows,) = curves["mean"].values()
    level = mean(rows, "spectral")
    panel.axhline(level, color=GREY, linestyle=":", linewidth=1.0, zorder=0)
    panel.axvline(1.0, color="black", linewidth=1.5, zorder=0)
    panel.set(xscale="log", yscale="log", xlim=(0.012, 27), ylim=(6e-4, 0.6))
    panel.text(0.0128, level * 0.87, "the mean of all values", color="#666666", fontsize=8.5)
    panel.text(1.06, 8e-4, "exact attention (torch SDPA)", fontsize=9)
    panel.set(xlabel="time of a call, in times of exact attention", ylabel="relative spectral error")
    for axis, steps in ((panel.xaxis, (1, 3)), (panel.yaxis, (1, 3))):
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.set_minor_locator(NullLocator())
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title("8,192 GloVe words attend to each other. Lower and further to the left is better.", fontsize=11)
    drawn.savefig(path)


if __name__ == "__main__":
    draw(RESULTS / "overview.png")
