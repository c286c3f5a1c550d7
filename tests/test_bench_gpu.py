"""`bench.gpu` without a device: a rehearsal of the whole command, and its parts by numbers worked out by hand."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.gpu import command as gpu
from bench.gpu import suite as gpu_suite
from bench.gpu import table as gpu_table
from bench.gpu.arguments import ARGUMENTS, Numbers, Rows, for_library, for_reference
from bench.gpu.calls import check_all_gradients, check_calls
from bench.gpu.checks import check_kernel, check_kernels, difference, garbage, judged, lists_differ, torch_library
from bench.gpu.errors import cases, error_rows, errors_of, export_vit
from bench.gpu.peers import OTHERS, OWN, peer_rows
from bench.gpu.profile import LAUNCHES, PAPER, PAPER_ROWS, bounded, launches_in, stage_of, summarise
from bench.gpu.session import Session, attempted, exact_rows, median_seconds, timed
from bench.gpu.speed import METHODS, cupy_timings, fused_seconds, graphs, timings
from kdecore.arrays.namespace import host
from kdecore.kernels.registry import KERNELS, Implementation
from kdecore.methods.treecode import Treecode

HASHED = "_ZN7kdecore7kernels10hash_codes4cuda7project12_3clocals_3e7projectB2v3E5ArrayIfLi3E1C7mutable7alignedE"


def session(seconds=60.0, vit=None, peers=None):
    return Session("cpu", time.monotonic() + seconds, 5, vit, peers)


PACKAGES = {
    "flash_attn": """
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale).transpose(1, 2)
""",
    "flash_attn_interface": """
def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None):
    return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale).transpose(1, 2)
""",
    "sageattention": """
def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    assert tensor_layout == "HND"
    return attention(q, k, v, sm_scale)
""",
    "xformers": "from xformers import ops",
    "xformers/ops": """
def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    return attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale).transpose(1, 2)
""",
    "flashinfer": """
def single_prefill_with_kv_cache(q, k, v, scale_q=None, causal=False, kv_layout="NHD", sm_scale=None):
    assert q.ndim == 3
    assert q.is_contiguous()
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return attention(q, k, v, sm_scale)[0].transpose(0, 1).contiguous()
""",
}
"""Packages with the functions that peers have by their documentation; all take what PyTorch's attention takes."""
COMMON = "from torch.nn.functional import scaled_dot_product_attention\n"
COMMON += "def attention(q, k, v, scale): return scaled_dot_product_attention(q, k, v, scale=scale)\n"


def write_packages(folder, names):
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(COMMON + PACKAGES[name], encoding="utf-8")


def test_rehearsal(tmp_path, capsys):
    write_packages(tmp_path / "packages", ["flash_attn"])
    out = tmp_path / "out"
    given = ["--rehearse", "--out", str(out), "--peers", str(tmp_path / "packages"), "--seed", "3", "--seconds", "900"]
    code = gpu.main(given)
    printed = capsys.readouterr().out
    record = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
    assert code == 0, printed
    assert not record["failed"]
    assert printed.endswith((out / "gpu.txt").read_text(encoding="utf-8"))
    assert "REHEARSAL" in printed
    assert {"machine", "device", "commit", "seed", "seconds", "goals", "failed", "found"} == set(record)
    found = record["found"]
    kinds = {"tests", "check", "ceiling", "timing", "profile", "error", "peer", "graph", "left_out", "section"}
    assert kinds == set(found)
    assert [row["name"] for row in found["section"]] == list(gpu.SECTIONS)
    assert found["tests"][0]["passed"] > 10
    assert all(row["passed"] for row in found["check"])
    assert {row["section"].split()[0] for row in found["check"]} == {
        "kernels",
        "calls",
        "timings",
        "float32",
        "others",
        "gradients",
    }
    assert {row["method"] for row in found["timing"] if "speedup" in row} == {"sortlsh", "treecode", "hyper"}
    keys = {"ms", "issue_ms", "sdpa_ms", "sdpa_predicted", "speedup", "spectral", "frobenius"}
    assert all(keys <= set(row) for row in found["timing"] if row["library"] == "torch")
    figures = [row[key] for kind in ("timing", "error", "peer") for row in found[kind] for key in keys & set(row)]
    figures += [row["value"] for row in found["ceiling"]] + [row["device_ms"] for row in found["profile"]]
    assert all(isinstance(x, bool) or (math.isfinite(x) and x > 0) for x in figures)
    (peer,) = (row for row in found["peer"] if row["peer"] == "FlashAttention 2")
    assert peer["frobenius"] < 0.01
    absent = {row["what"].split(", n")[0] for row in found["left_out"] if "ModuleNotFoundError" in row["why"]}
    assert absent == set(OTHERS) - {"FlashAttention 2"}
    assert "LEFT OUT" in printed
    assert not (out / "gpu.rows.jsonl").exists()


