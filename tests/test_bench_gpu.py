"""`bench.gpu` without a device: a rehearsal of the whole command, and its parts by numbers worked out by hand."""

import json
import math
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.gpu import command as gpu
from bench.gpu import suite as gpu_suite
from bench.gpu import table as gpu_table
from bench.gpu.arguments import ARGUMENTS, Numbers, Rows, for_library, for_reference
from bench.gpu.calls import check_calls
from bench.gpu.checks import check_kernel, difference, garbage, judged, lists_differ, torch_library
from bench.gpu.errors import cases, error_rows, errors_of, export_vit
from bench.gpu.profile import COUNTABLE, Work, counted, launches_in, rates, stage_of, summarise, work_of
from bench.gpu.session import Session, attempted, exact_rows, median_seconds, timed
from bench.gpu.speed import ceilings, fused_seconds, timings
from kdecore.arrays.namespace import host
from kdecore.core.state import AttentionState
from kdecore.kernels.registry import KERNELS, Implementation

HASHED = "_ZN7kdecore7kernels10hash_codes4cuda7project12_3clocals_3e7projectB2v3E5ArrayIfLi3E1C7mutable7alignedE"


def session(seconds=60.0, vit=None):
    return Session("cpu", time.monotonic() + seconds, 5, vit)


def test_rehearsal(tmp_path, capsys):
    code = gpu.main(["--rehearse", "--out", str(tmp_path), "--seconds", "300", "--seed", "3"])
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert code == 0, printed
    assert not record["failed"]
    assert printed.endswith((tmp_path / "gpu.txt").read_text(encoding="utf-8"))
    assert "REHEARSAL" in printed
    assert {"machine", "device", "commit", "seed", "seconds", "goals", "failed", "found"} == set(record)
    found = record["found"]
    kinds = {"tests", "check", "ceiling", "sdpa", "backend", "timing", "profile", "error", "graph", "left_out", "section"}
    assert kinds == set(found)
    assert [row["name"] for row in found["section"]] == list(gpu.SECTIONS)
    assert found["tests"][0]["passed"] > 10
    assert all(row["passed"] for row in found["check"])
    assert {row["method"] for row in found["timing"] if "speedup" in row} == {"sortlsh", "treecode", "hyper"}
    keys = {"ms", "issue_ms", "sdpa_ms", "sdpa_predicted", "speedup", "spectral", "frobenius"}
    assert all(keys <= set(row) for row in found["timing"] if row["library"] == "torch")
    figures = [row[key] for kind in ("timing", "error") for row in found[kind] for key in keys & set(row)]
    figures += [row["value"] for row in found["ceiling"]] + [row["device_ms"] for row in found["profile"]]
    assert all(isinstance(x, bool) or (math.isfinite(x) and x > 0) for x in figures)
    assert not (tmp_path / "gpu.rows.jsonl").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().out.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_a_process_that_hangs_or_crashes_is_a_failure(tmp_path):
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        started = time.monotonic()
        hung, beside = gpu.run_processes(
            [[sys.executable, "-c", x] for x in ("import time; time.sleep(60)", "pass")], 2, log
        )
        assert time.monotonic() - started < 10
        (crashed,) = gpu.run_processes([[sys.executable, "-c", "import os; os.abort()"]], 20, log)
        (fine,) = gpu.run_processes([[sys.executable, "-c", "pass"]], 20, log)
    assert "limit of time" in hung
    assert beside is None
    assert str(-signal.SIGABRT) in crashed
    assert fine is None


def test_what_a_process_wrote_before_it_ended_is_kept(tmp_path):
    path = tmp_path / "rows"
    path.write_text('{"kind": "check", "name": "a", "passed": true}\n{"kind": "check", "na', encoding="utf-8")
    rows = gpu.grouped(path, [gpu.failure("b", RuntimeError("ended"))])
    assert rows == {
        "check": [{"name": "a", "passed": True}],
        "failure": [{"what": "b", "error": "RuntimeError: ended"}],
    }


@pytest.mark.parametrize("section", [ceilings, timings, error_rows, check_calls])
def test_what_there_is_no_time_for_is_said(section):
    started = time.monotonic()
    found = list(section(session(1.0)))
    left = [row["what"] for kind, row in found if kind == "left_out"]
    late = [row for kind, row in found if kind == "sdpa" and row["ms"] is None]
    assert left or late
    assert not any(kind in ("timing", "error", "check", "profile") for kind, _ in found)
    assert time.monotonic() - started < 10


