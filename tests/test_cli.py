"""The command `kdecore` as a user meets it: outputs, exit codes, one line for every mistake, and no half-written file."""

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest

import kdecore
from bench.timing import interleaved
from kdecore.accuracy.metrics import Errors
from kdecore.arrays.backend import backend_named
from kdecore.compare import baselines, cli, comparison, machine, table, timing
from kdecore.compare.cases import Case, glove_case
from kdecore.compare.plots import comparison_png
from kdecore.core.problem import canonicalise
from kdecore.kernels import registry
from kdecore.kernels.registry import KERNELS, TARGETS, cuda_problem
from kdecore.methods import METHODS

QUICK = ["--n", "80", "--seeds", "2", "--repeats", "1", "--budgets", "16"]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """Begin at once: hundreds of calls are timed here, and no time is looked at."""
    monkeypatch.setattr(timing, "SETTLE_SECONDS", 1e-4)


@pytest.fixture
def no_plot(monkeypatch):
    """Write stand-ins for the plot, which takes half a second to draw, and for the page, of 5 MB."""
    monkeypatch.setattr("kdecore.compare.plots.comparison_png", lambda *arguments: b"\x89PNG stand-in")
    monkeypatch.setattr("kdecore.compare.page.comparison_html", lambda *arguments: b"<!doctype html>")


def run(capsys, *argv):
    status = cli.main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_fails(capsys, *argv, says):
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert err.startswith("kdecore: error: ")
    assert err.count("\n") == 1
    assert says in err


def widest(out):
    """Columns of the widest line, but for the one that names the folder."""
    return max(len(line) for line in out.splitlines() if not line.startswith("Written to "))


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def small_case(shape=(2, 60, 8), dtype=np.float32):
    q, k, v = np.random.default_rng(0).standard_normal((3, *shape)).astype(dtype)
    return Case("small", q, k, v)


