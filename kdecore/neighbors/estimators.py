"""`KernelRegressor` and `KernelClassifier`: kernel-weighted means of what is known at the training rows."""

from dataclasses import replace
from typing import Any, Self

from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d, validate_data

from kdecore.api.call import CallOptions
from kdecore.api.report import Report
from kdecore.arrays.namespace import Array, host
from kdecore.arrays.random import check_seed
from kdecore.arrays.scalars import check_boolean
from kdecore.methods.gaussian_tree import gaussian_keys, gaussian_queries
from kdecore.neighbors.index import GaussianIndex
from kdecore.neighbors.scaling import scaling_of

BATCH = 2**17
"""Rows predicted together, at most: what bounds memory."""
FLOATS = (host.float64, host.float32)


class KernelEstimator(BaseEstimator):  # type: ignore[misc]
    """What both estimators are made of: an index of the training rows, and kernel-weighted means of values at them."""

    def __init__(
        self,
        bandwidth: float | str = "scott",
        *,
        budget: int | None = None,
        rtol: float | None = None,
        rtol_norm: str = "frobenius",
        random_state: int = 0,
        threads: int | None = None,
    ) -> None:
        self.bandwidth = bandwidth
        self.budget = budget
        self.rtol = rtol
        self.rtol_norm = rtol_norm
        self.random_state = random_state
        self.threads = threads

    def _index(self, X: Array, values: Array, weights: Array) -> None:
        """Index rows (n, d) with values (n, c), of weights (n,) that are not all 0."""
        CallOptions(method="treecode", budget=self.budget, rtol=self.rtol, rtol_norm=self.rtol_norm, threads=self.threads)
        seed = check_seed(self.random_state, "random_state")
        seen = weights > 0
        X, values, weights = X[seen], values[seen], weights[seen]
        self._scaling = scaling_of(X, weights, self.bandwidth)
        self.bandwidth_ = self._scaling.bandwidth
        points = self._scaling.points(X)
        keys = gaussian_keys(host, points, host.log(weights).astype(points.dtype))
        self.index_ = GaussianIndex(
            keys,
            values.astype(points.dtype),
            budget=self.budget,
            queries=gaussian_queries(host, points),
            seed=seed,
            threads=self.threads,
        )

    def _means(self, X: Any, return_report: bool) -> tuple[Array, Report | None]:
        """Return kernel-weighted means of the values (n, c), and the report of the batch that may be furthest off."""
        check_boolean("return_report", return_report)
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=FLOATS)
        outs: list[Array] = []
        reports: list[Report] = []
        for first in range(0, len(X), BATCH):
            batch = X[first : first + BATCH]
            near = self._scaling.distances(batch) <= self._scaling.reach
            queries = gaussian_queries(host, self._scaling.points(batch[near]))
            found = self.index_.attend(queries, rtol=self.rtol, rtol_norm=self.rtol_norm, return_report=return_report)
            means, *more = found if return_report else (found,)
            if not host.all(near):
                exactly = replace(self._scaling, dtype=host.dtype(host.float64))
                inside, means = means, host.empty((len(batch), means.shape[1]), dtype=means.dtype)
                means[near], means[~near] = inside, self.index_.attend_far(exactly.points(batch[~near]))
            outs.append(means)
            reports += more

        def limit(report: Report) -> float:
            return 0.0 if report.certificate is None else report.certificate.upper(self.rtol_norm)

        return host.concat(outs), max(reports, key=limit) if return_report else None


