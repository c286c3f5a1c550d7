"""`packed_attention`: samples of different lengths, packed one after another without padding."""

from typing import Any, Literal, Unpack, overload

from kdecore.api.attention import attention
from kdecore.api.call import PackedOptions, call_options
from kdecore.api.report import Report
from kdecore.arrays.errors import OptionError, ShapeError
from kdecore.arrays.gradients import recorded
from kdecore.arrays.namespace import Array, ArrayT, accumulation_dtype, dtype_name
from kdecore.arrays.scalars import check_boolean
from kdecore.core.problem import check_alike, check_scale, check_shapes
from kdecore.engine.restrictions import check_finite_inputs, integers

OWN_LENGTHS = ("mask", "key_lengths")
"""What samples that have lengths of their own leave no room for."""
RETURNED = ("return_lse", "return_report")


@overload
def packed_attention(
    q: ArrayT,
    k: Array,
    v: Array,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any = ...,
    *,
    return_lse: Literal[False] = ...,
    return_report: Literal[False] = ...,
    **options: Unpack[PackedOptions],
) -> ArrayT: ...
@overload
def packed_attention(
    q: ArrayT,
    k: Array,
    v: Array,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any = ...,
    *,
    return_lse: Literal[True],
    return_report: Literal[False] = ...,
    **options: Unpack[PackedOptions],
) -> tuple[ArrayT, Array]: ...
@overload
def packed_attention(
    q: ArrayT,
    k: Array,
    v: Array,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any = ...,
    *,
    return_lse: Literal[False] = ...,
    return_report: Literal[True],
    **options: Unpack[PackedOptions],
) -> tuple[ArrayT, tuple[Report | None, ...]]: ...
@overload
def packed_attention(
    q: ArrayT,
    k: Array,
    v: Array,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any = ...,
    *,
    return_lse: Literal[True],
    return_report: Literal[True],
    **options: Unpack[PackedOptions],
) -> tuple[ArrayT, Array, tuple[Report | None, ...]]: ...
@overload
def packed_attention(
    q: ArrayT,
    k: Array,
    v: Array,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any = ...,
    *,
    return_lse: bool = ...,
    return_report: bool = ...,
    **options: Unpack[PackedOptions],
) -> Any: ...
def packed_attention(
    q: Array, k: Array, v: Array, cu_seqlens_q: Any, cu_seqlens_k: Any = None, *, causal: bool = False, **options: Any
) -> Any:
    """Softmax attention within each of several samples that are packed along the axis of positions.

    Parameters
    ----------
    q
        (…, total_q, d): the queries of all samples, one sample after another.
    k
        (…, total_k, d): the keys likewise.
    v
        (…, total_k, d_v): the values likewise.
    cu_seqlens_q
        (B + 1,) integers, ascending from 0 to total_q: sample i has the queries cu_seqlens_q[i] … cu_seqlens_q[i + 1] − 1.
    cu_seqlens_k
        (B + 1,) likewise for keys, from 0 to total_k; ``cu_seqlens_q`` if None.
    causal
        As in `kdecore.attention`: the last query of each sample is aligned to its last key.
    options
        All other arguments of `kdecore.attention` but ``mask`` and ``key_lengths``.

    Returns
    -------
    out : Array
        (…, total_q, d_v): for each sample what `kdecore.attention` gives for it alone, with the same seed; 0 for the queries
        of a sample without keys.
    lse : Array
        (…, total_q), −inf for those; only with ``return_lse``.
    reports : tuple of Report or None
        One for each sample, None for one without queries or keys; only with ``return_report``.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        Besides what `kdecore.attention` raises: lengths that don't fit the arrays, naming them; an option of another name.

    Examples
    --------
    >>> import numpy as np
    >>> import kdecore
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 8, 100, 16), dtype=np.float32)
    >>> kdecore.packed_attention(q, k, v, [0, 30, 100], causal=True).shape
    (8, 100, 16)
    """
    for name in OWN_LENGTHS:
        if name in options:
            raise OptionError(f"{name} can't be given to packed_attention: samples have their own lengths")
    # Raises for what doesn't fit, whatever the samples are.
    call = call_options({"causal": causal, **options}, "scale", *RETURNED)
    for name in RETURNED:
        check_boolean(name, options.get(name, False))
    xp, device = check_alike(q=q, k=k, v=v)
    check_shapes(q, k, v)
    check_scale(options.get("scale"), int(q.shape[-1]))
    if call.check_finite:
        check_finite_inputs(q=q, k=k, v=v)
        options = {**options, "check_finite": False}
    queries = _edges("cu_seqlens_q", cu_seqlens_q, int(q.shape[-2]))
    keys = _edges("cu_seqlens_k", cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, int(k.shape[-2]))
    if len(keys) != len(queries):
        raise ShapeError(f"cu_seqlens_k must have as many entries as cu_seqlens_q, {len(queries)}, got {len(keys)}")
    outs: list[Array] = []
    lses: list[Array] = []
    reports: list[Report | None] = []
    for sample in range(len(queries) - 1):
        rows, seen = slice(queries[sample], queries[sample + 1]), slice(keys[sample], keys[sample + 1])
        one = q[..., rows, :]
        if rows.start == rows.stop or seen.start == seen.stop:
            # Zeros of the right shape and dtype, whatever else the arrays hold.
            shape = tuple(int(size) for size in one.shape[:-1])
            outs.append(xp.zeros((*shape, v.shape[-1]), dtype=v.dtype, device=device))
            lses.append(xp.full(shape, -xp.inf, dtype=accumulation_dtype(xp, dtype_name(q)), device=device))
            reports.append(None)
            continue
        found = attention(one, k[..., seen, :], v[..., seen, :], causal=causal, **{**options, "return_lse": True})
        outs.append(found[0])
        lses.append(found[1])
        reports.append(found[2] if len(found) > 2 else None)
    out = recorded(xp.concat(outs, axis=-2), q, k, v)
    results = [out]
    if options.get("return_lse"):
        results.append(recorded(xp.concat(lses, axis=-1), q, k, v))
    if options.get("return_report"):
        results.append(tuple(reports))
    return tuple(results) if len(results) > 1 else out


def _edges(name: str, given: Any, total: int) -> list[int]:
    edges = integers(name, given)
    if edges.ndim != 1 or len(edges) < 2:
        raise ShapeError(f"{name} must have the shape (B + 1,) with B ≥ 1, got {edges.shape}")
    numbers = [int(edge) for edge in edges]
    if numbers[0] != 0 or numbers[-1] != total or sorted(numbers) != numbers:
        raise OptionError(f"{name} must ascend from 0 to {total}, the number of rows, got {numbers}")
    return numbers
