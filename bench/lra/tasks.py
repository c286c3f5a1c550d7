"""The five tasks: where examples come from, the published protocol of each, and a reduced one for two cores."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.lra import listops, packages, pathfinder
from bench.lra.samples import Samples, Splits, kept, split

Counts = tuple[int, int, int]
"""Examples to train with, to choose a checkpoint with, and to test with."""


@dataclass(frozen=True)
class Schedule:
    """How a network is trained.

    Attributes
    ----------
    steps, batch
        Steps, and examples in each.
    rate, warm_up
        AdamW's highest rate, reached in so many steps by a line, from where another falls to zero.
    every
        Steps from one look at the development set to the next; then the state is written, too.
    """

    steps: int
    batch: int
    rate: float
    warm_up: int
    every: int


@dataclass(frozen=True)
class Protocol:
    """All that the runs on a task have in common.

    Attributes
    ----------
    task
        Its name.
    length
        Tokens that examples are padded or cut to.
    counts
        See `Counts`.
    training
        From random weights.
    tuning
        From exact attention's checkpoint; None where every method is trained from random weights.
    """

    task: str
    length: int
    counts: Counts
    training: Schedule
    tuning: Schedule | None = None


@dataclass(frozen=True)
class Task:
    """What a task needs.

    Attributes
    ----------
    classes, vocabulary
        Numbers of labels and of tokens.
    parts
        Sequences in an example.
    full
        The published protocol.
    load
        (counts, length, seed, folder) → `Splits`; the folder has the task's files, or gets what was generated.
    """

    classes: int
    vocabulary: int
    parts: int
    full: Protocol
    load: Callable[[Counts, int, int, Path], Splits]


def generated(generate: Callable[[int, int, int], Samples], counts: Counts, length: int, seed: int, folder: Path) -> Splits:
    """Return what a generator makes, kept in a file."""
    count = sum(counts)
    return split(kept(folder / f"{count}-{length}-{seed}.npz", lambda: generate(count, length, seed)), counts)


# Rows: task, padded length, examples, batch, rate, steps of warm-up, steps between looks at the development set.
PUBLISHED = (
    Protocol("listops", 2048, (96_000, 2_000, 2_000), Schedule(50_000, 32, 1e-4, 1000, 500)),
    Protocol("text", 4096, (20_000, 2_400, 2_400), Schedule(50_000, 32, 1e-4, 80, 500)),
    Protocol("retrieval", 4096, (147_086, 18_090, 17_437), Schedule(50_000, 16, 2e-4, 800, 1000)),
    Protocol("pathfinder", 1024, (160_000, 20_000, 20_000), Schedule(50_000, 128, 2e-4, 312, 500)),
    Protocol("image", 1024, (45_000, 5_000, 10_000), Schedule(50_000, 256, 1e-4, 175, 50)),
)
SOURCES: dict[str, Callable[[Counts, int, int, Path], Splits]] = {
    "listops": partial(generated, listops.generate),
    "text": packages.text,
    "retrieval": packages.retrieval,
    "pathfinder": partial(generated, pathfinder.generate),
    "image": packages.image,
}
CLASSES = packages.CLASSES | {"listops": listops.CLASSES, "pathfinder": pathfinder.CLASSES}
VOCABULARY = dict.fromkeys(SOURCES, packages.VOCABULARY) | {"listops": listops.VOCABULARY}
TASKS = {
    one.task: Task(CLASSES[one.task], VOCABULARY[one.task], 1 + (one.task == "retrieval"), one, SOURCES[one.task])
    for one in PUBLISHED
}
"""Name → task."""

REDUCED = Schedule(2000, 32, 1e-3, 200, 200), Schedule(400, 32, 3e-4, 40, 100)
"""Training and tuning."""
REDUCED_COUNTS = (8000, 1000, 2000)
REDUCED_LENGTHS = {"listops": 512, "text": 1024, "retrieval": 1024, "pathfinder": 1024, "image": 1024}


def reduced(task: str) -> Protocol:
    """Return the reduced protocol: shorter sequences, fewer examples and steps, a higher rate, and tuning."""
    return Protocol(task, REDUCED_LENGTHS[task], REDUCED_COUNTS, *REDUCED)


def label(protocol: Protocol) -> str:
    """Say in a line all that a protocol consists of but its tuning."""
    examples = "/".join(map(str, protocol.counts))
    return f"{protocol.task}, {protocol.length} tokens, {examples} examples, {steps(protocol.training)}"


def tuning(protocol: Protocol) -> str:
    """Say in a few words all that a protocol's tuning consists of; "" where it has none."""
    return "" if protocol.tuning is None else steps(protocol.tuning)


def steps(schedule: Schedule) -> str:
    """Say in a few words all that a schedule consists of."""
    rates = f"up to {schedule.rate:g} in {schedule.warm_up}"
    return f"{schedule.steps} steps of {schedule.batch}, {rates}, looked at every {schedule.every}"
