"""Long Range Arena: what methods cost in test accuracy, put in untrained, and fine-tuned from exact attention's network.

`--full` is the published protocol, every method trained from random weights. By default sequences, examples and steps are
fewer: exact attention is trained once; every method is put into its network as it is; and all are tuned from there with the
same steps, batches and seeds. Gaps to exact attention are shown only where that clearly beats the majority class and
networks whose attention is the mean of the values. Runs that are cut off go on where they were.

Text, image and retrieval need `python -m bench.lra.packages` once. docs/experiments_lra.md says what differs from the
published benchmark.
"""

import argparse
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.experiments.rows import Results, Row, Show, attempted, collect
from bench.experiments.standin import aligned
from bench.lra.attention import CONTROL, EXACT, NAMES, attention
from bench.lra.runs import CONTROLLED, PUT_IN, TRAINED, TUNED, Run, load, measure, runs
from bench.lra.samples import cache_folder
from bench.lra.tasks import TASKS, Protocol, Schedule, label, reduced, tuning
from bench.lra.verdict import CLEARLY, clear, rivals
from kdecore.compare.picture import COLOURS, DASHES, MARKERS

BUDGET = 128
"""Features, landmarks or keys for each query: the paper's, for all methods."""
SEEDS = 3
TINY = Schedule(4, 4, 1e-3, 2, 2)
TINY_LENGTH, TINY_COUNTS, TINY_BUDGET, TINY_SEEDS = 64, (16, 8, 8), 16, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the experiment's arguments to a parser."""
    parser.add_argument("--task", choices=tuple(TASKS), default="listops", help="listops by default")
    parser.add_argument("--full", action="store_true", help="the published protocol, days for a method on a CPU")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="all by default; exact and mean always")
    parser.add_argument("--seeds", type=int, metavar="N", help="how many, from 0 on")
    parser.add_argument("--tiny", action="store_true", help="sizes that take seconds, to see that it runs")
    parser.add_argument("--budget", type=int, help=f"{BUDGET} by default")
    parser.add_argument("--length", type=int, help="tokens that examples are padded or cut to")
    parser.add_argument(
        "--examples", type=int, nargs=3, metavar="N", help="to train, to choose a checkpoint, and to test with"
    )
    parser.add_argument("--steps", type=int, help="of training; looked at, and written, every tenth part")
    parser.add_argument("--tuning", type=int, metavar="STEPS", help="of tuning, the same")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="folder of data and checkpoints")
    parser.add_argument("--device", default="cpu", help="PyTorch's name of where networks are; only tried on the CPU")


def run(arguments: argparse.Namespace, show: Show) -> Results:
    """Run what lra.json in the folder ``arguments.out`` hasn't yet, and return all that it has then.

    Parameters
    ----------
    arguments
        What `add_arguments` asks for, and ``out``.
    show
        Called with what is being run.

    Returns
    -------
    dict
        ``machine``, and ``rows``: `Run.key` → ``task``, ``protocol``, ``tuning`` ("" where nothing is tuned), ``stage``,
        ``method``, ``budget``, ``seed``, and what `measure` returns, or ``failed`` with the reason.

    Raises
    ------
    ModuleNotFoundError
        The task's package isn't there; the message says how to fetch it.
    ValueError
        An argument is out of range, or the file is another machine's.
    """
    protocol = chosen(arguments)
    budget = arguments.budget or (TINY_BUDGET if arguments.tiny else BUDGET)
    seeds = arguments.seeds or (TINY_SEEDS if arguments.tiny or arguments.full else SEEDS)
    names = arguments.methods or NAMES
    for name in names:
        attention(name, budget)
    show(f"{label(protocol)}: reading or drawing examples")
    load(protocol, arguments.cache)
    plan = {
        one.key: partial(row, one, arguments.cache, arguments.device, show) for one in runs(protocol, names, budget, seeds)
    }
    return collect(arguments.out / "lra.json", plan, show)


def chosen(arguments: argparse.Namespace) -> Protocol:
    """Return the protocol that arguments ask for."""
    protocol = TASKS[arguments.task].full if arguments.full else reduced(arguments.task)
    if arguments.tiny:
        length = TINY_LENGTH if arguments.task in ("listops", "text", "retrieval") else protocol.length
        protocol = Protocol(arguments.task, length, TINY_COUNTS, TINY, None if arguments.full else TINY)
    if arguments.length is not None:
        protocol = replace(protocol, length=arguments.length)
    if arguments.examples is not None:
        protocol = replace(protocol, counts=tuple(arguments.examples))
    if arguments.steps is not None:
        protocol = replace(protocol, training=shortened(protocol.training, arguments.steps))
    if arguments.tuning is not None and protocol.tuning is None:
        raise ValueError("--tuning must not be given with --full, which tunes nothing")
    if arguments.tuning is not None and protocol.tuning is not None:
        protocol = replace(protocol, tuning=shortened(protocol.tuning, arguments.tuning))
    return protocol


def shortened(schedule: Schedule, steps: int) -> Schedule:
    """Return a schedule of so many steps, a tenth of them to warm up and from one look to the next."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    tenth = max(1, steps // 10)
    return replace(schedule, steps=steps, warm_up=tenth, every=tenth)


def row(one: Run, cache: Path, device: str, show: Show) -> Row:
    """Return a run's row, or why a method failed at it."""
    identity: Row = {"task": one.protocol.task, "protocol": label(one.protocol), "tuning": tuning(one.protocol)}
    identity |= {"stage": one.stage, "method": one.method, "budget": one.budget, "seed": one.seed}
    return attempted(identity, partial(measure, one, cache, device, lambda text: show(f"{one.key}: {text}")))


