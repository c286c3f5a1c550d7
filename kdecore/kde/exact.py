"""Exact evaluation, in tiles: the primitive that answers every query."""

from dataclasses import dataclass

from kdecore.arrays.namespace import Array
from kdecore.kde.moments import dense_moments, lifted_points, lifted_queries, log_first
from kdecore.kde.primitive import Answer, Level
from kdecore.kde.problem import GaussianForm
from kdecore.kde.report import LevelReport


@dataclass(frozen=True)
class Exact:
    """All n points for each query, O(n d) a query; no n × m array is made.

    Attributes
    ----------
    form
        The problem.
    points, queries
        (n, d + 1) and (m, d + 1), lifted.
    """

    form: GaussianForm
    points: Array
    queries: Array
    name: str = "exact"
    setup_evaluations: float = 0.0

    def level(self, index: int, pending: int, last: LevelReport | None) -> Level | None:
        """Return the only level."""
        return Level(0, 0.0, self.form.n) if index == 0 else None

    def preprocess(self, level: Level) -> None:
        """Do nothing."""

    def query(self, structure: None, rows: Array, carry: None) -> Answer:
        """Answer all ``rows`` (s,)."""
        xp = self.form.xp
        queries = xp.take(self.queries, rows, axis=0)
        log_sum = log_first(xp, dense_moments(xp, queries, self.points))
        count = int(rows.shape[0])
        answered = xp.ones((count,), dtype=xp.bool, device=self.form.device)
        return Answer(log_sum, answered, float(count) * self.form.n, None, 1)


def make_exact(form: GaussianForm) -> Exact:
    """Return the exact primitive for one problem."""
    return Exact(form, lifted_points(form), lifted_queries(form))