def test_compare_writes_table_json_and_plot(tmp_path, capsys):
    status, out, err = run(capsys, "compare", *QUICK, "--budgets", "16", "32", "--out", tmp_path / "new" / "folder")
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    assert widest(out) <= 80
    for part in ("sortlsh", "hyper", "exact (", "Frobenius", "on all queries", "GloVe"):
        assert part in out
    assert files_in(tmp_path / "new" / "folder") == sorted(cli.OUTPUTS)
    assert (tmp_path / "new" / "folder" / "compare.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "new" / "folder" / "compare.json").read_text(encoding="utf-8"))
    assert record["seeds"] == [0, 1]
    assert record["arguments"]["budgets"] == [16, 32]
    assert record["machine"]["versions"]["kdecore"] == kdecore.__version__
    assert [(row["method"], row["budget"]) for row in record["rows"][1:]] == [
        (method, budget) for method in ("treecode", "sortlsh", "hyper") for budget in (16, 32)
    ]
    for row in record["rows"]:
        assert row["milliseconds"] > 0
        assert len(row["timings"]) == 2
        assert row["timed_rows"] == row["error_rows"] == 80
        assert row["errors"]["spectral"] < (1e-5 if row["ran"] == "exact" else 1.0)


def test_compare_replaces_earlier_results(tmp_path, no_plot, capsys):
    for name in cli.OUTPUTS:
        (tmp_path / name).write_text("old")
    assert run(capsys, "compare", *QUICK, "--out", tmp_path)[0] == 0
    assert files_in(tmp_path) == sorted(cli.OUTPUTS)
    json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_compare_users_file(tmp_path, no_plot, capsys, library):
    pytest.importorskip(library)
    case = small_case()
    np.savez(tmp_path / "data [bold].npz", q=case.q[:, :40], k=case.k, v=case.v[..., :5])
    status, out, _ = run(capsys, "compare", tmp_path / "data [bold].npz", "--library", library, "--methods", "exact", "auto",
        "--budgets", "8", "--seeds", "1", "--repeats", "1", "--scale", "0.25", "--out", tmp_path / "out")  # fmt: skip
    assert status == 0
    assert "data [bold].npz: 2 × 40 queries, 60 keys, d = 8, d_v = 5, float32" in out
    record = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert record["case"] == {"name": "data [bold].npz", "q": [2, 40, 8], "k": [2, 60, 8], "v": [2, 60, 5],
        "dtype": "float32", "scale": 0.25, "diagonal": None, "library": library}  # fmt: skip
    assert [row["method"] for row in record["rows"][1:]] == ["exact", "auto"]
    assert record["rows"][1]["budget"] is None
    assert record["rows"][1]["errors_std"]["spectral"] is None  # one seed has no deviation


@pytest.mark.parametrize(
    ("timed", "says"), [(60, "on 60 of 80 queries, drawn at random, and scaled up"), (1024, "on all queries.")]
)
def test_compare_says_that_rows_are_sampled(tmp_path, capsys, monkeypatch, timed, says):
    monkeypatch.setattr(comparison, "TIMED_ROWS", timed)
    status, out, _ = run(capsys, "compare", *QUICK, "--exact-rows", "50", "--out", tmp_path)
    assert status == 0
    record = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    for notes in (" ".join(out.split()), " ".join(record["notes"])):
        assert says in notes
        assert "Errors are on 50 of 80 queries, drawn at random" in notes
        assert "worst row of a sample is a lower bound" in notes
    baseline, *others = record["rows"]
    assert (baseline["timed_rows"], baseline["error_rows"]) == (min(80, timed), 50)
    assert baseline["peak_bytes"] is None or timed > 80
    for row in others:
        assert (row["timed_rows"], row["error_rows"]) == (80, 50)


def test_few_exact_rows_do_not_inflate_the_baseline(monkeypatch):
    def function(q, k, v, scale):
        time.sleep(0.02)  # a fixed cost, whatever the rows
        return kdecore.attention(q, k, v, method="exact", scale=scale)

    monkeypatch.setattr(comparison, "exact_baseline", lambda: ("exact (slow to start)", function))
    case = small_case((2048, 8))
    few, row = comparison.measure(case, ["hyper"], [16], [0], repeats=1, exact_rows=8)
    assert few.timed_rows == 1024
    assert few.milliseconds < 20 * 2048 / 8 / 4
    assert few.errors.spectral < 1e-5
    rows = comparison.sample_rows(case, 8, 0)
    estimate = kdecore.attention(case.q, case.k, case.v, method="hyper", budget=16)[rows]
    exact = comparison.reference(case, rows)
    expected = np.linalg.norm(estimate - exact) / np.linalg.norm(exact)
    assert row.errors.frobenius == pytest.approx(expected, rel=1e-6)


def test_timed_rows_include_those_of_the_errors(monkeypatch):
    monkeypatch.setattr(comparison, "TIMED_ROWS", 30)
    case = small_case()
    for count, timed in ((5, 30), (30, 30), (40, 40)):
        rows = comparison.sample_rows(case, count, 0)
        found = comparison.timing_rows(case, rows, 0)
        assert len(found) == timed
        assert set(rows.tolist()) <= set(found.tolist())
    assert comparison.timing_rows(case, None, 0) is None


def test_one_timing_protocol(monkeypatch):
    events = []
    monkeypatch.setattr(time, "sleep", lambda seconds: events.append(seconds))
    seconds, result = timing.time_calls(lambda: events.append("timed"), 2, untimed=lambda: events.append("first") or 7)
    assert events == [timing.SETTLE_SECONDS, "first", "timed", "timed"]
    assert result == 7
    assert len(seconds) == 2

    used = []
    protocol = timing.time_calls

    def record(call, repeats, *, untimed):
        used.append(repeats)
        return protocol(call, repeats, untimed=untimed)

    monkeypatch.setattr(comparison, "time_calls", record)
    monkeypatch.setattr("bench.timing.time_calls", record)
    comparison.measure(small_case(), ["hyper"], [16], [0, 1], repeats=3)
    assert used == [3] * 4
    assert interleaved({"a": lambda: None}, repeats=5, rounds=2)["a"] >= 0.0
    assert used[4:] == [5, 5]


def test_compare_measures_every_method(tmp_path, capsys):
    status, out, err = run(capsys, "compare", *QUICK, "--methods", "sortlsh", "kdeformer", "auto", "exact",
        "--budgets", "16", "100", "200", "--out", tmp_path)  # fmt: skip
    assert (status, err) == (0, "")
    assert widest(out) <= 80
    lines = [line.split("  ")[0].strip() for line in out.splitlines()]
    table = ["sortlsh", "sortlsh (exact)", "kdeformer", "kdeformer (exact)", "auto (exact)", "auto (exact)", "exact"]
    start = lines.index("sortlsh")
    assert lines[start : start + len(table)] == table
    assert "density estimates" in out


@pytest.fixture
def two_baselines(monkeypatch):
    """Baselines of bench.baselines that need no other package."""
    pytest.importorskip("torch")
    folder = import_module("bench.baselines")
    found = {name: import_module(f"bench.baselines.{name}").attend for name in ("monarch", "uniform", "mean")}
    monkeypatch.setattr(folder, "BASELINES", found, raising=False)
    return found


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_compare_takes_baselines(tmp_path, capsys, two_baselines, library):
    case = small_case()
    np.savez(tmp_path / "data.npz", q=case.q[:, :40], k=case.k, v=case.v)
    status, out, err = run(capsys, "compare", tmp_path / "data.npz", "--library", library, "--scale", "0.5",
        "--methods", "uniform,sortlsh,mean", "--budgets", "16", "32", "--seeds", "2", "--repeats", "1",
        "--out", tmp_path / "out")  # fmt: skip
    assert (status, err) == (0, "")
    assert widest(out) <= 80
    record = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    rows = record["rows"][1:]
    assert [(row["method"], row["ran"], row["budget"], row["keys_per_query"]) for row in rows] == [
        ("uniform", "uniform", 16, 16),
        ("uniform", "uniform", 32, 32),
        ("sortlsh", "sortlsh", 16, rows[2]["keys_per_query"]),
        ("sortlsh", "sortlsh", 32, rows[3]["keys_per_query"]),
        ("mean", "mean", None, 60),
    ]
    assert [row["certificate"] is None for row in rows] == [True, True, False, False, True]
    assert all(row["milliseconds"] > 0 and row["speedup"] > 0 for row in rows)
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(x) for x in (case.q[:, :40], case.k, case.v)]
    exact = kdecore.attention(*(x.double().numpy() for x in tensors), method="exact", scale=0.5)
    for row in rows:
        if row["method"] != "sortlsh":
            outs = [two_baselines[row["method"]](*tensors, 0.5, row["budget"] or 60, seed).numpy() for seed in (0, 1)]
            expected = [np.linalg.norm(a - b) / np.linalg.norm(b) for one in outs for a, b in zip(one, exact, strict=True)]
            assert row["errors"]["frobenius"] == pytest.approx(np.mean(expected), rel=1e-5)
    notes = " ".join(record["notes"])
    assert "uniform, mean: other papers', from bench.baselines; keys/query are the budget, not measured." in notes
    assert [line.split()[0] for line in out.splitlines() if line.startswith(("uniform ", "mean "))] == [
        "uniform",
        "uniform",
        "mean",
    ]


