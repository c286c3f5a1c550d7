"""`attention`: the pipeline, in order. Every stage is a function in a file of its own."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Unpack, overload

from kdecore.accuracy.search import to_try
from kdecore.api.call import AttentionOptions, CallOptions
from kdecore.api.report import Report, make_report
from kdecore.api.run import Result, assembled, certify_all, find, held_bytes, run, unseen
from kdecore.arrays.backend import device_context
from kdecore.arrays.gradients import recorded
from kdecore.arrays.memory import in_library_of
from kdecore.arrays.namespace import Array, ArrayT
from kdecore.arrays.scalars import check_boolean
from kdecore.core.options import Options
from kdecore.core.problem import canonicalise_on_host
from kdecore.engine.nonfinite import finite_queries, spoilt
from kdecore.engine.restrictions import check_finite_inputs, check_restrictions
from kdecore.engine.split import subproblems
from kdecore.kernels.runtime.jit import compile_seconds
from kdecore.kernels.runtime.threads import team
from kdecore.methods.base import Plan
from kdecore.methods.plan import make_plan


@overload
def attention(
    q: ArrayT,
    k: Array,
    v: Array,
    *,
    return_lse: Literal[False] = ...,
    return_report: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
) -> ArrayT: ...
@overload
def attention(
    q: ArrayT,
    k: Array,
    v: Array,
    *,
    return_lse: Literal[True],
    return_report: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
) -> tuple[ArrayT, Array]: ...
@overload
def attention(
    q: ArrayT,
    k: Array,
    v: Array,
    *,
    return_lse: Literal[False] = ...,
    return_report: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[ArrayT, Report]: ...
@overload
def attention(
    q: ArrayT,
    k: Array,
    v: Array,
    *,
    return_lse: Literal[True],
    return_report: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[ArrayT, Array, Report]: ...
@overload
def attention(
    q: ArrayT, k: Array, v: Array, *, return_lse: bool = ..., return_report: bool = ..., **options: Unpack[AttentionOptions]
) -> Any: ...
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    method: str | Options = "auto",
    budget: int | None = None,
    rtol: float | None = None,
    rtol_norm: str = "frobenius",
    causal: bool = False,
    window: int | None = None,
    diagonal: int | None = None,
    key_lengths: Any = None,
    mask: Array | None = None,
    scale: float | None = None,
    seed: int = 0,
    kernels: str = "auto",
    threads: int | None = None,
    return_lse: bool = False,
    return_report: bool = False,
    certificate: float = 0.1,
    check_finite: bool = False,
    max_memory: int | None = None,
) -> Any:
    """Softmax attention, softmax(scale · q kᵀ) v: exact, estimated to an error ``rtol``, or from ``budget`` keys per query.

    Parameters
    ----------
    q
        (…, n_q, d) queries: a NumPy, CuPy or PyTorch array of float16, bfloat16, float32 or float64, dense and unmasked.
    k
        (…, n_k, d) keys, with q's library, device, dtype and leading dimensions; n_k ≥ 1. The last leading dimension may be
        a divisor of q's: then each key head serves as many query heads in a row (grouped heads, as PyTorch's enable_gqa).
    v
        (…, n_k, d_v) values, with the leading dimensions of k.
    method
        ``"exact"``; ``"sortlsh"`` (KDEformer's Algorithm 3); ``"hyper"`` (HyperAttention: the same with uniform sampling);
        ``"kdeformer"`` (Algorithm 1); ``"treecode"`` (near keys one by one, the others through means of tree nodes; beyond
        the paper); ``"auto"`` (exact below a measured crossover, above it treecode, or sortlsh where no kernel opens trees;
        on devices exact but for calls like those measured on such a card, docs/gpu.md; the report says which and why); or an
        options object, `Exact`, `SortLSH`, `Hyper`, `KDEformer` or `Treecode`, for control over a method's parts.
    budget
        Keys evaluated per query, at least 1; 512 if None. At or above n_k the result is exact, for every method.
    rtol
        Relative error, positive, that the result is to keep, instead of ``budget``: a budget is found (of the treecode with
        ``"auto"``, of sortlsh where no kernel opens trees) whose certificate's upper limit is at most that, on a few
        queries, before all are evaluated; exact where that is expected to be cheaper. What a certificate promises, and what
        it can't: docs/certificate.md.
    rtol_norm
        What ``rtol`` bounds: ``"frobenius"``, ‖out − exact‖_F / ‖exact‖_F, or ``"spectral"``, the same in the spectral norm;
        means over the leading dimensions.
    causal
        Query i sees the keys j ≤ i + ``diagonal`` only, which is n_k − n_q if it isn't given: the last query is aligned to
        the last key, as for decoding with cached keys. With n_q = 3 and n_k = 5, and the other way round (a query that sees
        no key gives 0 and lse −∞)::

            keys →                     1 1 1 0 0          0 0 0
            queries ↓                  1 1 1 1 0          0 0 0
                                       1 1 1 1 1          1 0 0
                                                          1 1 0
                                                          1 1 1
    window
        Keys seen around a query, at least 1: with ``causal`` the last ``window`` up to its position i + ``diagonal``
        (n_k − n_q if it isn't given), else so many to either side, its own among both. None for all.
    diagonal
        Query i stands at the position of key i + diagonal, as in ``numpy.tril``. It says what ``causal`` and ``window`` are
        aligned to (0: PyTorch's ``is_causal``), and that this key is the query's own, as in self-attention: treecode lists
        own keys one by one, which counts where rows attend to themselves most, such as words with K = Q. None: n_k − n_q
        with ``causal`` or ``window``; otherwise queries have no keys of their own. Nothing is taken from equal shapes.
    key_lengths
        Integers of the shape of k's leading dimensions, or of the first of them, such as (batch,): the keys from there on
        are padding, which nobody sees and which costs nothing.
    mask
        Boolean, True for what is seen, or floats added to the logits, of q's library and device, broadcastable to
        (…, n_q, n_k). Restrictions add up. A mask whose rows are intervals of keys once the keys that no query sees are left
        out, such as of padding, costs a pass over it, and is treated like lengths. Any other is right, but each method's
        chosen keys may be hidden, so that fewer are left (a query whose keys all are is evaluated exactly), treecode samples
        its far nodes, and time and memory grow by O(n_q · budget).
    scale
        Finite factor on ⟨q, k⟩; 1/√d if None.
    seed
        Integer in [0, 2**64). One seed gives the same random numbers on every array library, and two calls with one seed
        the same result. No global random state is read or written. Exact draws nothing, nor does treecode but for samples.
    kernels
        ``"auto"``, or the name of a target, such as ``"array-api"`` or ``"numba-cpu"``, that every kernel which has it
        must run; the others run in the array API. The report lists them. In code that PyTorch compiles or traces it must be
        ``"array-api"``: no other kernels are operations of PyTorch's.
    threads
        Threads of the Numba kernels, at least 1; as many as NUMBA_NUM_THREADS and the processors this process may use allow
        if None. Array libraries keep to their own settings. No result depends on it.
    return_lse
        Also return the natural log of each query's softmax denominator.
    return_report
        Also return a `Report` of what was done, with a `Certificate` of the error. On a GPU, making it waits for the device.
    certificate
        Exact rows for the report's certificate may take this part of the call's expected time, but are at least 32 in each
        group, or all; 0 for no certificate. With ``rtol`` the certificate is the one that the choice rests on; of groups
        that see different numbers of keys, the one of largest upper limit.
    check_finite
        Raise if q, k, v or mask hold a number that is not finite (−∞ is right in a mask). Without it they do what they do to
        exact attention: a query to its own row, a key or value to the rows that see it, a hidden one nothing.
    max_memory
        Temporaries that may be planned for, in bytes (`Report.temporary_bytes`): where they would be more, groups, and then
        queries, are evaluated one part after another. None for no limit.

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
        Wrong rank, mismatched d, n_k or leading dimensions, n_k = 0; a mask or key_lengths of another shape.
    DTypeError
        Not an array of these libraries, not a dense one, not a real floating-point dtype, or different dtypes.
    DeviceError
        Arrays of different libraries or on different devices.
    OptionError
        Unknown method or norm, budget, threads, window or max_memory below 1, scale not finite, seed out of range, options
        that contradict the budget; rtol not positive and finite, or given with a budget or with a method whose budget can't
        be chosen; key_lengths outside 0 … n_k; numbers that are not finite, with ``check_finite``; True or False for a
        number, or anything else for one of them.
    MemoryLimitError
        One group and few queries need more than ``max_memory``; the message says how much.
    KernelUnavailable
        The kernels asked for cannot run on these arrays.

    Notes
    -----
    Time is O(n_q n_k (d + d_v)) for exact, and O(n_q · budget · (d + d_v) + (n_q + n_k)(d + log n)) for sortlsh and hyper,
    for each leading index; treecode's is O((n_q + n_k) (d + log n) p + n_q · budget · (d + d_v)), p = 16. With rtol it is
    expected to be at most 1.23 times exact's, search included, where no budget is refused (of sortlsh and hyper by name,
    1.35). Where queries see intervals of keys, log₄(n / budget) levels of this are merged (`kdecore.engine.hierarchy`).
    Temporaries are O(budget · (n_q + n_k)); no n × n array is ever made.

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
    call = CallOptions(
        method=method,
        budget=budget,
        rtol=rtol,
        rtol_norm=rtol_norm,
        causal=causal,
        window=window,
        diagonal=diagonal,
        seed=seed,
        kernels=kernels,
        threads=threads,
        certificate=certificate,
        check_finite=check_finite,
        max_memory=max_memory,
    )
    check_boolean("return_lse", return_lse)
    check_boolean("return_report", return_report)
    problem = canonicalise_on_host(q, k, v, scale, call.kernels, [mask])
    restrictions = check_restrictions(problem, call.causal, call.window, call.diagonal, key_lengths, mask, q)
    if call.check_finite:
        check_finite_inputs(q=q, k=k, v=v, **({} if mask is None else {"mask": mask}))
    settings = call.settings
    tried = None if call.rtol is None else to_try(call.method, call.budget, problem, call.kernels)
    plan_for: Callable[..., Plan] = partial(make_plan, method=call.method, budget=call.budget, **settings)
    with team(settings["threads"]), device_context(problem.q):
        problem, finite = finite_queries(problem.standing_at(restrictions.diagonal), call.kernels)
        whole = subproblems(problem, restrictions)
        held = held_bytes(problem, restrictions, whole)
        results: list[Result] = []
        for one in whole:
            if one.problem is None:
                results.append(unseen(problem, one, settings))
            elif call.rtol is None:
                results += run(one, plan_for, call.limit, count=return_report, held=held)
            else:
                results += find(one, settings, tried, float(call.rtol), call.rtol_norm, call.limit)
        part = spoilt(problem, assembled(problem, results, finite=False), finite, call.kernels, problem.q)
        found, seconds = None, 0.0
        if return_report and call.certificate > 0 and call.rtol is None:
            found, seconds = certify_all(problem, whole, results, float(call.certificate), settings["seed"])
    # Queries that see no key depend on nothing.
    returned: list[Any] = [recorded(problem.returned(part.out, q), q, k, v, mask)]
    if return_lse:
        returned.append(recorded(in_library_of(q, problem.unfolded(part.lse)), q, k, v, mask))
    if return_report:
        compiling = compile_seconds() - compiled
        took = time.perf_counter() - started
        returned.append(make_report(problem, restrictions.diagonal, call, results, found, seconds, took, compiling))
    return tuple(returned) if len(returned) > 1 else returned[0]
