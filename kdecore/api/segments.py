"""`Segment`: some of the keys of an index with the tree over them, in the array library that a call needs."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, cast

from kdecore.arrays.gradients import gradient_mode, without_gradient
from kdecore.arrays.memory import in_library_of
from kdecore.arrays.namespace import Array, namespace_name
from kdecore.core.options import Options
from kdecore.core.problem import Problem
from kdecore.core.selection import Selected, Selection
from kdecore.methods import tree_lists, tree_pilot, treecode
from kdecore.methods.base import Plan
from kdecore.methods.key_tree import KeyTree
from kdecore.methods.tree_queries import Calibration
from kdecore.methods.treecode import MANY_QUERIES, Treecode

EXAMPLES = 2048
"""Queries, at least or all, that few queries are taken to look like: the keys themselves where none are given."""


@dataclass(frozen=True)
class Segment:
    """Some of the keys.

    Attributes
    ----------
    problem
        These keys and values, and no queries.
    tree
        The tree over them; None for few keys, which are attended to exactly.
    known
        What was found out about how far to open the tree, by options; grows with use, and does not go into another library.
    """

    problem: Problem
    tree: KeyTree | None
    known: dict[Any, Calibration] = field(default_factory=dict, compare=False, repr=False)


def sample_of(rows: Array) -> Array:
    """Return rows (G, n, d), or at least `EXAMPLES` of them, evenly spaced, without their gradients."""
    return without_gradient(rows)[:, :: max(1, int(rows.shape[1]) // EXAMPLES), :]


def in_library(like: Problem, segment: Segment) -> Segment:
    """Return a segment with arrays of the library that a problem has, on the CPU, sharing memory."""
    if segment.problem.xp is like.xp:
        return segment

    def converted(value: Any) -> Any:
        if isinstance(value, Problem):
            arrays = {name: in_library_of(like.k, getattr(value, name)) for name in ("q", "k", "v")}
            return replace(value, xp=like.xp, device=like.device, **arrays)
        if isinstance(value, dict):
            return {}
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{one.name: converted(getattr(value, one.name)) for one in fields(value)})
        if isinstance(value, tuple):
            items = map(converted, value)
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return value if value is None else in_library_of(like.k, value)

    return cast("Segment", converted(segment))


def recorded_now(problem: Problem) -> Problem:
    """Return a problem that records gradients only if they are recorded now.

    PyTorch's views of leaves that are made while they aren't say that they do, and would be leaves of their own.
    """
    return problem if gradient_mode(problem.q, problem.k, problem.v) else problem.without_gradient()


def joined(first: Problem, second: Problem) -> Problem:
    """Return a problem with the keys of both; in PyTorch where either is, which may record gradients."""
    if namespace_name(first.xp) == "numpy":
        first = in_library(second, Segment(first, None)).problem
    second = in_library(first, Segment(second, None)).problem
    xp = first.xp
    return replace(first, k=xp.concat([first.k, second.k], axis=1), v=xp.concat([first.v, second.v], axis=1))


def calibration(
    problem: Problem, segment: Segment, plan: Plan, like: Array | None, plan_for: Callable[[Problem, Options], Plan]
) -> Calibration | None:
    """Return how far to open a segment's tree for few queries, found with examples; None where queries say so.

    It is a constant, also where keys are recorded, and kept in the segment's library. Examples are queries ``like`` those to
    come, or the keys themselves.
    """
    options = plan.options
    assert isinstance(options, Treecode)
    if segment.tree is None or problem.n_q >= MANY_QUERIES or problem.n_q == 0:
        return None
    options = replace(options, block_size=min(options.rows, problem.n_q))
    if options not in segment.known:
        keys, tree = segment.problem.without_gradient(), segment.tree.without_gradient()
        rows = sample_of(keys.k) if like is None else in_library_of(keys.k, like)
        examples = replace(keys, q=rows, repeats=1)
        planned = plan_for(examples, options)
        prepared = treecode.prepare_queries(examples, planned, tree)
        segment.known[options] = tree_pilot.calibrate(examples, planned, prepared)
    known = segment.known[options]
    threshold, slope = (x if x is None else in_library_of(problem.k, x) for x in (known.threshold, known.slope))
    return known._replace(threshold=threshold, slope=slope)


def selected(
    problem: Problem,
    segment: Segment,
    tree: KeyTree | None,
    plan: Plan,
    like: Array | None,
    plan_for: Callable[[Problem, Options], Plan],
) -> Selected:
    """Select from a segment's keys for queries, as planned; ``tree`` is the segment's in the problem's library."""
    if tree is None or plan.method == "exact":
        return Selection()
    known = calibration(problem, segment, plan, like, plan_for)
    prepared = treecode.prepare_queries(problem, plan, tree, known)
    return tree_lists.for_queries(problem, tree, treecode.open_for(problem, plan, prepared))