def test_baselines_know_grouped_heads_and_half_precision(two_baselines):
    case = small_case((2, 4, 60, 8), np.float16)
    grouped = replace(case, k=case.k[:, :2], v=case.v[:, :2])
    problem = canonicalise(grouped.q, grouped.k, grouped.v)
    out = baselines.baseline("mean", problem, backend_named("numpy"))(16, 0)
    expected = np.repeat(grouped.v.astype(np.float32).mean(2, keepdims=True), 2, axis=1)
    np.testing.assert_allclose(out, np.broadcast_to(expected, out.shape), rtol=1e-6)
    assert out.shape == (2, 4, 60, 8)


def test_names_of_baselines_are_guessed_too(tmp_path, capsys, two_baselines):
    says = "treecode, monarch, uniform, mean, got 'unifrom'; did you mean 'uniform'?"
    assert_fails(capsys, "compare", *QUICK, "--methods", "unifrom", "--out", tmp_path, says=says)


@pytest.mark.parametrize("folder", ["nowhere.baselines", "bench"])
def test_without_baselines_only_methods_are_known(tmp_path, capsys, monkeypatch, folder):
    monkeypatch.setattr(baselines, "FOLDER", folder)
    says = f"method must be one of {', '.join(METHODS)}, got 'hypr'; did you mean 'hyper'?"
    assert_fails(capsys, "compare", *QUICK, "--methods", "hypr", "--out", tmp_path, says=says)


def test_baselines_are_not_looked_for_without_need(tmp_path, no_plot, capsys, monkeypatch):
    monkeypatch.setattr(baselines, "import_module", lambda name: pytest.fail(f"imported {name}"))
    assert run(capsys, "compare", *QUICK, "--methods", "hyper", "exact", "--out", tmp_path)[0] == 0


def test_baselines_that_lack_a_package_say_so(tmp_path, capsys, monkeypatch):
    def lacking(name):
        raise ModuleNotFoundError("No module named 'einops'", name="einops")

    monkeypatch.setattr(baselines, "import_module", lacking)
    says = "methods of bench.baselines cannot be used: No module named 'einops'"
    assert_fails(capsys, "compare", *QUICK, "--methods", "uniform", "--out", tmp_path, says=says)


def test_what_a_baseline_cannot_do_is_one_line(tmp_path, capsys, two_baselines):
    says = "monarch: budget must be at least 36 for 80 keys, got 16"
    assert_fails(capsys, "compare", *QUICK, "--methods", "monarch", "--out", tmp_path / "out", says=says)
    assert files_in(tmp_path) == []


def test_compare_with_tolerances(tmp_path, no_plot, capsys, monkeypatch):
    monkeypatch.setattr("kdecore.accuracy.search.THINNED_SHARE", math.inf)  # no search pays for so few keys
    status, out, err = run(capsys, "compare", "--n", "2048", "--rtol", "1e-6,0.9", "0.9", "--methods", "sortlsh,exact",
        "--budgets", "64", "--seeds", "2", "--repeats", "1", "--out", tmp_path)  # fmt: skip
    assert (status, err) == (0, "")
    record = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert record["arguments"]["rtol"] == [1e-6, 0.9, 0.9]
    rows = record["rows"]
    assert [(row["method"], row["budget"], row["rtol"]) for row in rows[1:]] == [
        ("sortlsh", 64, None),
        ("exact", None, None),
        ("auto", None, 1e-6),
        ("auto", None, 0.9),
    ]
    *_, strict, loose = rows
    assert (strict["ran"], strict["keys_per_query"]) == ("exact", 2048)
    assert loose["ran"] != "exact"
    assert loose["keys_per_query"] < 2048
    assert 0 < loose["errors"]["frobenius"] < 0.9
    assert loose["certificate"]["frobenius_interval"][1] <= 0.9
    for row in rows:
        assert (row["certificate"] is None) == (row["ran"] == "exact")
    for row in (rows[1], loose):
        assert 32 <= row["certificate"]["rows"] < 2048
        assert row["certificate"]["confidence"] == 0.95
        for norm in ("frobenius", "spectral"):
            low, high = row["certificate"][f"{norm}_interval"]
            assert 0 < low <= row["certificate"][norm] <= high
            assert low / 2 < row["first_errors"][norm] < high * 2
    lines = {line.split("  ")[0].strip(): line for line in out.splitlines()}
    assert "–" in lines["sortlsh"].replace(" – ", "")
    assert " – " in lines["exact"]
    assert " – " in lines["rtol 1e-06 (exact)"]
    # The longest name may be wrapped.
    assert {f"rtol 0.9 ({loose['ran']})", "rtol 0.9"} & lines.keys()
    assert f"({loose['ran']})" in out
    notes = " ".join(out.split())
    for part in ("certified: 95 % interval of the Frobenius error with seed 0", "not from the comparison; ", " of 2 hold it",
                 "rtol: kdecore chose"):  # fmt: skip
        assert part in notes
        assert part in " ".join(record["notes"])


