"""What is run for a protocol, and what each run measures: a row of the experiment's file."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from bench.lra.attention import CONTROL, EXACT, WITHOUT_GRADIENTS, attention
from bench.lra.model import DROPOUT, Classifier
from bench.lra.samples import Splits
from bench.lra.tasks import TASKS, Protocol, label, tuning
from bench.lra.training import State, accuracy, fit, seeded
from kdecore.compare.baselines import WITHOUT_BUDGET

TRAINED, PUT_IN, TUNED, CONTROLLED = "trained", "put in", "tuned", "control, tuned"
"""Stages: trained from random weights; put, untrained, into the network that exact attention was trained in; tuned from that
network; and the mean of values tuned from a network that it was itself trained in."""
DATA_SEED = 0
"""Of generated examples, the same for all runs."""


@dataclass(frozen=True)
class Run:
    """One row.

    Attributes
    ----------
    protocol
        Without ``tuning`` where nothing is tuned.
    stage
        One of the four.
    method, budget
        As `attention` takes them; no budget where it changes nothing.
    seed
        Of weights, batches, dropout and methods; of the method alone where nothing is trained.
    """

    protocol: Protocol
    stage: str
    method: str
    budget: int | None
    seed: int

    @property
    def key(self) -> str:
        """All that the row depends on but code and machine."""
        budget = f", budget {self.budget}" if self.budget is not None else ""
        tuned = f"; {tuning(self.protocol)}" if self.protocol.tuning is not None else ""
        return f"{label(self.protocol)}{tuned}: {self.method}{budget}, {self.stage}, seed {self.seed}"


def runs(protocol: Protocol, names: Sequence[str], budget: int, seeds: int) -> list[Run]:
    """Return what is run: all methods from random weights, or, where the protocol has tuning, what that needs.

    Exact attention and the control are always among the methods.
    """
    names = list(dict.fromkeys((EXACT, CONTROL, *names)))
    budgets = {name: None if name in WITHOUT_BUDGET else budget for name in names}
    trainable = [name for name in names if name not in WITHOUT_GRADIENTS]
    untuned = replace(protocol, tuning=None)
    if protocol.tuning is None:
        return [Run(untuned, TRAINED, name, budgets[name], seed) for seed in range(seeds) for name in trainable]
    found = [Run(untuned, TRAINED, name, None, 0) for name in (EXACT, CONTROL)]
    for name in names:
        drawn = 1 if name in WITHOUT_BUDGET else seeds
        found += [Run(untuned, PUT_IN, name, budgets[name], seed) for seed in range(drawn)]
    for seed in range(seeds):
        found += [Run(protocol, TUNED, name, budgets[name], seed) for name in trainable]
        found.append(Run(protocol, CONTROLLED, CONTROL, None, seed))
    return found


def measure(run: Run, folder: Path, device: str, show: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Return a run's test accuracy, and beside it the majority class's.

    Parameters
    ----------
    run
        What is run.
    folder
        Of data and checkpoints; a checkpoint that is there isn't trained again.
    device
        PyTorch's name of where networks are.
    show
        Called with how far training is.

    Returns
    -------
    dict
        ``accuracy``, of ``examples`` in the test; ``majority``: what always saying the most frequent label in training
        gets; ``dev`` and ``losses`` of `State`, where something was trained.
    """
    splits, state = load(run.protocol, folder), None
    attend = attention(run.method, run.budget or 1)
    if run.stage == PUT_IN:
        weights = fitted(first(run, EXACT), folder, device, show)["best"]
    else:
        state = fitted(run, folder, device, show)
        weights = state["best"]
    model = classifier(run.protocol, weights)().to(device)
    labels = splits.test.labels
    row = {
        "accuracy": accuracy(model, splits.test, attend, run.protocol.training.batch, device, run.seed),
        "examples": len(labels),
        "majority": float((labels == splits.train.labels.bincount().argmax()).double().mean()),
    }
    return row | ({} if state is None else {"dev": state["dev"], "losses": state["losses"]})


def fitted(run: Run, folder: Path, device: str, show: Callable[[str], None] | None) -> State:
    """Return the state after a run's training; exact attention has dropout of its weights only from random ones."""
    protocol, weights = run.protocol, None
    schedule = protocol.training
    if run.stage != TRAINED:
        assert protocol.tuning is not None
        schedule = protocol.tuning
        weights = fitted(first(run, CONTROL if run.stage == CONTROLLED else EXACT), folder, device, show)["best"]
    budget = run.budget or 1
    attends = attention(run.method, budget, DROPOUT if run.stage == TRAINED else 0.0), attention(run.method, budget)
    make = classifier(protocol, weights, run.seed)
    return fit(make, load(protocol, folder), schedule, attends, run.seed, checkpoint(run, folder), device, show)


def first(run: Run, method: str) -> Run:
    """Return the run that trains a method in the network from which others start."""
    return Run(replace(run.protocol, tuning=None), TRAINED, method, None, 0)


def checkpoint(run: Run, folder: Path) -> Path:
    """Return the file of a run's state."""
    return folder / "checkpoints" / f"{run.protocol.task}-{hashlib.sha256(run.key.encode()).hexdigest()[:16]}.pt"


def classifier(protocol: Protocol, weights: State | None, seed: int = 0) -> Callable[[], Classifier]:
    """Return what makes a task's network, with given weights or those of a seed."""
    task = TASKS[protocol.task]

    def make() -> Classifier:
        with seeded(seed, "cpu"):
            model = Classifier(task.vocabulary, protocol.length, task.classes, task.parts)
        if weights is not None:
            model.load_state_dict(weights)
        return model

    return make


def load(protocol: Protocol, folder: Path) -> Splits:
    """Return a protocol's examples; the last ones are held."""
    return _load(protocol.task, protocol.counts, protocol.length, folder)


@lru_cache(maxsize=1)
def _load(task: str, counts: tuple[int, int, int], length: int, folder: Path) -> Splits:
    return TASKS[task].load(counts, length, DATA_SEED, folder / task)
