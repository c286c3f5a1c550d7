"""Kernel density estimation in sub-linear time, in log space: the paper's WExpKDE and the primitives it is built on."""

import math
from typing import Any, Literal, Unpack, overload

from kdecore.arrays.backend import common_namespace
from kdecore.arrays.errors import OptionError, ShapeError
from kdecore.arrays.namespace import Array, Namespace, accumulation_dtype, common_device, dtype_name
from kdecore.arrays.random import check_seed
from kdecore.arrays.scalars import check_boolean
from kdecore.kde.gaussian_map import gaussian_form
from kdecore.kde.problem import (
    GaussianForm,
    KdeOptions,
    check_accuracy,
    check_arrays,
    check_bandwidth,
    check_log_weights,
    check_weights,
)
from kdecore.kde.report import KdeReport, LevelReport
from kdecore.kde.wexpkde import check_primitive, solve, wexpkde

__all__ = ["KdeReport", "LevelReport", "log_gaussian_kde", "log_weighted_exponential_kde", "wexpkde"]


@overload
def log_weighted_exponential_kde(
    x: Array,
    y: Array,
    weights: Array | None = ...,
    *,
    log_weights: Array | None = ...,
    return_report: Literal[False] = ...,
    **options: Unpack[KdeOptions],
) -> Array: ...
@overload
def log_weighted_exponential_kde(
    x: Array,
    y: Array,
    weights: Array | None = ...,
    *,
    log_weights: Array | None = ...,
    return_report: Literal[True],
    **options: Unpack[KdeOptions],
) -> tuple[Array, KdeReport]: ...
@overload
def log_weighted_exponential_kde(
    x: Array,
    y: Array,
    weights: Array | None = ...,
    *,
    log_weights: Array | None = ...,
    return_report: bool = ...,
    **options: Unpack[KdeOptions],
) -> Any: ...
def log_weighted_exponential_kde(
    x: Array,
    y: Array,
    weights: Array | None = None,
    *,
    log_weights: Array | None = None,
    eps: float = 0.2,
    delta: float = 0.05,
    primitive: str = "auto",
    seed: int = 0,
    return_report: bool = False,
) -> Any:
    """Natural log of Γ(yⱼ) = Σᵢ wᵢ exp⟨xᵢ, yⱼ⟩, within a factor 1 ± eps for each query with probability 1 − delta.

    Parameters
    ----------
    x
        (…, n, d) points: a NumPy, CuPy or PyTorch array of float16, bfloat16, float32 or float64, finite; n may be 0.
    y
        (…, m, d) queries of x's library, device, dtype and leading dimensions, finite; m may be 0.
    weights
        (…, n), finite and ≥ 0; 1 if None.
    log_weights
        (…, n) natural logs instead of ``weights``, for weights outside the dtype's range; −∞ is weight 0.
    eps
        Relative error of Γ asked for, in (0, 1).
    delta
        Probability, for each query, of missing it, in (0, 1). Queries share random numbers, so misses can come together.
    primitive
        ``"exact"``; ``"uniform"`` (sampling, with a Bernstein bound); ``"hbe"`` (hashing-based estimator); ``"neighbours"``
        (near neighbours exactly, the rest sampled); or ``"auto"`` (the cheapest, measured on a few of the queries).
    seed
        Integer in [0, 2**64). No global random state is read or written.
    return_report
        Also return a `KdeReport`.

    Returns
    -------
    log_sum : Array
        (…, m) natural logs, in float64 for float64 and float32 for the others; −∞ where all weights are 0 or n = 0.
    report : KdeReport
        Only with ``return_report``.

    Raises
    ------
    ShapeError
        Wrong rank or shapes that do not fit.
    DTypeError
        Not an array, or no real floating-point dtype, or x and y of different ones.
    DeviceError
        Arrays of different libraries or on different devices.
    OptionError
        A number that is not finite in x, y or the weights, a negative weight, both kinds of weights, eps or delta outside
        (0, 1), an unknown primitive, a seed out of range.

    Notes
    -----
    Time O(n m d) for ``"exact"``, on which every primitive falls back for queries it cannot answer. For densities of μ in
    Algorithm 2's sense, sampling needs O(m d/(ε² μ)), hashing O((n + m) d/(ε² √μ)). Levels are decided on the same
    numbers that make the estimate: each level is unbiased for itself, the answer that stopping picks is not quite.

    References
    ----------
    Zandieh, Han, Daliri, Karbasi (2023). KDEformer: Accelerating Transformers via Kernel Density Estimation. ICML.
    Algorithm 2.

    Examples
    --------
    >>> import numpy as np
    >>> from kdecore.kde import log_weighted_exponential_kde
    >>> x = np.asarray([[0.0, 0.0], [0.0, 10000.0]])
    >>> log_weighted_exponential_kde(x, x, primitive="exact")
    array([6.93147181e-01, 1.00000000e+08])
    """
    named = {"x": x, "y": y}
    name, given = ("weights", weights) if log_weights is None else ("log_weights", log_weights)
    if weights is not None and log_weights is not None:
        raise OptionError("log_weights must be None where weights are given, got both")
    if given is not None:
        named[name] = given
    xp = common_namespace(**named)
    common_device(**named)
    check_arrays(xp, x, y, given, name)
    accuracy, seed, primitive = check_accuracy(eps, delta), check_seed(seed), check_primitive(primitive)
    check_boolean("return_report", return_report)
    logs = None
    if given is not None:
        given = _canonical(xp, given[..., None], x)[..., 0]
        if log_weights is None:
            check_weights(xp, given)
            positive = given > 0
            logs = xp.where(positive, xp.log(xp.where(positive, given, 1.0)), -math.inf)
        else:
            check_log_weights(xp, given)
            logs = given
    result, report = wexpkde(_canonical(xp, x, x), _canonical(xp, y, x), logs, accuracy, primitive=primitive, seed=seed)
    result = xp.reshape(result, tuple(y.shape[:-1]))
    return (result, report) if return_report else result


