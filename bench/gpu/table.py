"""What `bench.gpu` found, as a table: what failed first, what was left out, figures, and whether the goals are reached."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.gpu.profile import LAUNCHES
from bench.gpu.session import OUT_OF_TIME, Row

MOST_CHARACTERS = 12_000
MOST_LINES = 12
"""Of failures and what was left out."""
LARGEST_ERROR = 0.05
GOAL_DTYPE = "bfloat16"
CORRECTNESS = ("kernels ", "calls ")
"""What the names of sections begin with for which there has to be time."""


@dataclass(frozen=True)
class Goal:
    """A speed-up over PyTorch's fused attention, to be reached at some n of a range, at `LARGEST_ERROR` or less."""

    text: str
    least_speedup: float
    smallest: int
    largest: int


GOALS = (
    Goal("faster than PyTorch's attention at n ≤ 8,192", 1.0, 1, 8192),
    Goal("at least 5 times as fast at n = 32,768", 5.0, 32_768, 32_768),
    Goal("at least 20 times as fast at n = 131,072", 20.0, 131_072, 131_072),
)

Rows = Mapping[str, Sequence[Row]]
"""Kind → what was found."""


def failed(rows: Rows) -> bool:
    """Return whether a test or check failed, anything raised, or there was no time for a check of correctness."""
    late = (row["section"].startswith(CORRECTNESS) and row["why"] == OUT_OF_TIME for row in rows.get("left_out", ()))
    return bool(
        rows.get("failure") or bad_checks(rows) or any(test_failed(row) for row in rows.get("tests", ())) or any(late)
    )


def test_failed(row: Row) -> bool:
    """Return whether tests failed, or none ran, or they ended badly; cut off by the limit of time, they did not fail."""
    return bool(row["failed"] or not row["passed"] or (row["exit_code"] != 0 and not row["cut_off"]))


def bad_checks(rows: Rows) -> list[Row]:
    """Return the checks that failed."""
    return [row for row in rows.get("check", ()) if not row["passed"]]


def verdicts(rows: Rows) -> list[Row]:
    """Return each goal's verdict: reached, MISSED or not measured, and the best figure."""
    found = []
    for goal in GOALS:
        there = [
            row
            for row in rows.get("timing", ())
            if "speedup" in row and row["dtype"] == GOAL_DTYPE and goal.smallest <= row["n"] <= goal.largest
        ]
        best = max((row for row in there if row["frobenius"] <= LARGEST_ERROR), key=lambda row: row["speedup"], default=None)
        verdict = "MISSED" if any(row["n"] == goal.largest for row in there) else "not measured"
        row = {"goal": goal.text, "least_speedup": goal.least_speedup, "best": best}
        if best is not None and best["speedup"] >= goal.least_speedup:
            verdict = "reached"
        found.append(row | {"verdict": verdict})
    return found


def table(header: Row, rows: Rows) -> str:
    """Return the whole table."""
    parts = [
        head(header, rows),
        failures(rows),
        checks(rows),
        tests(rows),
        ceilings(rows),
        timings(rows),
        profiles(rows),
        errors(rows),
        peers(rows),
        graphs(rows),
        omissions(rows),
        goals(rows) if header["device"] else ["GOALS are not judged in a rehearsal"],
    ]
    return clipped("\n".join(line for part in parts for line in part))


def clipped(text: str, most: int = MOST_CHARACTERS) -> str:
    """Shorten a text in its middle, where figures are: failures come first, goals last."""
    if len(text) <= most:
        return text
    note = "\n… the rest of this part is in gpu.json …\n"
    first = most * 2 // 3
    return text[:first].rpartition("\n")[0] + note + text[len(text) - (most - first - len(note)) :].partition("\n")[2]


def head(header: Row, rows: Rows) -> list[str]:
    """Say what it ran on."""
    device, machine = header["device"], header["machine"]
    where = f"{device['name']}, {device['multiprocessors']} multiprocessors" if device else f"REHEARSAL on {machine['cpu']}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if name in LIBRARIES)
    commit = header["commit"] or "unknown"
    took = ", ".join(f"{row['name']} {row['seconds']:.0f}" for row in rows.get("section", ()))
    seconds = f"seed {header['seed']}, {header['seconds']:.0f} s: {took or 'no section ended'}"
    return [f"kdecore on {where}", f"{versions}; commit {commit}", seconds, ""]


