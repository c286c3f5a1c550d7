"""The verdict of a comparison, the call that it says, and the table that it ends."""

import ast
import math
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import kdecore
from kdecore.accuracy.certificate import Certificate
from kdecore.accuracy.metrics import Errors
from kdecore.arrays.backend import backend_named
from kdecore.compare import cli, comparison, timing
from kdecore.compare.cases import Case
from kdecore.compare.machine import Machine
from kdecore.compare.rows import SDPA, Row, WorstRow, find_worst_rows
from kdecore.compare.table import print_table
from kdecore.compare.verdict import BOUND, largest_error, percent, plain, times, verdict
from kdecore.methods import METHODS

HERE = Machine("a processor of some name", 2, None, "Linux", "3.12", {}, {})


def case_of(n_q=8192, n_k=8192, heads=(), key_heads=None, **said):
    """Zeros that take no memory."""
    q, k = (np.broadcast_to(np.float32(0), (*lead, n, 64)) for lead, n in ((heads, n_q), (key_heads or heads, n_k)))
    return Case("some arrays", q, k, k, **said)


def row(method, milliseconds, error, budget=None, ran=None, rtol=None, exact_time=100.0):
    errors = Errors(error / 2, error, 10 * error)
    return Row(
        method=method,
        ran=ran or method,
        budget=budget,
        rtol=rtol,
        keys_per_query=float(budget or 8192),
        milliseconds=milliseconds,
        timings=(milliseconds,),
        timed_rows=8192,
        speedup=exact_time / milliseconds,
        errors=errors,
        errors_std=errors,
        error_rows=8192,
        peak_bytes=None,
        kernels={},
        certificate=None,
        first_errors=errors,
        worst_rows=(WorstRow((7,), 10 * error, error, 1.0, 0.5),),
    )


EXACT = row(SDPA, 100.0, 1e-7, ran="exact")
ROUGH = row("sortlsh", 0.4, 0.51, 128)  # 250 times as fast, and wrong by half
GOOD = row("treecode", 25.0, 0.013, 256)
BETTER = row("treecode", 50.0, 0.004, 1024)
SLOW = row("treecode", 150.0, 0.02, 128)


def test_the_fastest_within_the_bound_wins():
    found = verdict(case_of(), [EXACT, ROUGH, GOOD, BETTER], BOUND)
    assert found.sentence == "Use treecode at 256 keys: 4 times as fast as exact (torch SDPA) at 1.3 % error."
    assert found.reason == "It is the fastest of 2 settings within 5 % error."
    assert found.call == 'out = kdecore.attention(q, k, v, method="treecode", budget=256)'
    assert found.row is found.looked_at is GOOD
    assert verdict(case_of(), [EXACT, ROUGH, GOOD, BETTER], 0.01).row is BETTER
    assert verdict(case_of(), [EXACT, ROUGH, GOOD], BOUND).reason == "No other setting is within 5 % error."


def test_the_bound_itself_is_allowed():
    at = row("treecode", 25.0, 0.05, 256)
    assert verdict(case_of(), [EXACT, at], BOUND).row is at
    assert verdict(case_of(), [EXACT, replace(at, errors=Errors(0.0, 0.0500001, 0.0))], BOUND).row is EXACT


def test_no_error_above_a_fifth_is_a_speed_up():
    """Whatever is asked for: not in the verdict, and not in the table."""
    for rtols in ([], [0.9], [5.0, 0.6]):
        found = verdict(case_of(), [EXACT, ROUGH], largest_error(rtols))
        assert found.sentence == f"Use exact attention: nothing else is within {percent(largest_error(rtols))} error."
        assert found.reason == "The nearest is sortlsh at 128 keys, at 51 % error."
        assert found.row is EXACT
        assert found.looked_at is ROUGH
    assert [largest_error(rtols) for rtols in ([], [0.1], [0.1, 0.01], [0.9])] == [0.05, 0.1, 0.01, 0.2]


def test_exact_is_faster():
    found = verdict(case_of(), [EXACT, ROUGH, SLOW], BOUND)
    assert found.sentence == "Use exact attention: nothing within 5 % error is clearly faster."
    assert "treecode at 128 keys, at 2 % error: it takes 1.5 times as long as exact (torch SDPA)." in found.reason
    assert found.call == "out = torch.nn.functional.scaled_dot_product_attention(q, k, v)"
    assert found.looked_at is SLOW


def test_a_gain_that_two_runs_of_the_same_have_is_none():
    assert verdict(case_of(), [EXACT, replace(GOOD, milliseconds=95.0)], BOUND).row is EXACT


def test_the_fastest_exact_result_is_what_counts():
    own = row("exact", 20.0, 1e-7)
    found = verdict(case_of(), [EXACT, own, GOOD], BOUND)
    assert found.row is own
    assert found.call == 'out = kdecore.attention(q, k, v, method="exact")'


