"""PyTorch: what became of the calls of models, layer by layer, as counts and as a table."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from kdecore.api.report import Report
from kdecore_adapters.torch_operator import counted_by

TAKEN = "kdecore"
"""What is counted where looking which method kdecore ran would wait for a device, and where it raised."""
PYTORCH = "PyTorch"
Result = TypeVar("Result")
NO_CALLS = "no attention was met"
COMPILED = "compiled: not counted"


class Count(NamedTuple):
    """Calls of one layer that had the same fate.

    Attributes
    ----------
    layer
        Its name; "" where none is known.
    outcome
        The method that kdecore ran (``"exact"`` estimates nothing), `TAKEN`, why the call was left to PyTorch, or that a
        module of diffusers' attention ran and none was met, with what it asked instead.
    """

    layer: str
    outcome: str


@dataclass(frozen=True)
class Tally:
    """What calls of one `Count` did together.

    Attributes
    ----------
    calls
        How many there were.
    left
        Whether they were left to PyTorch.
    seconds
        What they took; None where that would wait for a device.
    keys
        Keys evaluated per query, the sum over the calls; None where not known.
    error
        The largest upper limit of the relative Frobenius error that was certified; None where none was asked for.
    """

    calls: int = 0
    left: bool = False
    seconds: float | None = None
    keys: float | None = None
    error: float | None = None

    def row(self, count: Count) -> tuple[str, ...]:
        """Return the cells of a table."""
        keys = "" if self.keys is None else f"{self.keys / self.calls:.0f}"
        error = "" if self.error is None else f"{self.error:.2g}"
        milliseconds = "" if self.seconds is None else f"{1e3 * self.seconds / self.calls:.1f}"
        ran = f"{PYTORCH}: {count.outcome}" if self.left else count.outcome
        return count.layer or "–", str(self.calls), keys, error, milliseconds, ran


class Calls:
    """Calls of attention that were met, by layer and by what became of them. ``print`` it for a table.

    Attributes
    ----------
    tallies
        `Count` → `Tally`, of the calls that were met.
    unmet
        `Count` → number of calls of modules in which none was met.
    compiled
        Whether there was compiled code, whose calls within a model are not counted.
    """

    def __init__(self) -> None:
        self.tallies: dict[Count, Tally] = {}
        self.unmet: Counter[Count] = Counter()
        self.compiled = False
        self._lock = Lock()

        # torch.compile runs this once, while it makes a graph, and takes no method for it.
        def note() -> bool:
            self.compiled = True
            return True

        self._note_compiled = torch.compiler.assume_constant_result(note)

    @property
    def counts(self) -> Counter[Count]:
        """`Count` → number of calls."""
        with self._lock:
            return Counter({**{count: tally.calls for count, tally in self.tallies.items()}, **self.unmet})

    def watch(self, layer: str, reason: str, query: Tensor, call: Callable[[], Result]) -> Result:
        """Return what a call returns, and add it; ``reason`` says why it is left to PyTorch, "" where it isn't."""
        if torch.compiler.is_compiling():
            self._note_compiled()
            return call()
        on_host, started = query.device.type == "cpu", time.perf_counter()
        reports: list[Report] = []
        try:
            # Of what lies on a device no report is made, which would wait for it.
            with counted_by(reports.append if on_host else None):
                return call()
        finally:
            seconds = time.perf_counter() - started if on_host else None
            self.add(Count(layer, reason or (reports[0].method if reports else TAKEN)), bool(reason), seconds, reports)

    def add(self, count: Count, left: bool, seconds: float | None, reports: list[Report]) -> None:
        """Add one call; of its reports there may be none."""
        errors = [one.certificate.upper("frobenius") for one in reports if one.certificate is not None]
        with self._lock:
            old = self.tallies.get(count, Tally(left=left, seconds=None if seconds is None else 0.0))
            self.tallies[count] = Tally(
                calls=old.calls + 1,
                left=left,
                seconds=None if seconds is None or old.seconds is None else old.seconds + seconds,
                keys=(old.keys or 0.0) + reports[0].keys_per_query if reports else old.keys,
                error=max([*errors, *([] if old.error is None else [old.error])], default=None),
            )

    def miss(self, count: Count) -> None:
        """Add one call of a module in which none was met."""
        with self._lock:
            self.unmet[count] += 1

    def __str__(self) -> str:
        head = ("layer", "calls", "keys per query", "error at most", "ms a call", "what ran")
        with self._lock:
            tallies = self.tallies | {count: Tally(calls) for count, calls in self.unmet.items()}
            rows = [head, *(tally.row(count) for count, tally in tallies.items())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(
                [
                    row[0].ljust(widths[0]),
                    *(cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)),
                    row[-1],
                ]
            )
            for row in rows
        ]
        return "\n".join([*(lines if tallies else [NO_CALLS]), *([COMPILED] if self.compiled else [])])

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {"tallies": dict(self.tallies), "unmet": Counter(self.unmet), "compiled": self.compiled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        vars(self).update(state)
