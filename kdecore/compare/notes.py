"""What the figures of a comparison are of, and what they leave out."""

import math
from collections.abc import Sequence

from kdecore.arrays.namespace import dtype_name
from kdecore.compare.cases import Case
from kdecore.compare.machine import Machine
from kdecore.compare.rows import Row
from kdecore.compare.verdict import LARGEST_ERROR, percent, shows_gain
from kdecore.core.problem import check_scale
from kdecore.methods import METHODS


def sizes(case: Case) -> str:
    """Name a case, with its sizes, dtype and scale."""
    heads = f"{case.groups} × " if case.groups > 1 else ""
    of_keys = math.prod(case.k.shape[:-2])
    key_heads = f"{of_keys} × " if of_keys != case.groups else ""
    return (
        f"{case.name}: {heads}{case.n_q:,} queries, {key_heads}{case.n_k:,} keys, d = {case.q.shape[-1]}, "
        f"d_v = {case.v.shape[-1]}, {dtype_name(case.q)}, scale {check_scale(case.scale, case.q.shape[-1]):.4g}"
    )


def place(machine: Machine, library: str) -> str:
    """Say what it was measured with and on."""
    return f"{library} on {machine.cpu}, {machine.cores} core{'s' if machine.cores != 1 else ''}"


def notes(case: Case, rows: Sequence[Row]) -> list[str]:
    """Say what was timed and what errors are against, on how many queries, and what the figures leave out."""
    baseline = rows[0]
    each = " of each group" if case.groups > 1 else ""

    def some(count: int) -> str:
        return "all queries" if count == case.n_q else f"{count:,} of {case.n_q:,} queries{each}, drawn at random"

    said = [case.note] if case.note else []
    said += [f"Speed-up is over {baseline.method}; errors are against kdecore's exact attention in float64."]
    if baseline.error_rows == case.n_q:
        said += ["Times and errors are on all queries."]
    else:
        scaled = "" if baseline.timed_rows == case.n_q else ", and scaled up; the methods on all queries"
        said += [
            f"Timed: {baseline.method} on {some(baseline.timed_rows)}{scaled}.",
            f"Errors are on {some(baseline.error_rows)}; the worst row of a sample is a lower bound on the worst of all.",
        ]
    if not all(map(shows_gain, rows)):
        said += [f"No speed-up is shown where the Frobenius error is above {percent(LARGEST_ERROR)}."]
    if any(row.certificate for row in rows):
        said += [_certificate_note(rows, case)]
    if any(row.rtol is not None for row in rows):
        said += ["rtol: kdecore chose method and budget for that Frobenius error, seed by seed; its time has the search in."]
    if others := list(dict.fromkeys(row.method for row in rows[1:] if row.method not in METHODS)):
        said += [f"{', '.join(others)}: other papers', from bench.baselines; keys/query are the budget, not measured."]
    if any(row.ran == "kdeformer" for row in rows):
        said += ["kdeformer's keys/query leave out the keys that its density estimates evaluate; its time has them in."]
    if any(math.isnan(row.errors.spectral) for row in rows):
        scale = check_scale(case.scale, case.q.shape[-1])
        said += [f"nan: the scale {scale:.4g} takes logits or outputs out of {dtype_name(case.q)}'s range."]
    return said


def _certificate_note(rows: Sequence[Row], case: Case) -> str:
    """Say what the intervals are of, what they were made from, and, where the true error is known, how many hold it."""
    certified = [row for row in rows if row.certificate]
    counts = [row.certificate.rows for row in certified if row.certificate]
    fewest, most = min(counts), max(counts)
    count = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    each = " of each group" if case.groups > 1 else ""
    confidence = next(row.certificate.confidence for row in certified if row.certificate)
    note = (
        f"certified: {100 * confidence:.0f} % interval of the Frobenius error with seed 0, "
        f"from {count} exact rows{each}, not from the comparison"
    )
    known = [row for row in certified if rows[0].error_rows == case.n_q and not math.isnan(row.first_errors.frobenius)]
    return f"{note}; {sum(map(holds, known))} of {len(known)} hold it (unrounded)." if known else f"{note}."


def holds(row: Row) -> bool:
    """Return whether a row's certificate holds its true error."""
    if row.certificate is None:
        return False
    (low, high), error = row.certificate.frobenius_interval, row.first_errors.frobenius
    # Of all rows the interval is a point, and its exact rows aren't computed in float64.
    return low <= error <= high or math.isclose(error, high, rel_tol=1e-3)
