"""`KeyIndex`: the key side of the treecode, built once for many batches of queries, and for keys that are appended."""

import time
from dataclasses import replace
from functools import partial, reduce
from typing import Any, NamedTuple

from kdecore.attend import attend
from kdecore.call import CallOptions
from kdecore.certificate import FEWEST_ROWS, Certificate, certify, estimate_errors, stratified
from kdecore.errors import OptionError, ShapeError, did_you_mean
from kdecore.inputs import Problem, canonicalise_on_host, check_alike, same_or_grouped_heads
from kdecore.kernels.jit import compile_seconds
from kdecore.kernels.registry import choose
from kdecore.kernels.threads import team
from kdecore.merge import Part, merge
from kdecore.methods import treecode
from kdecore.methods.view import query_moment
from kdecore.namespaces import (
    Array,
    device_context,
    device_name,
    gradient_mode,
    host,
    in_library_of,
    outside_inference_mode,
    quiet,
    recording,
    take_along_rows,
    to_float,
    to_host,
    without_gradient,
)
from kdecore.nonfinite import merge_not_finite
from kdecore.options import DEFAULT_BUDGET, MANY_QUERIES, Exact, Options, Treecode, check_boolean, integer_at_least
from kdecore.outcomes import run_all
from kdecore.planning import Plan, check_settings, exact_row_cost, expected_cost, make_plan, site_of
from kdecore.report import report_of_plan
from kdecore.segments import Segment, in_library, joined, recorded_now, sample_of
from kdecore.selection import Selected, Selection, Slots
from kdecore.shares import check_restrictions
from kdecore.tolerance import CERTIFIED_STREAM, PILOT_STREAM, Round

LEAST_BUDGET = 64
"""Keys per query that every tree gets at least."""
PLANS_KEPT = 32
CERTIFIED_SHARE = 20
"""One in so many queries is compared to certify a budget, but `FEWEST_ROWS` at least."""


