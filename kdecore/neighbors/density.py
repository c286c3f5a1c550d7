"""`KernelDensity`: how densely training rows lie around others, from the index that kernel-weighted means come from."""

import math
from dataclasses import replace
from typing import Any, Literal, Self, overload

from sklearn.base import DensityMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from kdecore.accuracy.certificate import FEWEST_ROWS, Certificate, estimate_errors, stratified
from kdecore.accuracy.trial import CERTIFIED_STREAM
from kdecore.api.index_search import CERTIFIED_SHARE
from kdecore.api.report import Report
from kdecore.arrays.namespace import Array, host
from kdecore.arrays.random import check_seed
from kdecore.arrays.scalars import check_boolean
from kdecore.core.options import DEFAULT_BUDGET
from kdecore.methods.gaussian_tree import gaussian_queries
from kdecore.neighbors.estimators import BATCH, KernelEstimator, weights_of
from kdecore.neighbors.index import SPARSEST, GaussianIndex
from kdecore.neighbors.scaling import lengths


class KernelDensity(DensityMixin, KernelEstimator):  # type: ignore[misc]
    """Kernel density estimation with a Gaussian kernel: scikit-learn's `KernelDensity`, estimated for many training rows.

    Parameters
    ----------
    bandwidth
        h of the kernels exp(−‖x − xᵢ‖²/(2h²)): a positive number, or a rule: ``"scott"``, σ n^(−1/(d+4)), or
        ``"silverman"``, σ (n (d+2)/4)^(−1/(d+4)), with σ² the mean variance of the features and n the sum of the weights.
        scikit-learn's rules are these at σ = 1, for features that were scaled.
    budget
        As in `KernelRegressor`. Up to as many training rows, densities are exact.
    rtol
        Relative error of densities to keep instead, the root of its mean square over the rows of a batch of up to 131,072:
        budgets are doubled until one keeps it on one row in twenty, at least 32, that are evaluated exactly. Of up to 64
        rows, or where no budget below n will do, exact.
    random_state
        Integer in [0, 2**64): which rows errors are measured on.
    threads
        Of the kernels; as many as the processor has cores if None.

    Attributes
    ----------
    bandwidth_, index_, n_features_in_, feature_names_in_
        As in `KernelRegressor`.

    Notes
    -----
    Everything is computed in float64. Fitting n rows costs O(n d² + n log n), scores of m rows O(m (budget · d + log m)).
    With a budget, a row's score depends slightly on the rows that it is asked with. Where densities are lowest they are
    evaluated exactly. The error is relative to the density, so that of its logarithm it is the error itself.

    References
    ----------
    Parzen (1962). On estimation of a probability density function and mode. Annals of Mathematical Statistics.

    Examples
    --------
    >>> import numpy as np
    >>> from kdecore.neighbors import KernelDensity
    >>> X = np.linspace(0, 1, 101)[:, None]
    >>> np.exp(KernelDensity(bandwidth=0.05).fit(X).score_samples([[0.5], [2.0]])).round(2)
    array([0.99, 0.  ])
    """

    def __init__(
        self,
        bandwidth: float | str = "scott",
        *,
        budget: int | None = None,
        rtol: float | None = None,
        random_state: int = 0,
        threads: int | None = None,
    ) -> None:
        super().__init__(bandwidth, budget=budget, rtol=rtol, random_state=random_state, threads=threads)

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Index the training rows.

        Parameters
        ----------
        X
            (n, d) array-like, finite.
        y
            Ignored.
        sample_weight
            As in `KernelRegressor.fit`.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            From scikit-learn's own checks; and `OptionError`, naming the parameter.
        """
        X = validate_data(self, X, dtype=host.float64)
        weights = weights_of(sample_weight, len(X))
        self._index(X, host.ones((len(X), 1)), weights)
        heaviest = float(host.max(weights))
        log_weight = math.log(heaviest) + math.log(float(host.sum(weights / heaviest)))
        self._log_mass = log_weight + X.shape[1] * math.log(self.bandwidth_ * math.sqrt(2.0 * math.pi))
        return self

    @overload
    def score_samples(self, X: Any, *, return_report: Literal[False] = ...) -> Array: ...
    @overload
    def score_samples(self, X: Any, *, return_report: Literal[True]) -> tuple[Array, Report]: ...
    @overload
    def score_samples(self, X: Any, *, return_report: bool = ...) -> Any: ...
    def score_samples(self, X: Any, *, return_report: bool = False) -> Any:
        """Return the natural log of the probability density at rows.

        Parameters
        ----------
        X
            (m, d) array-like, finite.
        return_report
            Also return the `Report` of the batch that may be furthest off. Its `Certificate` is of relative errors of
            densities, as in ``rtol``.

        Returns
        -------
        log_density : ndarray
            (m,) float64.
        report : Report
            Only with ``return_report``.

        Raises
        ------
        ValueError, TypeError
            From scikit-learn's own checks, and its ``NotFittedError``; of numbers whose squares overflow.
        """
        check_boolean("return_report", return_report)
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=host.float64)
        lengths(X / self.bandwidth_)  # raises where squares overflow
        queries = (gaussian_queries(host, self._scaling.points(X[i : i + BATCH])) for i in range(0, len(X), BATCH))
        how = self.budget or DEFAULT_BUDGET, self.rtol, check_seed(self.random_state, "random_state"), return_report
        sums, reports = zip(*(log_sums(self.index_, some, *how) for some in queries), strict=True)
        scores = host.concat(sums) - self._log_mass
        if not return_report:
            return scores
        return scores, max(reports, key=lambda one: one.certificate.upper("frobenius") if one.certificate else 0.0)

    def score(self, X: Any, y: Any = None) -> float:
        """Return the log-likelihood of rows (m, d), the sum of their scores; ``y`` is ignored."""
        return float(host.sum(self.score_samples(X)))


def log_sums(
    index: GaussianIndex, queries: Array, budget: int, rtol: float | None, seed: int, certified: bool
) -> tuple[Array, Report | None]:
    """Return log Σ wᵢ exp(−‖y − xᵢ‖²/2) for queries (m, 2d + 1), with a budget, or one from there on that keeps ``rtol``.

    The report, which says how far off the sums are, is None where neither asks for it: ``rtol`` and ``certified``.
    """
    if rtol is None and not certified:
        return index.attend(queries, budget=budget, return_lse=True)[1], None
    m, asked = len(queries), budget if rtol is None else None
    count = min(m, max(FEWEST_ROWS, m // CERTIFIED_SHARE))
    rows = (stratified(host, 1, count, seed, CERTIFIED_STREAM, None)[0] * m).astype(host.int64)
    exact: Array | None = None
    # From there on the index evaluates every query exactly.
    largest = index.n_k if rtol is None else index.n_k / SPARSEST if m > 2 * FEWEST_ROWS else 0
    while budget < largest:
        _, found, report = index.attend(queries, budget=budget, return_lse=True, return_report=True, certificate=0.0)
        if exact is None:
            exact = index.attend(queries[rows], budget=index.n_k, return_lse=True)[1]
        bound = of_ratios(host.exp(found[rows] - exact), m)
        if rtol is None or bound.upper("frobenius") <= rtol:
            return found, replace(report, budget=asked, certificate=bound)
        budget *= 2
    _, found, report = index.attend(queries, budget=index.n_k, return_lse=True, return_report=True)
    return found, replace(report, budget=asked)


def of_ratios(ratios: Array, queries: int) -> Certificate:
    """Return a certificate of relative errors, from the ratios (rows,) of estimates to what is exact."""
    shape = (1, len(ratios), 1, 1)
    return estimate_errors(host.reshape(ratios, shape), host.ones(shape), queries)