def test_no_section_is_run_without_time(tmp_path, capsys):
    assert gpu.main(["--rehearse", "--out", str(tmp_path), "--seconds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "no time left" in printed
    assert "TESTS not run" in printed
    assert "CHECKS not made" in printed


def test_stages_by_kernel_names():
    assert stage_of(HASHED) == "hash_codes"
    assert stage_of("kdecore.kernels.row_norms.cuda.norms") == "row_norms"
    assert stage_of("kdecore::kernels::hash_codes::cuda::project::_3clocals_3e::project[abi:v7]") == "hash_codes"
    assert stage_of("attend_tile") == "attend_blocks"
    assert stage_of("open_blocks") == "open_tree"
    assert stage_of("Memcpy DtoD (Device -> Device)") == stage_of("Memset (Device)") == "copies"
    assert stage_of("void at::native::elementwise_kernel<128, 4>") == "array operations"


def test_summary_of_canned_events():
    def event(name, device, microseconds, **more):
        span = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=device, time_range=span, self_cpu_time_total=microseconds, **more)

    device, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        event("cudaLaunchKernel", cpu, 50),
        event("step", device, 900, is_user_annotation=True),
        *(event(HASHED, device, 30) for _ in range(4)),
        *(event("sort", device, 40) for _ in range(2)),
    ]
    found = summarise(launches_in(events, True), calls=2)
    assert found["launches"] == 3
    assert found["device_ms"] == pytest.approx(0.1)
    assert found["stages"]["hash_codes"] == pytest.approx({"ms": 0.06, "launches": 2, "share": 0.6})
    assert found["stages"]["array operations"] == pytest.approx({"ms": 0.04, "launches": 1, "share": 0.4})
    assert list(found["stages"]) == ["hash_codes", "array operations"]
    assert found["longest"][0]["name"] == HASHED
    assert [one.name for one in launches_in(events, False)] == ["cudaLaunchKernel"]


def test_bytes_and_operations_by_hand():
    x = torch.zeros((2, 10, 8), dtype=torch.bfloat16)
    few, codes = x[:, :3], torch.zeros((2, 10), dtype=torch.int16)
    hashed = work_of("hash_codes", (few, x, torch.zeros((8, 12))), (codes[:, :3], codes))
    assert hashed == Work(2 * 13 * 8 * 2 + 8 * 12 * 4 + 2 * 13 * 2, 2 * 2 * 13 * 8 * 12)
    norms = work_of("row_norms", (x,), torch.zeros((2, 10), dtype=torch.float64))
    assert norms == Work(320 + 160, 0)
    order = work_of("bucket_order", (torch.zeros((2, 10), dtype=torch.int16), 12), torch.zeros((2, 10), dtype=torch.int64))
    assert order == Work(40 + 160, 0)
    q, v = torch.zeros((6, 4)), torch.zeros((6, 5))
    lists = torch.zeros((2, 3), dtype=torch.int64), torch.zeros((2, 7), dtype=torch.int64), torch.zeros((2, 7))
    part = AttentionState(torch.zeros((6, 5)), torch.zeros(6))
    blocks = work_of("attend_blocks", (q, q, v, *lists, 0.5, None, None), part)
    assert blocks == Work(2 * 96 + 120 + 48 + 112 + 56 + 120 + 24, 2 * 2 * 3 * 7 * (4 + 5))
    dense = work_of("attend_dense", (q[None], q[None], v[None], 0.5), AttentionState(part.out[None], part.lse[None]))
    assert dense == Work(2 * 96 + 120 + 120 + 24, 2 * 6 * 6 * (4 + 5))


def test_rates_by_hand():
    stages = {"hash_codes": {"ms": 2.0}, "row_norms": {"ms": 0.0}, "open_tree": {"ms": 1.0}}
    work = {"hash_codes": [Work(10**9, 10**12), Work(10**9, 10**12)], "row_norms": [Work(1, 0)]}
    found = rates(stages, work)
    assert list(found) == ["hash_codes"]
    assert found["hash_codes"]["tb_s"] == pytest.approx(1.0)
    assert found["hash_codes"]["tflop_s"] == pytest.approx(1000.0)
    assert set(COUNTABLE) <= set(KERNELS)


