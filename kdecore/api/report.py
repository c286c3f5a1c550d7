"""`Report`: what a call did, in six lines, and in detail."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kdecore.accuracy.certificate import Certificate
from kdecore.accuracy.search import SearchStep
from kdecore.api.call import CallOptions
from kdecore.api.index_search import IndexResult
from kdecore.api.run import Result
from kdecore.arrays.namespace import device_name
from kdecore.arrays.scalars import to_float
from kdecore.arrays.text import as_html, as_lines, as_text
from kdecore.core.problem import Problem
from kdecore.core.selection import Slots
from kdecore.methods.base import Plan


@dataclass(frozen=True)
class Report:
    """What one call of `kdecore.attention` did.

    Attributes
    ----------
    method
        Name of the method that ran.
    reason
        Why that method.
    options
        Its options as they were resolved.
    budget
        Keys per query asked for, of the call, its options object or its index; None where left to the method.
    keys_per_query
        Keys evaluated per query, measured: the mean over queries of the slots that counted, keys and tree nodes alike. A key
        that is evaluated and then hidden, by a mask or at the edge of causal attention, counts.
    longest_list
        Slots of the longest list that queries share; all keys where a query sees all.
    shape
        (groups, n_q, n_k, d, d_v).
    diagonal
        Query i stands at the position of key i + diagonal; None where that was not said.
    dtype
        The inputs' dtype.
    library, device
        Where the arrays are.
    copied
        Inputs that had to be copied for their dtype, byte order or layout in memory.
    kernels
        Kernel name → implementation that ran, and why it.
    threads
        Threads of the Numba kernels.
    temporary_bytes
        Planned peak of temporaries above inputs and results, in bytes.
    compile_seconds
        Wall time spent compiling kernels, or loading compiled ones from the disk: on a process's first call of its kind.
    seconds
        Wall time of the call without that.
    certificate
        Estimate of the error; None where the result is exact, has no elements, or none was asked for.
    certificate_seconds
        What it took of ``seconds``; 0 with ``rtol``, whose search it is part of.
    rounds
        What was tried to meet ``rtol``.
    """

    method: str
    reason: str
    options: dict[str, int]
    budget: int | None
    keys_per_query: float
    longest_list: int
    shape: tuple[int, int, int, int, int]
    diagonal: int | None
    dtype: str
    library: str
    device: str
    copied: tuple[str, ...]
    kernels: dict[str, str]
    threads: int
    temporary_bytes: int
    compile_seconds: float
    seconds: float
    certificate: Certificate | None = None
    certificate_seconds: float = 0.0
    rounds: tuple[SearchStep, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain Python values, ready for JSON."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: plain(item) for name, item in value.items()}
            return [plain(item) for item in value] if isinstance(value, tuple) else value

        return {name: plain(value) for name, value in asdict(self).items()}

    def _summary(self) -> list[tuple[str, str]]:
        groups, n_q, n_k, d, d_v = self.shape
        asked = "no budget asked for" if self.budget is None else f"budget asked for: {self.budget}"
        exact = "exact up to rounding" if self.method == "exact" else "not asked for"
        compiling = f", and {self.compile_seconds:.1f} s to compile kernels or load them" if self.compile_seconds else ""
        return [
            ("method", f"{self.method} ({self.reason})"),
            ("keys per query", f"{self.keys_per_query:.1f} of {n_k} ({asked})"),
            ("error", exact if self.certificate is None else str(self.certificate)),
            (
                "problem",
                f"{groups} × {n_q} queries, d = {d}, d_v = {d_v}, {self.dtype}, {self.library} on {self.device}",
            ),
            ("time", f"{self.seconds * 1e3:.2f} ms{compiling}"),
            ("memory", f"{self.temporary_bytes / 2**20:.1f} MiB of temporaries planned"),
        ]

    def _more(self) -> list[tuple[str, str]]:
        place = f"query i at key i{f' {self.diagonal:+d}' if self.diagonal else ''}"
        took = f", in {self.certificate_seconds * 1e3:.2f} ms of the time" if self.certificate_seconds else ""
        compared = [] if self.certificate is None else [f"from {self.certificate.rows} exact rows a group{took}"]
        return [
            *((name, str(value)) for name, value in self.options.items()),
            *(("tried", str(one)) for one in self.rounds),
            *(("certificate", said) for said in compared),
            ("longest list", f"{self.longest_list} keys"),
            *([] if self.diagonal is None else [("diagonal", place)]),
            *([("copied", f"{', '.join(self.copied)} (dtype, layout or grouped heads)")] if self.copied else []),
            *((f"kernel {name}", choice) for name, choice in self.kernels.items()),
            ("threads", f"{self.threads} in Numba kernels"),
        ]

    def details(self) -> str:
        """Return all of it as text: what `str` says, options, the search's steps, and each kernel with why it ran."""
        return as_text([*self._summary(), *self._more()])

    def __str__(self) -> str:
        return as_lines(self._summary())

    def _repr_html_(self) -> str:
        return as_html(self._summary(), as_text(self._more()))


