"""What to use: one sentence, why, and the call to copy. The table and the page both show it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from kdecore.compare.cases import Case
from kdecore.compare.rows import SDPA, Row
from kdecore.core.options import DEFAULT_BUDGET
from kdecore.methods import METHODS
from kdecore.methods.auto import WORTHWHILE, exact_over_treecode
from kdecore.methods.costs import Sizes

BOUND = 0.05
"""Largest relative Frobenius error of what is recommended, unless a tolerance was asked for."""
LARGEST_ERROR = 0.2
"""Above it, a time is that of another result: no speed-up is shown, whatever was asked for."""
LEAST_GAIN = 1.1
"""What is recommended has to be so many times as fast as exact attention: two runs of the same differ by as much."""
WIDTH = 80


@dataclass(frozen=True)
class Verdict:
    """What to use.

    Attributes
    ----------
    sentence
        One sentence: what to use, with its gain and error, or exact attention.
    reason
        What was asked of it, or why it is exact attention; one sentence or two.
    call
        Python to copy.
    row
        What was measured of it.
    looked_at
        The estimate whose worst rows are worth a look: that one, or the best there was; None where there was none.
    bound
        Largest relative Frobenius error that was allowed.
    """

    sentence: str
    reason: str
    call: str
    row: Row
    looked_at: Row | None
    bound: float


def largest_error(rtols: Sequence[float]) -> float:
    """Return the largest error that may be recommended: `BOUND`, or the smallest tolerance asked for."""
    return min([*rtols, LARGEST_ERROR]) if rtols else BOUND


def verdict(case: Case, rows: Sequence[Row], bound: float) -> Verdict:
    """Choose the fastest setting whose error is within a bound and that is faster than exact attention; else exact.

    Parameters
    ----------
    case
        Inputs that were measured: their sizes, scale and diagonal.
    rows
        Rows of `kdecore.compare.comparison.measure`, the baseline first, which is exact.
    bound
        Largest relative Frobenius error (mean over seeds), of `largest_error`.

    Returns
    -------
    Verdict
        Errors that are NaN are within no bound.
    """
    exact = min((row for row in rows if row.ran == "exact"), key=lambda row: row.milliseconds)
    estimates = [row for row in rows if row.ran != "exact"]
    within = [row for row in estimates if row.errors.frobenius <= bound]
    fastest = min(within, key=lambda row: row.milliseconds, default=None)
    nearest = min(
        (row for row in estimates if math.isfinite(row.errors.frobenius)), key=lambda row: row.errors.frobenius, default=None
    )
    allowed = f"{percent(bound)} error"
    if fastest is not None and exact.milliseconds / fastest.milliseconds >= LEAST_GAIN:
        gain = f"{times(exact.milliseconds / fastest.milliseconds)} times as fast as {exact.label}"
        sentence = f"Use {fastest.setting}: {gain} at {percent(fastest.errors.frobenius)} error."
        reason = f"It is the fastest of {len(within)} settings within {allowed}."
        if len(within) == 1:
            reason = f"No other setting is within {allowed}."
        return Verdict(sentence, reason, call(fastest, case), fastest, fastest, bound)
    if not math.isfinite(exact.errors.frobenius):
        sentence = "No verdict: even the errors of exact attention are not finite."
        reason = "The numbers leave the range of their dtype; try a smaller scale."
    elif not estimates:
        sentence, reason = "Use exact attention: nothing else was run.", "Budgets that cover all keys are exact."
    elif fastest is not None:
        sentence = f"Use exact attention: nothing within {allowed} is clearly faster."
        reason = (
            f"The fastest within it is {fastest.setting}, at {percent(fastest.errors.frobenius)} error: "
            f"it takes {times(fastest.milliseconds / exact.milliseconds)} times as long as {exact.label}."
        )
    else:
        sentence = f"Use exact attention: nothing else is within {allowed}."
        reason = "No error is a finite number."
        if nearest is not None:
            reason = f"The nearest is {nearest.setting}, at {percent(nearest.errors.frobenius)} error."
    reason = " ".join(filter(None, (reason, expectation(case))))
    return Verdict(sentence, reason, call(exact, case), exact, fastest or nearest, bound)


def expectation(case: Case) -> str:
    """Say that exact attention was to be expected for such sizes, and from which on it isn't; "" where it wasn't."""

    def gain(n_q: int, n_k: int) -> float:
        sizes = Sizes(case.groups, n_q, n_k, case.q.shape[-1], case.v.shape[-1], str(case.q.dtype))
        return exact_over_treecode(sizes, DEFAULT_BUDGET)

    if gain(case.n_q, case.n_k) >= WORTHWHILE and case.n_k > DEFAULT_BUDGET:
        return ""
    said = (
        f'For so few rows that is expected: method="auto" runs exact attention on {case.n_q:,} queries and {case.n_k:,} keys'
    )
    if case.n_q != case.n_k:
        return f"{said}."
    return f"{said}, and estimates from some {next(n for n in count(600, 100) if gain(n, n) >= WORTHWHILE):,} on."


def call(row: Row, case: Case) -> str:
    """Return the Python that runs a setting on arrays or tensors q, k and v, as one would break it into lines."""
    scale = {} if case.scale is None else {"scale": f"{case.scale:.9g}"}
    if row.method == SDPA:
        grouped = {"enable_gqa": "True"} if case.q.shape[:-2] != case.k.shape[:-2] else {}
        return _call("torch.nn.functional.scaled_dot_product_attention", "q, k, v", scale | grouped)
    if row.ran != "exact" and row.method not in METHODS:
        return _call(f'bench.baselines.BASELINES["{row.method}"]', f"q, k, v, {case.scale}, {row.budget or case.n_k}, 0", {})
    asked = (
        {"rtol": f"{row.rtol:g}"}
        if row.rtol is not None
        else {"method": f'"{"exact" if row.ran == "exact" else row.method}"'}
    )
    if row.ran != "exact" and row.budget is not None:
        asked["budget"] = str(row.budget)
    diagonal = {} if case.diagonal is None or row.ran == "exact" else {"diagonal": str(case.diagonal)}
    return _call("kdecore.attention", "q, k, v", asked | scale | diagonal)


def _call(function: str, arrays: str, options: dict[str, str]) -> str:
    given = [arrays, *(f"{name}={value}" for name, value in options.items())]
    on_one, on_three = f"out = {function}({', '.join(given)})", f"out = {function}(\n    {', '.join(given)}\n)"
    each = f"out = {function}(\n" + "".join(f"    {one},\n" for one in given) + ")"
    return next((text for text in (on_one, on_three) if max(map(len, text.splitlines())) <= WIDTH), each)


def shows_gain(row: Row) -> bool:
    """Return whether a speed-up says something of a row: its result is exact, or near enough."""
    return row.ran == "exact" or row.errors.frobenius <= LARGEST_ERROR


def percent(value: float) -> str:
    """Return a relative error as people say it, with two digits."""
    return f"{plain(100 * value, 2)} %"


def times(value: float) -> str:
    """Return a ratio with two digits, or all that stand before the point."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def plain(value: float, digits: int = 4) -> str:
    """Return a number with so many digits and no exponent."""
    rounded = float(f"{value:.{digits}g}")
    if not math.isfinite(rounded) or rounded == 0:
        return f"{rounded:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    text = f"{rounded:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