class Found(NamedTuple):
    """Attention of queries to all keys of an index.

    Attributes
    ----------
    part
        The result.
    plans
        What was done with each segment.
    slots
        How many slots counted in each.
    """

    part: Part
    plans: list[Plan]
    slots: list[Slots]


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
            rounds: tuple[Round, ...] = ()
            bound, seconds = None, 0.0
            if rtol is None:
                found = self._attend_segments(problem, call.budget or self._budget, count=return_report)
                if return_report and certificate > 0:
                    bound, seconds = self._certified(problem, found, float(certificate))
            else:
                found, bound, rounds = self._to_tolerance(problem, float(rtol), rtol_norm)
        results = self._results(problem, found.part, q, return_lse)
        if return_report:
            compiling, took = compile_seconds() - compiled, time.perf_counter() - started
            # Exact segments beside estimated ones don't make an answer exact.
            main = max(
                zip(found.slots, found.plans, strict=True),
                key=lambda one: (one[1].method != "exact", to_float(one[0].total)),
            )[1]
            report = report_of_plan(problem, main, found.slots, took, compiling)
            results.append(
                replace(
                    report,
                    reason=f"KeyIndex, segments: {len(found.plans)}" + ("" if rtol is None else f", rtol {rtol:g}"),
                    budget=call.budget,
                    shape=(problem.groups, problem.n_q, self.n_k, problem.d, self._segments[0].problem.d_v),
                    certificate=bound,
                    certificate_seconds=seconds,
                    rounds=rounds,
                )
            )
        return tuple(results) if len(results) > 1 else results[0]

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

    def _attend_segments(self, problem: Problem, budget: int | None, *, count: bool = False) -> Found:
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
            selection: Selected = Selection()
            if there.tree is not None and plans[-1].method != "exact":
                known = self._calibration(of_segment, segment, plans[-1])
                prepared = treecode.prepare_queries(of_segment, plans[-1], there.tree, known)
                opened = treecode.open_for(of_segment, plans[-1], prepared)
                selection = treecode.for_queries(of_segment, there.tree, opened)
            parts.append(attend(of_segment, plans[-1], selection, watch=watch))
        return Found(reduce(partial(merge, problem.xp), parts), plans, slots)

    @staticmethod
    def _results(problem: Problem, part: Part, q: Array, return_lse: bool) -> list[Any]:
        """Return what a caller gets, in the library and dtype of his queries."""
        out = problem.returned(part.out, q)
        return [out, in_library_of(q, problem.unfolded(part.lse))] if return_lse else [out]

    def _exact_rows(self, problem: Problem, rows: Array) -> Array:
        """Return exact attention of the queries ``rows`` (G, m) to all keys: (G, m, d_v)."""
        some = problem.without_gradient().with_queries(rows)
        return self._attend_segments(replace(some, repeats=1), None).part.out

    def _costs(self, problem: Problem, plans: list[Plan]) -> tuple[float, float]:
        """Return what evaluating all queries is expected to take as planned, and one exact row of each group."""
        sizes = [replace(segment.problem, q=problem.q, repeats=problem.repeats) for segment in self._segments]
        planned = sum(expected_cost(some, plan.options).evaluate for some, plan in zip(sizes, plans, strict=True))
        return planned, sum(exact_row_cost(some) * some.groups for some in sizes)

    def _certified(self, problem: Problem, found: Found, share: float) -> tuple[Certificate | None, float]:
        """Compare some rows with exact attention; return what was found, None where all was exact, and the seconds."""
        if all(plan.method == "exact" for plan in found.plans) or problem.d_v == 0:
            return None, 0.0
        started, (cost, row_cost) = time.perf_counter(), self._costs(problem, found.plans)
        exact, seed = partial(self._exact_rows, problem), self._settings["seed"]
        return certify(problem, found.part.out, exact, cost, row_cost, share, seed), time.perf_counter() - started

    def _to_tolerance(self, problem: Problem, rtol: float, norm: str) -> tuple[Found, Certificate | None, tuple[Round, ...]]:
        """Return attention within a tolerance, and what it rests on.

        As `kdecore.tolerance.search`, but all queries are evaluated with each budget: they take little, trees being there.
        """
        xp, n_q, seed = problem.xp, problem.n_q, self._settings["seed"]
        rounds: list[Round] = []
        spent, exact_cost = 0.0, 0.0
        samples: dict[str, tuple[Array, Array]] = {}
        certified = max(FEWEST_ROWS, n_q // CERTIFIED_SHARE)
        numbers = {"pilot": (FEWEST_ROWS, PILOT_STREAM), "certified": (certified, CERTIFIED_STREAM)}

        def compare(found: Found, kind: str) -> Certificate:
            if kind not in samples:
                count, stream = numbers[kind]
                rows = xp.astype(stratified(xp, problem.groups, count, seed, stream, problem.device) * n_q, xp.int64)
                samples[kind] = rows, self._exact_rows(problem, rows)
            rows, exact = samples[kind]
            shape = (problem.groups, int(rows.shape[1]), 1, int(exact.shape[2]))
            some = take_along_rows(xp, without_gradient(found.part.out), rows)
            return estimate_errors(host.reshape(to_host(some), shape), host.reshape(to_host(exact), shape), n_q)

        budget = self._budget
        while n_q > 2 * FEWEST_ROWS and 2 * budget < self.n_k and problem.groups * problem.d_v > 0:
            found = self._attend_segments(problem, budget, count=True)
            cost, row_cost = self._costs(problem, found.plans)
            spent, exact_cost = spent + cost, row_cost * n_q
            for kind in numbers:
                bound = compare(found, kind)
                error, upper = float(getattr(bound, norm)), bound.upper(norm)
                rounds.append(Round("treecode", budget, kind, bound.rows, error, upper, spent / exact_cost))
                if upper > rtol:
                    break
            else:
                return found, bound, tuple(rounds)
            budget *= 2
        return self._attend_segments(problem, None, count=True), None, tuple(rounds)

    @property
    def _budget(self) -> int:
        return self._options.budget or DEFAULT_BUDGET

    def _plan(self, problem: Problem, options: Options) -> Plan:
        # Steps of decoding are all alike, and planning one takes as long as a fifth of it.
        key = problem.n_q, problem.n_k, options, gradient_mode(problem.q, problem.k, problem.v)
        plan = self._plans.get(key)
        if plan is None:
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
            return Segment(problem, treecode.build(problem, plan, in_library_of(problem.k, self._moment)))

    def _calibration(self, problem: Problem, segment: Segment, plan: Plan) -> treecode.Calibration | None:
        """Return how far to open a segment's tree for few queries, found with examples; None where queries say so.

        It is a constant, also where keys are recorded, and kept in the segment's library.
        """
        options = plan.options
        assert isinstance(options, Treecode)
        if segment.tree is None or problem.n_q >= MANY_QUERIES or problem.n_q == 0:
            return None
        options = replace(options, block_size=min(options.rows, problem.n_q))
        if options not in segment.known:
            keys, tree = segment.problem.without_gradient(), segment.tree.without_gradient()
            like = sample_of(keys.k) if self._like is None else in_library_of(keys.k, self._like)
            examples = replace(keys, q=like, repeats=1)
            planned = self._plan(examples, options)
            prepared = treecode.prepare_queries(examples, planned, tree)
            segment.known[options] = treecode.calibrate(examples, planned, prepared)
        known = segment.known[options]
        threshold, slope = (x if x is None else in_library_of(problem.k, x) for x in (known.threshold, known.slope))
        return known._replace(threshold=threshold, slope=slope)

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
