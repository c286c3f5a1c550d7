"""WExpKDE (KDEformer, Algorithm 2) on canonical arrays: the map, falling density levels, the rest exactly."""

import math
import time
from collections.abc import Callable
from functools import partial

from kdecore.arrays.namespace import Array, Namespace, namespace_of
from kdecore.arrays.random import uniform
from kdecore.arrays.scalars import one_of
from kdecore.kde.auto import choose
from kdecore.kde.exact import make_exact
from kdecore.kde.gaussian_map import exponential_form
from kdecore.kde.hashing_based import make_hashing_based
from kdecore.kde.levels import Outcome, run_levels
from kdecore.kde.neighbours import make_neighbours
from kdecore.kde.primitive import Primitive
from kdecore.kde.problem import Accuracy, GaussianForm
from kdecore.kde.report import GUARANTEES, KdeReport, LevelReport, merge_levels
from kdecore.kde.uniform import make_uniform

PRIMITIVES = ("auto", "exact", "uniform", "hbe", "neighbours")
"""Names that ``primitive`` may have."""

UNIFORM_STREAM, NEIGHBOURS_STREAM, PILOT_STREAM, HASHING_STREAM = 16, 18, 20, 2**16
_GROUP_STEP = 0x9E3779B97F4A7C15
"""Between the seeds of two groups: 2⁶⁴ over the golden ratio."""


def check_primitive(name: object) -> str:
    """Return ``name`` if it names a primitive, or raise `OptionError`."""
    return one_of(PRIMITIVES, "primitive", name)


def make_primitive(name: str, form: GaussianForm, accuracy: Accuracy, seed: int) -> Primitive:
    """Return the primitive called ``name`` for one problem, all its randomness fixed by ``seed``."""
    if name == "uniform":
        return make_uniform(form, accuracy, seed, UNIFORM_STREAM)
    if name == "neighbours":
        return make_neighbours(form, accuracy, seed, NEIGHBOURS_STREAM)
    if name == "hbe":
        return make_hashing_based(form, accuracy, seed, HASHING_STREAM)
    return make_exact(form)


def wexpkde(
    x: Array,
    y: Array,
    log_weights: Array | None,
    accuracy: Accuracy,
    *,
    primitive: str = "auto",
    seed: int = 0,
) -> tuple[Array, KdeReport]:
    """Estimate log Σᵢ wᵢ exp⟨xᵢ, yⱼ⟩ for each group: Algorithm 2 on checked, canonical arrays.

    Parameters
    ----------
    x, y
        (G, n, d) and (G, m, d), finite, float32 or float64.
    log_weights
        (G, n) natural logs, −∞ for weight 0, or None for weight 1.
    accuracy
        ε and δ.
    primitive
        One of `PRIMITIVES`.
    seed
        In [0, 2**64).

    Returns
    -------
    log_sum
        (G, m), natural log; −∞ where no point has positive weight.
    report
        What was done.
    """

    def form_of(xp: Namespace, group: int) -> GaussianForm | None:
        points, weights = x[group, ...], None if log_weights is None else log_weights[group, ...]
        if weights is not None:
            kept = xp.nonzero(weights > -math.inf)[0]
            if int(kept.shape[0]) < int(points.shape[0]):
                points, weights = xp.take(points, kept, axis=0), xp.take(weights, kept)
        if int(points.shape[0]) == 0:
            return None
        if weights is not None and float(xp.max(weights) - xp.min(weights)) == 0.0:
            form = exponential_form(points, y[group, ...], None)
            return _shifted(form, weights[0])
        return exponential_form(points, y[group, ...], weights)

    return solve(x, y, form_of, accuracy, primitive=primitive, seed=seed)


def _shifted(form: GaussianForm, by: Array) -> GaussianForm:
    """Return the form of a sum exp(by) times larger."""
    return GaussianForm(form.x, form.height, form.y, form.offset + by, form.log_weight, form.xp, form.device)


def solve(
    x: Array,
    y: Array,
    form_of: Callable[[Namespace, int], GaussianForm | None],
    accuracy: Accuracy,
    *,
    primitive: str,
    seed: int,
) -> tuple[Array, KdeReport]:
    """Run Algorithm 2 on each group's Gaussian form; ``form_of`` returns None where there are no points."""
    xp = namespace_of(x)
    started = time.perf_counter()
    groups, n, d = (int(size) for size in x.shape)
    m = int(y.shape[1])
    values, levels, names, reasons, setup = [], [], [], [], 0.0
    for group in range(groups):
        form = form_of(xp, group) if m else None
        if form is None:
            values.append(xp.full((m,), -math.inf, dtype=x.dtype, device=x.device))
            continue
        log_sum, done, name, reason, spent = _solve_group(form, accuracy, primitive, (seed + group * _GROUP_STEP) % 2**64)
        values.append(log_sum)
        levels.extend(done)
        names.append(name)
        reasons.append(reason)
        setup += spent
    result = xp.stack(values) if values else xp.zeros((0, m), dtype=x.dtype, device=x.device)
    merged = merge_levels(levels)
    used = sorted(set(names)) or ["exact"]
    total = max(1, groups * m)
    report = KdeReport(
        primitive=", ".join(used),
        reason=reasons[0] if reasons else "nothing to compute",
        eps=accuracy.eps,
        delta=accuracy.delta,
        n=n,
        m=m,
        d=d,
        groups=groups,
        levels=merged,
        evaluations_per_query=sum(level.evaluations for level in merged) / total,
        setup_per_query=setup / total,
        exact_queries=sum(level.answered for level in merged if level.primitive == "exact"),
        guarantee="; ".join(GUARANTEES[name] for name in used),
        seconds=time.perf_counter() - started,
    )
    return result, report


def _solve_group(
    form: GaussianForm, accuracy: Accuracy, name: str, seed: int
) -> tuple[Array, list[LevelReport], str, str, float]:
    """Return one group's log-sums (m,), what each level did, the primitive, why it, and its set-up cost."""
    xp = form.xp
    rows = xp.arange(form.m, dtype=xp.int64, device=form.device)
    outcomes: list[Outcome] = []
    reason = "asked for by name"
    if name == "auto":
        order = xp.argsort(uniform(xp, seed, PILOT_STREAM, form.m, device=form.device), stable=True)
        choice = choose(form, accuracy, order, partial(_make, form, accuracy, seed))
        if choice.pilot is not None:
            outcomes.append(choice.pilot)
        primitive, rows, reason = choice.primitive, choice.rows, choice.reason
    else:
        primitive = None if name == "exact" else make_primitive(name, form, accuracy, seed)
    spent = 0.0 if primitive is None else primitive.setup_evaluations
    if primitive is not None:
        outcomes.append(run_levels(xp, primitive, rows))
        rows = outcomes[-1].pending
    outcomes.append(run_levels(xp, make_exact(form), rows))
    index = xp.concat([part for outcome in outcomes for part in outcome.rows])
    value = xp.concat([part for outcome in outcomes for part in outcome.log_sum])
    # The forms' logits leave out −‖y‖²/2.
    base = form.offset - 0.5 * xp.sum(form.y * form.y, axis=1)
    log_sum = base + xp.take(value, xp.argsort(index, stable=True))
    levels = [level for outcome in outcomes for level in outcome.levels]
    return log_sum, levels, "exact" if primitive is None else primitive.name, reason, spent


def _make(form: GaussianForm, accuracy: Accuracy, seed: int, name: str) -> Primitive:
    return make_primitive(name, form, accuracy, seed)
