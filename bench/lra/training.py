"""Training that goes on where it was cut off: a step depends on its number and the weights before it alone."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.lra.attention import Attend
from bench.lra.model import LAYERS, Classifier
from bench.lra.samples import Samples, Splits
from bench.lra.tasks import Schedule

State = dict[str, Any]
"""``step``: how many are done; ``model`` and ``optimizer`` after them; ``best``: the weights that did best on the
development set, the first of equals; ``dev``: its accuracy every ``Schedule.every`` steps; ``losses``: means of the steps
between."""

CLIP, EPSILON = 1.0, 1e-6
"""Largest number in a gradient, and AdamW's, whose weight decay is 0: as published."""
EPOCHS, STEPS = 10**6, 10**9
"""More than any run has: seeds of runs are kept apart by them."""


def fit(
    make: Callable[[], Classifier],
    splits: Splits,
    schedule: Schedule,
    attends: tuple[Attend, Attend],
    seed: int,
    path: Path,
    device: str = "cpu",
    show: Callable[[str], None] | None = None,
) -> State:
    """Train a network, or go on with it.

    Parameters
    ----------
    make
        Makes it, with the weights to start from.
    splits, schedule
        Examples, and how to train. Batches are those of the seed, whatever is trained.
    attends
        Attention in training and on the development set.
    seed
        Of batches, dropout and attention.
    path
        File of the state, written every ``schedule.every`` steps and at the end, and read where it is there.
    device
        PyTorch's name of where the network is.
    show
        Called with how far training is, whenever the state is written.

    Returns
    -------
    State
        After the last step.

    Raises
    ------
    FloatingPointError
        A loss isn't finite.
    ValueError
        There are fewer examples than in a batch.
    """
    model = make().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.rate, eps=EPSILON, weight_decay=0.0)
    state: State = {"step": 0, "best": None, "dev": [], "losses": []}
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    recent: list[float] = []
    for step in range(state["step"], schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate * rate(step, schedule)
        batch = splits.train[chosen(len(splits.train), schedule.batch, step, seed)]
        recent.append(take(model, optimizer, batch, attends[0], STEPS * seed + LAYERS * step, device))
        if (step + 1) % schedule.every == 0 or step + 1 == schedule.steps:
            found = accuracy(model, splits.dev, attends[1], schedule.batch, device)
            if found > max(state["dev"], default=-1.0):
                state["best"] = {name: x.detach().clone() for name, x in model.state_dict().items()}
            state["dev"].append(found)
            state["losses"].append(sum(recent) / len(recent))
            recent = []
            state |= {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            write(path, state)
            if show is not None:
                show(f"step {step + 1} of {schedule.steps}: loss {state['losses'][-1]:.3f}, accuracy {found:.1%}")
    return state


def take(
    model: Classifier, optimizer: torch.optim.Optimizer, batch: Samples, attend: Attend, seed: int, device: str
) -> float:
    """Take a step, and return the loss before it; the process's random numbers stay as they were."""
    model.train()
    with seeded(seed, device):
        tokens, lengths, labels = (x.to(device) for x in (batch.tokens, batch.lengths, batch.labels))
        loss = functional.cross_entropy(model(tokens, lengths, attend, seed), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"losses must be finite, got {loss.item()}")
    nn.utils.clip_grad_value_(model.parameters(), CLIP)
    optimizer.step()
    return loss.item()


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """Make PyTorch's own numbers those of a seed; behind it they are what they were before."""
    with torch.random.fork_rng([] if torch.device(device).type == "cpu" else [device]):
        torch.manual_seed(seed)
        yield


def rate(step: int, schedule: Schedule) -> float:
    """Return the rate's part of its highest: a line up in ``warm_up`` steps, and one down to zero."""
    if step < schedule.warm_up:
        return (step + 1) / schedule.warm_up
    return (schedule.steps - step) / (schedule.steps - schedule.warm_up)


def chosen(count: int, batch: int, step: int, seed: int) -> Tensor:
    """Return which examples a step is of, (batch,): of a new order in every epoch, whose remainder is left out."""
    if count < batch:
        raise ValueError(f"examples to train with must be at least {batch}, a batch, got {count}")
    epoch, number = divmod(step, count // batch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(EPOCHS * seed + epoch))
    return order[number * batch : (number + 1) * batch]


@torch.no_grad()
def accuracy(model: Classifier, examples: Samples, attend: Attend, batch: int, device: str, seed: int = 0) -> float:
    """Return the part of the examples that a network classifies rightly; batches have seeds of their own."""
    model.eval()
    right = 0
    for start in range(0, len(examples), batch):
        some = examples[start : start + batch]
        logits = model(some.tokens.to(device), some.lengths.to(device), attend, STEPS * seed + LAYERS * start)
        right += int((logits.argmax(1).cpu() == some.labels).sum())
    return right / len(examples)


def write(path: Path, state: State) -> None:
    """Write a file as a whole, or leave the one that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)