def test_counting_leaves_the_kernels_as_they_were():
    before = dict(KERNELS)
    with counted() as work:
        KERNELS["finite_rows"][-1].function(host, np.zeros((1, 3, 2), np.float32))
    assert before == KERNELS
    assert work == {"finite_rows": [Work(24 + 3, 0)]}
    with pytest.raises(ZeroDivisionError), counted():
        raise ZeroDivisionError
    assert before == KERNELS


def test_every_kernel_has_random_arguments(rng):
    assert set(ARGUMENTS) == set(KERNELS)
    for kernel, make in ARGUMENTS.items():
        KERNELS[kernel][-1].function(host, *(for_reference(x, "bfloat16") for x in make(rng, 37)))


def test_reference_and_implementation_get_the_same_numbers(rng):
    library = torch_library("cpu")
    for kind in (Rows, Numbers):
        for dtype in ("float16", "bfloat16", "float32", "float64"):
            x = rng.standard_normal(999)
            given = for_library(kind(x), dtype, library.convert)
            np.testing.assert_array_equal(given.double().numpy(), for_reference(kind(x), dtype))


def wrong(change):
    """An implementation of `row_norms` that is wrong."""
    right = KERNELS["row_norms"][-1].function
    return Implementation("array-api", lambda xp, rows: change(xp, right(xp, rows)))


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        (lambda xp, norms: norms, True),
        (lambda xp, norms: norms * (1 + 1e-4), False),
        (lambda xp, norms: norms[:, 1:], False),
        (lambda xp, norms: xp.empty(norms.shape, dtype=norms.dtype, device=norms.device), False),
        (lambda xp, norms: 1 / 0, False),
    ],
)
def test_a_wrong_kernel_fails(change, passes):
    row = check_kernel("row_norms", wrong(change), torch_library("cpu"), "float32", 37, session(), "norms")
    assert row["passed"] is passes
    assert json.loads(json.dumps(row))["name"] == "norms"


def test_unwritten_memory_is_filled():
    with garbage(torch_library("cpu").xp) as xp:
        assert xp.empty(3, dtype=torch.float32).isnan().all()
        assert torch.empty_like(torch.zeros(2)).isnan().all()
        assert (torch.empty(3, dtype=torch.int16) == 77 * 257).all()
    with garbage(host) as xp:
        assert np.isnan(xp.empty((2, 2), dtype=xp.float64)).all()
        assert (xp.empty(2, dtype=xp.int64) > 2**60).all()
        assert xp.empty(2, dtype=xp.bool).all()
        assert xp.zeros(2).sum() == 0


def test_differences_by_hand():
    assert difference(np.array([3.0, 4.5]), np.array([3.0, 4.0])) == pytest.approx(0.1)
    assert difference(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])) == 0.25
    assert difference(np.array([-np.inf, 1.0]), np.array([-np.inf, 1.0])) == 0
    assert difference(np.array([0.0, 1.0]), np.array([-np.inf, 1.0])) == np.inf
    assert difference(np.array([np.nan, 1.0]), np.array([0.0, 1.0])) == np.inf
    assert difference(np.zeros(2), np.zeros(3)) == np.inf


def test_lists_in_any_order():
    index, weight = np.array([[[4, 2, 9, 0]]]), np.array([[[0.0, 1.0, 2.0, -np.inf]]])
    assert lists_differ(index[..., ::-1], weight[..., ::-1], index, weight) == 0
    assert lists_differ(index, weight + np.array([0.0, 0.0, 0.1, 0.0]), index, weight) == pytest.approx(1 / 3)
    assert lists_differ(index + np.array([0, 0, 1, 0]), weight, index, weight) == pytest.approx(1 / 2)
    assert lists_differ(index, weight * np.nan, index, weight) == np.inf


def test_rounding_may_change_few_integers_only():
    right = {"": np.zeros(10**5, np.int16)}
    few, many = (right[""].copy() for _ in range(2))
    few[:5], many[:500] = 1, 1
    assert judged("hash_codes", {"": few}, right, "float32")["passed"]
    assert not judged("hash_codes", {"": many}, right, "float32")["passed"]
    assert not judged("hash_codes", {"": few}, right, "float64")["passed"]
    assert not judged("bucket_order", {"": few}, right, "float32")["passed"]


