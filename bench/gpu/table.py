"""What `bench.gpu` found, as a table: what failed first, what was left out, figures, and whether the goals are reached."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.gpu.session import Row

MOST_CHARACTERS = 12_000
MOST_LINES = 12
"""Of failures and what was left out."""
LARGEST_ERROR = 0.05
GOAL_DTYPE = "bfloat16"
GLOVE, TRANSFORMER = "GloVe", "vision transformer"


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
    """Return whether a test or check failed, or anything raised."""
    return bool(rows.get("failure") or bad_checks(rows) or any(test_failed(row) for row in rows.get("tests", ())))


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
        tests(rows),
        checks(rows),
        ceilings(rows),
        timings(rows),
        profiles(rows),
        graphs(rows),
        errors(rows),
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
    """List the device's rates, and those of PyTorch's attention."""
    rates = ", ".join(f"{row['name']} {row['value']:.4g} {row['unit']}" for row in rows.get("ceiling", ()))
    lines = [f"CEILINGS {rates or 'not measured'}"]
    for dtype in dict.fromkeys(row["dtype"] for row in rows.get("sdpa", ())):
        of_dtype = [row for row in rows["sdpa"] if row["dtype"] == dtype]
        ran = ", ".join(f"{row['backend']} {row['tflop_s']:.4g}" for row in of_dtype if row["ms"] is not None)
        rest = ", ".join(row["backend"] for row in of_dtype if row["ms"] is None)
        lines.append(f"  PyTorch's attention, {dtype}, n = {of_dtype[0]['n']:,}, TFLOP/s: {ran}; not: {rest or 'none'}")
    return [*lines, ""]


def timings(rows: Rows) -> list[str]:
    """List times and errors; what kdecore's reference, another library, takes comes last."""
    own = [row for row in rows.get("timing", ()) if "speedup" in row]
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
    """List stages' shares and rates."""
    every = rows.get("profile", ())
    ceiling = {row["name"]: row["value"] for row in rows.get("ceiling", ())}
    lines = ["WHERE DEVICE TIME GOES"] if every else ["WHERE DEVICE TIME GOES not measured"]
    for row in every:
        shares = ", ".join(f"{name} {stage['share']:.0%}" for name, stage in row["stages"].items() if stage["share"] >= 0.01)
        took = f"{row['launches']:.0f} launches, {row['device_ms']:.4g} ms"
        lines.append(f"  {row['dtype']}, n = {row['n']:,}, {row['method']}: {took}: {shares}")
        if row["rates"] and row["n"] in SHOWN_RATES:
            lines.append(
                "    " + "; ".join(rate(name, found, row["dtype"], ceiling) for name, found in row["rates"].items())
            )
    return [*lines, ""]


SHOWN_RATES = (8192, 131_072)


def rate(stage: str, found: Row, dtype: str, ceiling: Mapping[str, float]) -> str:
    """Return a stage's rates, with their parts of the ceilings."""
    copied, product = ceiling.get("copy"), ceiling.get("bfloat16 product" if dtype == "bfloat16" else "tf32 product")
    text = f"{stage} {found['tb_s']:.3g} TB/s{part(found['tb_s'], copied)}"
    if "tflop_s" in found:
        text += f", {found['tflop_s']:.3g} TFLOP/s{part(found['tflop_s'], product)}"
    return text


def part(value: float, ceiling: float | None) -> str:
    """Return which part of a ceiling a rate is."""
    return f" ({value / ceiling:.0%})" if ceiling else ""


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
    """List what was left out."""
    left = [f"  {row['what']}: {row['why']}"[:160] for row in rows.get("left_out", ())]
    return ["LEFT OUT", *some(left), ""] if left else ["LEFT OUT nothing", ""]


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
