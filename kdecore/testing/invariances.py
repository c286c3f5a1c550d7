"""What must not change a result, or must change it in a known way, whatever the method."""

import math
from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from kdecore.arrays.scalars import one_of
from kdecore.testing.evaluation import Evaluate, Method, evaluator, name_of, place, rounded, rounding, unrestricted
from kdecore.testing.examples import Measured, PropertyFailed, figures_of
from kdecore.testing.oracle import default_scale
from kdecore.testing.strategies import AttentionProblem, dtype, mild_problems
from kdecore.testing.strategies import problems as any_problems
from kdecore.testing.strategies import seed as any_seed

Invariance: TypeAlias = Callable[[Evaluate, AttentionProblem, int, str], float]
"""(evaluate, problem, seed, dtype) → how far off, in units of what is allowed."""


def check_invariances(
    method: Method,
    *,
    budget: int | None = None,
    without: Collection[str] = (),
    library: str = "numpy",
    device: int | None = None,
    problems: SearchStrategy[AttentionProblem] | None = None,
    examples: int = 50,
    seconds: float = math.inf,
) -> Measured:
    """Check what holds for every method, whatever it chooses: see Notes.

    Parameters
    ----------
    method
        A name, an options object, or a function ``(q, k, v, *, seed, scale) -> out``, which is given arrays (…, n_q, d),
        (…, n_k, d), (…, n_k, d_v) of the library with one or two leading dimensions, and numbers.
    budget
        Keys per query of a name, or of options that leave it open; half of the keys if None.
    without
        Names of those that the method doesn't promise: ``"ones"`` where denominators are estimated by themselves,
        ``"shift"`` where rounding decides what is chosen, such as the order of equal keys.
    library, device
        Library of the arrays, and number of the CUDA device they lie on; None for the library's usual one.
    problems
        Strategy of problems (…, n, d) without options but ``scale``; if None `strategies.problems`, ``restricted=False``: up
        to 150 rows, structured, with magnitudes up to 1e4.
    examples
        Problems, at most.
    seconds
        After these no other problem begins.

    Returns
    -------
    Measured
        ``worst`` is the largest deviation in units of what is allowed, and the bound is 1.

    Raises
    ------
    PropertyFailed
        An `AssertionError`: which property doesn't hold, by how much.
    OptionError
        An argument is out of its range, or the library can't be used.

    Notes
    -----
    The same bits: ``"repeat"``, of one seed twice; ``"values"``, of values four times as large (then out is, too);
    ``"reshape"``, with leading dimensions as one. Up to rounding: ``"ones"``, 1 of values that are all 1; and, in float64 on
    `strategies.mild_problems`, ``"scale"``, queries four times as large with a fourth of the scale, and ``"shift"``, a
    vector added to all keys. There are no false alarms: in every run of a program the examples are the same.
    O(examples) calls.
    """
    evaluate = evaluator(method, budget, place(library, device))
    for name in without:
        one_of(tuple(INVARIANCES), "without", name)
    held = [one for name, one in INVARIANCES.items() if name not in without]

    def measure(problem: AttentionProblem, mild: AttentionProblem, seed: int, dtype: str) -> float:
        worst = 0.0
        for words, deviation in held:
            one, kind = (mild, "float64") if deviation in (shifted, rescaled) else (problem, dtype)
            one = rounded(unrestricted(one), kind)
            found = deviation(evaluate, one, seed, kind)
            if not found <= 1.0:
                raise PropertyFailed(
                    f"{name_of(method)} breaks an invariance: {words}, seed {seed}, {kind}; it is off by {found:.3g} times "
                    "what rounding allows",
                    one,
                    found,
                    1.0,
                )
            worst = max(worst, found)
        return worst

    drawn = st.tuples(any_problems(restricted=False) if problems is None else problems, mild_problems(), any_seed, dtype)
    count, worst = figures_of(drawn, measure, examples, seconds)
    return Measured("invariances", name_of(method), count, worst, 1.0)


def unequal(found: Any, expected: Any) -> float:
    """Return 0 where the bits are the same, and else infinity."""
    return 0.0 if np.array_equal(found, expected, equal_nan=True) else math.inf


def repeated(evaluate: Evaluate, problem: AttentionProblem, seed: int, dtype: str) -> float:
    """Compare two calls."""
    first, second = (evaluate(problem, seed, dtype)[0] for _ in range(2))
    return unequal(first, second)


def values_scaled(evaluate: Evaluate, problem: AttentionProblem, seed: int, dtype: str) -> float:
    """Compare results of values and of four times these."""
    out, scaled = (evaluate(problem._replace(v=problem.v * factor), seed, dtype)[0] for factor in (1.0, 4.0))
    return unequal(scaled, 4.0 * out)


def reshaped(evaluate: Evaluate, problem: AttentionProblem, seed: int, dtype: str) -> float:
    """Compare results with leading dimensions as they are, and as one."""
    flat = problem._replace(**{name: x.reshape(-1, *x.shape[-2:]) for name, x in zip("qkv", problem, strict=False)})
    out, one = evaluate(problem, seed, dtype)[0], evaluate(flat, seed, dtype)[0]
    return unequal(out.reshape(one.shape), one)


def rescaled(evaluate: Evaluate, problem: AttentionProblem, seed: int, dtype: str) -> float:
    """Compare a factor on the scale with one on queries."""
    scale = problem.options.get("scale", default_scale(problem.q.shape[-1]))
    other = problem._replace(q=4.0 * problem.q, options=problem.options | {"scale": scale / 4.0})
    out, same = (evaluate(one, seed, dtype)[0] for one in (problem, other))
    return float(np.abs(out - same).max(initial=0.0)) / rounding(problem, dtype)


def ones(evaluate: Evaluate, problem: AttentionProblem, seed: int, dtype: str) -> float:
    """Compare the result of values that are all 1 with 1."""
    one = problem._replace(v=np.ones_like(problem.v))
    return float(np.abs(evaluate(one, seed, dtype)[0] - 1.0).max(initial=0.0)) / rounding(one, dtype)


def shifted(evaluate: Evaluate, problem: AttentionProblem, seed: int, dtype: str) -> float:
    """Compare results of keys, and of keys to all of which one vector is added."""
    vector = 2.0 * np.cos(np.arange(problem.k.shape[-1]))
    moved = problem._replace(k=problem.k + vector)
    out, same = (evaluate(one, seed, dtype)[0] for one in (problem, moved))
    return float(np.abs(out - same).max(initial=0.0)) / rounding(moved, dtype)


INVARIANCES: dict[str, tuple[str, Invariance]] = {
    "repeat": ("a seed gives the same bits again", repeated),
    "values": ("values scale out", values_scaled),
    "reshape": ("leading dimensions only reshape", reshaped),
    "scale": ("a factor on queries is one on the scale", rescaled),
    "ones": ("weights add up to one", ones),
    "shift": ("a vector added to all keys changes nothing", shifted),
}
"""Name → in words, and what measures it."""
