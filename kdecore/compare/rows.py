"""What is measured of one method at one budget, and which of its rows are furthest off."""

from dataclasses import dataclass

from kdecore.accuracy.certificate import Certificate
from kdecore.accuracy.metrics import Errors
from kdecore.arrays.namespace import Array, host
from kdecore.arrays.rows import row_norms
from kdecore.arrays.scalars import to_float

SDPA = "exact (torch SDPA)"
"""Label of the baseline where PyTorch computes it."""
WORST = 5
"""Rows that are kept for each setting."""


@dataclass(frozen=True)
class WorstRow:
    """A row of the result that is far off, E = result − exact and O = exact.

    Attributes
    ----------
    place
        Leading indices and number of the query.
    error
        ‖Eᵢ‖ / ‖Oᵢ‖.
    median_error
        The same of the median row, over all groups; what ``error`` compares with.
    exact_norm
        ‖Oᵢ‖ over the root mean square of all rows' norms: a small row is far off soon.
    share
        ‖Eᵢ‖² / ‖E‖²_F, over all groups.
    """

    place: tuple[int, ...]
    error: float
    median_error: float
    exact_norm: float
    share: float


@dataclass(frozen=True)
class Row:
    """One method at one budget, or at the one it found for a tolerance.

    Attributes
    ----------
    method
        Name asked for; for the baseline a label that says what computed it.
    ran
        Name of the method that ran: ``"auto"`` resolves to one, and a budget of n_k or more is exact. Where a tolerance
        found several, their names in the order of the seeds, such as ``"treecode, exact"``.
    budget
        Keys per query asked for; None for exact methods, and with a tolerance.
    rtol
        Relative Frobenius error asked for instead of a budget, or None.
    keys_per_query
        Keys evaluated per query, measured, mean over seeds; of baselines, the budget.
    milliseconds
        Median of ``timings``.
    timings
        Wall time of every timed call in milliseconds, for all queries (`time_calls`).
    timed_rows
        Queries per group that the timed calls computed; where below n_q, the times are scaled up by n_q / timed_rows.
    speedup
        The baseline's milliseconds divided by these.
    errors, errors_std
        Mean over seeds, and sample standard deviation (NaN for one seed).
    error_rows
        Queries per group that the errors are computed on.
    peak_bytes
        Peak of resident memory above the inputs during one more call, result included; None where not known.
    kernels
        Kernel name → implementation that ran.
    certificate
        What the call with the first seed said of its own error; None where that result is exact, or a baseline's.
    first_errors
        The errors with that seed, which the certificate is about.
    worst_rows
        With that seed, `WORST` of them at most, the worst first.
    """

    method: str
    ran: str
    budget: int | None
    rtol: float | None
    keys_per_query: float
    milliseconds: float
    timings: tuple[float, ...]
    timed_rows: int
    speedup: float
    errors: Errors
    errors_std: Errors
    error_rows: int
    peak_bytes: int | None
    kernels: dict[str, str]
    certificate: Certificate | None
    first_errors: Errors
    worst_rows: tuple[WorstRow, ...]

    @property
    def label(self) -> str:
        """Name or tolerance asked for, and in brackets the method that ran where it is another."""
        asked = self.method if self.rtol is None else f"rtol {self.rtol:g}"
        return asked if asked.startswith(self.ran) else f"{asked} ({self.ran})"

    @property
    def setting(self) -> str:
        """The label, and the budget where there is one."""
        return self.label if self.budget is None else f"{self.label} at {self.budget:,} keys"


def find_worst_rows(estimate: Array, exact: Array, rows: Array | None) -> tuple[WorstRow, ...]:
    """Return the rows that are furthest off, relative to their own norm.

    Parameters
    ----------
    estimate, exact
        NumPy (…, n, d_v), n ≥ 1, computed in float64.
    rows
        (n,) numbers of the queries that these are; None for all.

    Returns
    -------
    tuple of WorstRow
        At most `WORST`, the worst first; rows with NaN or infinity count as the worst. O(n d_v + n log n).
    """
    shape = tuple(exact.shape[:-1])
    exact = host.astype(exact, host.float64, copy=False)
    sizes = row_norms(host, exact)
    away = row_norms(host, host.astype(estimate, host.float64, copy=False) - exact)
    sizes, away = host.reshape(sizes, (-1,)), host.reshape(away, (-1,))
    # 0 / 0 is a row that is right.
    relative = host.where(away == 0, 0.0, away / host.where(away == 0, 1.0, sizes))
    order = host.argsort(host.where(host.isnan(relative), host.inf, relative), descending=True)
    median = to_float(relative[order[int(order.shape[0]) // 2]])
    # With nothing but zero rows, each is 0 of the typical one.
    typical, total = (float(x) or 1.0 for x in (host.sqrt(host.mean(sizes * sizes)), host.sum(away * away)))
    found = []
    for number in order[:WORST].tolist():
        *lead, query = _place(number, shape)
        found.append(
            WorstRow(
                place=(*lead, query if rows is None else int(rows[query])),
                error=to_float(relative[number]),
                median_error=median,
                exact_norm=to_float(sizes[number] / typical),
                share=to_float(away[number] * away[number] / total),
            )
        )
    return tuple(found)


def _place(number: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the indices of an element by its number, in rows."""
    place: list[int] = []
    for size in reversed(shape):
        number, index = divmod(number, size)
        place.insert(0, index)
    return tuple(place)