def test_a_certificate_is_made_once_and_never_timed(monkeypatch):
    calls = []
    attention = comparison.attention
    monkeypatch.setattr(comparison, "attention", lambda *a, **k: calls.append(k) or attention(*a, **k))
    row = comparison.measure(small_case(), ["hyper"], [16], [3, 4], repeats=2)[1]
    made = [k for k in calls if k["method"] == "hyper"]
    described = [k for k in made if k.get("return_report")]
    assert len(made) - len(described) in (4, 5)  # and one for memory, where that is known
    assert [(k["seed"], k.get("certificate")) for k in described] == [(3, None), (4, 0.0)]
    only = comparison.measure(small_case(), ["hyper"], [16], [3], repeats=1)[1]
    assert row.certificate == only.certificate
    assert row.first_errors == only.errors
    assert row.first_errors != row.errors


@pytest.mark.parametrize(
    ("limits", "shown"),
    [
        ((0.00491, 0.00529), "0.0049–0.0053"),
        ((0.0491, 0.05), "0.049–0.050"),
        ((0.996, 12.3), "0.99–13"),
        ((1.01e-5, 1.19e-4), "1.0e-05–1.2e-04"),
        ((0.0, 0.5), "0.0–0.50"),
        ((0.5, math.inf), "0.50–inf"),
        ((0.1234, 0.1234), "0.123"),
        ((math.nan, math.nan), "nan"),
    ],
)
def test_limits_are_rounded_outwards(limits, shown):
    assert table.interval(*limits) == shown


@pytest.mark.parametrize(("columns", "most"), [(60, 74), (80, 80), (100, 80), (200, 80)])
def test_narrow_terminals_lose_no_numbers(tmp_path, no_plot, capsys, monkeypatch, columns, most):
    monkeypatch.setenv("COLUMNS", str(columns))
    status, out, _ = run(capsys, "compare", *QUICK, "--seeds", "1", "--methods", "sortlsh", "--rtol", "1e-6",
        "--out", tmp_path)  # fmt: skip
    assert status == 0
    assert "…" not in out
    shown = out[out.index("keys/") : out.index("Speed-up")]
    assert max(map(len, shown.splitlines())) <= most
    assert "certified" in shown
    for row in json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))["rows"]:
        if row["certificate"]:
            assert table.interval(*row["certificate"]["frobenius_interval"]) in shown


def test_labels_in_table_and_plot():
    row = comparison.measure(small_case(), ["auto"], [16], [0], repeats=1)[1]
    for ran in ("treecode", "exact", "sortlsh, exact"):
        assert replace(row, method="auto", ran=ran, budget=None, rtol=0.05).label == f"rtol 0.05 ({ran})"
    labels = {("auto", "sortlsh"): "auto (sortlsh)", ("hyper", "hyper"): "hyper", ("exact (torch SDPA)", "exact"): None}
    for (method, ran), label in labels.items():
        assert replace(row, method=method, ran=ran).label == (label or method)


def test_budgets_beyond_the_keys_are_measured_once(tmp_path, no_plot, capsys):
    status, _, _ = run(capsys, "compare", *QUICK, "--budgets", "500,16", "128", "100,16", "--out", tmp_path)
    assert status == 0
    record = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert record["arguments"]["budgets"] == [500, 16, 128, 100, 16]
    assert [(row["method"], row["budget"]) for row in record["rows"][1:]] == [
        (method, budget) for method in ("treecode", "sortlsh", "hyper") for budget in (16, 100)
    ]


def test_lists_may_have_commas(tmp_path, no_plot, capsys):
    status, _, _ = run(capsys, "compare", *QUICK, "--methods", "sortlsh,hyper", "--budgets", "16,32", "--out", tmp_path)
    assert status == 0
    record = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert record["arguments"]["methods"] == ["sortlsh", "hyper"]
    assert record["arguments"]["budgets"] == [16, 32]


