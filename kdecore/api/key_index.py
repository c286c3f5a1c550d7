"""`KeyIndex`: the key side of the treecode, built once for many batches of queries, and for keys that are appended."""

import time
from dataclasses import replace
from functools import partial, reduce
from typing import Any, Literal, Unpack, overload

from kdecore.api.call import CallOptions, IndexOptions
from kdecore.api.index_search import IndexResult, certify_index, costs, doubled
from kdecore.api.report import Report, report_of_index
from kdecore.api.run import run_all
from kdecore.api.segments import Segment, in_library, joined, recorded_now, sample_of, selected
from kdecore.arrays.backend import device_context
from kdecore.arrays.errors import OptionError, ShapeError, did_you_mean
from kdecore.arrays.gradients import gradient_mode, outside_inference_mode, recording
from kdecore.arrays.memory import in_library_of, quiet
from kdecore.arrays.namespace import Array, ArrayT, device_name
from kdecore.arrays.scalars import check_boolean, integer_at_least
from kdecore.core.options import DEFAULT_BUDGET, Exact, Options
from kdecore.core.problem import Problem, canonicalise_on_host, check_alike, same_or_grouped_heads
from kdecore.core.selection import Slots
from kdecore.core.state import AttentionState, merge_states
from kdecore.engine.attend import attend
from kdecore.engine.nonfinite import merge_not_finite
from kdecore.engine.restrictions import check_restrictions
from kdecore.kernels.registry import choose
from kdecore.kernels.runtime.jit import compile_seconds
from kdecore.kernels.runtime.threads import team
from kdecore.methods import key_tree
from kdecore.methods.base import Plan
from kdecore.methods.choices import site_of
from kdecore.methods.plan import check_settings, make_plan
from kdecore.methods.treecode import Treecode
from kdecore.methods.view import query_moment

LEAST_BUDGET = 64
"""Keys per query that every tree gets at least."""
PLANS_KEPT = 32


