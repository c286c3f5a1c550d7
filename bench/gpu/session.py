"""What all sections of `bench.gpu` share: where they run, until when, random numbers, and how calls are timed."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Row: TypeAlias = dict[str, Any]
"""What was found, as JSON can hold it."""
Findings: TypeAlias = Iterator[tuple[str, Row]]
"""Kinds and rows, in the order in which they are found: ``"check"``, ``"timing"``, ``"left_out"``, …"""

LONG = 0.5
"""Seconds of a call that is timed once only."""
OUT_OF_TIME = "no time left"


@dataclass(frozen=True)
class Session:
    """Where a section runs, and until when.

    Attributes
    ----------
    device
        ``"cuda"``, or ``"cpu"`` for a rehearsal: tiny sizes, and the clock on the wall in place of device events.
    until
        When it has to end, in `time.monotonic`'s seconds.
    seed
        Of all random inputs.
    vit
        File with a vision transformer's q, k and v; None for none.
    peers
        Folder with other packages; None for none.
    """

    device: str
    until: float
    seed: int
    vit: Path | None = None
    peers: Path | None = None

    @property
    def rehearsal(self) -> bool:
        """Whether there is no device."""
        return self.device == "cpu"

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.until - time.monotonic()

    def has(self, seconds: float) -> bool:
        """Return whether so many seconds are left."""
        return self.left() > seconds

    def numbers(self, *stream: int) -> np.random.Generator:
        """Return a generator on the host, a different one for each stream."""
        return np.random.default_rng((self.seed, *stream))

    def generator(self, *stream: int) -> torch.Generator:
        """Return a generator on the device, a different one for each stream."""
        return torch.Generator(self.device).manual_seed(int(self.numbers(*stream).integers(2**62)))


def left_out(what: str, why: str) -> tuple[str, Row]:
    """Say that something was not measured."""
    return "left_out", {"what": what, "why": why}


def out_of_time(what: str) -> tuple[str, Row]:
    """Say that there was no time for something."""
    return left_out(what, OUT_OF_TIME)


def failure(what: str, error: BaseException) -> tuple[str, Row]:
    """Say that something raised."""
    return "failure", {"what": what, "error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def attempted(what: str, rows: Callable[[], Findings]) -> Findings:
    """Yield what is found; where it raises, that it did, or that memory didn't suffice."""
    try:
        yield from rows()
    except torch.OutOfMemoryError:
        yield left_out(what, "the device's memory does not suffice")
    except Exception as error:  # a device's errors are of many kinds, and all are to be reported
        yield failure(what, error)


def synchronize(device: str) -> None:
    """Wait until the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def free_memory(device: str) -> None:
    """Give memory that nothing holds back to the device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def timed(device: str, calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Return the seconds of ``repeats`` calls, which take turns, so that no cache serves the next one's inputs."""
    if device != "cuda":
        seconds = []
        for i in range(repeats):
            started = time.perf_counter()
            calls[i % len(calls)]()
            seconds.append(time.perf_counter() - started)
        return seconds
    event: Any = torch.cuda.Event
    events = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for i, (start, end) in enumerate(events):
        start.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in events]


def median_seconds(device: str, calls: Sequence[Callable[[], Any]], repeats: int = 7) -> float:
    """Return a call's median time, after calls to warm up; that of one call where it is `LONG`."""
    calls[0]()
    (once,) = timed(device, calls[-1:], 1)
    return once if once > LONG else statistics.median(timed(device, calls, repeats))


def issue_seconds(device: str, calls: Sequence[Callable[[], Any]], repeats: int = 5) -> float:
    """Return how long the host takes to issue a call, the device being idle: the median. Nothing waits for its end."""
    seconds = []
    for i in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        calls[i % len(calls)]()
        seconds.append(time.perf_counter() - started)
    synchronize(device)
    return statistics.median(seconds)


def exact_rows(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return exact attention in float64 by PyTorch alone, a few queries at a time: (H, n_q, d_v)."""
    step = max(1, 2**27 // (len(k) * k.shape[1]))
    k, v = k.double(), v.double()
    parts = (q[:, first : first + step].double() for first in range(0, q.shape[1], step))
    return torch.cat([torch.softmax(scale * part @ k.mT, -1) @ v for part in parts], 1)