def make_report(
    problem: Problem,
    diagonal: int | None,
    call: CallOptions,
    results: list[Result],
    certificate: Certificate | None,
    certificate_seconds: float,
    seconds: float,
    compile_seconds: float,
) -> Report:
    """Describe a finished call whose queries stand at ``diagonal``, that took ``seconds``, and of them so many to compile.

    Where groups were treated differently, this says what was done with those of an approximate
    method that took most.
    """
    rows = [len(one.subproblem.groups) * (one.subproblem.queries[1] - one.subproblem.queries[0]) for one in results]
    keys = [sum(to_float(slots.total) for slots in one.slots) for one in results]
    approximate = [i for i, one in enumerate(results) if one.plan.method != "exact"] or range(len(results))
    main = results[max(approximate, key=keys.__getitem__)]
    plan, reason = main.plan, main.plan.reason
    unlike = sum(count for one, count in zip(results, rows, strict=True) if one.plan.options != plan.options)
    if unlike:
        reason = f"{reason}; otherwise for {unlike} of {sum(rows)} queries"
    bounded = [one.certificate for one in results if one.certificate is not None]
    if bounded:
        certificate = max(bounded, key=lambda one: one.upper(call.rtol_norm))
    return replace(
        report_of_plan(problem, plan, [slots for one in results for slots in one.slots], seconds, compile_seconds),
        reason=reason,
        budget=call.budget_asked,
        diagonal=diagonal,
        kernels={name: text for one in results for name, text in kernels_of(one.plan).items()},
        temporary_bytes=max(one.plan.temporary_bytes for one in results),
        certificate=certificate,
        certificate_seconds=certificate_seconds,
        rounds=tuple(one for result in results for one in result.rounds),
    )


def kernels_of(plan: Plan) -> dict[str, str]:
    """Return which implementation of each kernel was chosen, and why."""
    return {name: f"{choice.target} ({choice.reason})" for name, choice in plan.kernels.items()}


def report_of_plan(problem: Problem, plan: Plan, slots: Sequence[Slots], seconds: float, compile_seconds: float) -> Report:
    """Describe a call that did what one plan says, with so many slots that counted in each Selection."""
    keys = sum(to_float(one.total) for one in slots)
    return Report(
        method=plan.method,
        reason=plan.reason,
        options=asdict(plan.options),
        budget=None,
        keys_per_query=keys / max(1, problem.groups * problem.n_q),
        longest_list=max((int(to_float(one.longest)) for one in slots), default=0),
        shape=(problem.groups, problem.n_q, problem.n_k, problem.d, problem.d_v),
        diagonal=None,
        dtype=problem.input_dtype,
        library=problem.library,
        device=device_name(problem.q),
        copied=problem.copied,
        kernels=kernels_of(plan),
        threads=plan.threads,
        temporary_bytes=plan.temporary_bytes,
        compile_seconds=compile_seconds,
        seconds=seconds - compile_seconds,
    )


def report_of_index(problem: Problem, found: IndexResult, seconds: float, compile_seconds: float, **fields: Any) -> Report:
    """Describe a call of an index, by the segment of an approximate method that took most; ``fields`` say the rest."""
    # Exact segments beside estimated ones don't make an answer exact.
    main = max(
        zip(found.slots, found.plans, strict=True),
        key=lambda one: (one[1].method != "exact", to_float(one[0].total)),
    )[1]
    return replace(report_of_plan(problem, main, found.slots, seconds, compile_seconds), **fields)