def test_exact_alone():
    covering = row("treecode", 90.0, 1e-7, 9000, ran="exact")
    found = verdict(case_of(), [EXACT, covering], BOUND)
    assert found.sentence == "Use exact attention: nothing else was run."
    assert found.looked_at is None
    assert found.call == 'out = kdecore.attention(q, k, v, method="exact")'


def test_errors_that_are_no_numbers():
    lost = row("treecode", 1.0, math.nan, 256)
    found = verdict(case_of(), [EXACT, lost], BOUND)
    assert (found.row, found.looked_at) == (EXACT, None)
    assert found.reason == "No error is a finite number."
    assert verdict(case_of(), [EXACT, lost, GOOD], BOUND).row is GOOD
    found = verdict(case_of(), [replace(EXACT, errors=lost.errors), lost], BOUND)
    assert found.sentence == "No verdict: even the errors of exact attention are not finite."


def test_short_inputs_are_named_as_the_reason():
    found = verdict(case_of(500, 500), [EXACT, SLOW], BOUND)
    assert 'method="auto" runs exact attention on 500 queries and 500 keys, and estimates from some ' in found.reason
    few = verdict(case_of(4, 8192), [EXACT, SLOW], BOUND).reason
    assert few.endswith('For so few rows that is expected: method="auto" runs exact attention on 4 queries and 8,192 keys.')
    assert "expected" not in verdict(case_of(), [EXACT, SLOW], BOUND).reason
    assert "expected" not in verdict(case_of(500, 500), [EXACT, GOOD], BOUND).reason


@pytest.mark.parametrize("n", [2000, 8192])
def test_auto_does_what_the_reason_says(n):
    q = np.random.default_rng(0).standard_normal((n, 64)).astype(np.float32)
    _, report = kdecore.attention(q, q, q, method="auto", return_report=True, certificate=0.0)
    reason = verdict(case_of(n, n), [EXACT, SLOW], BOUND).reason
    assert ('method="auto" runs exact' in reason) == (report.method == "exact")


def test_a_tolerance_is_a_setting():
    chosen = row("auto", 30.0, 0.02, rtol=0.05, ran="treecode")
    found = verdict(case_of(diagonal=0), [EXACT, chosen], BOUND)
    assert found.sentence.startswith("Use rtol 0.05 (treecode): 3.3 times as fast")
    assert found.call == "out = kdecore.attention(q, k, v, rtol=0.05, diagonal=0)"


def calls():
    for said in ({}, {"scale": 10**-0.5, "diagonal": 0}, {"scale": -123456.789012, "diagonal": -16000}):
        for one in (GOOD, row("kdeformer", 1.0, 0.01, 1_000_000), row("auto", 1.0, 0.01, rtol=0.025, ran="treecode"),
                    row("exact", 1.0, 1e-7), row("sortlsh", 1.0, 1e-7, 9000, ran="exact")):  # fmt: skip
            yield verdict(case_of(**said), [EXACT, one], BOUND).call, said


def test_calls_run_and_fit_the_terminal():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 70, 4))
    seen = []
    for text, said in calls():
        assert max(map(len, text.splitlines())) <= 80
        options = {one.arg: ast.literal_eval(one.value) for one in ast.parse(text).body[0].value.keywords}
        for name, value in said.items():
            assert options.get(name, value) == pytest.approx(value, rel=1e-8)
        names = {"kdecore": kdecore, "q": q, "k": k, "v": v}
        exec(text, names)
        assert names["out"].shape == q.shape
        seen.append(frozenset(options))
    assert len(set(seen)) > 4


@pytest.mark.parametrize("key_heads", [(2, 4), (2, 2)])
def test_the_call_of_pytorch_runs(key_heads):
    torch = pytest.importorskip("torch")
    text = verdict(case_of(heads=(2, 4), key_heads=key_heads, scale=0.3), [EXACT, ROUGH], BOUND).call
    q, k = (torch.ones(*lead, 5, 8) for lead in ((2, 4), key_heads))
    names = {"torch": torch, "q": q, "k": k, "v": k}
    exec(text, names)
    assert names["out"].shape == (2, 4, 5, 8)
    assert ("enable_gqa=True" in text) == (key_heads == (2, 2))


def test_the_call_of_a_baseline_runs():
    torch = pytest.importorskip("torch")
    text = verdict(case_of(n_k=30, scale=0.5), [EXACT, row("uniform", 1.0, 0.01, 16, ran="uniform")], BOUND).call
    x = torch.ones(1, 30, 8)
    names = {"bench": import_module("bench"), "q": x, "k": x, "v": x}
    import_module("bench.baselines")
    exec(text, names)
    assert names["out"].shape == (1, 30, 8)


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [(0.00001, 4, "0.00001"), (0.1, 4, "0.1"), (10.0, 4, "10"), (1200.0, 2, "1200"), (5.05, 2, "5"), (99.6, 2, "100"),
     (0.0, 4, "0"), (math.nan, 4, "nan"), (math.inf, 4, "inf"), (120.0, 4, "120")],
)  # fmt: skip
def test_plain_numbers(value, digits, shown):
    assert plain(value, digits) == shown