class KeyIndex:
    """Keys and values, indexed for softmax attention of any queries to them.

    The tree over the keys (`kdecore.methods.treecode`) is built here; `attend` only opens it. Keys that are appended are
    attended to exactly until there are more of them than the budget; then they get a tree of their own, together with the
    trees before it that are no larger, so that each key is built into O(log n) trees and there are never more than about
    log₂ n (the logarithmic method of Bentley & Saxe 1980). Each tree gets its part of the budget.

    Parameters
    ----------
    k, v
        (…, n_k, d) keys and (…, n_k, d_v) values, arrays as in `kdecore.attention`; n_k ≥ 1. They are not copied where their
        dtype and layout allow: don't change them afterwards.
    method
        ``"treecode"``, or `Treecode` options.
    budget
        Keys evaluated per query, at least 1; 512 if None.
    scale
        Finite factor on ⟨q, k⟩; 1/√d if None.
    queries
        (…, n, d), n ≥ 1: queries like those that will come, by which the tree is laid out. If None they are taken to lie as
        the keys do, which errs somewhat more (docs/key_index.md).
    seed, kernels, threads
        As in `kdecore.attention`.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, OptionError, KernelUnavailable
        As `kdecore.attention` does, naming the argument.

    Notes
    -----
    Building costs O(G n_k (d p + p log n_k) + G d² p) with p = 16, and a batch of n_q queries
    O(G n_q (budget · (d + d_v) + p log n_q)).
    With ``queries=q``, ``KeyIndex(k, v, queries=q).attend(q)`` is ``attention(q, k, v, method="treecode")`` up to rounding.
    An index may be used by several threads at once; `append` by one at a time. All queries see all keys of an index: one of
    them, or a value, that is not finite makes every result NaN. Samples of different lengths need an index each.

    Examples
    --------
    >>> import numpy as np
    >>> import kdecore
    >>> k, v = np.random.default_rng(0).standard_normal((2, 8, 4096, 64), dtype=np.float32)
    >>> index = kdecore.KeyIndex(k, v, budget=256)
    >>> index.attend(k[:, :1]).shape
    (8, 1, 64)
    >>> index.append(k[:, :1], v[:, :1])
    >>> index.n_k
    4097
    """

    _build = staticmethod(key_tree.build)

    @outside_inference_mode()
    def __init__(
        self,
        k: Array,
        v: Array,
        *,
        method: str | Options = "treecode",
        budget: int | None = None,
        scale: float | None = None,
        queries: Array | None = None,
        seed: int = 0,
        kernels: str = "auto",
        threads: int | None = None,
    ) -> None:
        check_alike(k=k, v=v)
        problem = recorded_now(canonicalise_on_host(k, k, v, scale, kernels, [queries]))
        if not (isinstance(method, Treecode) or (isinstance(method, str) and method == Treecode.name)):
            hint = did_you_mean(method, [Treecode.name])
            raise OptionError(f'method must be "treecode" or Treecode options for a KeyIndex, got {method!r}{hint}')
        if budget is not None:
            budget = integer_at_least(1, "budget", budget)
        self._options = (method if isinstance(method, Treecode) else Treecode()).resolve(budget)
        self._settings = check_settings(seed, kernels, threads)
        self._plans: dict[Any, Plan] = {}
        self._one, self._scale = (k[..., :1, :], v[..., :1, :]), problem.scale
        self._segments: tuple[Segment, ...] = ()
        seen = problem.k
        if queries is not None:
            seen = in_library_of(problem.k, self._fitting("queries", queries).q)
            if queries.shape[-2] == 0:
                raise ShapeError(f"queries must have at least one row, or be None; got shape {tuple(queries.shape)}")
        # Raises where the kernels asked for can't run, however few the keys.
        self._plan(problem, Exact())
        measure = choose("second_moment", site_of(problem), self._settings["kernels"]).function
        with team(self._settings["threads"]), device_context(self._one[0]):
            with quiet():
                self._moment = query_moment(problem.xp, seen, measure)
            self._like = None if queries is None else sample_of(seen)
            self._segments = (self._indexed(replace(problem, q=problem.q[:, :0, :])),)

    @property
    def n_k(self) -> int:
        """Number of keys."""
        return sum(segment.problem.n_k for segment in self._segments)

    def __len__(self) -> int:
        return self.n_k

    def __repr__(self) -> str:
        first = self._segments[0].problem
        size = f"{first.groups} × {self.n_k} keys, d = {first.d}, d_v = {first.d_v}, {first.input_dtype}"
        place = f"{first.library} on {device_name(first.k)}"
        return f"KeyIndex({size}, {place}, budget {self._budget}, segments: {len(self._segments)})"

    def __getstate__(self) -> dict[str, Any]:
        # Plans hold functions, and are made anew.
        return {**vars(self), "_plans": {}}

    @overload
    def attend(
        self,
        q: ArrayT,
        *,
        return_lse: Literal[False] = ...,
        return_report: Literal[False] = ...,
        **options: Unpack[IndexOptions],
    ) -> ArrayT: ...
    @overload
    def attend(
        self, q: ArrayT, *, return_lse: Literal[True], return_report: Literal[False] = ..., **options: Unpack[IndexOptions]
    ) -> tuple[ArrayT, Array]: ...
    @overload
    def attend(
        self, q: ArrayT, *, return_lse: Literal[False] = ..., return_report: Literal[True], **options: Unpack[IndexOptions]
    ) -> tuple[ArrayT, Report]: ...
    @overload
    def attend(
        self, q: ArrayT, *, return_lse: Literal[True], return_report: Literal[True], **options: Unpack[IndexOptions]
    ) -> tuple[ArrayT, Array, Report]: ...
    @overload
    def attend(
        self, q: ArrayT, *, return_lse: bool = ..., return_report: bool = ..., **options: Unpack[IndexOptions]
    ) -> Any: ...
    def attend(
        self,
        q: Array,
        *,
        budget: int | None = None,
        rtol: float | None = None,
        rtol_norm: str = "frobenius",
        return_lse: bool = False,
        return_report: bool = False,
        certificate: float = 0.1,
    ) -> Any:
        """Return softmax attention of queries to all keys so far.

        Parameters
        ----------
        q
            (…, n_q, d), of the keys' library, device, dtype and leading dimensions; the last of these may be a multiple of
            the keys' (grouped heads).
        budget
            Keys evaluated per query in this call, at least 1; the index's own if None. Keys that have no tree yet, no more
            than the index's own budget, are all evaluated.
        rtol, rtol_norm
            Relative error that the result is to keep, instead of ``budget``, and its norm, as in `kdecore.attention`:
            budgets are doubled until one is certified. Of few queries, or where no budget much below n_k will do, exact.
        return_lse
            Also return the natural log of each query's softmax denominator.
        return_report
            Also return a `Report`, with a `Certificate` of the error.
        certificate
            Exact rows for it may take this part of the call's expected time, but are at least 32 in each group, or all; 0
            for none. A row takes as long as exact attention to all keys, so that of few queries it takes most of the time.

        Returns
        -------
        out : Array
            (…, n_q, d_v), of q's library, dtype and device.
        lse : Array
            (…, n_q), in the accumulation dtype; only with ``return_lse``.
        report : Report
            Only with ``return_report``.

        Raises
        ------
        ShapeError, DTypeError, DeviceError, OptionError
            Naming what doesn't fit the keys, or is out of its range.
        """
        started, compiled = time.perf_counter(), compile_seconds()
        call = CallOptions(method=Treecode(), budget=budget, rtol=rtol, rtol_norm=rtol_norm, certificate=certificate)
        check_boolean("return_lse", return_lse)
        check_boolean("return_report", return_report)
        problem = self._fitting("q", q)
        with team(self._settings["threads"]), device_context(self._one[0]):
            seed, seconds = self._settings["seed"], 0.0
            if rtol is not None:
                attend, taking = partial(self._attend_segments, problem, count=True), partial(costs, problem, self._segments)
                how = (problem, self._budget, self.n_k, attend, self._exact_rows, taking, seed)
                found, bound, rounds = doubled(*how, float(rtol), rtol_norm)
            else:
                found = self._attend_segments(problem, call.budget or self._budget, count=return_report)
                bound, rounds = None, ()
                if return_report and certificate > 0:
                    bound, seconds = certify_index(
                        problem, self._segments, found, self._exact_rows, float(certificate), seed
                    )
        results = self._results(problem, found.part, q, return_lse)
        if return_report:
            compiling, took = compile_seconds() - compiled, time.perf_counter() - started
            reason = f"KeyIndex, segments: {len(found.plans)}" + ("" if rtol is None else f", rtol {rtol:g}")
            asked = None if rtol is not None else call.budget or self._budget
            shape = (problem.groups, problem.n_q, self.n_k, problem.d, self._segments[0].problem.d_v)
            more = {"certificate": bound, "certificate_seconds": seconds, "rounds": rounds}
            about = report_of_index(problem, found, took, compiling, reason=reason, budget=asked, shape=shape, **more)
            results.append(about)
        return tuple(results) if len(results) > 1 else results[0]

    @overload
    def attend_and_append(self, q: ArrayT, k: Array, v: Array, *, return_lse: Literal[False] = ...) -> ArrayT: ...
    @overload
    def attend_and_append(self, q: ArrayT, k: Array, v: Array, *, return_lse: Literal[True]) -> tuple[ArrayT, Array]: ...
    @overload
    def attend_and_append(self, q: ArrayT, k: Array, v: Array, *, return_lse: bool = ...) -> Any: ...
    def attend_and_append(self, q: Array, k: Array, v: Array, *, return_lse: bool = False) -> Any:
        """Add keys, and return what the queries that come with them see: all keys before, and causally the new ones.

        Parameters
        ----------
        q
            (…, n_q, d), as for `attend`; the last one is aligned to the last new key, as in `kdecore.attention`.
        k, v
            (…, m, d) and (…, m, d_v), as for `append`.
        return_lse
            Also return the natural log of each query's softmax denominator.

        Returns
        -------
        out, lse
            As `attend` does.

        Raises
        ------
        ShapeError, DTypeError, DeviceError, OptionError
            Naming what doesn't fit; the index is then as it was.
        """
        check_boolean("return_lse", return_lse)
        added = self._added(k, v)
        problem = self._fitting("q", q, added.k, added.v)
        new = in_library(problem, Segment(added, None)).problem
        new = replace(new, q=problem.q, repeats=problem.repeats, lead=problem.lead)
        with team(self._settings["threads"]), device_context(self._one[0]):
            causal = check_restrictions(new, True, None, None, None, None, q)
            of_new = run_all(new, causal, self._options, self._settings)
            part = merge_not_finite(problem.xp, self._attend_segments(problem, self._budget).part, of_new)
            self._append(added)
        results = self._results(problem, part, q, return_lse)
        return tuple(results) if return_lse else results[0]

    def append(self, k: Array, v: Array) -> None:
        """Add keys (…, m, d) and values (…, m, d_v), of the index's library, device, dtype and leading dimensions.

        Where gradients of keys before are recorded they stay so, also where none are recorded of these.

        Raises
        ------
        ShapeError, DTypeError, DeviceError
            Naming what doesn't fit; the index is then as it was.
        """
        added = self._added(k, v)
        with team(self._settings["threads"]), device_context(self._one[0]):
            self._append(added)

    @outside_inference_mode()
    def _added(self, k: Array, v: Array) -> Problem:
        """Return new keys in canonical form, without queries, or raise what doesn't fit."""
        first = self._segments[0].problem
        self._check_like_keys(k=k, v=v)
        lead = tuple(self._one[0].shape[:-2])
        for name, array, width in (("k", k, first.d), ("v", v, first.d_v)):
            if array.shape[-1] != width or tuple(array.shape[:-2]) != lead:
                expected = f"the index's leading dimensions {lead} and last dimension {width}"
                raise ShapeError(f"{name} must have {expected}, got shape {tuple(array.shape)}")
        added = canonicalise_on_host(self._one[0], k, v, first.scale, self._settings["kernels"], self._kept())
        return replace(recorded_now(added), q=in_library_of(added.k, first.q), lead=first.lead)

    @outside_inference_mode()
    def _append(self, added: Problem) -> None:
        segments = list(self._segments)
        # Keys that were recorded stay so, whether or not this call is: all of them are for later ones.
        with recording():
            if segments[-1].tree is None:
                added = joined(segments.pop().problem, added)
            if added.n_k > self._budget:
                while segments and segments[-1].problem.n_k <= added.n_k:
                    added = joined(segments.pop().problem, added)
            self._segments = (*segments, self._indexed(added))

    def _attend_segments(self, problem: Problem, budget: int | None, *, count: bool = False) -> IndexResult:
        """Return attention of a problem's queries to all keys so far; exact for the budget None."""
        parts, plans = [], []
        slots: list[Slots] = []
        watch = slots.append if count else None
        for segment in self._segments:
            there = in_library(problem, segment)
            of_segment = replace(there.problem, q=problem.q, repeats=problem.repeats)
            options: Options = Exact()
            if segment.tree is not None and budget is not None:
                share = max(min(LEAST_BUDGET, budget), budget * segment.problem.n_k // self.n_k)
                options = replace(self._options, num_slots=share)
            plans.append(self._plan(of_segment, options))
            selection = selected(of_segment, segment, there.tree, plans[-1], self._like, self._plan)
            parts.append(attend(of_segment, plans[-1], selection, watch=watch))
        return IndexResult(reduce(partial(merge_states, problem.xp), parts), plans, slots)

    @staticmethod
    def _results(problem: Problem, part: AttentionState, q: Array, return_lse: bool) -> list[Any]:
        """Return what a caller gets, in the library and dtype of his queries."""
        out = problem.returned(part.out, q)
        return [out, in_library_of(q, problem.unfolded(part.lse))] if return_lse else [out]

    def _exact_rows(self, problem: Problem, rows: Array) -> Array:
        """Return exact attention of the queries ``rows`` (G, m) to all keys: (G, m, d_v)."""
        some = problem.without_gradient().with_queries(rows)
        return self._attend_segments(replace(some, repeats=1), None).part.out

    @property
    def _budget(self) -> int:
        return self._options.budget or DEFAULT_BUDGET

    def _plan(self, problem: Problem, options: Options) -> Plan:
        # Steps of decoding are all alike, and planning one takes as long as a fifth of it.
        key = problem.n_q, problem.n_k, options, gradient_mode(problem.q, problem.k, problem.v)
        if (plan := self._plans.get(key)) is None:
            plan = make_plan(problem, method=options, **self._settings)
            kept = self._plans if len(self._plans) < PLANS_KEPT else {}
            self._plans = {**kept, key: plan}
        return plan

    def _indexed(self, problem: Problem) -> Segment:
        if problem.n_k <= self._budget or problem.groups == 0:
            return Segment(problem, None)
        # Planned for one query: there are none yet.
        plan = self._plan(replace(problem, q=problem.k[:, :1, :]), self._options)
        with quiet():
            return Segment(problem, self._build(problem, plan, in_library_of(problem.k, self._moment)))

    def _fitting(self, name: str, queries: Array, *others: Array) -> Problem:
        """Return queries with one of the keys in canonical form, or raise what they don't fit in, under their name.

        ``others`` are the call's other arrays, which may record gradients too.
        """
        self._check_like_keys(**{name: queries})
        (*lead, _, d), shape = (tuple(x.shape) for x in (self._one[0], queries))
        if shape[-1] != d or not same_or_grouped_heads(shape[:-2], tuple(lead)):
            expected = f"the index's leading dimensions {tuple(lead)}, or a multiple of the last, and last dimension {d}"
            raise ShapeError(f"{name} must have {expected}, got shape {shape}")
        kernels, kept = self._settings["kernels"], self._kept()
        return canonicalise_on_host(queries, *self._one, self._scale, kernels, [*kept, *others])

    def _kept(self) -> list[Array]:
        """Return all keys and values, which may record gradients."""
        return [x for segment in self._segments for x in (segment.problem.k, segment.problem.v)]

    def _check_like_keys(self, **arrays: Array) -> None:
        # Otherwise it would be the keys that don't fit what came.
        check_alike(**{"the index's keys": self._one[0]}, **arrays)
