"""Validation: what the user passed → `Problem`, the canonical form that every later stage works on."""

import math
from dataclasses import dataclass, replace

from kdecore.errors import DTypeError, OptionError, ShapeError
from kdecore.namespaces import (
    ACCUMULATION,
    Array,
    Namespace,
    accumulation_dtype,
    common_device,
    common_namespace,
    contiguous,
    dtype_name,
    is_contiguous,
    namespace_name,
    take_along_rows,
    to_float,
    without_gradient,
)


@dataclass(frozen=True)
class Problem:
    """Attention inputs in canonical form.

    Attributes
    ----------
    q, k, v
        (G, n_q, d), (G, n_k, d), (G, n_k, d_v) in the accumulation dtype; G is the product of the leading dimensions.
    scale
        Factor on ⟨q, k⟩.
    lead
        Leading dimensions of the result.
    xp
        Array namespace of the inputs.
    device
        Device of the inputs.
    input_dtype
        Name of the inputs' dtype, which the result has too.
    copied
        Names of the inputs that had to be copied, for their dtype, byte order or layout in memory.
    """

    q: Array
    k: Array
    v: Array
    scale: float
    lead: tuple[int, ...]
    xp: Namespace
    device: object
    input_dtype: str
    copied: tuple[str, ...]

    @property
    def groups(self) -> int:
        """Number of independent attention problems (batch times heads)."""
        return int(self.q.shape[0])

    @property
    def n_q(self) -> int:
        """Number of queries in each group."""
        return int(self.q.shape[1])

    @property
    def n_k(self) -> int:
        """Number of keys in each group."""
        return int(self.k.shape[1])

    @property
    def d(self) -> int:
        """Dimension of queries and keys."""
        return int(self.q.shape[2])

    @property
    def d_v(self) -> int:
        """Dimension of values."""
        return int(self.v.shape[2])

    @property
    def library(self) -> str:
        """Plain name of the array library."""
        return namespace_name(self.xp)

    def without_gradient(self) -> "Problem":
        """Return the same problem, not recorded for automatic differentiation."""
        return replace(self, **{name: without_gradient(getattr(self, name)) for name in ("q", "k", "v")})

    def with_queries(self, rows: Array) -> "Problem":
        """Return the same problem for some of the queries only, rows (G, m) int64."""
        return replace(self, q=take_along_rows(self.xp, self.q, rows))


def canonicalise(q: Array, k: Array, v: Array, scale: float | None = None) -> Problem:
    """Check q, k, v and scale, and bring them into canonical form.

    Parameters
    ----------
    q, k, v
        (…, n_q, d), (…, n_k, d), (…, n_k, d_v), of one library, device and dtype: float16, bfloat16, float32 or float64.
    scale
        Factor on ⟨q, k⟩, finite; 1/√d if None.

    Returns
    -------
    Problem
        Views of the inputs where possible. Half precision is copied to float32, and every kernel gets rows that lie one
        after another: other layouts are copied, once.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, OptionError
        Naming the argument, what was expected and what came.
    """
    xp = common_namespace(q=q, k=k, v=v)
    device = common_device(q=q, k=k, v=v)
    _check_dtypes(q=q, k=k, v=v)
    _check_shapes(q, k, v)
    name = dtype_name(q)
    dtype = accumulation_dtype(xp, name)
    lead = tuple(int(size) for size in q.shape[:-2])
    groups = math.prod(lead)

    def canonical(array: Array) -> Array:
        return contiguous(xp.astype(xp.reshape(contiguous(array), (groups, *array.shape[-2:])), dtype, copy=False))

    return Problem(
        q=canonical(q),
        k=canonical(k),
        v=canonical(v),
        scale=_check_scale(scale, int(q.shape[-1])),
        lead=lead,
        xp=xp,
        device=device,
        input_dtype=name,
        copied=tuple(label for label, x in (("q", q), ("k", k), ("v", v)) if not is_contiguous(x) or x.dtype != dtype),
    )


def _check_dtypes(**arrays: Array) -> None:
    first = next(iter(arrays))
    for name, array in arrays.items():
        found = dtype_name(array)
        if found not in ACCUMULATION:
            raise DTypeError(f"{name} must have one of the dtypes {', '.join(ACCUMULATION)}, got {found}")
        if found != dtype_name(arrays[first]):
            raise DTypeError(f"{name} must have the same dtype as {first} ({dtype_name(arrays[first])}), got {found}")


def _check_shapes(q: Array, k: Array, v: Array) -> None:
    for name, array, form in (("q", q, "(…, n_q, d)"), ("k", k, "(…, n_k, d)"), ("v", v, "(…, n_k, d_v)")):
        if array.ndim < 2:
            raise ShapeError(f"{name} must have at least 2 dimensions {form}, got shape {tuple(array.shape)}")
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    for name, array in (("k", k), ("v", v)):
        if array.shape[:-2] != q.shape[:-2]:
            raise ShapeError(f"{name} must have the leading dimensions of q, {tuple(q.shape[:-2])}; {shapes}")
    if k.shape[-1] != q.shape[-1]:
        raise ShapeError(f"k must have q's last dimension d = {q.shape[-1]}; {shapes}")
    if v.shape[-2] != k.shape[-2]:
        raise ShapeError(f"v must have as many rows as k, n_k = {k.shape[-2]}; {shapes}")
    if k.shape[-2] == 0:
        raise ShapeError(f"k must have at least one row (softmax over no keys is undefined); {shapes}")
    if q.shape[-1] == 0:
        raise ShapeError(f"q must have a last dimension d of at least 1; {shapes}")


def _check_scale(scale: float | None, d: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(d)
    number = to_float(scale)
    if not math.isfinite(number):
        raise OptionError(f"scale must be a finite number or None for 1/sqrt(d), got {scale!r}")
    return number