def test_numbers_that_are_not_finite_are_refused_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "measure", lambda *a, **k: pytest.fail("measured first"))
    case = small_case()
    case.q[0, 3, 2], case.v[1, 4, :3] = np.nan, np.inf
    np.savez(tmp_path / "bad.npz", q=case.q, k=case.k, v=case.v)
    says = "infinite in bad.npz: q holds 1 of 960, v holds 3 of 960; with them every error would be nan"
    assert_fails(capsys, "compare", tmp_path / "bad.npz", *QUICK, "--out", tmp_path / "out", says=says)
    assert files_in(tmp_path) == ["bad.npz"]


@pytest.mark.parametrize(
    ("options", "stored", "used", "says"),
    [
        ([], 0.5, 0.5, "scale: 0.5, as data.npz holds it."),
        (["--scale", "0.25"], 0.5, 0.25, "scale: 0.25 as asked for, not what data.npz holds."),
        ([], [1.0, 2.0], 8**-0.5, "scale: 1/√d; what data.npz holds under that name is no finite number but an array"),
    ],
)
def test_the_scale_in_a_file_is_used_and_said(tmp_path, no_plot, capsys, options, stored, used, says):
    case = small_case()
    np.savez(tmp_path / "data.npz", Q=case.q, K=case.k, V=case.v, scale=stored)
    status, out, err = run(capsys, "compare", tmp_path / "data.npz", *QUICK, "--methods", "hyper", *options,
        "--out", tmp_path)  # fmt: skip
    assert (status, err) == (0, "")
    assert f"float32, scale {used:.4g}" in " ".join(out.split())
    record = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert record["case"]["scale"] == pytest.approx(used)
    for notes in (" ".join(out.split()), " ".join(record["notes"])):
        assert says in notes


@pytest.mark.parametrize("scale", ["1e300", "-1e300", "1e30"])
def test_overflow_leaks_no_warning(tmp_path, no_plot, capsys, scale):
    status, out, err = run(capsys, "compare", *QUICK, f"--scale={scale}", "--methods", "sortlsh", "hyper", "kdeformer",
        "exact", "--out", tmp_path)  # fmt: skip
    assert (status, err) == (0, "")
    assert f"nan: the scale {float(scale):.4g} takes" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "sortlsh", "sortlhs"], "got 'sortlhs'; did you mean 'sortlsh'?"),
        (["--methods", "Treecode"], "got 'Treecode'; did you mean 'treecode'?"),
        (["--budgets", "0"], "budget must be an integer of at least 1, got 0"),
        (["--rtol", "0"], "rtol must be a positive finite number or None, got 0.0"),
        (["--rtol", "0.05,-0.1"], "rtol must be a positive finite number or None, got -0.1"),
        (["--rtol", "-1"], "rtol"),
        (["--rtol", "nan"], "rtol"),
        (["--rtol", "inf"], "rtol"),
        (["--seeds", "0"], "seeds must be an integer of at least 1, got 0"),
        (["--repeats", "0"], "repeats"),
        (["--exact-rows", "0"], "exact_rows"),
        (["--scale", "nan"], "scale"),
        (["--n", "100000"], "GloVe"),
        (["missing.npz"], "missing.npz: No such file"),
        (["a.npz", "b.npz"], "one .npz"),
        (["a.txt"], "one .npz"),
        (["."], "cannot read .: it is a folder"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    for out in (tmp_path, tmp_path / "new" / "folder"):
        assert_fails(capsys, "compare", *arguments, "--out", out, says=says)
        assert files_in(tmp_path) == []


def test_empty_outputs_leave_no_folder(tmp_path, capsys):
    np.savez(tmp_path / "empty.npz", q=np.ones((0, 4)), k=np.ones((5, 4)), v=np.ones((5, 4)))
    assert_fails(capsys, "compare", tmp_path / "empty.npz", "--out", tmp_path / "out", says="at least one element")
    assert files_in(tmp_path) == ["empty.npz"]


@pytest.mark.parametrize("failure", [MemoryError("too much"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["measure", "write"])
def test_a_new_folder_goes_where_nothing_is_written(tmp_path, no_plot, capsys, monkeypatch, where, failure):
    def fail(*arguments, **options):
        raise failure

    monkeypatch.setattr(comparison if where == "measure" else cli, "measure" if where == "measure" else "to_json", fail)
    (tmp_path / "mine").mkdir()
    for out in ("new/folder", "mine", "mine/new"):
        assert run(capsys, "compare", *QUICK, "--out", tmp_path / out)[0] in (2, 130)
        assert files_in(tmp_path) == ["mine"]
        assert files_in(tmp_path / "mine") == []


def test_options_are_checked_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "glove_case", lambda n: pytest.fail("loaded the data first"))
    assert_fails(capsys, "compare", "--methods", "nope", "--out", tmp_path / "out", says="nope")
    assert_fails(capsys, "compare", "--rtol", "0", "--out", tmp_path / "out", says="rtol")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND; see kdecore --help"),
        (["unknown"], "'unknown'"),
        (["info", "more"], "unknown arguments: more; see kdecore --help"),
        (["compare", "--budgets", "many"], "argument --budgets: must be integers, got 'many'; see kdecore compare --help"),
        (["compare", "--budgets", "16,1.5"], "got '16,1.5'"),
        (["compare", "--budgets"], "--budgets: expected at least one argument"),
        (["compare", "--rtol", "small"], "argument --rtol: must be numbers, got 'small'; see kdecore compare --help"),
        (["compare", "--rtol", "0.1,small"], "argument --rtol: must be numbers, got '0.1,small'"),
        (["compare", "--rtol", ","], "argument --rtol: must be numbers, got ','"),
        (["compare", "--rtol"], "--rtol: expected at least one argument"),
        (["compare", "--rtol", "0.1", "ok.npz"], "got 'ok.npz'; files come before the options"),
        (["compare", "--library", "jax"], "invalid choice: 'jax'"),
        (["compare", "--methods", "sortlsh", "hyper", "ok.npz"], "got 'ok.npz'; files come before the options"),
        (["compare", "--budgets", "16", "ok.NPZ"], "files come before the options, as in kdecore compare ok.NPZ"),
        (["compare", "--budgets", "16", "ok.pt"], "files come before the options, as in kdecore compare ok.pt"),
        (["compare", "q.npy", "--seeds", "1", "k.npy"], "files come before the options, as in kdecore compare k.npy"),
        (["compare", "--methods", ","], "at least one entry"),
    ],
)
def test_misspelt_arguments(capsys, monkeypatch, arguments, says):
    monkeypatch.setattr(cli, "glove_case", lambda n: pytest.fail("loaded the data first"))
    assert_fails(capsys, *arguments, says=says)