@pytest.mark.parametrize("name", OTHERS)
def test_packages_are_called_as_they_document(tmp_path, monkeypatch, name):
    """With the layout and the scale that each takes, queries of one head answer as PyTorch's attention."""
    for loaded in [module for module in sys.modules if module.split(".")[0] in PACKAGES]:
        monkeypatch.delitem(sys.modules, loaded)
    write_packages(tmp_path, PACKAGES)
    monkeypatch.syspath_prepend(str(tmp_path))
    q, k, v = torch.randn((3, 2, 9, 4), generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(OTHERS[name](q, k, v, 0.3)(), expected)


def test_without_a_folder_only_pytorch_is_run(monkeypatch):
    monkeypatch.setitem(OWN, "flex_attention", lambda *given: 1 / 0)
    rows = list(peer_rows(session()))
    named = {row.get("peer") or row["what"].split(",")[0] for _, row in rows}
    assert named == set(OWN)
    assert ("left_out", {"what": "flex_attention, n = 256", "why": "ZeroDivisionError: division by zero"}) in rows


def test_a_folder_that_is_none_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--rehearse", "--out", str(tmp_path), "--peers", str(tmp_path / "none")])
    assert "--peers is to be a folder" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().out.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_a_process_that_hangs_or_crashes_takes_no_other_with_it(tmp_path):
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        started = time.monotonic()
        scripts = "import time; time.sleep(60)", "pass", "import os; os.abort()"
        codes = gpu.run_processes([[sys.executable, "-c", script] for script in scripts], 2, log)
    assert time.monotonic() - started < 10
    assert codes == [None, 0, -signal.SIGABRT]


def test_a_section_that_hangs_ends_its_process_and_says_where():
    script = "import time; from bench.gpu.command import stopped_after\nwith stopped_after(0.3): time.sleep(60)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert found.returncode == gpu.LATE
    assert 'File "<string>", line 2' in found.stderr
    with gpu.stopped_after(0.05):
        pass
    time.sleep(0.1)


SCRIPT = """
import json, os, sys, time
for name in sys.argv[2:]:
    with open(sys.argv[1], "a") as file:
        print(json.dumps({"kind": "begun", "name": name, "process": os.getpid()}), file=file)
    if name == "graphs":
        os.abort()
    if name == "others":
        time.sleep(60)
"""


def canned(options, started, names):
    """A process whose graphs crash, and whose other sizes hang."""
    return [sys.executable, "-c", SCRIPT, str(gpu.rows_path(options.out)), *names]


def test_sections_behind_one_that_crashes_are_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "command", canned)
    gpu.rows_path(tmp_path).write_text("", encoding="utf-8")
    options = argparse.Namespace(out=tmp_path, seconds=300.0)
    with (tmp_path / "gpu.log").open("w", encoding="utf-8") as log:
        stage = ("graphs", "float32", "cupy"), ("ceilings",)
        ((kind, row),) = gpu.run_stage(stage, options, time.monotonic(), log)
    assert kind == "failure"
    assert row["what"] == "graphs"
    assert str(-signal.SIGABRT) in row["error"]
    begun = {row["name"]: row["process"] for row in gpu.grouped(gpu.rows_path(tmp_path), ())["begun"]}
    assert set(begun) == {"graphs", "float32", "cupy", "ceilings"}
    assert begun["float32"] == begun["cupy"] != begun["graphs"]