class KernelRegressor(RegressorMixin, KernelEstimator):  # type: ignore[misc]
    """Nadaraya–Watson regression: the mean of y over the training rows, weighted by a Gaussian kernel around each row.

    Parameters
    ----------
    bandwidth
        h of the weights exp(−‖x − xᵢ‖²/(2h²)): a positive number, or a rule: ``"scott"``, σ n^(−1/(d+4)), or
        ``"silverman"``, σ (n (d+2)/4)^(−1/(d+4)), with σ² the mean variance of the features and n the sum of the weights.
        All features have the same: scale them before. The rules are those of density estimation; search for the best one,
        as with any parameter.
    budget
        Training rows, and means of some, evaluated per row to predict, in the mean, at least 1; 512 if None. Besides, a part
        4 · budget / n of the rows to predict, those with fewest training rows around them, is evaluated exactly, at most,
        which takes as long as four times the budget would. Up to as many training rows, predictions are exact.
    rtol
        Relative error to keep instead: of predictions from the mean of y, each output in units of its standard deviation.
        As in `KeyIndex.attend`, for each batch of up to 131,072 rows.
    rtol_norm
        ``"frobenius"`` or ``"spectral"``: norm of ``rtol``.
    random_state
        Integer in [0, 2**64), scikit-learn's name for kdecore's ``seed``: of which rows errors are measured on. None is
        refused: no global random state is touched, and two fits predict the same.
    threads
        Of the kernels; as many as the processor has cores if None.

    Attributes
    ----------
    bandwidth_
        The bandwidth.
    index_
        `KeyIndex` of the training rows; its ``budget`` can be another for a call.
    n_features_in_, feature_names_in_
        As scikit-learn has them.

    Notes
    -----
    Fitting n rows costs O(n d² + n log n), predicting m O(m (budget · (d + c) + log m)), in memory for up to 131,072 rows.
    With a budget, what is predicted for a row depends slightly on the rows that it is predicted with. Rows far from all
    training rows are predicted exactly: the nearest one's value. Rows of unit length make this softmax attention, at a
    scale of 1/h².
    Float32 is computed in float32 where the bandwidth isn't so small, or a row so far away, that kernels would be rounded by
    1e-3; a bandwidth so small that float64 would round them so is refused.

    References
    ----------
    Nadaraya (1964). On estimating regression. Theory of Probability and Its Applications.
    Watson (1964). Smooth regression analysis. Sankhyā A.

    Examples
    --------
    >>> import numpy as np
    >>> from kdecore.neighbors import KernelRegressor
    >>> X = np.linspace(0, 1, 100)[:, None]
    >>> model = KernelRegressor(bandwidth=0.05).fit(X, np.sin(6 * X[:, 0]))
    >>> model.predict([[0.25]]).round(2)
    array([0.95])
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Index the training rows.

        Parameters
        ----------
        X
            (n, d) array-like, finite; float32 stays so, everything else becomes float64.
        y
            (n,) or (n, c) numbers, finite.
        sample_weight
            (n,) factors on the kernels, finite, at least 0 and not all 0: as so many equal rows. 1 if None.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            From scikit-learn's own checks; of numbers whose squares overflow, and of weights that float64 can't hold beside
            the largest; and `OptionError`, naming the parameter.
        """
        X, y = validate_data(self, X, y, dtype=FLOATS, multi_output=True, y_numeric=True)
        weights = weights_of(sample_weight, len(X))
        columns = y[:, None] if y.ndim == 1 else y
        columns = columns.astype(host.float64)
        share = weights / host.max(weights)
        share /= host.sum(share)
        with host.errstate(over="ignore", invalid="ignore"):
            self._mean = share @ columns
            spread = host.sqrt(share @ (columns - self._mean) ** 2)
        if not bool(host.all(host.isfinite(spread))):
            largest = float(host.max(host.abs(columns)))
            raise ValueError(f"y must have numbers whose squares float64 can hold, got one of size {largest:.3g}")
        # A tolerance is to mean the same whatever unit an output has, and wherever its zero is.
        self._spread = host.where(spread > 0, spread, 1.0)
        self._shape, self._dtype = y.shape[1:], X.dtype
        self._index(X, (columns - self._mean) / self._spread, weights)
        return self

    def predict(self, X: Any, *, return_report: bool = False) -> Any:
        """Return the kernel-weighted means of y around rows.

        Parameters
        ----------
        X
            (m, d) array-like, finite.
        return_report
            Also return the `Report` of the batch that may be furthest off, with a `Certificate` of its error: relative, in
            the units of ``rtol``.

        Returns
        -------
        y : ndarray
            (m,) or (m, c), as in `fit`; float32 if X was there, otherwise float64.
        report : Report
            Only with ``return_report``.

        Raises
        ------
        ValueError, TypeError
            From scikit-learn's own checks, and its ``NotFittedError``.
        """
        means, report = self._means(X, return_report)
        found = (means * self._spread + self._mean).astype(self._dtype).reshape(-1, *self._shape)
        return (found, report) if return_report else found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class KernelClassifier(ClassifierMixin, KernelEstimator):  # type: ignore[misc]
    """Classification by kernel-weighted vote: the share of each class among the training rows around a row.

    Parameters
    ----------
    bandwidth, budget, random_state, threads
        As in `KernelRegressor`.
    rtol, rtol_norm
        Relative error of the matrix of probabilities, and its norm.

    Attributes
    ----------
    classes_
        (c,) labels, sorted.
    bandwidth_, index_, n_features_in_, feature_names_in_
        As in `KernelRegressor`.

    Notes
    -----
    As `KernelRegressor`. Votes of all classes are kept for each training row: n c numbers.

    Examples
    --------
    >>> import numpy as np
    >>> from kdecore.neighbors import KernelClassifier
    >>> X = np.linspace(0, 1, 100)[:, None]
    >>> model = KernelClassifier(bandwidth=0.05).fit(X, np.where(X[:, 0] < 0.5, "left", "right"))
    >>> model.predict([[0.2], [0.9]]).tolist()
    ['left', 'right']
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Index the training rows.

        Parameters
        ----------
        X
            (n, d) array-like, finite; float32 stays so, everything else becomes float64.
        y
            (n,) labels of any one type.
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
        X, y = validate_data(self, X, y, dtype=FLOATS)
        check_classification_targets(y)
        weights = weights_of(sample_weight, len(X))
        self.classes_, codes = host.unique(column_or_1d(y, warn=True), return_inverse=True)
        self._dtype = X.dtype
        self._index(X, host.eye(len(self.classes_), dtype=X.dtype)[codes], weights)
        return self

    def predict_proba(self, X: Any, *, return_report: bool = False) -> Any:
        """Return the share of each class around rows.

        Parameters
        ----------
        X
            (m, d) array-like, finite.
        return_report
            Also return the `Report` of the batch that may be furthest off, with a `Certificate` of its error.

        Returns
        -------
        probabilities : ndarray
            (m, c) in the order of ``classes_``, at least 0, with rows that sum to 1; float32 if X was in `fit`, otherwise
            float64.
        report : Report
            Only with ``return_report``.

        Raises
        ------
        ValueError, TypeError
            From scikit-learn's own checks, and its ``NotFittedError``.
        """
        means, report = self._means(X, return_report)
        # Means of votes but for rounding.
        means = (means / host.sum(means, axis=1, keepdims=True)).astype(self._dtype)
        return (means, report) if return_report else means

    def predict(self, X: Any) -> Array:
        """Return the class of the largest share around each of (m, d) rows, the first of equal ones: (m,)."""
        # First: before fit there are no classes.
        probabilities = self.predict_proba(X)
        return self.classes_[host.argmax(probabilities, axis=1)]


def weights_of(sample_weight: Any, n: int) -> Array:
    """Return weights as (n,) float64, 1 for None, or raise `ValueError`."""
    if sample_weight is None:
        return host.ones(n)
    weights = check_array(sample_weight, ensure_2d=False, dtype=host.float64, input_name="sample_weight")
    if weights.shape != (n,):
        raise ValueError(f"sample_weight must have shape ({n},), as many as X has rows, got {weights.shape}")
    if not (weights.min() >= 0 and weights.max() > 0):
        raise ValueError(f"sample_weight must be at least 0, and not all zero, got {weights.min():g} to {weights.max():g}")
    return weights