def test_output_folder_is_checked_before_measuring(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "measure", lambda *a, **k: pytest.fail("measured first"))
    (tmp_path / "file").write_text("keep me")
    assert_fails(capsys, "compare", *QUICK, "--out", tmp_path / "file", says="file")
    assert_fails(capsys, "compare", *QUICK, "--out", tmp_path / "file" / "below", says="below")
    (tmp_path / "out" / "compare.png").mkdir(parents=True)
    assert_fails(capsys, "compare", *QUICK, "--out", tmp_path / "out", says="compare.png")
    assert (tmp_path / "file").read_text() == "keep me"


def test_unwritable_folder(tmp_path, capsys, monkeypatch):
    def refuse(self, content):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(cli.Path, "write_bytes", refuse)
    assert_fails(capsys, "compare", *QUICK, "--out", tmp_path, says="Permission denied")


def test_full_disk_leaves_the_earlier_results(tmp_path, no_plot, capsys, monkeypatch):
    for name in cli.OUTPUTS:
        (tmp_path / name).write_text("old")
    write = cli.Path.write_bytes

    def fill_up(self, content):
        write(self, content[: len(content) // 2])
        if "png" in self.name:
            raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(cli.Path, "write_bytes", fill_up)
    assert_fails(capsys, "compare", *QUICK, "--out", tmp_path, says="No space left")
    assert files_in(tmp_path) == sorted(cli.OUTPUTS)
    assert {(tmp_path / name).read_text() for name in cli.OUTPUTS} == {"old"}


@pytest.mark.parametrize("where", ["measure", "_record"])
def test_interrupt(tmp_path, no_plot, capsys, monkeypatch, where):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison if where == "measure" else cli, where, interrupt)
    status, out, err = run(capsys, "compare", *QUICK, "--out", tmp_path)
    assert (status, out) == (130, "")
    assert err == "kdecore: interrupted, nothing was written\n"
    assert files_in(tmp_path) == []


def test_out_of_memory(tmp_path, capsys, monkeypatch):
    def exhaust(*arguments, **options):
        raise MemoryError("Unable to allocate 1 TiB")

    monkeypatch.setattr(comparison, "measure", exhaust)
    assert_fails(capsys, "compare", *QUICK, "--out", tmp_path, says="not enough memory: Unable to allocate 1 TiB")


@pytest.mark.parametrize("package", ["rich", "matplotlib", "plotly", "jinja2"])
def test_without_the_extra(tmp_path, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    says = f"kdecore compare needs {package}: pip install 'kdecore[cli]', or from a clone pip install '.[cli]'"
    assert_fails(capsys, "compare", *QUICK, "--out", tmp_path, says=says)
    assert run(capsys, "info")[0] == 0


def test_without_torch(tmp_path, no_plot, capsys, no_torch):
    status, out, _ = run(capsys, "compare", *QUICK, "--out", tmp_path)
    assert status == 0
    assert "exact (kdecore)" in out
    assert_fails(
        capsys, "compare", *QUICK, "--library", "torch", "--out", tmp_path, says="'torch' cannot be used: not installed"
    )


def test_info(capsys):
    status, out, err = run(capsys, "info")
    assert (status, err) == (0, "")
    assert f"kdecore {kdecore.__version__}" in out
    for name in (*KERNELS, *TARGETS, "numpy", "torch", "cupy", "cpu"):
        assert name in out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert lines["hash_codes"].split()[1:3] == ["numba-cpu", "numba-cpu"]
    assert "numpy cpu, torch cpu" in lines["array-api"]


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (None, "no CUDA driver or device found"),
        (RuntimeError("the driver is too old"), "CUDA does not start: the driver is too old"),
    ],
)
def test_info_says_why_cuda_kernels_do_not_run(capsys, monkeypatch, problem, said):
    from numba import cuda

    def available():
        if problem is not None:
            raise problem
        return False

    monkeypatch.setattr(cuda, "is_available", available)
    cuda_problem.cache_clear()
    try:
        _, out, _ = run(capsys, "info")
    finally:
        cuda_problem.cache_clear()
    line = next(line for line in out.splitlines() if line.startswith("  numba-cuda"))
    assert said in line


