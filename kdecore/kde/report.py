"""`KdeReport`: what a kernel sum cost, level by level."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from kdecore.arrays.text import as_html, as_lines, as_text


@dataclass(frozen=True)
class LevelReport:
    """One density level, over all groups.

    Attributes
    ----------
    primitive
        Its name.
    index, density, samples
        As in `kdecore.kde.primitive.Level`; the exact remainder is ``"exact"`` at density 0.
    asked
        Queries that reached the level.
    answered
        Of these, queries it answered.
    evaluations
        Kernel evaluations spent at the level, over all queries asked.
    """

    primitive: str
    index: int
    density: float
    samples: int
    asked: int
    answered: int
    evaluations: float


@dataclass(frozen=True)
class KdeReport:
    """What one call of `kdecore.kde` did.

    Attributes
    ----------
    primitive
        Name of the primitive that ran, or several where groups differ.
    reason
        Why that one.
    eps, delta
        As asked for.
    n, m, d, groups
        Sizes.
    levels
        Each density level, densest first, then the exact remainder.
    evaluations_per_query
        Kernel evaluations, mean over queries, all levels and pilots included.
    setup_per_query
        Work before any query (permutations, clusters; not the tables of a level), in kernel evaluations per query.
    exact_queries
        Queries that no level answered, evaluated exactly.
    guarantee
        What the error statement rests on.
    seconds
        Wall time of the call.
    """

    primitive: str
    reason: str
    eps: float
    delta: float
    n: int
    m: int
    d: int
    groups: int
    levels: tuple[LevelReport, ...]
    evaluations_per_query: float
    setup_per_query: float
    exact_queries: int
    guarantee: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain Python values, ready for JSON."""
        return asdict(self)

    def _summary(self) -> list[tuple[str, str]]:
        exactly = f"{self.exact_queries} of {self.groups * self.m} queries done exactly"
        return [
            ("primitive", f"{self.primitive} ({self.reason})"),
            (
                "evaluations",
                f"{self.evaluations_per_query:.1f} of {self.n} per query, set-up {self.setup_per_query:.1f} more",
            ),
            ("error", f"{self.eps:g} asked for, for {100 * (1 - self.delta):g} % of the queries; {exactly}"),
            ("rests on", self.guarantee),
            ("problem", f"{self.groups} × {self.m} queries, {self.n} points, d = {self.d}"),
            ("time", f"{self.seconds * 1e3:.2f} ms"),
        ]

    def _levels(self) -> str:
        lines = ["level  primitive   density    samples    asked  answered  evaluations per query asked"]
        lines.extend(
            f"{level.index:>5}  {level.primitive:<10}  {level.density:<9.3g}  {level.samples:>7}  {level.asked:>7}  "
            f"{level.answered:>8}  {level.evaluations / max(1, level.asked):.1f}"
            for level in self.levels
        )
        return "\n".join(lines)

    def details(self) -> str:
        """Return all of it as text: what `str` says, and a line for each level."""
        return f"{as_text(self._summary())}\n{self._levels()}"

    def __str__(self) -> str:
        return as_lines(self._summary())

    def _repr_html_(self) -> str:
        return as_html(self._summary(), self._levels())


GUARANTEES = {
    "exact": "exact but for rounding",
    "uniform": "empirical Bernstein bound, each level for itself, with a derived finite-population factor",
    "neighbours": "measured (Bernstein bound with the range that the neighbour search found)",
    "hbe": "measured (estimate at or above the level's density, and spread between tables)",
}
"""Primitive → what its error statement rests on."""


def merge_levels(levels: Iterable[LevelReport]) -> tuple[LevelReport, ...]:
    """Add up levels of the same primitive, index and samples."""
    found: dict[tuple[str, int, int], LevelReport] = {}
    for level in levels:
        key = (level.primitive, level.index, level.samples)
        old = found.get(key)
        if old is not None:
            level = LevelReport(
                level.primitive,
                level.index,
                level.density,
                level.samples,
                old.asked + level.asked,
                old.answered + level.answered,
                old.evaluations + level.evaluations,
            )
        found[key] = level
    return tuple(sorted(found.values(), key=lambda level: (level.primitive == "exact", level.primitive, level.index)))