@overload
def log_gaussian_kde(
    x: Array,
    y: Array,
    bandwidth: float = ...,
    *,
    normalised: bool = ...,
    return_report: Literal[False] = ...,
    **options: Unpack[KdeOptions],
) -> Array: ...
@overload
def log_gaussian_kde(
    x: Array,
    y: Array,
    bandwidth: float = ...,
    *,
    normalised: bool = ...,
    return_report: Literal[True],
    **options: Unpack[KdeOptions],
) -> tuple[Array, KdeReport]: ...
@overload
def log_gaussian_kde(
    x: Array,
    y: Array,
    bandwidth: float = ...,
    *,
    normalised: bool = ...,
    return_report: bool = ...,
    **options: Unpack[KdeOptions],
) -> Any: ...
def log_gaussian_kde(
    x: Array,
    y: Array,
    bandwidth: float = 1.0,
    *,
    normalised: bool = False,
    eps: float = 0.2,
    delta: float = 0.05,
    primitive: str = "auto",
    seed: int = 0,
    return_report: bool = False,
) -> Any:
    """Natural log of μ(yⱼ) = (1/n) Σᵢ exp(−‖xᵢ − yⱼ‖²/(2 bandwidth²)), within 1 ± eps with probability 1 − delta.

    Parameters
    ----------
    x
        (…, n, d) points, n ≥ 1; as in `log_weighted_exponential_kde`. (n,) numbers are (n, 1) points.
    y
        (…, m, d) queries; (m,) numbers where x are (n,).
    bandwidth
        Positive and finite.
    normalised
        Divide by (bandwidth √(2π))^d, so that μ is a probability density over y, as `score_samples` of scikit-learn's
        ``KernelDensity`` is.
    eps, delta, primitive, seed, return_report
        As in `log_weighted_exponential_kde`.

    Returns
    -------
    log_density : Array
        (…, m) natural logs; at most 0 but for error and rounding where not ``normalised``.
    report : KdeReport
        Only with ``return_report``.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, OptionError
        As in `log_weighted_exponential_kde`; also n = 0, and a bandwidth that is not positive and finite.

    References
    ----------
    Charikar, Siminelakis (2017). Hashing-based-estimators for kernel density in high dimensions. FOCS.
    Karppa, Aumüller, Pagh (2022). DEANN: Speeding up kernel-density estimation using approximate nearest neighbor search.

    Examples
    --------
    >>> import numpy as np
    >>> from kdecore.kde import log_gaussian_kde
    >>> np.exp(log_gaussian_kde(np.asarray([0.0]), np.asarray([0.0, 1.0]), normalised=True, primitive="exact")).round(4)
    array([0.3989, 0.242 ])
    """
    xp = common_namespace(x=x, y=y)
    common_device(x=x, y=y)
    if x.ndim == y.ndim == 1:
        x, y = x[:, None], y[:, None]
    check_arrays(xp, x, y, None, "weights")
    if x.shape[-2] == 0:
        raise ShapeError(f"x must have at least one row (the mean over no points is undefined), got shape {tuple(x.shape)}")
    width = check_bandwidth(bandwidth)
    accuracy, seed, primitive = check_accuracy(eps, delta), check_seed(seed), check_primitive(primitive)
    check_boolean("return_report", return_report)
    check_boolean("normalised", normalised)
    points, queries = _canonical(xp, x, x), _canonical(xp, y, x)

    def form_of(xp: Namespace, group: int) -> GaussianForm:
        return gaussian_form(points[group, ...], queries[group, ...], width)

    result, report = solve(points, queries, form_of, accuracy, primitive=primitive, seed=seed)
    result = xp.reshape(result, tuple(y.shape[:-1]))
    if normalised:
        result = result - int(x.shape[-1]) * (math.log(width) + 0.5 * math.log(2.0 * math.pi))
    return (result, report) if return_report else result


def _canonical(xp: Namespace, array: Array, x: Array) -> Array:
    """Return ``array`` (…, a, b) as (G, a, b) in the accumulation dtype of ``x``."""
    groups = math.prod(int(size) for size in array.shape[:-2])
    dtype = accumulation_dtype(xp, dtype_name(x))
    return xp.astype(xp.reshape(array, (groups, *array.shape[-2:])), dtype, copy=False)
