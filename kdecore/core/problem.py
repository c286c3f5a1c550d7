"""Validation: what the user passed → `Problem`, the canonical form that every later stage works on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdecore.arrays.backend import common_namespace
from kdecore.arrays.errors import DTypeError, OptionError, ShapeError
from kdecore.arrays.gradients import check_not_traced, without_gradient
from kdecore.arrays.memory import contiguous, host_views, in_library_of, is_contiguous
from kdecore.arrays.namespace import (
    Array,
    Namespace,
    accumulation_dtype,
    check_floating,
    common_device,
    dtype_name,
    host,
    namespace_name,
    namespace_of,
    on_accelerator,
)
from kdecore.arrays.rows import take_along_rows
from kdecore.arrays.scalars import to_float
from kdecore.core.key_ranges import KeyRanges, Mask


@dataclass(frozen=True)
class Problem:
    """Attention inputs in canonical form.

    Attributes
    ----------
    q, k, v
        (G, n_q, d), (G, n_k, d), (G, n_k, d_v); G is the product of the keys' leading dimensions. In the accumulation dtype,
        or on accelerators in that of the inputs: there kernels read half precision at half the traffic.
        With ``repeats`` r query heads to a key head, the rows i · r … i · r + r − 1 of q are their queries at position i.
    scale
        Factor on ⟨q, k⟩.
    lead
        Leading dimensions of the result, the query heads among them.
    xp
        Array namespace of q, k and v.
    device
        Device of q, k and v.
    library
        Plain name of the inputs' library; that of q, k and v may be NumPy where it isn't (`canonicalise_on_host`).
    input_dtype
        Name of the inputs' dtype, which the result has too.
    copied
        Names of the inputs that had to be copied, for their dtype, byte order or layout in memory.
    repeats
        Query heads that share a key head.
    visible
        Which keys each query sees, where it isn't all.
    mask
        What else is hidden or added.
    own
        (G, n_q) or, the same for all groups, (1, n_q), NumPy int64: the number of each query's own key, as in
        self-attention, −1 where it has none; None where none has one.
    """

    q: Array
    k: Array
    v: Array
    scale: float
    lead: tuple[int, ...]
    xp: Namespace
    device: object
    library: str
    input_dtype: str
    copied: tuple[str, ...]
    repeats: int = 1
    visible: KeyRanges | None = None
    mask: Mask | None = None
    own: Array | None = None

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
    def dtype(self) -> object:
        """What everything is computed in, whatever q, k and v are stored in."""
        return accumulation_dtype(self.xp, self.input_dtype)

    def without_gradient(self) -> "Problem":
        """Return the same problem, not recorded for automatic differentiation."""
        mask = None if self.mask is None else replace(self.mask, values=without_gradient(self.mask.values))
        return replace(self, mask=mask, **{name: without_gradient(getattr(self, name)) for name in ("q", "k", "v")})

    def __getstate__(self) -> dict[str, Any]:
        # A namespace is a module, which can't be pickled or copied; both follow from the arrays.
        return {name: value for name, value in vars(self).items() if name not in ("xp", "device")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        q = state["q"]
        vars(self).update(state, xp=common_namespace(q=q), device=common_device(q=q))

    def in_accumulation_dtype(self) -> "Problem":
        """Return the same problem with q, k and v in the dtype that everything is computed in."""
        return replace(
            self, **{name: self.xp.astype(getattr(self, name), self.dtype, copy=False) for name in ("q", "k", "v")}
        )

    def with_queries(self, rows: Array) -> "Problem":
        """Return the same problem for some of the queries only, rows (G, m) int64; they are to see all keys."""
        return replace(self, q=take_along_rows(self.xp, self.q, rows), own=None)

    @property
    def most_seen(self) -> int:
        """How many keys a query sees at most, unless a mask hides more."""
        visible = self.visible
        return self.n_k if visible is None else int(host.max(visible.end - visible.first))

    def rows(self, first: int, end: int) -> "Problem":
        """Return the same problem for the queries first … end − 1 only, without what hides keys."""
        q = contiguous(self.q[:, first:end, :])
        return replace(self, q=q, visible=None, mask=None, own=None if self.own is None else self.own[:, first:end])

    def keys(self, first: int, end: int) -> "Problem":
        """Return the same problem for the keys first … end − 1 only, without what hides keys."""
        k, v = (contiguous(x[:, first:end, :]) for x in (self.k, self.v))
        return replace(self, k=k, v=v, visible=None, mask=None, own=own_among(self.own, [(first, end)]))

    def standing_at(self, diagonal: int | None) -> "Problem":
        """Return the same problem with queries at the positions of the keys i + diagonal, their own; None for at none."""
        positions = self.n_q // self.repeats
        if diagonal is None or not -positions < diagonal < self.n_k:
            return replace(self, own=None)
        own = host.arange(self.n_q, dtype=host.int64)[None, :] // self.repeats + diagonal
        return replace(self, own=own_among(own, [(0, self.n_k)]))

    def returned(self, rows: Array, like: Array) -> Array:
        """Return `unfolded` results in the dtype and library of an input."""
        rows = in_library_of(like, self.unfolded(rows))
        return namespace_of(like).astype(rows, like.dtype, copy=False)

    def unfolded(self, rows: Array) -> Array:
        """Return results (G, n_q, …) by query heads, with the leading dimensions of the inputs."""
        tail = tuple(int(size) for size in rows.shape[2:])
        if self.repeats > 1:
            apart = self.xp.reshape(rows, (self.groups, self.n_q // self.repeats, self.repeats, *tail))
            rows = self.xp.permute_dims(apart, (0, 2, 1, *range(3, 3 + len(tail))))
        return self.xp.reshape(rows, (*self.lead, self.n_q // self.repeats, *tail))


FORMS = {"q": "(…, n_q, d)", "k": "(…, n_k, d)", "v": "(…, n_k, d_v)", "queries": "(…, n, d)"}


def own_among(own: Array | None, some: Sequence[tuple[int, int]]) -> Array | None:
    """Return `Problem.own` where only some spans of the keys are left, one after another."""
    if own is None:
        return None
    found, before = host.full(own.shape, -1, dtype=host.int64), 0
    for first, end in some:
        found = host.where((first <= own) & (own < end), own + (before - first), found)
        before += end - first
    return found if bool(host.any(found >= 0)) else None


def canonicalise(q: Array, k: Array, v: Array, scale: float | None = None) -> Problem:
    """Check q, k, v and scale, and bring them into canonical form.

    Parameters
    ----------
    q, k, v
        (…, n_q, d), (…, n_k, d), (…, n_k, d_v), of one library, device and dtype: float16, bfloat16, float32 or float64.
        The last leading dimension of k and v may divide q's: then so many query heads share each key head.
    scale
        Factor on ⟨q, k⟩, finite; 1/√d if None.

    Returns
    -------
    Problem
        Views of the inputs where possible. Half precision is copied to float32 on the CPU, and every kernel gets rows that
        lie one after another: other layouts are copied, once.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, OptionError
        Naming the argument, what was expected and what came.
    """
    xp, device = check_alike(q=q, k=k, v=v)
    check_shapes(q, k, v)
    name = dtype_name(q)
    dtype = q.dtype if on_accelerator(q) else accumulation_dtype(xp, name)
    lead = tuple(int(size) for size in q.shape[:-2])
    groups = math.prod(int(size) for size in k.shape[:-2])
    repeats = int(q.shape[-3]) // int(k.shape[-3]) if q.ndim > 2 and k.shape[-3] != q.shape[-3] else 1

    def canonical(array: Array) -> Array:
        return contiguous(xp.astype(xp.reshape(contiguous(array), (groups, *array.shape[-2:])), dtype, copy=False))

    def canonical_queries() -> Array:
        if repeats == 1:
            return canonical(q)
        apart = xp.reshape(xp.astype(q, dtype, copy=False), (groups, repeats, *q.shape[-2:]))
        together = xp.permute_dims(apart, (0, 2, 1, 3))
        return contiguous(xp.reshape(contiguous(together), (groups, repeats * int(q.shape[-2]), q.shape[-1])))

    return Problem(
        q=canonical_queries(),
        k=canonical(k),
        v=canonical(v),
        scale=check_scale(scale, int(q.shape[-1])),
        lead=lead,
        xp=xp,
        device=device,
        library=namespace_name(xp),
        input_dtype=name,
        copied=tuple(
            label
            for label, x in (("q", q), ("k", k), ("v", v))
            if not is_contiguous(x) or x.dtype != dtype or (repeats > 1 and label == "q")
        ),
        repeats=repeats,
    )


def canonicalise_on_host(
    q: Array, k: Array, v: Array, scale: float | None, kernels: str, recorded: Sequence[Array | None] = ()
) -> Problem:
    """Check, and bring into canonical form as `canonicalise` does, NumPy views of tensors on the CPU that record nothing.

    PyTorch computes array operations on threads that wait for each other by spinning: beside another busy process that takes
    several times as long, and alone it saves nothing here (bench/NOTES.md). ``recorded`` are what else may record gradients.
    Raises `OptionError` where operations are traced and ``kernels`` are to be others.
    """
    check_alike(q=q, k=k, v=v)
    check_not_traced(q, kernels)
    views = host_views(q, k, v, recorded=recorded)
    if views is None:
        return canonicalise(q, k, v, scale)
    own_q, own_k, own_v = views
    problem = canonicalise(own_q, own_k, own_v, scale)
    name = dtype_name(q)
    copied = ("q", "k", "v") if name == "bfloat16" else problem.copied
    return replace(problem, library=namespace_name(namespace_of(q)), input_dtype=name, copied=copied)


def check_alike(**arrays: Array) -> tuple[Namespace, Any]:
    """Return the namespace and the device of named arrays of rows, of one library, device and floating-point dtype.

    Raises
    ------
    ShapeError, DTypeError, DeviceError
        Naming the argument that is no such array, or differs from the first.
    """
    xp, device = common_namespace(**arrays), common_device(**arrays)
    first = next(iter(arrays))
    for name, array in arrays.items():
        check_floating(name, array)
        if (found := dtype_name(array)) != (expected := dtype_name(arrays[first])):
            raise DTypeError(f"{name} must have the same dtype as {first} ({expected}), got {found}")
    for name, array in arrays.items():
        if array.ndim < 2:
            raise ShapeError(f"{name} must have at least 2 dimensions {FORMS[name]}, got shape {tuple(array.shape)}")
    return xp, device


def check_shapes(q: Array, k: Array, v: Array) -> None:
    """Raise `ShapeError` unless q, k and v, of two dimensions or more, fit each other as `canonicalise` says."""
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not same_or_grouped_heads(tuple(q.shape[:-2]), tuple(k.shape[:-2])):
        expected = f"{tuple(q.shape[:-2])}, or in place of the last one a divisor of it (grouped heads)"
        raise ShapeError(f"k must have the leading dimensions of q, {expected}; {shapes}")
    if v.shape[:-2] != k.shape[:-2]:
        raise ShapeError(f"v must have the leading dimensions of k, {tuple(k.shape[:-2])}; {shapes}")
    if k.shape[-1] != q.shape[-1]:
        raise ShapeError(f"k must have q's last dimension d = {q.shape[-1]}; {shapes}")
    if v.shape[-2] != k.shape[-2]:
        raise ShapeError(f"v must have as many rows as k, n_k = {k.shape[-2]}; {shapes}")
    if k.shape[-2] == 0:
        raise ShapeError(f"k must have at least one row (softmax over no keys is undefined); {shapes}")
    if q.shape[-1] == 0:
        raise ShapeError(f"q must have a last dimension d of at least 1; {shapes}")


def same_or_grouped_heads(of_queries: tuple[int, ...], of_keys: tuple[int, ...]) -> bool:
    """Return whether queries of such leading dimensions fit keys of such ones."""
    if of_queries == of_keys:
        return True
    if not of_queries or len(of_queries) != len(of_keys) or of_queries[:-1] != of_keys[:-1]:
        return False
    return of_keys[-1] > 0 and of_queries[-1] > 0 and of_queries[-1] % of_keys[-1] == 0


def check_scale(scale: float | None, d: int) -> float:
    """Return a finite scale, 1/√d for None, or raise `OptionError`."""
    if scale is None:
        return 1.0 / math.sqrt(d)
    number = to_float(scale)
    if not math.isfinite(number):
        raise OptionError(f"scale must be a finite number or None for 1/sqrt(d), got {scale!r}")
    return number