def test_what_was_found_is_written_when_a_signal_ends_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "command", canned)
    monkeypatch.setattr(gpu, "CHECKS", {"graphs": gpu.SECTIONS["graphs"]})
    monkeypatch.setattr(gpu, "STAGES", ((), (("timings", "others"),)))
    before = signal.getsignal(signal.SIGTERM)

    def end():
        while "others" not in gpu.rows_path(tmp_path).read_text(encoding="utf-8"):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    gpu.rows_path(tmp_path).write_text("", encoding="utf-8")
    threading.Thread(target=end, daemon=True).start()
    with pytest.raises(SystemExit) as raised:
        gpu.main(["--rehearse", "--out", str(tmp_path), "--seed", "1"])
    assert raised.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    record = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert [row["what"] for row in record["found"]["failure"]] == ["graphs"]
    assert [row["what"] for row in record["found"]["left_out"]] == [name for name in gpu.SECTIONS if name != "graphs"]
    assert record["failed"]
    assert "LEFT OUT" in (tmp_path / "gpu.txt").read_text(encoding="utf-8")
    assert "LEFT OUT" in capsys.readouterr().out


def test_what_a_process_wrote_before_it_ended_is_kept(tmp_path):
    path = tmp_path / "rows"
    path.write_text('{"kind": "check", "name": "a", "passed": true}\n{"kind": "check", "na', encoding="utf-8")
    rows = gpu.grouped(path, [gpu.failure("b", RuntimeError("ended"))])
    assert rows == {
        "check": [{"name": "a", "passed": True}],
        "failure": [{"what": "b", "error": "RuntimeError: ended"}],
    }


@pytest.mark.parametrize(
    "section",
    [
        partial(check_kernels, dtype="float32"),
        partial(check_calls, dtype="float32"),
        check_all_gradients,
        timings,
        error_rows,
        peer_rows,
        graphs,
        cupy_timings,
    ],
)
def test_what_there_is_no_time_for_is_said(section):
    rows = list(section(session(seconds=0.0)))
    assert rows
    assert {kind for kind, _ in rows} == {"left_out"}
    assert any(row["why"] == "no time left" for _, row in rows)


def test_a_rehearsal_without_time_says_so_and_fails(tmp_path, capsys):
    assert gpu.main(["--rehearse", "--out", str(tmp_path), "--seconds", "1"]) == 1
    printed = capsys.readouterr().out
    assert "TESTS not run" in printed
    assert "CHECKS not made" in printed
    left = [line.split(":")[0].strip() for line in printed.splitlines() if "no time left" in line]
    assert left == list(gpu.SECTIONS)


def test_what_is_most_important_comes_first_and_checks_take_a_minute_and_a_half_at_most():
    ends = gpu.limits(5.0, gpu.SECONDS)
    assert gpu.SECONDS == 300.0
    assert max(ends[name] for name in gpu.CHECKS) == 5.0 + 90.0
    assert list(ends.values()) == sorted(ends.values())
    assert max(ends.values()) + gpu.GRACE < 5.0 + gpu.SECONDS
    assert [name for stage in gpu.STAGES for names in stage for name in names] == list(gpu.SECTIONS)


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


