"""`primitive="auto"`: a few queries are evaluated exactly, and the cost of others is worked out from their terms.

First as if its search and its bounds were perfect. What could win even so is set up, and its cost worked out again with its
own bounds and its own near points. Hashing is the theory's primitive, and wins nowhere (docs/kde.md): ask for it by name.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from kdecore.arrays.namespace import Array
from kdecore.kde.levels import Outcome
from kdecore.kde.moments import lifted_points, lifted_queries, log_first, logit_moments
from kdecore.kde.neighbours import PROBES, Neighbours
from kdecore.kde.primitive import Primitive
from kdecore.kde.problem import Accuracy, GaussianForm
from kdecore.kde.report import LevelReport
from kdecore.kde.uniform import Uniform, draws_at, draws_needed

EXACT_COST = (2.6, 0.03)
"""Nanoseconds of one exact kernel evaluation, and more for each dimension (bench/kde_time.py, NumPy float32)."""
EVALUATION_COST = {"uniform": 1.3, "neighbours": 3.0}
"""Nanoseconds that one kernel evaluation takes beyond an exact one."""
SETUP_COST = {"uniform": (800.0, 6.0), "neighbours": (1000.0, 8.0)}
"""Nanoseconds to set up, for each point, and more for each dimension."""
CALL_COST = {"uniform": 2e6, "neighbours": 2e6}
"""Nanoseconds whatever the size."""
LEAST_WORK = 2**23
"""Kernel evaluations below which nothing but exact is looked at."""
PILOT = (8, 32, 256)
"""Queries evaluated exactly, whose answers are kept: one in 256, but 8 to 32."""
TRY_SHARE = 0.1
"""Setting up may cost this share of the least cost found so far, or more where the gain promised over that is `GAIN`."""
GAIN = 0.4


@dataclass(frozen=True)
class Choice:
    """What will run, and what has been answered already.

    Attributes
    ----------
    primitive
        The primitive, or None for exact.
    pilot
        The queries evaluated exactly, or None.
    rows
        (r,) int64: queries still to be asked.
    reason
        Why.
    """

    primitive: Primitive | None
    pilot: Outcome | None
    rows: Array
    reason: str


def choose(form: GaussianForm, accuracy: Accuracy, order: Array, make: Callable[[str], Primitive]) -> Choice:
    """Choose the primitive of least foreseen cost.

    Cost is counted on the pilot's measured terms and not timed, so that one seed always makes one choice. O(n d + n log n)
    a pilot query.

    Parameters
    ----------
    form, accuracy
        The problem, and what is asked for.
    order
        (m,) int64: the queries in random order; the first few are the pilot.
    make
        Name → primitive.
    """
    n, m = form.n, form.m
    lists = math.isqrt(max(0, n - 1)) + 1
    near = PROBES * n // lists
    first = draws_at(accuracy, 0)
    exact = EXACT_COST[0] + EXACT_COST[1] * form.d
    unit = {name: 1.0 + more / exact for name, more in EVALUATION_COST.items()}
    setup = {
        name: ((base + slope * form.d) * n + CALL_COST[name]) / (exact * m) for name, (base, slope) in SETUP_COST.items()
    }
    setup["neighbours"] += lists * n / m
    least = {
        "uniform": setup["uniform"] + unit["uniform"] * first,
        "neighbours": setup["neighbours"] + unit["neighbours"] * (first + near + lists),
    }
    if n * m < LEAST_WORK or m < 32 * PILOT[0] or min(least.values()) >= n:
        return Choice(None, None, order, "auto: too few points or queries for anything but exact to pay")
    xp = form.xp
    size = max(PILOT[0], min(PILOT[1], m // PILOT[2]))
    pilot = order[:size]
    logits = xp.take(lifted_queries(form), pilot, axis=0) @ xp.matrix_transpose(lifted_points(form))
    outcome = _answers(form, pilot, logits)
    ordered = xp.sort(xp.exp(logits - xp.max(logits, axis=1, keepdims=True)), axis=1, descending=True, stable=False)
    hopes = {
        "uniform": setup["uniform"] + unit["uniform"] * _hope(form, accuracy, ordered, 0),
        "neighbours": setup["neighbours"] + unit["neighbours"] * (near + lists + _hope(form, accuracy, ordered, near)),
    }
    best: Primitive | None = None
    best_cost, notes = float(n), []
    for name in sorted(hopes, key=lambda name: hopes[name]):
        hope = hopes[name]
        notes.append(f"{name} at best {hope / n:.2g}")
        affordable = setup[name] <= TRY_SHARE * best_cost or hope <= (1.0 - GAIN) * best_cost
        if hope >= best_cost or not affordable:
            continue
        primitive = make(name)
        assert isinstance(primitive, Uniform | Neighbours)
        cost = unit[name] * float(xp.mean(primitive.foresee(pilot, logits)))
        notes[-1] += f", set up and found {cost / n:.2g}"
        if cost < best_cost:
            best, best_cost = primitive, cost
    reason = f"auto: cost in exact's, from {size} queries: {'; '.join(notes)}"
    return Choice(best, outcome, order[size:], reason)


def _answers(form: GaussianForm, rows: Array, logits: Array) -> Outcome:
    """Return the pilot's exact answers."""
    xp, n, count = form.xp, form.n, int(rows.shape[0])
    log_sum = log_first(xp, logit_moments(xp, xp.asarray(logits, copy=True), squares=False))
    level = LevelReport("exact", 0, 0.0, n, count, count, float(count) * n)
    return Outcome((rows,), (log_sum,), rows[:0], (level,))


def _hope(form: GaussianForm, accuracy: Accuracy, ordered: Array, known: int) -> float:
    """Return the mean number of draws, were the ``known`` heaviest points evaluated and the largest of the others known.

    ``ordered`` (s, n) holds each query's terms over the largest, descending.
    """
    xp = form.xp
    rest = ordered[:, min(known, form.n - 1) :]
    return float(xp.mean(draws_needed(xp, rest, xp.sum(ordered, axis=1), float(rest.shape[1]), rest[:, 0], accuracy)))
