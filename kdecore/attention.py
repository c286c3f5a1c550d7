"""`attention`: the pipeline, in order. Every stage is a function in a file of its own."""

import time
from dataclasses import replace
from functools import partial
from typing import Any

from kdecore.attend import attend
from kdecore.certificate import Certificate, certify, check_share
from kdecore.inputs import canonicalise
from kdecore.kernels.jit import compile_seconds
from kdecore.kernels.threads import team
from kdecore.methods import SELECT
from kdecore.namespaces import Array
from kdecore.options import Exact, Options
from kdecore.planning import make_plan
from kdecore.report import make_report
from kdecore.tolerance import Round, check_tolerance, search, to_try


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    method: str | Options = "auto",
    budget: int | None = None,
    rtol: float | None = None,
    rtol_norm: str = "frobenius",
    scale: float | None = None,
    seed: int = 0,
    kernels: str = "auto",
    threads: int | None = None,
    return_lse: bool = False,
    return_report: bool = False,
    certificate: float = 0.1,
) -> Any:
    """Softmax attention, softmax(scale · q kᵀ) v: exact, estimated to an error ``rtol``, or from ``budget`` keys per query.

    Parameters
    ----------
    q
        (…, n_q, d) queries: a NumPy, CuPy, PyTorch or other array-API array of float16, bfloat16, float32 or float64.
    k
        (…, n_k, d) keys, with q's library, device, dtype and leading dimensions; n_k ≥ 1.
    v
        (…, n_k, d_v) values, likewise.
    method
        ``"exact"``; ``"sortlsh"`` (KDEformer's Algorithm 3); ``"hyper"`` (HyperAttention: the same with uniform sampling);
        ``"kdeformer"`` (Algorithm 1); ``"treecode"`` (near keys one by one, the others through means of tree nodes; beyond
        the paper); ``"auto"`` (exact below a measured crossover, above it treecode, or sortlsh where
        no kernel opens trees; the report says which and why); or an
        options object, `Exact`, `SortLSH`, `Hyper`, `KDEformer` or `Treecode`, for control over a method's parts.
    budget
        Keys evaluated per query, at least 1; 512 if None. At or above n_k the result is exact, for every method.
    rtol
        Relative error, positive, that the result is to keep, instead of ``budget``: the cheapest method (of all with
        ``"auto"``) and budget are found whose certificate's upper limit is at most that, on a few queries, before all are
        evaluated; exact where that is expected to be cheaper. What a certificate promises, and what it can't:
        docs/certificate.md.
    rtol_norm
        What ``rtol`` bounds: ``"frobenius"``, ‖out − exact‖_F / ‖exact‖_F, or ``"spectral"``, the same in the spectral norm;
        means over the leading dimensions.
    scale
        Finite factor on ⟨q, k⟩; 1/√d if None.
    seed
        Integer in [0, 2**64). One seed gives the same random numbers on every array library, and two calls with one seed
        the same result. No global random state is read or written. Exact draws nothing, nor does treecode but for samples.
    kernels
        ``"auto"``, or the name of an implementation that every kernel must have, such as ``"array-api"``.
    threads
        Threads of the Numba kernels, at least 1; as many as NUMBA_NUM_THREADS and the processors this process may use allow
        if None. Array libraries keep to their own settings. No result depends on it.
    return_lse
        Also return the natural log of each query's softmax denominator.
    return_report
        Also return a `Report` of what was done, with a `Certificate` of the error. On a GPU, making it waits for the device.
    certificate
        Exact rows for the report's certificate may take this part of the call's expected time, but are at least 32 in each
        group, or all; 0 for no certificate. With ``rtol`` the certificate is the one that the choice rests on.

    Returns
    -------
    out : Array
        (…, n_q, d_v), of q's library, dtype and device. Computed in float64 for float64, in float32 for the others.
    lse : Array
        (…, n_q), log Σⱼ exp(scale · ⟨q, kⱼ⟩) or its estimate, in the accumulation dtype; only with ``return_lse``.
    report : Report
        Only with ``return_report``.

    Raises
    ------
    ShapeError
        Wrong rank, mismatched d, n_k or leading dimensions, n_k = 0.
    DTypeError
        Not an array, not a real floating-point dtype, or different dtypes.
    DeviceError
        Arrays of different libraries or on different devices.
    OptionError
        Unknown method or norm, budget or threads below 1, scale not finite, seed out of range, options that contradict the
        budget; rtol not positive and finite, or given with a budget or with a method whose budget can't be chosen.
    KernelUnavailable
        The kernels asked for cannot run on these arrays.

    Notes
    -----
    Time is O(n_q n_k (d + d_v)) for exact, and O(n_q · budget · (d + d_v) + (n_q + n_k)(d + log n)) for sortlsh and hyper,
    for each leading index; treecode's is O((n_q + n_k) (d + log n) p + n_q · budget · (d + d_v)), p = 16. With rtol it is
    expected to be at most 1.25 times exact's, search included. Temporaries are O(budget · (n_q + n_k)); no n × n array is
    ever made.

    References
    ----------
    Zandieh, Han, Daliri, Karbasi (2023). KDEformer: Accelerating Transformers via Kernel Density Estimation. ICML.
    Han, Jayaram, Karbasi, Mirrokni, Woodruff, Zandieh (2023). HyperAttention: Long-context Attention in Near-Linear Time.

    Examples
    --------
    >>> import numpy as np
    >>> import kdecore
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 1000, 16), dtype=np.float32)
    >>> out, report = kdecore.attention(q, k, v, method="sortlsh", budget=128, return_report=True)
    >>> out.shape, report.method, report.keys_per_query
    ((2, 1000, 16), 'sortlsh', 128.0)
    """
    started, compiled = time.perf_counter(), compile_seconds()
    share = check_share(certificate)
    problem = canonicalise(q, k, v, scale)
    plan_for = partial(make_plan, problem, seed=seed, kernels=kernels, threads=threads)
    found: Certificate | None = None
    rounds: tuple[Round, ...] = ()
    certificate_seconds = 0.0
    if rtol is None:
        plan = plan_for(method=method, budget=budget)
        with team(plan.threads):
            selection = SELECT[plan.method](problem, plan)
            part = attend(problem, plan, selection)
            if return_report and share > 0:
                finished = time.perf_counter()
                found = certify(problem, plan, part.out, share)
                certificate_seconds = time.perf_counter() - finished
    else:
        tolerance = check_tolerance(rtol, rtol_norm)
        tried = to_try(method, budget, plan_for)
        with team(plan_for(method=Exact()).threads):
            outcome = search(problem, plan_for, tried, tolerance, rtol_norm)
        plan, selection, part = outcome.plan, outcome.selection, outcome.part
        found, rounds = outcome.certificate, outcome.rounds
    xp = problem.xp
    out = xp.astype(xp.reshape(part.out, (*problem.lead, problem.n_q, problem.d_v)), q.dtype, copy=False)
    results: list[Any] = [out]
    if return_lse:
        results.append(xp.reshape(part.lse, (*problem.lead, problem.n_q)))
    if return_report:
        seconds = time.perf_counter() - started
        report = make_report(problem, plan, selection, seconds, compile_seconds() - compiled)
        results.append(replace(report, certificate=found, certificate_seconds=certificate_seconds, rounds=rounds))
    return tuple(results) if len(results) > 1 else out