def test_percent_and_times():
    assert [percent(value) for value in (0.0131, 0.5, 12.0, math.nan)] == ["1.3 %", "50 %", "1200 %", "nan %"]
    assert [times(value) for value in (0.7, 4.04, 13.4, 2580.0)] == ["0.7", "4", "13", "2,580"]


def test_the_table_fits_80_columns_whatever_stands_in_it(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    limits = Certificate(32, 0.95, 1e-4, (1.01e-5, 1.19e-4), 1e-4, (1e-5, 1e-4))
    names = [*METHODS, "nystromformer_with_exact_inverse", "scatterbrain_window", "kdeformer_released"]
    rows = [replace(EXACT, keys_per_query=1048576.0)]
    rows += [
        replace(row(name, 123456.7, 1.23e-4, 1048576), peak_bytes=2**34, certificate=limits, speedup=1234.5, ran=ran)
        for name in names
        for ran in (name, "treecode, exact")
    ]
    rows.append(replace(rows[-1], method="auto", rtol=1.2345e-6, ran="sortlsh, exact"))
    found = verdict(case_of(), rows, BOUND)
    print_table(case_of(), rows, HERE, "numpy", 5, Path("x" * 100), found)
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if not line.startswith("Written to ")) <= 80
    assert "…" not in out
    assert out.count("1.0e-05–1.2e-04") == len(rows) - 1
    assert out.count("1048576") == len(rows)


def test_the_table_ends_with_verdict_and_call(capsys):
    rows = [EXACT, ROUGH, GOOD]
    found = verdict(case_of(), rows, BOUND)
    print_table(case_of(), rows, HERE, "numpy", 5, Path("out"), found)
    out = capsys.readouterr().out
    assert out.endswith(f"\n{found.sentence}\n{found.reason}\n\n{found.call}\n")
    (rough,) = (line for line in out.splitlines() if line.startswith("sortlsh"))
    assert "×" not in rough
    assert "250" not in out
    assert "No speed-up is shown where the Frobenius error is above 20 %." in out


def test_worst_rows():
    exact = np.ones((2, 3, 4))
    exact[1, 2] = 0.1
    estimate = exact.copy()
    estimate[0, 1] += 0.5
    estimate[1, 2] += 0.2
    worst, second, *others = find_worst_rows(estimate, exact, np.array([5, 7, 9]))
    assert (worst.place, second.place) == ((1, 9), (0, 7))
    assert (worst.error, second.error) == (pytest.approx(2.0), pytest.approx(0.5))
    assert worst.exact_norm == pytest.approx(0.1 / math.sqrt((5 + 0.01) / 6))
    assert worst.share == pytest.approx(0.04 / 0.29)
    assert {one.error for one in others} == {worst.median_error} == {0.0}
    assert len(others) == 3
    estimate[0, 0] = np.nan
    assert find_worst_rows(estimate, exact, None)[0].place == (0, 0)
    assert all(one.error == one.share == 0.0 for one in find_worst_rows(0 * exact, 0 * exact, None))


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_grouped_heads_in_a_file(tmp_path, capsys, monkeypatch, library):
    pytest.importorskip(library)
    monkeypatch.setattr(timing, "SETTLE_SECONDS", 1e-4)
    monkeypatch.setattr("kdecore.compare.page.comparison_html", lambda *arguments: b"")
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 4, 50, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, 2, 60, 8)).astype(np.float32)
    np.savez(tmp_path / "grouped.npz", q=q, k=k, v=v[..., :5])
    arguments = [tmp_path / "grouped.npz", "--library", library, "--methods", "hyper", "--budgets", "16", "--seeds", "1",
                 "--repeats", "1", "--exact-rows", "20", "--out", tmp_path / "out"]  # fmt: skip
    assert cli.main(["compare", *map(str, arguments)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "grouped.npz: 8 × 50 queries, 4 × 60 keys, d = 8, d_v = 5, float32" in out
    assert "Errors are on 20 of 50 queries of each group, drawn at random" in out
    case = Case("grouped", q, k, v)
    baseline, own = comparison.measure(case, ["exact"], [16], [0], repeats=1, exact_rows=20, library=library)
    assert (baseline.error_rows, own.error_rows, own.timed_rows) == (20, 20, 50)
    for one in (baseline, own):
        assert one.errors.frobenius < 1e-5


@pytest.mark.parametrize("lead", [((4,), (2,)), ((3, 4), (3, 1)), ((2, 3, 4), (2, 3, 2))])
@pytest.mark.parametrize("d_v", [8, 5])
def test_pytorchs_exact_attention_has_grouped_heads(lead, d_v):
    pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    (q, k, v) = (rng.standard_normal((*one, n, d)) for one, n, d in zip((lead[0], *lead[1:] * 2), (7, 20, 20), (8, 8, d_v),
                                                                         strict=True))  # fmt: skip
    expected = kdecore.attention(q, k, v, method="exact", scale=0.3)
    np.testing.assert_allclose(backend_named("torch").exact_attention(q, k, v, 0.3), expected, rtol=1e-10)