LIBRARIES = ("torch", "triton", "cupy-cuda13x", "numba-cuda")


def some(lines: Iterable[str]) -> list[str]:
    """Return the first lines, and how many there are more."""
    lines = list(lines)
    return lines[:MOST_LINES] + ([f"  … and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else [])


def failures(rows: Rows) -> list[str]:
    """List what failed."""
    bad = [f"  {row['what']}: {row['error']}"[:240] for row in rows.get("failure", ())]
    bad += [f"  {row['name']}: {row.get('why') or off(row)}"[:240] for row in bad_checks(rows)]
    return ["FAILED", *some(bad), ""] if bad else []


def off(row: Row) -> str:
    """Say how far off a check is."""
    of = f"{row['of']}: " if row.get("of") else ""
    return f"{of}{row['measured']:.3g}, at most {row['limit']:.3g}"


def tests(rows: Rows) -> list[str]:
    """Say how the tests went."""
    lines = []
    for row in rows.get("tests", ()):
        end = ", CUT OFF by the limit of time" if row["cut_off"] else ""
        lines.append(f"TESTS {row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped{end}")
        lines += [f"  FAILED {one['name']}: {one['error']}"[:200] for one in row["failures"]]
        if row.get("said"):
            lines += ["  " + line[:200] for line in row["said"].splitlines()[-3:]]
    return [*(lines or ["TESTS not run"]), ""]


def checks(rows: Rows) -> list[str]:
    """Say how the checks went."""
    every = rows.get("check", ())
    return [f"CHECKS {len(every) - len(bad_checks(rows))} of {len(every)} passed", ""] if every else ["CHECKS not made", ""]


def ceilings(rows: Rows) -> list[str]:
    """List the device's rates."""
    rates = ", ".join(f"{row['name']} {row['value']:.4g} {row['unit']}" for row in rows.get("ceiling", ()))
    return [f"CEILINGS {rates or 'not measured'}", ""]


def timings(rows: Rows) -> list[str]:
    """List times and errors; what kdecore's reference, another library, takes comes last."""
    own = sorted(
        (row for row in rows.get("timing", ()) if "speedup" in row), key=lambda row: (row["dtype"] != GOAL_DTYPE, row["n"])
    )
    others = [row for row in rows.get("timing", ()) if "speedup" not in row]
    if not own and not others:
        return ["TIMINGS not measured", ""]
    lines = ["TIMINGS in ms (p: predicted from n²); errors, of norms, on words drawn from GloVe with noise"]
    columns = f"{'budget':>13} {'kdecore':>9} {'×':>7} {'issued in':>9} {'spectral':>9} {'Frobenius':>9}"
    lines.append(f"  {'':9}{'n':>8} {'PyTorch':>13} {columns}")
    for row in own:
        exact = f"{row['sdpa_ms']:.4g}{'p' * row['sdpa_predicted']}"
        lines.append(
            f"  {row['dtype']:<9}{row['n']:>8,} {row['sdpa']:>5.5}{exact:>8} {row['method']:<8}{row['budget']:>5}"
            f" {row['ms']:>9.4g} {row['speedup']:>7.3g} {row['issue_ms']:>9.3g}"
            f" {row['spectral']:>9.2%} {row['frobenius']:>9.2%}"
        )
    lines += [f"  {row['library']}, {row['dtype']}, n = {row['n']:,}, {row['method']}: {row['ms']:.4g} ms" for row in others]
    return [*lines, ""]


def profiles(rows: Rows) -> list[str]:
    """List launches beside those that tests count, and stages beside their time on paper."""
    every = rows.get("profile", ())
    lines = ["WHERE DEVICE TIME GOES, ms (on paper)" if every else "WHERE DEVICE TIME GOES not measured"]
    for row in every:
        launches = f"{row['launches']:.0f} launches (tests count {LAUNCHES[row['method']]})"
        lines.append(f"  {row['dtype']}, n = {row['n']:,}, {row['method']}: {row['device_ms']:.4g} ms, {launches}")
        stages = [stage_text(*item) for item in row["stages"].items() if item[1]["share"] >= LEAST_SHARE]
        lines.append("    " + ", ".join(stages))
    return [*lines, ""]


LEAST_SHARE = 0.01
"""Of a stage that is listed."""


def stage_text(name: str, stage: Row) -> str:
    """Return a stage's time, beside that on paper where it is known."""
    return f"{name} {stage['ms']:.3g}" + (f" ({stage['paper_ms']:.2g})" if "paper_ms" in stage else "")


def peers(rows: Rows) -> list[str]:
    """List exact attention of PyTorch and of other packages, and estimates on the same inputs, the fastest first."""
    every = [row for row in rows.get("peer", ()) if row["dtype"] == GOAL_DTYPE]
    lines = [f"PEERS in {GOAL_DTYPE}, ms and Frobenius error on the same inputs" if every else "PEERS not measured"]
    for n in dict.fromkeys(row["n"] for row in every):
        found = [(row["ms"], row["frobenius"], row["peer"]) for row in every if row["n"] == n]
        found += [
            (row["ms"], row["frobenius"], f"{row['method']} {row['budget']}")
            for row in rows.get("timing", ())
            if "speedup" in row and (row["dtype"], row["n"]) == (GOAL_DTYPE, n)
        ]
        lines.append(f"  n = {n:,}: " + ", ".join(f"{name} {ms:.3g} ({error:.2g})" for ms, error, name in sorted(found)))
    return [*lines, ""]


def graphs(rows: Rows) -> list[str]:
    """Say whether calls can be captured."""
    lines = []
    for row in rows.get("graph", ()):
        if row["captured"]:
            result = "the same result" if row["same"] else "ANOTHER result"
            text = f"replay {row['replay_ms']:.3g} ms, call {row['ms']:.3g} ms, {result}"
        else:
            text = f"not captured: {row['why'][:200]}"
        lines.append(f"CUDA GRAPH, {row['method']}, n = {row['n']:,}: {text}")
    return [*(lines or ["CUDA GRAPH not tried"]), ""]


def errors(rows: Rows) -> list[str]:
    """List errors beside times, a line for each case and method."""
    every = rows.get("error", ())
    lines = ["ERRORS, budget: spectral / Frobenius in ms" if every else "ERRORS not measured"]
    keys = dict.fromkeys((row["case"], row["dtype"]) for row in every)
    for case, dtype in keys:
        mine = [row for row in every if (row["case"], row["dtype"]) == (case, dtype)]
        lines.append(f"  {case}, n = {mine[0]['n']:,}, {dtype}: PyTorch ({mine[0]['sdpa']}) {mine[0]['sdpa_ms']:.3g} ms")
        for method in dict.fromkeys(row["method"] for row in mine):
            cells = [
                f"{row['budget']}: {row['spectral']:.2%} / {row['frobenius']:.2%} in {row['ms']:.3g}"
                for row in mine
                if row["method"] == method
            ]
            lines.append(f"    {method:<8} {'   '.join(cells)}")
    return [*lines, ""]


def omissions(rows: Rows) -> list[str]:
    """List what was left out, by section and reason, most important first."""
    by_reason: dict[str, list[str]] = {}
    for row in rows.get("left_out", ()):
        # A section that did not end is named once.
        by_reason.setdefault(f"{row['section']}: {row['why']}", []).extend({row["what"]} - {row["section"]})
    lines = []
    for reason, what in by_reason.items():
        more = [f"and {len(what) - SHOWN} more"] if len(what) > SHOWN else []
        lines.append(f"  {reason[:120]}{': ' * bool(what)}{'; '.join([*what[:SHOWN], *more])}"[:240])
    return ["LEFT OUT", *lines, ""] if lines else ["LEFT OUT nothing", ""]


SHOWN = 2
"""Things that are named of those left out of a section for one reason."""


def goals(rows: Rows) -> list[str]:
    """List the verdicts."""
    lines = [f"GOALS in {GOAL_DTYPE}, at most {LARGEST_ERROR:.0%} Frobenius error on the inputs timed"]
    for row in verdicts(rows):
        best = row["best"]
        text = "nothing measured errs so little" if row["verdict"] == "MISSED" else "no figure"
        if best is not None:
            predicted = ", PyTorch's time predicted" if best["sdpa_predicted"] else ""
            text = f"{best['method']} {best['speedup']:.3g} × at n = {best['n']:,}, error {best['frobenius']:.2%}{predicted}"
        lines.append(f"  {row['verdict']:<12} {row['goal']} ({text})")
    return lines


def finite(value: Any) -> Any:
    """Return what JSON can hold: numbers that are not finite become None."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
