"""`KeyIndex`: the key side of the treecode, built once for many batches of queries, and for keys that are appended."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from kdecore.attend import attend
from kdecore.errors import OptionError, ShapeError
from kdecore.inputs import Problem, canonicalise
from kdecore.kernels.threads import team
from kdecore.merge import Part, merge
from kdecore.methods import treecode
from kdecore.namespaces import Array, device_context, gradient_mode, outside_inference_mode, without_gradient
from kdecore.nonfinite import merge_not_finite
from kdecore.options import DEFAULT_BUDGET, Exact, Options, Treecode, integer_at_least
from kdecore.outcomes import run_all
from kdecore.planning import Plan, make_plan
from kdecore.selection import Selection
from kdecore.shares import check_restrictions

LEAST_BUDGET = 64
"""Keys per query that every tree gets at least."""


PLANS_KEPT = 32


@dataclass(frozen=True)
class Piece:
    """Some of the keys.

    Attributes
    ----------
    problem
        These keys and values, and no queries.
    tree
        The tree over them; None for few keys, which are attended to exactly.
    """

    problem: Problem
    tree: treecode.KeyTree | None


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
        problem = canonicalise(k, k, v, scale)
        if not (method == "treecode" or isinstance(method, Treecode)):
            raise OptionError(f'method must be "treecode" or Treecode options for a KeyIndex, got {method!r}')
        if budget is not None:
            budget = integer_at_least(1, "budget", budget)
        self._options = (method if isinstance(method, Treecode) else Treecode()).resolve(budget)
        self._settings: dict[str, Any] = {"seed": seed, "kernels": kernels, "threads": threads}
        self._plans: dict[Any, Plan] = {}
        self._one, self._scale = (k[..., :1, :], v[..., :1, :]), problem.scale
        seen = problem.k if queries is None else self._fitting(queries).q
        self._threads = self._plan(problem, Exact()).threads
        with team(self._threads), device_context(self._one[0]):
            self._moment = treecode.second_moment(problem.xp, without_gradient(seen))
            self._pieces: tuple[Piece, ...] = (self._indexed(replace(problem, q=problem.q[:, :0, :])),)

    @property
    def n_k(self) -> int:
        """Number of keys."""
        return sum(piece.problem.n_k for piece in self._pieces)

    def attend(self, q: Array, *, return_lse: bool = False) -> Any:
        """Return softmax attention of queries to all keys so far.

        Parameters
        ----------
        q
            (…, n_q, d), of the keys' library, device, dtype and leading dimensions; the last of these may be a multiple of
            the keys' (grouped heads).
        return_lse
            Also return the natural log of each query's softmax denominator.

        Returns
        -------
        out : Array
            (…, n_q, d_v), of q's library, dtype and device.
        lse : Array
            (…, n_q), in the accumulation dtype; only with ``return_lse``.

        Raises
        ------
        ShapeError, DTypeError, DeviceError
            Naming what doesn't fit the keys.
        """
        problem = self._fitting(q)
        with team(self._threads), device_context(self._one[0]):
            part = self._attend_pieces(problem)
        return self._result(problem, part, q.dtype, return_lse)

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
        ShapeError, DTypeError, DeviceError
            Naming what doesn't fit; the index is then as it was.
        """
        problem, added = self._fitting(q), self._added(k, v)
        new = replace(added, q=problem.q, repeats=problem.repeats, lead=problem.lead)
        plan_for: Callable[[Problem], Plan] = partial(make_plan, method=self._options, **self._settings)
        with team(self._threads), device_context(self._one[0]):
            causal = check_restrictions(new, True, None, None, None, q)
            part = merge_not_finite(problem.xp, self._attend_pieces(problem), run_all(new, causal, plan_for))
            self._append(added)
        return self._result(problem, part, q.dtype, return_lse)

    def append(self, k: Array, v: Array) -> None:
        """Add keys (…, m, d) and values (…, m, d_v), of the index's library, device, dtype and leading dimensions.

        Raises
        ------
        ShapeError, DTypeError, DeviceError
            Naming what doesn't fit; the index is then as it was.
        """
        added = self._added(k, v)
        with team(self._threads), device_context(self._one[0]):
            self._append(added)

    @outside_inference_mode()
    def _added(self, k: Array, v: Array) -> Problem:
        """Return new keys in canonical form, without queries, or raise what doesn't fit."""
        first = self._pieces[0].problem
        added = canonicalise(self._one[0], k, v, first.scale)
        if added.d_v != first.d_v:
            raise ShapeError(f"v must have the last dimension {first.d_v} of the index's values, got {tuple(v.shape)}")
        if added.groups != first.groups:
            raise ShapeError(f"k must have the leading dimensions {first.lead} of the index's keys, got {tuple(k.shape)}")
        return replace(first, k=added.k, v=added.v)

    @outside_inference_mode()
    def _append(self, added: Problem) -> None:
        pieces = list(self._pieces)
        if pieces[-1].tree is None:
            added = joined(pieces.pop().problem, added)
        if added.n_k > self._budget:
            while pieces and pieces[-1].problem.n_k <= added.n_k:
                added = joined(pieces.pop().problem, added)
        self._pieces = (*pieces, self._indexed(added))

    def _attend_pieces(self, problem: Problem) -> Part:
        """Return attention of a problem's queries to all keys so far."""
        pieces = self._pieces
        n_k = sum(piece.problem.n_k for piece in pieces)
        part = None
        for piece in pieces:
            share = max(min(LEAST_BUDGET, self._budget), self._budget * piece.problem.n_k // n_k)
            of_piece = replace(piece.problem, q=problem.q, repeats=problem.repeats)
            found = self._attend_piece(of_piece, piece.tree, share)
            part = found if part is None else merge(problem.xp, part, found)
        assert part is not None
        return part

    @staticmethod
    def _result(problem: Problem, part: Part, dtype: Any, return_lse: bool) -> Any:
        out = problem.xp.astype(problem.unfolded(part.out), dtype, copy=False)
        return (out, problem.unfolded(part.lse)) if return_lse else out

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

    def _indexed(self, problem: Problem) -> Piece:
        if problem.n_k <= self._budget:
            return Piece(problem, None)
        # Planned for one query: there are none yet.
        plan = self._plan(replace(problem, q=problem.k[:, :1, :]), self._options)
        return Piece(problem, treecode.build(problem, plan, self._moment))

    def _attend_piece(self, problem: Problem, tree: treecode.KeyTree | None, budget: int) -> Part:
        options = Exact() if tree is None else replace(self._options, num_slots=budget)
        plan = self._plan(problem, options)
        if tree is None or plan.method == "exact":
            return attend(problem, plan, Selection())
        return attend(problem, plan, treecode.open_for(problem, plan, treecode.prepare_queries(problem, plan, tree)))

    def _fitting(self, q: Array) -> Problem:
        """Return queries with one of the keys in canonical form, or raise what they don't fit in."""
        return canonicalise(q, *self._one, self._scale)


def joined(first: Problem, second: Problem) -> Problem:
    """Return a problem with the keys of both."""
    xp = first.xp
    return replace(first, k=xp.concat([first.k, second.k], axis=1), v=xp.concat([first.v, second.v], axis=1))