def test_info_without_numba_cuda(capsys, monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    cuda_problem.cache_clear()
    try:
        _, out, _ = run(capsys, "info")
    finally:
        cuda_problem.cache_clear()
    assert "nowhere here: numba-cuda is not installed" in out
    assert "nowhere here: triton is not installed" in out


@pytest.mark.parametrize("installed", [True, False])
def test_info_says_what_triton_needs(capsys, monkeypatch, installed):
    """A device in any case: to install it would not do."""
    pytest.importorskip("torch")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(registry, "find_spec", lambda name: name if installed and name == "triton" else None)
    cuda_problem.cache_clear()
    try:
        _, out, _ = run(capsys, "info")
    finally:
        cuda_problem.cache_clear()
    said = " ".join(out[out.index("  triton  ") : out.index("  torch-autograd  ")].split())
    needed = "needs PyTorch tensors on a CUDA device, got torch on cpu"
    assert said == f"triton nowhere here: {needed if installed else f'triton is not installed; {needed}'}"


def test_version(capsys):
    with pytest.raises(SystemExit) as info:
        cli.main(["--version"])
    assert info.value.code == 0
    assert capsys.readouterr().out == f"kdecore {kdecore.__version__}\n"


def test_module_runs_and_kdecore_imports_no_other_library():
    code = "import sys, kdecore, kdecore.compare.cli; print([m for m in ('torch', 'cupy', 'rich') if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert found.stdout.strip() == "[]"


def test_measure_counts_and_progress():
    steps = []
    rows = comparison.measure(
        small_case(), ["sortlsh", "exact", "sortlsh"], [12, 60, 12], [3, 4], repeats=2, progress=lambda *s: steps.append(s)
    )
    assert [(row.method, row.ran, row.budget, row.keys_per_query) for row in rows[1:]] == [
        ("sortlsh", "sortlsh", 12, 12.0),
        ("sortlsh", "exact", 60, 60.0),  # a budget of n_k or more is exact
        ("exact", "exact", None, 60.0),
    ]
    assert all(len(row.timings) == 4 for row in rows)
    assert rows[0].speedup == 1.0
    assert rows[1].errors_std.spectral > 0.0
    done, total, _ = zip(*steps, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == total[-1] == total[0]


def test_errors_are_means_over_seeds():
    case = small_case()
    exact = kdecore.attention(*(x.astype(np.float64) for x in (case.q, case.k, case.v)), method="exact")
    by_seed = [
        np.mean([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(
            kdecore.attention(case.q, case.k, case.v, method="hyper", budget=20, seed=seed), exact, strict=True)])
        for seed in (0, 1, 2)
    ]  # fmt: skip
    row = comparison.measure(case, ["hyper"], [20], [0, 1, 2], repeats=1)[1]
    assert row.errors.frobenius == pytest.approx(np.mean(by_seed), rel=1e-6)
    assert row.errors_std.frobenius == pytest.approx(np.std(by_seed, ddof=1), rel=1e-4)


def test_half_precision_inputs():
    rows = comparison.measure(small_case(dtype=np.float16), ["sortlsh"], [20], [0], repeats=1)
    assert all(math.isfinite(row.errors.spectral) for row in rows)


def test_sampled_rows_follow_the_seed():
    case = small_case()
    first, again, other = (comparison.sample_rows(case, 20, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(set(first.tolist())) == 20
    assert comparison.sample_rows(case, 60, 0) is None
    assert comparison.sample_rows(case, None, 0) is None


def test_rows_are_sampled_beyond_the_limit(monkeypatch):
    monkeypatch.setattr(comparison, "EXACT_LIMIT", 3000)
    monkeypatch.setattr(comparison, "FEWEST_ROWS", 5)
    case = small_case()
    assert len(comparison.sample_rows(case, None, 0)) == 3000 // (2 * 60)


def test_measure_rejects_empty_output():
    case = small_case()
    with pytest.raises(kdecore.ShapeError, match="at least one element"):
        comparison.measure(replace(case, q=case.q[:, :0]), ["sortlsh"], [8], [0])


@pytest.mark.parametrize(("methods", "budgets", "seeds"), [([], [8], [0]), (["exact"], [], [0]), (["exact"], [8], [])])
def test_measure_needs_something_to_measure(methods, budgets, seeds):
    with pytest.raises(kdecore.OptionError, match="at least one"):
        comparison.measure(small_case(), methods, budgets, seeds)


def test_machine_names_the_threads_that_kdecore_uses(monkeypatch):
    monkeypatch.setattr("numba.get_num_threads", lambda: pytest.fail("launched Numba's threading layer"))
    monkeypatch.setattr("kdecore.kernels.runtime.threads.thread_count", lambda: 7)
    threads = machine.this_machine().threads
    assert threads["kdecore"] == "7"
    assert "numba" not in threads


def test_peak_memory():
    size = 64 * 2**20
    found = machine.peak_memory(lambda: np.ones(size, dtype=np.uint8))
    if found is None:
        pytest.skip("this system cannot reset a process's high-water mark")
    assert 0.9 * size < found < 1.5 * size


@pytest.mark.parametrize("names", [("numpy",), ("torch",), ("numpy", "torch")], ids="-".join)
def test_backends_do_the_same(names):
    for name in names:
        pytest.importorskip(name)
        library = backend_named(name)
        array = np.arange(6.0).reshape(2, 3)[::-1]
        array.flags.writeable = False
        np.testing.assert_array_equal(library.to_numpy(library.from_numpy(array)), array)
        assert library.version()
        assert library.unusable() is None
        assert library.devices()[0] == "cpu"
        library.synchronize()


@pytest.mark.parametrize(("d", "d_v"), [(8, 8), (8, 5), (5, 8)])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_torch_baseline_is_exact(lead, d, d_v):
    pytest.importorskip("torch")
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((*lead, n, columns)) for n, columns in ((7, d), (20, d), (20, d_v)))
    function = backend_named("torch").exact_attention
    expected = kdecore.attention(q, k, v, method="exact", scale=0.3)
    np.testing.assert_allclose(function(q, k, v, 0.3), expected, rtol=1e-10)


def test_json_has_no_nan():
    text = cli.to_json({"a": [math.nan, math.inf, 1.5], "b": {"c": -math.inf}}).decode()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, None, 1.5], "b": {"c": None}}


def test_plot_says_that_rows_are_sampled(monkeypatch):
    texts = []
    monkeypatch.setattr(comparison, "TIMED_ROWS", 40)
    monkeypatch.setattr(
        "kdecore.compare.plots.Figure.savefig",
        lambda figure, *a, **k: texts.extend(
            [figure.axes[0].get_title(), *(text.get_text() for text in figure.axes[0].texts)]
        ),
    )
    case = small_case()
    rows = comparison.measure(case, ["hyper"], [8], [0], repeats=1, exact_rows=20)
    comparison_png(case, rows, machine.this_machine(), "numpy", 0.05)
    assert any("errors on 20 of 60 queries, drawn at random" in text for text in texts)
    assert any("exact" in text and "scaled up from 40 queries" in text for text in texts)


def test_plot_shows_tolerances(monkeypatch):
    figures = []
    monkeypatch.setattr("kdecore.compare.plots.Figure.savefig", lambda figure, *a, **k: figures.append(figure))
    case = small_case()
    exact, hyper, one = comparison.measure(case, ["hyper", "auto"], [8], [0], repeats=1)
    chosen = [replace(one, method="auto", ran=ran, budget=None, rtol=rtol) for ran, rtol in
              (("hyper", 0.2), ("sortlsh, exact", 0.1), ("exact", 0.05))]  # fmt: skip
    comparison_png(case, [exact, hyper, *chosen], machine.this_machine(), "numpy", 0.05)
    comparison_png(case, [exact, *chosen], machine.this_machine(), "numpy", 0.05)
    for figure, curves in zip(figures, (["hyper"], []), strict=True):
        texts = [text.get_text() for text in figure.axes[0].texts]
        assert {"rtol 0.2", "rtol 0.1"} <= set(texts)
        assert "rtol 0.05" not in texts
        assert any(text.startswith(("rtol 0.05 (exact):", "▾ rtol 0.05 (exact):")) for text in texts)
        legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert legend == [*curves, "rtol (Frobenius)"]


def test_plot_shows_many_methods_apart(monkeypatch):
    figures = []
    monkeypatch.setattr("kdecore.compare.plots.Figure.savefig", lambda figure, *a, **k: figures.append(figure))
    case = small_case()
    exact, hyper = comparison.measure(case, ["hyper"], [8], [0], repeats=1)
    many = [replace(hyper, method=f"method {i}", ran=f"method {i}", budget=i or None) for i in range(13)]
    comparison_png(case, [exact, *many], machine.this_machine(), "numpy", 0.05)
    curves = [line for line in figures[0].axes[0].lines if line.get_label().startswith("method")]
    assert [line.get_label() for line in curves] == [row.label for row in many]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in curves}
    assert len(looks) == 13
    texts = [text.get_text() for text in figures[0].axes[0].texts]
    assert sorted(text for text in texts if text.isdigit()) == sorted(map(str, range(1, 13)))
    assert "None" not in texts


def test_plot_with_any_errors():
    case, here = glove_case(64), machine.this_machine()
    rows = comparison.measure(case, ["hyper"], [8, 16], [0], repeats=1)
    for frobenius in (1e-9, 0.0, math.nan, math.inf):
        changed = [replace(row, errors=Errors(0.1, frobenius, 0.1)) for row in rows]
        assert comparison_png(case, changed, here, "numpy", 0.05).startswith(b"\x89PNG")
