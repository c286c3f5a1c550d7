"""The loop of Algorithm 2: falling density levels, unanswered queries going on to the next."""

from dataclasses import dataclass

from kdecore.arrays.namespace import Array, Namespace
from kdecore.kde.primitive import Primitive
from kdecore.kde.report import LevelReport


@dataclass(frozen=True)
class Outcome:
    """What the levels of a primitive made of some queries.

    Attributes
    ----------
    rows, log_sum
        Indices (int64) of the queries answered, and natural logs, in pieces.
    pending
        (r,) int64: queries that no level answered.
    levels
        What each level did.
    """

    rows: tuple[Array, ...]
    log_sum: tuple[Array, ...]
    pending: Array
    levels: tuple[LevelReport, ...]

    @property
    def evaluations(self) -> float:
        """Kernel evaluations over all levels and queries."""
        return sum(level.evaluations for level in self.levels)


def run_levels(xp: Namespace, primitive: Primitive, rows: Array) -> Outcome:
    """Query falling density levels for ``rows`` (s,) int64 until all are answered or exact evaluation is cheaper.

    The primitive says at which density a new level would cost more than exact evaluation of what is left.
    """
    done_rows: list[Array] = []
    done_sums: list[Array] = []
    levels: list[LevelReport] = []
    carry, index = None, 0
    while int(rows.shape[0]):
        level = primitive.level(index, int(rows.shape[0]), levels[-1] if levels else None)
        if level is None:
            break
        answer = primitive.query(primitive.preprocess(level), rows, carry)
        yes, no = xp.nonzero(answer.answered)[0], xp.nonzero(~answer.answered)[0]
        levels.append(
            LevelReport(
                primitive.name,
                level.index,
                level.density,
                level.samples,
                int(rows.shape[0]),
                int(yes.shape[0]),
                answer.evaluations,
            )
        )
        done_rows.append(xp.take(rows, yes))
        done_sums.append(xp.take(answer.log_sum, yes))
        rows = xp.take(rows, no)
        carry = None if answer.carry is None else answer.carry.take(xp, no)
        index = answer.next_index
    return Outcome(tuple(done_rows), tuple(done_sums), rows, tuple(levels))