TESTS = """
import pytest

def test_passes(): pass
def test_fails(): assert 2 == 3
def test_skips(): pytest.skip("none")
@pytest.fixture
def broken():
    yield
    raise ValueError("not ended well")
def test_ends_badly(broken): pass
"""


def test_outcomes_of_tests(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS, encoding="utf-8")
    report = tmp_path / "outcomes"
    command = gpu_suite.command(report, (str(tmp_path / "test_it.py"), "--noconftest"))
    assert gpu_suite.run_tests(command, 60.0)[0] == 1
    found = gpu_suite.read_outcomes(report.read_text(encoding="utf-8") + '{"name": "cut o')
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    errors = {one["name"].rpartition("::")[2]: one["error"] for one in found["failures"]}
    assert errors == {"test_fails": "assert 2 == 3", "test_ends_badly": "ValueError: not ended well"}
    assert gpu_suite.read_outcomes("")["passed"] == 0


def test_tests_that_take_too_long_are_interrupted():
    started = time.monotonic()
    code, cut, _ = gpu_suite.run_tests([sys.executable, "-c", "import time; time.sleep(60)"], 1.0)
    assert cut
    assert code == -signal.SIGINT or code == 1
    assert time.monotonic() - started < 15


def timing(n, speedup, frobenius, method="treecode", dtype="bfloat16"):
    own = {"library": "torch", "dtype": dtype, "n": n, "method": method, "speedup": speedup, "frobenius": frobenius}
    own["budget"] = 512
    return own | {"ms": 1.0, "issue_ms": 1.0, "spectral": 0.01, "sdpa": "flash", "sdpa_ms": speedup, "sdpa_predicted": False}


def test_goals():
    rows = {
        "timing": [
            timing(4096, 0.5, 0.01),
            timing(8192, 1.2, 0.01),
            timing(32768, 9.0, 0.3, "sortlsh"),
            timing(32768, 4.0, 0.04),
            timing(131072, 30.0, 0.01, dtype="float32"),
        ]
    }
    assert [row["verdict"] for row in gpu_table.verdicts(rows)] == ["reached", "MISSED", "not measured"]
    assert gpu_table.verdicts(rows)[1]["best"]["speedup"] == 4.0
    assert gpu_table.verdicts({"timing": [timing(131072, 40.0, math.nan)]})[2]["verdict"] == "MISSED"
    assert gpu_table.verdicts({"timing": [timing(4096, 0.5, 0.01)]})[0]["verdict"] == "not measured"
    assert all(row["verdict"] == "not measured" for row in gpu_table.verdicts({}))


HEADER = {
    "machine": {"cpu": "a processor", "versions": {"torch": "2", "numpy": "2"}},
    "device": {"name": "a device", "multiprocessors": 132},
    "commit": None,
    "seed": 1,
    "seconds": 9.0,
}
GOOD_TESTS = {"passed": 5, "failed": 0, "skipped": 0, "exit_code": 0, "cut_off": False, "failures": []}


def test_failures_come_first_and_the_table_is_short():
    checks = [{"name": f"check {i}", "passed": i % 2 == 0, "measured": math.inf, "limit": 0.1} for i in range(60)]
    stages = {f"stage {i}": {"share": 0.1, "ms": 1.0} for i in range(9)}
    profile = {"dtype": "bfloat16", "n": 8192, "method": "sortlsh", "launches": 50.0, "device_ms": 1.0, "stages": stages}
    profile["rates"] = {"hash_codes": {"tb_s": 1.5, "tflop_s": 2.0}}
    rows = {
        "check": checks,
        "tests": [GOOD_TESTS],
        "ceiling": [{"name": "copy", "value": 3.0, "unit": "TB/s"}],
        "timing": [timing(2**power, 1.0, math.nan) for power in range(12, 19)] * 4,
        "profile": [profile] * 20,
        "left_out": [{"what": f"part {i}", "why": "no time left"} for i in range(99)],
    }
    text = gpu_table.table(HEADER, rows)
    assert len(text) <= gpu_table.MOST_CHARACTERS
    assert text.index("FAILED") < text.index("TESTS") < text.index("GOALS")
    assert "check 1: inf, at most 0.1" in text
    assert "and 18 more" in text
    assert "hash_codes 1.5 TB/s (50%), 2 TFLOP/s" in text
    assert "and 87 more" in text
    assert text.splitlines()[-1].startswith("  not measured") or "at least 20 times" in text.splitlines()[-1]
    long = gpu_table.clipped(text * 9)
    assert len(long) <= gpu_table.MOST_CHARACTERS
    assert "FAILED" in long[:300]