def grouped(results: Results) -> dict[str, list[Row]]:
    """Return title → rows that stand beside each other: those of one protocol, and of one tuning where it has some."""
    rows, found = list(results["rows"].values()), {}
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        own = [row for row in rows if row["protocol"] == protocol]
        for tuned in dict.fromkeys(row["tuning"] for row in own if row["tuning"]) or [""]:
            title = f"{protocol}; tuned in {tuned}" if tuned else protocol
            found[title] = [row for row in own if row["tuning"] in ("", tuned)]
    return found


def table(results: Results) -> str:
    """Return accuracies, mean ± deviation over seeds, and gaps to exact attention where they mean something."""
    return "\n\n".join(f"{title}\n{lines(rows)}" for title, rows in grouped(results).items())


def lines(rows: Sequence[Row]) -> str:
    """Return the table of one protocol."""
    # With tuning, exact attention and the control alone are trained: their networks are those of the other stages.
    tuned = any(row["tuning"] for row in rows)
    stages, told = (PUT_IN, TUNED) if tuned else (TRAINED,), clear(rows)
    exact = {stage: of(rows, stage, EXACT) for stage in stages}
    cells = []
    for method, budget in dict.fromkeys((row["method"], row["budget"]) for row in rows):
        found = [of(rows, stage, method, budget) for stage in stages]
        gaps = [gap(some, exact[stage]) if told else "–" for stage, some in zip(stages, found, strict=True)]
        cells.append([method, "" if budget is None else str(budget), *map(percent, found), *gaps])
    text = aligned(["accuracy in the test, %", "budget", *stages, *(f"gap, {stage}" for stage in stages)], cells)
    if shares := {row["majority"] for row in rows if "majority" in row}:
        text += f"\nthe majority class: {100 * max(shares):.1f}"
    if own := of(rows, CONTROLLED, CONTROL):
        text += f"\nthe mean of values, trained and tuned so: {percent(own)}"
    failed = {(row["method"], row["stage"]): row["failed"] for row in rows if "failed" in row}
    text += "".join(f"\n{method} failed, {stage}: {reason}" for (method, stage), reason in failed.items())
    return f"{text}\n{verdict(rows)}"


def of(rows: Sequence[Row], stage: str, method: str, budget: int | None = None) -> list[Row]:
    """Return a method's measured rows of a stage, in the order of their seeds."""
    found = [row for row in rows if (row["stage"], row["method"], row["budget"]) == (stage, method, budget)]
    return sorted((row for row in found if "accuracy" in row), key=lambda row: row["seed"])


def percent(rows: Sequence[Row]) -> str:
    """Return the mean accuracy, with its deviation over seeds where there are some."""
    if not rows:
        return "–"
    values = [100 * row["accuracy"] for row in rows]
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def gap(rows: Sequence[Row], exact: Sequence[Row]) -> str:
    """Return how many points a method's mean is from exact attention's."""
    if not rows or not exact:
        return "–"
    mine, other = (statistics.fmean(row["accuracy"] for row in some) for some in (rows, exact))
    return f"{100 * (mine - other):+.1f}"


def verdict(rows: Sequence[Row]) -> str:
    """Say whether gaps mean something, and why."""
    found = "; ".join(f"{errors:.1f} of {name}" for name, errors in rivals(rows).items())
    if not found:
        return "exact attention or a rival of its has no result: no gap is shown"
    said = f"exact attention is ahead by so many standard errors: {found}"
    return said if clear(rows) else f"{said}. Less than {CLEARLY:g}: no gap is shown"


def figure(results: Results, path: Path) -> None:
    """Draw training losses and test accuracies, a row of panels for each protocol."""
    groups = grouped(results)
    drawn = Figure(figsize=(13.0, 5.2 * len(groups)), dpi=100, layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(len(groups), 2, squeeze=False)
    for (title, rows), (left, right) in zip(groups.items(), panels, strict=True):
        draw(left, right, [row for row in rows if "accuracy" in row])
        left.set_title(textwrap.fill(title, 90), fontsize=8)
        right.set_title(textwrap.fill(verdict(rows), 90), fontsize=8)
    drawn.savefig(path)


def draw(left: Any, right: Any, rows: Sequence[Row]) -> None:
    """Draw one protocol's losses in the last stage, and its accuracies in all."""
    last = TUNED if any(row["tuning"] for row in rows) else TRAINED
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for number, method in enumerate(methods):
        turn, place = divmod(number, len(COLOURS))
        look = {"color": COLOURS[place], "marker": MARKERS[(place + turn) % len(MARKERS)], "linestyle": DASHES[turn]}
        own = {stage: [row for row in rows if (row["stage"], row["method"]) == (stage, method)] for stage in (PUT_IN, last)}
        if own[last]:
            losses = [statistics.fmean(one) for one in zip(*(row["losses"] for row in own[last]), strict=True)]
            left.plot(range(1, len(losses) + 1), losses, label=method, **look)
        for stage, filled in ((PUT_IN, "none"), (last, look["color"])):
            values = [100 * row["accuracy"] for row in own[stage]]
            right.plot(values, [number] * len(values), marker="o", ls="", color=look["color"], markerfacecolor=filled)
    if rows:
        right.axvline(100 * rows[0]["majority"], color="black", linestyle=":")
    left.set(xlabel="looks at the development set", ylabel=f"training loss, {last}")
    right.set(yticks=range(len(methods)), yticklabels=methods)
    right.set_xlabel(f"test accuracy, %; filled: {last}, hollow: put in, dotted: majority")
    right.invert_yaxis()
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
