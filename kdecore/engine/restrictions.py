"""What of the keys queries see, as users say it: checked, and without what hides nothing."""

import math
from dataclasses import dataclass
from typing import Any

from kdecore.arrays.backend import common_namespace
from kdecore.arrays.errors import DTypeError, OptionError, ShapeError
from kdecore.arrays.gradients import without_gradient
from kdecore.arrays.memory import host_views, to_host
from kdecore.arrays.namespace import (
    ACCUMULATION,
    Array,
    check_plain,
    common_device,
    dtype_name,
    host,
    namespace_name,
    type_name,
)
from kdecore.core.key_ranges import Mask
from kdecore.core.problem import Problem


@dataclass(frozen=True)
class Restrictions:
    """What hides keys from queries, as `kdecore.attention` is given it, checked.

    Attributes
    ----------
    causal, window
        As given.
    diagonal
        As given, or else n_k − n_q where causal attention or a window goes by it.
    lengths
        (G,) NumPy int64: keys there are in each group.
    mask
        Of all groups, or None.
    """

    causal: bool
    window: int | None
    diagonal: int | None
    lengths: Array
    mask: Mask | None


def check_restrictions(
    problem: Problem,
    causal: bool,
    window: int | None,
    diagonal: int | None,
    key_lengths: Any,
    mask: Any,
    like: Array,
) -> Restrictions:
    """Check lengths and mask, naming the argument; ``like`` is q. Arguments as in `kdecore.attention`."""
    lengths = _check_lengths(problem, key_lengths)
    if diagonal is None and (causal or window is not None):
        diagonal = problem.n_k - problem.n_q // problem.repeats
    checked = None if mask is None else _check_mask(problem, mask, like)
    return Restrictions(causal, window, diagonal, lengths, checked)


def _check_lengths(problem: Problem, key_lengths: Any) -> Array:
    lead = (*problem.lead[:-1], problem.lead[-1] // problem.repeats) if problem.lead else ()
    if key_lengths is None:
        return host.full((problem.groups,), problem.n_k, dtype=host.int64)
    lengths = integers("key_lengths", key_lengths)
    if lengths.shape != lead[: lengths.ndim]:
        raise ShapeError(
            f"key_lengths must have the leading dimensions of k or the first of them, {lead}, got {lengths.shape}"
        )
    if lengths.size and not 0 <= int(host.min(lengths)) <= int(host.max(lengths)) <= problem.n_k:
        raise OptionError(f"key_lengths must lie in 0 … n_k = {problem.n_k}, got {lengths.tolist()}")
    spread = host.reshape(host.astype(lengths, host.int64), (*lengths.shape, *(1,) * (len(lead) - lengths.ndim)))
    return host.reshape(host.broadcast_to(spread, lead), (-1,))


def integers(name: str, given: Any) -> Array:
    """Return integers as a NumPy array, whatever they come in, or raise `DTypeError` naming the argument."""
    is_array = hasattr(given, "dtype")
    if is_array:
        check_plain(name, given)
    try:
        found = to_host(given) if is_array else host.asarray(given)
    except (TypeError, ValueError, RuntimeError):
        what = type_name(given) if is_array else repr(given)
        raise DTypeError(f"{name} must hold integers in rows of one length, got {what}") from None
    if found.size and found.dtype.kind not in "iu":
        raise DTypeError(f"{name} must hold integers, got {dtype_name(found)}")
    return host.astype(found, host.int64)


def _check_mask(problem: Problem, mask: Any, like: Array) -> Mask:
    xp = common_namespace(q=like, mask=mask)
    common_device(q=like, mask=mask)
    if mask.dtype != xp.bool and (found := dtype_name(mask)) not in ACCUMULATION:
        advice = "; cast it to bool, True for what is seen" if found.startswith(("int", "uint")) else ""
        raise DTypeError(f"mask must be boolean or have one of the dtypes {', '.join(ACCUMULATION)}, got {found}{advice}")
    whole = (*problem.lead, problem.n_q // problem.repeats, problem.n_k)
    shape = (*(1,) * (2 - mask.ndim), *(int(size) for size in mask.shape))
    missing = len(whole) - len(shape)
    if missing < 0 or any(size not in (1, full) for size, full in zip(shape, whole[missing:], strict=True)):
        raise ShapeError(f"mask must be broadcastable to (…, n_q, n_k) = {whole}, got shape {tuple(mask.shape)}")
    count = math.prod(shape[:-2])
    matrix = host.broadcast_to(host.reshape(host.arange(count), shape[:-2]), problem.lead)
    values = xp.reshape(mask, (count, *shape[-2:]))
    if namespace_name(problem.xp) != namespace_name(xp):
        (values,) = host_views(values) or (values,)
    return Mask(values, host.reshape(matrix, (problem.groups, problem.repeats)))


def check_finite_inputs(**arrays: Array) -> None:
    """Raise `OptionError` naming the first argument that holds a number that is not finite, and where.

    Of a mask, −inf is no such number.
    """
    for name, array in arrays.items():
        numbers = to_host(without_gradient(array)) if dtype_name(array) != "bfloat16" else to_host(array.float())
        spoilt = ~host.isfinite(numbers)
        if name == "mask":
            spoilt &= numbers != -host.inf
        if bool(host.any(spoilt)):
            place = tuple(int(i) for i in host.argwhere(spoilt)[0])
            raise OptionError(f"{name} must be finite, got {numbers[place]} at index {place}")
