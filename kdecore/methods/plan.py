"""`make_plan`: what will be done, from shapes and options alone. Touches no array data."""

import math
from dataclasses import replace
from typing import Any

from kdecore.arrays.errors import OptionError, did_you_mean
from kdecore.arrays.random import check_seed
from kdecore.arrays.scalars import integer_at_least
from kdecore.core.options import Exact, Options
from kdecore.core.problem import Problem
from kdecore.kernels.registry import check_target, choose
from kdecore.kernels.runtime.threads import thread_count
from kdecore.kernels.site import Site
from kdecore.methods.base import METHODS, Plan
from kdecore.methods.choices import choices, site_of
from kdecore.methods.levels import steps
from kdecore.methods.memory import FEWEST_QUERIES, temporary_bytes


def check_settings(seed: object = 0, kernels: str = "auto", threads: int | None = None) -> dict[str, Any]:
    """Return what all plans of a call share, each in its range, or raise `OptionError`."""
    count = thread_count(None if threads is None else integer_at_least(1, "threads", threads))
    return {"seed": check_seed(seed), "kernels": check_target(kernels), "threads": count}


def check_method(method: str | Options, budget: int | None) -> Options:
    """Return the options that a method and a budget mean, every field set; or raise `OptionError`."""
    if budget is not None:
        budget = integer_at_least(1, "budget", budget)
    if isinstance(method, Options):
        known = METHODS.get(getattr(method, "name", ""))
        if known is None or not isinstance(method, known.options):
            raise OptionError(f"method must be registered (kdecore.methods.register), got {method!r}")
        return method.resolve(budget)
    if not isinstance(method, str) or method not in METHODS:
        expected = f"one of the names {', '.join(METHODS)} or an options object"
        raise OptionError(f"method must be {expected}, got {method!r}{did_you_mean(method, tuple(METHODS))}")
    return METHODS[method].options().resolve(budget)


def make_plan(
    problem: Problem,
    *,
    method: str | Options = "auto",
    budget: int | None = None,
    seed: int = 0,
    kernels: str = "auto",
    threads: int | None = None,
    limit: float = math.inf,
) -> Plan:
    """Resolve method, budget and kernels for a problem; parameters as in `kdecore.attention`.

    Where ``"auto"`` would take what even for few queries of one group takes more than ``limit`` bytes, exact is planned.
    """
    seed, kernels, count = check_settings(seed, kernels, threads).values()
    site = site_of(problem)
    asked = check_method(method, budget)
    options, reason = _adapted(problem, asked, site, kernels)
    cuts = steps(problem, options)
    chosen = choices(problem, options, site, kernels)
    if asked.name == "auto" and limit < math.inf and not isinstance(options, Exact):
        few = _few_queries(problem)
        least = temporary_bytes(few, options, steps(few, options), chosen, count)
        if least > limit:
            reason = f"auto: {options.name} takes at least {least} bytes here, of which max_memory leaves {limit:.0f}"
            options = Exact()
            cuts = steps(problem, options)
            chosen = choices(problem, options, site, kernels)
    exact = choose("attend_dense", replace(site, gradient=""), kernels)
    most = temporary_bytes(problem, options, cuts, chosen, count)
    return Plan(options, reason, seed, chosen, exact, count, most, cuts)


def _few_queries(problem: Problem) -> Problem:
    """Return a problem of one group and so few queries that it isn't cut for want of memory."""
    visible = None if problem.visible is None else problem.visible.rows(slice(FEWEST_QUERIES))
    q, k, v = problem.q[:1, :FEWEST_QUERIES, :], problem.k[:1, ...], problem.v[:1, ...]
    return replace(problem, q=q, k=k, v=v, visible=visible)


def _adapted(problem: Problem, options: Options, site: Site, kernels: str) -> tuple[Options, str]:
    """Return the options that suit a problem, and why these."""
    if problem.groups * problem.n_q == 0:
        return Exact(), "there are no queries"
    if problem.visible is not None and problem.visible.pairs == 0:
        return Exact(), "no query sees a key"
    if options.name != "auto" and options.budget is not None and options.budget >= problem.most_seen:
        return Exact(), f"a budget of {options.budget} covers all {problem.most_seen} keys"
    return METHODS[options.name].adapted(problem, options, site, kernels)
