"""The one interface of all KDE primitives (Algorithm 2's Preprocess and Query)."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from kdecore.arrays.namespace import Array, Namespace
from kdecore.kde.problem import GaussianForm
from kdecore.kde.report import LevelReport


@dataclass(frozen=True)
class Level:
    """One density level of Algorithm 2.

    Attributes
    ----------
    index
        0 for the densest, cheapest one.
    density
        μ̃: the primitive answers queries of this density or more; sparser ones it may answer if it can tell.
    samples
        What the primitive spends to be right at μ̃: points sampled, or tables hashed.
    """

    index: int
    density: float
    samples: int


@dataclass(frozen=True)
class Answer:
    """What a primitive says about s queries at one level.

    Attributes
    ----------
    log_sum
        (s,), natural log of the estimate of Σᵢ exp(heightᵢ − ‖xᵢ − y‖²/2 + ‖y‖²/2).
    answered
        (s,) bool; False is "below μ̃": the estimate is not to be used.
    evaluations
        Kernel evaluations spent, over all s queries.
    carry
        What the next level can reuse, or None; its ``take(xp, rows)`` keeps some of the queries.
    next_index
        Level at which to go on.
    """

    log_sum: Array
    answered: Array
    evaluations: float
    carry: Any
    next_index: int


class Primitive(Protocol):
    """A KDE data structure for falling density levels.

    Attributes
    ----------
    name
        As the user writes it.
    setup_evaluations
        Work done before any level, in kernel evaluations.
    """

    @property
    def name(self) -> str:
        """Name of the primitive."""

    @property
    def setup_evaluations(self) -> float:
        """Work done before any level, in units of one kernel evaluation."""

    def level(self, index: int, pending: int, last: LevelReport | None) -> Level | None:
        """Return the level, or None where it would cost more than exact evaluation of the ``pending`` queries.

        ``last`` says what the level before did.
        """

    def preprocess(self, level: Level) -> Any:
        """Build the structure for one density level."""

    def query(self, structure: Any, rows: Array, carry: Any) -> Answer:
        """Estimate, or say "below μ̃", for the queries with indices ``rows`` (s,) int64."""


@dataclass(frozen=True)
class Split:
    """Points parted into a few that are evaluated for every query, and a body that is sampled or hashed.

    Attributes
    ----------
    head
        (h,) int64 indices.
    body
        (n − h,) int64 indices, n − h ≥ 1.
    """

    head: Array
    body: Array


def split_heads(form: GaussianForm, potential: Array) -> Split:
    """Set the ⌈√n⌉ points of the largest ``potential`` (n,) apart, if that lowers its maximum by at least 1 nat.

    A few long rows or large weights set the density scale of all queries (N in Algorithm 2). Evaluated apart, they cost
    √n a query and the others' density rises (derived). O(n log n).
    """
    xp, n = form.xp, form.n
    order = xp.argsort(potential, descending=True, stable=True)
    count = math.isqrt(n - 1) + 1
    if n < 16 or float(potential[int(order[0])] - potential[int(order[count])]) < 1.0:
        count = 0
    return Split(order[:count], order[count:])


def exp_capped(xp: Namespace, values: Array) -> Array:
    """Return exp, with exponents above 40 cut there: large enough to fail any test, too small to overflow later."""
    return xp.exp(xp.minimum(values, xp.full_like(values, 40.0)))


def normal_quantile(probability: float) -> float:
    """Return the standard normal quantile for a probability in (0.5, 1), by bisection on the error function."""
    low, high = 0.0, 40.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        if 0.5 * (1.0 + math.erf(middle / math.sqrt(2.0))) < probability:
            low = middle
        else:
            high = middle
    return high


def to_host_ints(values: Array) -> list[int]:
    """Return a 1-d integer array as Python ints; waits for the device."""
    return [int(values[i]) for i in range(values.shape[0])] if not hasattr(values, "tolist") else list(values.tolist())