@pytest.mark.parametrize(
    ("rows", "fails"),
    [
        ({}, False),
        ({"tests": [GOOD_TESTS]}, False),
        ({"tests": [GOOD_TESTS | {"cut_off": True, "exit_code": 2}]}, False),
        ({"tests": [GOOD_TESTS | {"exit_code": 3}]}, True),
        ({"tests": [GOOD_TESTS | {"failed": 1, "exit_code": 1}]}, True),
        ({"tests": [GOOD_TESTS | {"passed": 0, "exit_code": 5}]}, True),
        ({"check": [{"passed": True}, {"passed": False}]}, True),
        ({"failure": [{"what": "a", "error": "b"}]}, True),
    ],
)
def test_what_counts_as_a_failure(rows, fails):
    assert gpu_table.failed(rows) is fails


def test_failures_end_the_command_with_1(tmp_path, monkeypatch, capsys):
    def run_processes(commands, seconds, log):
        with gpu.rows_path(tmp_path).open("a", encoding="utf-8") as file:
            file.write(
                json.dumps({"kind": "check", "name": "bad", "passed": False, "measured": math.nan, "limit": 1}) + "\n"
            )

        return [None for _ in commands]

    monkeypatch.setattr(gpu, "run_processes", run_processes)
    assert gpu.main(["--rehearse", "--out", str(tmp_path)]) == 1
    assert "bad: nan, at most 1" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["failed"]


def test_a_section_that_raises_is_a_failure():
    def rows():
        yield "check", {"passed": True}
        raise torch.OutOfMemoryError("full") if full else ValueError("broken\nby more")

    full = False
    assert list(attempted("it", rows))[1:] == [("failure", {"what": "it", "error": "ValueError: broken"})]
    full = True
    assert [kind for kind, _ in attempted("it", rows)] == ["check", "left_out"]


def test_exact_attention_is_predicted_where_it_takes_long():
    one = tuple(torch.zeros((1, 64, 4)) for _ in range(3))
    assert fused_seconds(session(), "math", [one], [(8, 0.1)]) == (pytest.approx(6.4), True)
    seconds, predicted = fused_seconds(session(), "math", [one], [(32, 1e-4)])
    assert seconds < 1
    assert not predicted


def test_calls_take_turns():
    seen = []
    calls = [lambda i=i: seen.append(i) for i in range(3)]
    assert len(timed("cpu", calls, 7)) == 7
    assert seen == [0, 1, 2, 0, 1, 2, 0]
    assert median_seconds("cpu", calls) >= 0


def test_exact_rows(rng):
    q, k, v = (torch.tensor(rng.standard_normal((2, 50, 5)), dtype=torch.bfloat16) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.3)
    torch.testing.assert_close(exact_rows(q, k, v, 0.3), expected)


def test_layers_from_a_file(tmp_path, monkeypatch, rng):
    from bench import vit

    layers = {i: tuple(rng.standard_normal((2, 65, 16)).astype(np.float32) for _ in "qkv") for i in (1, 3, 6)}
    monkeypatch.setattr(vit, "qkv", lambda size, wanted: {i: layers[i] for i in wanted})
    path = tmp_path / "vit.npz"
    assert "2×65×16" in export_vit(path)
    found = list(cases(session(vit=path)))[1:]
    assert [case.name[-1] for case in found] == ["1", "3", "6"]
    np.testing.assert_array_equal(found[1].k, layers[3][1].astype(np.float16))
    rows = [row for _, row in errors_of(session(vit=path), found[1], "bfloat16")]
    assert [row["method"] for row in rows] == ["sortlsh", "hyper", "treecode"]
    assert all(row["frobenius"] < 0.5 for row in rows)


def test_the_documentation_names_every_section():
    text = (Path(gpu.__file__).parent / "METHOD.md").read_text(encoding="utf-8")
    for section in gpu.SECTIONS:
        assert f"| {section} |" in text