def test_times_on_paper_by_hand():
    assert set(PAPER) <= set(KERNELS)
    assert set(METHODS) <= set(LAUNCHES)
    stages = {name: {"ms": 1.0} for name in ("finite_rows", "open_tree", "attend_blocks", "gap_moments", "copies")}
    row = {"heads": 16, "n": PAPER_ROWS // 16, "stages": stages}
    found = bounded(row, {"copy": 3.0, "product": 798.0})["stages"]
    assert found["finite_rows"]["paper_ms"] == pytest.approx(0.18)
    assert found["open_tree"]["paper_ms"] == pytest.approx(9.4 / 5.5)
    assert found["attend_blocks"]["paper_ms"] == pytest.approx(0.5)
    assert found["gap_moments"]["paper_ms"] == pytest.approx(0.03)
    assert found["copies"] == {"ms": 1.0}
    # Operations bound where products are slow; what waits does not shrink with n.
    found = bounded(row | {"n": row["n"] // 4}, {"copy": 3.0, "product": 100.0})["stages"]
    assert found["attend_blocks"]["paper_ms"] == pytest.approx(0.25 * 2.7)
    assert found["gap_moments"]["paper_ms"] == pytest.approx(0.03)
    assert bounded(row, {}) == row


@pytest.mark.parametrize(("n", "milliseconds"), [(131_072, 4.8), (32_768, 1.44), (8192, 0.61)])
def test_what_the_treecode_takes_on_paper(n, milliseconds):
    """On an H100's rates, in 16 heads, as docs/gpu.md says; its sorts, PyTorch's, move 0.8 GB beside what is counted."""
    used = {"finite_rows", "spoil_groups", "spoil_rows", *Treecode(ordering="sort").kernels}
    used -= {"attend_blocks", "bucket_order"}
    assert used <= set(PAPER)
    stages: dict[str, dict[str, float]] = {name: {} for name in used}
    row = {"heads": 16, "n": n, "stages": stages}
    seconds = [stage["paper_ms"] for stage in bounded(row, {"copy": 3.0, "product": 798.0})["stages"].values()]
    assert sum(seconds) + 0.27 * n / 131_072 == pytest.approx(milliseconds, rel=0.02)


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


def test_tests_that_take_too_long_are_killed():
    started = time.monotonic()
    code, _ = gpu_suite.run_tests([sys.executable, "-c", "import time; time.sleep(60)"], 1.0)
    assert code is None
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
    stages = {f"stage {i}": {"share": 0.1, "ms": 1.0, "paper_ms": 0.25} for i in range(9)}
    profile = {"dtype": "bfloat16", "n": 8192, "method": "sortlsh", "launches": 50.0, "device_ms": 1.0, "stages": stages}
    rows = {
        "check": checks,
        "tests": [GOOD_TESTS],
        "ceiling": [{"name": "copy", "value": 3.0, "unit": "TB/s"}],
        "timing": [timing(2**power, 1.0, math.nan) for power in range(12, 19)] * 4,
        "profile": [profile] * 20,
        "peer": [{"peer": "a peer", "dtype": "bfloat16", "n": 8192, "ms": 0.5, "frobenius": 0.002}],
        "left_out": [{"what": f"part {i}", "why": "no time left", "section": "others"} for i in range(99)],
    }
    text = gpu_table.table(HEADER, rows)
    assert len(text) <= gpu_table.MOST_CHARACTERS
    assert text.index("FAILED") < text.index("CHECKS") < text.index("GOALS")
    assert "check 1: inf, at most 0.1" in text
    assert "and 18 more" in text
    assert f"50 launches (tests count {LAUNCHES['sortlsh']})" in text
    assert "stage 0 1 (0.25), stage 1" in text
    assert "n = 8,192: a peer 0.5 (0.002), treecode 512 1 (nan)" in text
    assert "others: no time left: part 0; part 1; and 97 more" in text
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
        ({"left_out": [{"section": "timings", "what": "a", "why": "no time left"}]}, False),
        ({"left_out": [{"section": "calls float32", "what": "a", "why": "no time left"}]}, True),
        ({"left_out": [{"section": "calls float32", "what": "a", "why": "CuPy is not installed"}]}, False),
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

        return [0 for _ in commands]

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
    found = list(cases(session(vit=path)))[:-1]
    assert [case.name[-1] for case in found] == ["1", "3", "6"]
    np.testing.assert_array_equal(found[1].k, layers[3][1].astype(np.float16))
    rows = [row for _, row in errors_of(session(vit=path), found[1], "bfloat16")]
    assert [row["method"] for row in rows] == ["treecode", "sortlsh", "hyper"]
    assert all(row["frobenius"] < 0.5 for row in rows)


def test_the_documentation_names_every_section():
    text = (Path(gpu.__file__).parent / "METHOD.md").read_text(encoding="utf-8")
    for section in gpu.SECTIONS:
        assert f"| {section.split()[0]}" in text
