"""KDEformer's Algorithm 1 (Zandieh, Han, Daliri, Karbasi, ICML 2023): keys sampled by the norms of A's columns and V's rows.

A = D⁻¹ exp(scale · QKᵀ) is the softmax matrix. Both its row sums D and the norms of its columns are kernel density estimates
(`kdecore.kde`, the paper's Algorithm 2), so neither needs all pairs:

1. D̃ = WExpKDE(K → Q), row sums within 1 ± ε.
2. βⱼ = WExpKDE(√2 Q → √2 K, weights D̃ᵢ⁻²) ≈ ‖aⱼ‖², within 1 ± ⅓.
3. p from β and ‖vⱼ‖²; m keys drawn i.i.d. from p.
4. Output D̃⁻¹ exp(scale · QK_Sᵀ) diag(1 / (m p_S)) V_S.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from kdecore.arrays.errors import OptionError
from kdecore.arrays.gradients import without_gradient
from kdecore.arrays.namespace import Array
from kdecore.arrays.random import uniform
from kdecore.arrays.rows import TILE_ELEMENTS, searchsorted_rows, spans, take_along_rows
from kdecore.arrays.scalars import one_of, to_float
from kdecore.core.options import DEFAULT_BUDGET, Options, set_integers
from kdecore.core.problem import Problem
from kdecore.core.selection import Selection, equal_blocks
from kdecore.kde.problem import Accuracy
from kdecore.kde.wexpkde import wexpkde
from kdecore.kernels.registry import Choice
from kdecore.kernels.site import Site
from kdecore.methods.base import Method, Plan
from kdecore.methods.choices import item_bytes
from kdecore.methods.levels import Step
from kdecore.methods.memory import lists_bytes

KEYS_STREAM, COLUMNS_STREAM = 2, 3
"""Random streams of the sampled keys, and of the columns that ‖A‖ is estimated from."""
DELTA = 0.01
"""Probability, for each query, that the density estimates may miss their accuracy."""
COLUMN_ACCURACY = 1 / 3
"""Relative accuracy of the column norms: the sampling bound loses only a constant factor by it."""
COLUMN_SEED = 0x9E3779B97F4A7C15
"""Added to the seed for the column norms, so that both density estimates use numbers of their own."""
NORM_COLUMNS = 512
"""Columns sampled to estimate ‖A‖."""


@dataclass(frozen=True)
class KDEformer(Options):
    """Options of ``method="kdeformer"``: KDEformer's Algorithm 1, whose keys are sampled by kernel density estimates.

    Attributes
    ----------
    num_samples
        Keys drawn, with repetition; the budget if None, unless ``eps`` is given without a budget.
    eps
        Relative accuracy of the denominators, in (0, 1), 0.2 if None. Given without budget and num_samples, the number of
        keys follows from it: C ε⁻² log(n) (sr(A) + sr(V)), the paper's bound with the measured constant C = `CONSTANT`.
    probabilities
        ``"mixture"``, ½ (‖aⱼ‖²/‖A‖²_F + ‖vⱼ‖²/‖V‖²_F), which needs no operator norm; or ``"paper"``,
        ∝ ‖aⱼ‖² + (‖A‖²/‖V‖²) ‖vⱼ‖².
    normaliser
        ``"kde"``, dividing by the denominators that were estimated for all keys; or ``"sampled"``, by the sum of the sampled
        weights.
    primitive
        Density estimator, as in `kdecore.kde.log_weighted_exponential_kde`.
    """

    name: ClassVar[str] = "kdeformer"
    CONSTANT: ClassVar[float] = 0.4

    num_samples: int | None = None
    eps: float | None = None
    probabilities: str = "mixture"
    normaliser: str = "kde"
    primitive: str = "auto"

    @property
    def kernels(self) -> tuple[str, ...]:
        """Kernels that the method needs."""
        return ("row_norms", "attend_blocks", "attend_dense")

    def __post_init__(self) -> None:
        set_integers(self, num_samples=1)
        if self.eps is not None and not 0.0 < to_float(self.eps) < 1.0:
            raise OptionError(f"eps must lie strictly between 0 and 1, got {self.eps!r}")
        if self.eps is not None:
            object.__setattr__(self, "eps", float(self.eps))
        for name, known in (
            ("probabilities", ("mixture", "paper")),
            ("normaliser", ("kde", "sampled")),
            ("primitive", ("auto", "exact", "uniform", "hbe", "neighbours")),
        ):
            one_of(known, name, getattr(self, name))

    def resolve(self, budget: int | None) -> Self:
        """Return these options with num_samples set, unless it is to follow from eps."""
        if budget is not None and self.num_samples not in (None, budget):
            raise OptionError(f"budget must be None or num_samples = {self.num_samples}, got {budget}")
        samples = self.num_samples or budget or (None if self.eps is not None else DEFAULT_BUDGET)
        return replace(self, num_samples=samples)

    def with_budget(self, budget: int) -> Self:
        """Return resolved options for another budget; where the number of keys follows from eps, these."""
        return self if self.num_samples is None else replace(self, num_samples=budget)

    @property
    def budget(self) -> int | None:
        """Keys evaluated per query; None where they follow from eps."""
        return self.num_samples

    @property
    def accuracy(self) -> float:
        """Relative accuracy of the denominators."""
        return 0.2 if self.eps is None else float(self.eps)

    @property
    def needs_operator_norm(self) -> bool:
        """Whether ‖A‖ has to be estimated."""
        return self.num_samples is None or self.probabilities == "paper"


def select(problem: Problem, plan: Plan) -> Selection:
    """Select one list of keys for all queries, and the denominators.

    Returns
    -------
    Selection
        One block; num_samples keys with repetition, at log-weight −log(m pⱼ). Where ``eps`` asks for as many keys as there
        are, all keys. Two density estimates, O(G (n_q + n_k) d / eps²) at least, then O(G n_q m (d + d_v)).
    """
    options = plan.options
    assert isinstance(options, KDEformer)
    xp, problem = problem.xp, problem.in_accumulation_dtype()
    log_rows, log_columns = log_norms(problem, options, plan.seed)
    norms = xp.astype(plan.kernels["row_norms"].function(xp, problem.v), xp.float64, copy=False)
    top = operator_norm_squared(problem, log_rows, log_columns, plan.seed) if options.needs_operator_norm else None
    samples = options.num_samples
    if samples is None:
        assert top is not None
        samples = sample_count(problem, log_columns, norms, top, options.accuracy)
        if samples >= problem.n_k:
            return Selection()
    ratio = top if options.probabilities == "paper" else None
    p = probabilities(problem, log_columns, norms, ratio)

    cumulative = xp.cumulative_sum(p, axis=1)
    points = xp.reshape(
        uniform(xp, plan.draw_seed, KEYS_STREAM, problem.groups * samples, device=problem.device), (-1, samples)
    )
    keys = searchsorted_rows(xp, cumulative, points * cumulative[:, -1:], side="right")
    keys = xp.clip(keys, 0, problem.n_k - 1)
    log_weight = -xp.log(take_along_rows(xp, p, keys)) - math.log(samples)
    every = xp.broadcast_to(xp.arange(problem.n_q, dtype=xp.int64, device=problem.device), (problem.groups, problem.n_q))
    return Selection(
        equal_blocks(xp, every, problem.n_q),
        keys[:, None, :],
        xp.astype(log_weight, problem.dtype)[:, None, :],
        log_rows if options.normaliser == "kde" else None,
    )


def log_norms(problem: Problem, options: KDEformer, seed: int) -> tuple[Array, Array]:
    """Return natural logs of A's row sums before normalisation, (G, n_q), and of its columns' squared norms, (G, n_k).

    Steps 1 and 2 of Algorithm 1. The scale is split evenly between queries and keys, which keeps distances small.
    """
    root = math.sqrt(abs(problem.scale))
    q = without_gradient(problem.q) * math.copysign(root, problem.scale)
    k = without_gradient(problem.k) * root
    log_rows, _ = wexpkde(k, q, None, Accuracy(options.accuracy, DELTA), primitive=options.primitive, seed=seed)
    log_columns, _ = wexpkde(
        q * math.sqrt(2.0),
        k * math.sqrt(2.0),
        -2.0 * log_rows,
        Accuracy(COLUMN_ACCURACY, DELTA),
        primitive=options.primitive,
        seed=(seed + COLUMN_SEED) % 2**64,
    )
    return log_rows, log_columns


def probabilities(problem: Problem, log_columns: Array, norms: Array, norm_squared: Array | None) -> Array:
    """Return each key's sampling probability, float64 (G, n_k).

    ½ (βⱼ/Σβ + ‖vⱼ‖²/‖V‖²_F), which needs no operator norm and meets the condition of the paper's theorem on approximate
    products with the factor ½ for its ¼ (derived); or with ‖A‖² given, the paper's ∝ βⱼ + (‖A‖²/‖V‖²) ‖vⱼ‖².
    """
    xp = problem.xp
    logs = xp.astype(log_columns, xp.float64)
    beta = xp.exp(logs - xp.max(logs, axis=1, keepdims=True))
    squares = norms * norms
    if norm_squared is not None:
        # Both terms are wanted in units of ‖A‖² and ‖V‖²: beta is relative to its largest entry, norms to V's.
        scale_a = xp.exp(xp.max(logs, axis=1)) / norm_squared
        scale_v = 1.0 / _nonzero(problem, value_norm_squared(problem))
        total = beta * scale_a[:, None] + squares * scale_v[:, None]
        return total / xp.sum(total, axis=1, keepdims=True)
    half = beta / xp.sum(beta, axis=1, keepdims=True)
    mass = xp.sum(squares, axis=1, keepdims=True)
    return xp.where(mass > 0, 0.5 * (half + squares / _nonzero(problem, mass)), half)


def sample_count(problem: Problem, log_columns: Array, norms: Array, norm_squared: Array, eps: float) -> int:
    """Return m = C ε⁻² log(n) (sr(A) + sr(V)), the largest over groups; sr(M) = ‖M‖²_F / ‖M‖²."""
    xp = problem.xp
    rank_a = xp.sum(xp.exp(xp.astype(log_columns, xp.float64)), axis=1) / norm_squared
    rank_v = xp.sum(norms * norms, axis=1) / _nonzero(problem, value_norm_squared(problem))
    ranks = to_float(xp.max(rank_a + rank_v))
    n = max(problem.n_q, problem.n_k, 2)
    return math.ceil(KDEformer.CONSTANT * math.log(n) * ranks / eps**2)


def operator_norm_squared(problem: Problem, log_rows: Array, log_columns: Array, seed: int) -> Array:
    """Estimate ‖A‖² for each group, float64 (G,), from `NORM_COLUMNS` columns sampled by their norms.

    A Aᵀ is estimated by the sampled columns' outer products; its largest eigenvalue is that of their Gram matrix, found in
    O(G n_q · NORM_COLUMNS · d). At least n_q / n_k, which A reaches on the vector of ones (derived).
    """
    xp = problem.xp
    p = xp.exp(xp.astype(log_columns, xp.float64))
    cumulative = xp.cumulative_sum(p, axis=1)
    points = uniform(xp, seed, COLUMNS_STREAM, problem.groups * NORM_COLUMNS, device=problem.device)
    points = xp.reshape(points, (problem.groups, NORM_COLUMNS)) * cumulative[:, -1:]
    columns = xp.clip(searchsorted_rows(xp, cumulative, points, side="right"), 0, problem.n_k - 1)
    # Σ aⱼaⱼᵀ / (m pⱼ) with pⱼ = βⱼ / Σβ.
    log_factor = 0.5 * (xp.log(cumulative[:, -1:] / NORM_COLUMNS) - take_along_rows(xp, xp.log(p), columns))
    q, k = without_gradient(problem.q), without_gradient(problem.k)
    found = []
    for g in range(problem.groups):
        keys = xp.astype(xp.take(k[g, ...], columns[g, :], axis=0) * problem.scale, xp.float64)
        gram = xp.zeros((NORM_COLUMNS, NORM_COLUMNS), dtype=xp.float64, device=problem.device)
        for rows in spans(problem.n_q, TILE_ELEMENTS // NORM_COLUMNS):
            logits = xp.astype(q[g, rows, :], xp.float64) @ xp.matrix_transpose(keys)
            log_row = xp.astype(log_rows[g, rows], xp.float64)[:, None]
            entries = xp.exp(logits - log_row + log_factor[g, :])
            gram = gram + xp.matrix_transpose(entries) @ entries
        found.append(xp.linalg.eigvalsh(gram)[-1])
    return xp.maximum(xp.stack(found), xp.full_like(xp.stack(found), problem.n_q / problem.n_k))


def value_norm_squared(problem: Problem) -> Array:
    """Return ‖V‖² (largest eigenvalue of VᵀV) relative to V's largest entry squared, float64 (G,)."""
    xp = problem.xp
    v = xp.astype(without_gradient(problem.v), xp.float64)
    largest = xp.max(xp.abs(v), axis=(-2, -1), keepdims=True)
    v = v / xp.where(largest > 0, largest, 1.0)
    return xp.linalg.eigvalsh(xp.matrix_transpose(v) @ v)[:, -1]


def _nonzero(problem: Problem, values: Array) -> Array:
    return problem.xp.where(values > 0, values, 1.0)


def adapted(problem: Problem, options: KDEformer, site: Site, kernels: str) -> tuple[Options, str]:
    """Return the options, with denominators that are summed where densities of all keys don't say them."""
    if problem.mask is None and problem.visible is None:
        return options, "asked for by name"
    why = "pieces of intervals are merged" if problem.mask is None else "densities know no masks"
    return replace(options, normaliser="sampled"), f"asked for by name; {why}: sampled denominators"


def temporary_bytes(
    problem: Problem, options: KDEformer, cuts: tuple[Step, ...], kernels: dict[str, Choice], threads: int
) -> int:
    """Bound what one list takes, and the density estimates' own copies of rows, a coordinate wider, with their tiles."""
    rows = problem.groups * (problem.n_q + problem.n_k)
    densities = item_bytes(problem) * (8 * rows * (problem.d + 1) + 16 * TILE_ELEMENTS)
    return densities + lists_bytes(problem, options, kernels, threads, problem.n_q)


METHOD = Method(KDEformer, select, temporary_bytes=temporary_bytes, adapted=adapted)
