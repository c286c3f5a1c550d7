"""The bound that KDEformer is about: ‖out − exact‖₂ ≤ ε ‖A‖₂ ‖V‖₂, A the matrix of attention weights."""

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from kdecore.arrays.errors import OptionError
from kdecore.arrays.scalars import integer_at_least
from kdecore.methods.kdeformer import KDEformer
from kdecore.testing.evaluation import Method, evaluator, keys_per_query, name_of, place, rounded, unrestricted
from kdecore.testing.examples import Measured, PropertyFailed, figures_of
from kdecore.testing.oracle import default_scale, exact_attention
from kdecore.testing.strategies import AttentionProblem, dtype, mild_problems


def check_spectral_bound(
    method: Method,
    *,
    eps: float | None = None,
    delta: float = 0.1,
    budget: int | None = None,
    library: str = "numpy",
    device: int | None = None,
    problems: SearchStrategy[AttentionProblem] | None = None,
    examples: int = 10,
    seeds: int = 30,
    false_alarm: float = 1e-6,
    seconds: float = math.inf,
) -> Measured:
    """Check that ‖out − exact‖₂ ≤ ε ‖A‖₂ ‖V‖₂ in all but a share ``delta`` of calls; A = softmax(scale · qkᵀ).

    Parameters
    ----------
    method
        A name, an options object, or a function ``(q, k, v, *, seed, scale) -> out``, which is given arrays (2, n_q, d),
        (2, n_k, d), (2, n_k, d_v) of the library, and numbers.
    eps
        The promise, positive. If None the options' own ``eps``, or else what m keys allow by KDEformer's theorem, with the
        constant C that was measured for it: ε = √(C ln(n) (sr(A) + sr(V)) / m), sr(M) = ‖M‖²_F / ‖M‖², n = max(n_q, n_k).
    delta
        Share of calls that may miss it, in (0, 1).
    budget
        m, keys per query; half of the keys if None. Functions have to be given it, or ``eps``.
    library, device
        Library of the arrays, and number of the CUDA device they lie on; None for the library's usual one.
    problems
        Strategy of problems (G, n, d) without options but ``scale``; `strategies.mild_problems` if None, i.i.d. or in
        clusters, on which no single key decides. On others uniform samples keep no such bound.
    examples
        Problems, at most.
    seeds
        Calls for each problem.
    false_alarm
        Rate at which a method that keeps its promise fails, over fresh seeds; in (0, 1).
    seconds
        After these no other problem begins.

    Returns
    -------
    Measured
        ``worst`` is the largest over problems of the h-th largest of ‖out − exact‖₂ / (ε ‖A‖₂ ‖V‖₂) over seeds, the larger
        of the groups, and the bound is 1.

    Raises
    ------
    PropertyFailed
        An `AssertionError`: h of the seeds exceed the bound.
    OptionError
        An argument is out of its range, the library can't be used, or nobody says ε.

    Notes
    -----
    Norms are spectral. h is the least number that a binomial variable of ``seeds`` trials with probability ``delta`` reaches
    at a rate of at most ``false_alarm / examples``. Seeds are 0, 1, 2, …: a pass stays a pass. O(examples · seeds) calls.
    """
    for name, share in (("delta", delta), ("false_alarm", false_alarm)):
        if not 0.0 < share < 1.0:
            raise OptionError(f"{name} must lie strictly between 0 and 1, got {share!r}")
    if eps is not None and not eps > 0.0:
        raise OptionError(f"eps must be positive, got {eps!r}")
    evaluate = evaluator(method, budget, place(library, device))
    promised = getattr(method, "eps", None) if eps is None else eps
    if promised is None and keys_per_query(method, budget, 1) is None:
        raise OptionError(f"eps or budget must be given for {name_of(method)}, which doesn't say how many keys it evaluates")
    most = reached_seldom(integer_at_least(1, "seeds", seeds), delta, false_alarm / examples)

    if most > seeds:
        raise OptionError(f"seeds must be more for delta = {delta:g} and false_alarm = {false_alarm:g}, got {seeds}")

    def measure(problem: AttentionProblem, dtype: str) -> float:
        problem = rounded(unrestricted(problem), dtype)
        truth, lse = exact_attention(*problem[:3], problem.options.get("scale"))
        keys = keys_per_query(method, budget, problem.k.shape[-2])
        limits = np.array([limit(problem, lse, group, promised, keys) for group in range(len(truth))])
        errors = [np.linalg.norm(evaluate(problem, seed, dtype)[0] - truth, 2, axis=(-2, -1)) for seed in range(seeds)]
        ratios = np.max(np.array(errors) / limits, axis=1)
        worst = float(np.sort(ratios)[-most])
        if not worst <= 1.0:
            raise PropertyFailed(
                f"{name_of(method)} breaks the spectral bound: ‖out − exact‖₂ exceeds ε ‖A‖₂ ‖V‖₂ with "
                f"{np.sum(~(ratios <= 1))} of {seeds} seeds, where {most - 1} may "
                f"(δ = {delta:g}, false alarms: {false_alarm:g}), by a factor of {worst:.3g} and more with {most}",
                problem,
                worst,
                1.0,
            )
        return worst

    count, worst = figures_of(
        st.tuples(mild_problems() if problems is None else problems, dtype), measure, examples, seconds
    )
    return Measured("spectral bound", name_of(method), count, worst, 1.0)


def limit(problem: AttentionProblem, lse: Any, group: int, eps: float | None, keys: int | None) -> float:
    """Return ε ‖A‖₂ ‖V‖₂ of a group; ε follows from the keys where it isn't given."""
    scale = problem.options.get("scale", default_scale(problem.q.shape[-1]))
    a = np.exp(scale * problem.q[group] @ problem.k[group].T - lse[group][:, None])
    norms = [float(np.linalg.norm(x, 2)) for x in (a, problem.v[group])]
    if eps is None:
        assert keys is not None
        stable = sum(float(np.sum(x * x)) / norm**2 for x, norm in zip((a, problem.v[group]), norms, strict=True))
        eps = math.sqrt(KDEformer.CONSTANT * math.log(max(2, *a.shape)) * stable / keys)
    return eps * norms[0] * norms[1]


def reached_seldom(trials: int, probability: float, rate: float) -> int:
    """Return the least number that a binomial variable reaches at a rate of at most ``rate``: beyond its trials if none."""
    tail = 0.0
    for h in range(trials, 0, -1):
        tail += math.comb(trials, h) * probability**h * (1 - probability) ** (trials - h)
        if tail > rate:
            return h + 1
    return 1
