"""``method="auto"`` on devices: by what was measured on cards of that name, exact attention elsewhere. Without a device."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import kdecore
from bench.cards import fitted
from kdecore.core.problem import canonicalise
from kdecore.engine.restrictions import check_restrictions
from kdecore.engine.split import subproblems
from kdecore.kernels import registry
from kdecore.methods import devices
from kdecore.methods.auto import WORTHWHILE
from kdecore.methods.costs import Sizes
from kdecore.methods.devices import CARDS, exact_over_treecode, unmeasured
from kdecore.methods.plan import make_plan
from kdecore_adapters.torch_adapter import left_to_torch, scaled_dot_product_attention
from kdecore_adapters.torch_backend import BACKEND, TorchBackend
from kdecore_adapters.torch_modules import replace_attention

H200 = "NVIDIA H200"
ABOUT = "measured on NVIDIA H200: exact attention is expected to be about as fast"
MASKED = "no measurement of masks on NVIDIA H200: exact; name a method"
RESULTS = json.loads((Path(__file__).parent.parent / "bench" / "results" / "gpu_h200.json").read_text(encoding="utf-8"))
TIMINGS = [row for row in RESULTS["found"]["timing"] if row["method"] == "treecode"]


@pytest.fixture
def card(monkeypatch):
    """Let PyTorch's device "meta" be a card of a name that can be changed."""
    found = SimpleNamespace(name=H200)
    monkeypatch.setattr(TorchBackend, "card", lambda self, device: found.name)
    return found


@pytest.fixture
def opened_by(monkeypatch):
    """Let trees be opened by a kernel of a target."""

    def opened_by(target):
        (*_, reference) = registry.KERNELS["open_tree"]
        monkeypatch.setitem(registry.KERNELS, "open_tree", (replace(reference, target=target),))

    opened_by("triton")
    return opened_by


def rows(n=65_536, dtype="bfloat16", d=64, d_v=64, heads=16, n_k=None):
    shapes = ((n, d), (n_k or n, d), (n_k or n, d_v))
    return [torch.empty(1, heads, *shape, dtype=getattr(torch, dtype), device="meta") for shape in shapes]


def planned(arrays, **more):
    plan = make_plan(canonicalise(*arrays), **more)
    return plan.method, plan.reason


def test_the_table_is_what_was_measured():
    assert fitted(RESULTS, "trees opened in sweeps") == CARDS[H200]
    assert all(name == card.name for name, card in CARDS.items())


def test_the_treecode_is_foretold_hardly_faster_than_it_was():
    """Nor much slower, but where the host's time decides, which is taken to be the longest."""
    for row in TIMINGS:
        sizes = Sizes(16, row["n"], row["n"], 64, 64, row["dtype"])
        ratio = exact_over_treecode(H200, sizes, row["budget"]) / (row["sdpa_ms"] / row["ms"])
        assert (0.85 if row["n"] >= 32_768 else 0.5) < ratio < 1.1


@pytest.mark.parametrize("row", TIMINGS, ids=lambda row: f"{row['dtype']}-{row['n']}-{row['budget']}")
def test_the_treecode_is_taken_where_it_was_worth_it(card, opened_by, row):
    arrays = rows(row["n"], row["dtype"])
    method, reason = planned(arrays, budget=row["budget"])
    assert method == ("treecode" if row["sdpa_ms"] / row["ms"] >= WORTHWHILE else "exact")
    assert reason.startswith("auto: measured on NVIDIA H200 (commit 6fca90d+, trees opened in sweeps): treecode is expected")
    left = left_to_torch(*arrays, {"budget": row["budget"]})
    assert left == ("" if method == "treecode" else ABOUT)


def test_a_card_that_was_not_measured_stays_with_exact(card, opened_by):
    card.name = "NVIDIA B300"
    said = "no measurement of NVIDIA B300: exact; name a method"
    assert planned(rows(2**20)) == ("exact", f"auto: {said}")
    assert left_to_torch(*rows(2**20), {}) == said
    assert planned(rows(), method="treecode")[0] == "treecode"
    assert left_to_torch(*rows(), {"method": "treecode"}) == ""


MISSING = {
    "float16": ({"dtype": "float16"}, "float16"),
    "float64": ({"dtype": "float64"}, "float64"),
    "wide": ({"d": 80}, "rows of more than 64 numbers"),
    "wide values": ({"d_v": 65}, "rows of more than 64 numbers"),
}


@pytest.mark.parametrize(("sizes", "what"), MISSING.values(), ids=MISSING)
def test_calls_unlike_those_measured_stay_with_exact(card, opened_by, sizes, what):
    said = f"no measurement of {what} on NVIDIA H200: exact; name a method"
    assert planned(rows(**sizes)) == ("exact", f"auto: {said}")
    assert left_to_torch(*rows(**sizes), {}) == said


@pytest.mark.parametrize("restricted", [{"causal": True}, {"window": 900}], ids=str)
def test_restricted_keys_were_not_measured(card, opened_by, restricted):
    problem = canonicalise(*rows())
    more = {"causal": False, "window": None, **restricted}
    (one,) = subproblems(problem, check_restrictions(problem, **more, diagonal=None, key_lengths=None, mask=None, like=None))
    plan = make_plan(one.problem)
    assert plan.method == "exact"
    assert plan.reason == "auto: no measurement of restricted keys on NVIDIA H200: exact; name a method"


@pytest.mark.parametrize("target", ["numba-cuda", "array-api"])
def test_other_kernels_were_not_measured(card, opened_by, target):
    opened_by(target)
    said = f"auto: no measurement of trees opened by {target} on NVIDIA H200: exact; name a method"
    assert planned(rows()) == ("exact", said)


def test_what_exact_attention_is_cheaper_for(card, opened_by):
    """Few queries read keys and values once; one head of many has too little to do; no queries nothing."""
    assert planned(rows(1, n_k=2**20))[0] == "exact"
    assert planned(rows(65_536, heads=1))[0] == "exact"
    assert planned(rows(65_536, heads=16))[0] == "treecode"
    assert left_to_torch(*rows(0, n_k=65_536), {}) == ABOUT
    read = 2**20 * 128 * 2 / CARDS[H200].copy / CARDS[H200].treecode["bfloat16"].launch
    one_query = Sizes(1, 1, 2**20, 64, 64, "bfloat16")
    assert exact_over_treecode(H200, one_query, 512) == pytest.approx(read, rel=0.2)
    assert unmeasured(H200, one_query) == ""


UNLIKE = {
    "mask": ({"attn_mask": torch.empty(1, 1, 1, 65_536, dtype=torch.bool, device="meta")}, {}, "masks"),
    "causal": ({"is_causal": True}, {}, "masks"),
    "rtol": ({}, {"rtol": 0.1}, "rtol"),
}


@pytest.mark.parametrize(("call", "options", "what"), UNLIKE.values(), ids=UNLIKE)
def test_calls_of_pytorch_that_were_not_measured_are_left_to_it(card, monkeypatch, call, options, what):
    reasons = []
    own = functional.scaled_dot_product_attention
    monkeypatch.setattr(functional, "scaled_dot_product_attention", lambda *x, **y: reasons.append(y) or own(*x, **y))
    found = scaled_dot_product_attention(*rows(), **call, **options)
    assert found.shape == (1, 16, 65_536, 64)
    assert len(reasons) == 1
    said = f"no measurement of {what} on NVIDIA H200: exact; name a method"
    assert left_to_torch(*rows(), options, restricted=bool(call)) == said


def test_gradients_were_not_measured(card):
    q, k, v = rows()
    said = "no measurement of gradients on NVIDIA H200: exact; name a method"
    assert left_to_torch(q, k, v.requires_grad_(), {}) == said
    with torch.no_grad():
        assert left_to_torch(q, k, v, {}) == ""


class Asks(nn.Module):
    def forward(self, q, k, v, **call):
        return functional.scaled_dot_product_attention(q, k, v, **call)


@pytest.mark.parametrize(("call", "what"), [({}, "kdecore"), ({"is_causal": True}, MASKED)])
def test_tables_of_models_say_which(card, opened_by, monkeypatch, call, what):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    model = Asks()
    replacement = replace_attention(model)
    model(*rows(), **call)
    ((_, outcome),) = replacement.counts
    assert outcome == what


def test_compiled_code_asks_for_the_card_too(card):
    torch.compiler.reset()
    q, k, v = rows(8192)

    def attend(q, k, v):
        return scaled_dot_product_attention(q * 1.0, k, v)

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    assert compiled(q, k, v).shape == q.shape
    assert compiled(*rows(8200)).shape == (1, 16, 8200, 64)


def test_nobody_asks_for_a_card_of_arrays_on_the_host(monkeypatch):
    def asked(self, device):
        raise AssertionError(device)

    monkeypatch.setattr(TorchBackend, "card", asked)
    monkeypatch.setattr(devices, "unmeasured", asked)
    q = np.zeros((1, 700, 4), dtype=np.float32)
    for array in (q, torch.from_numpy(q), torch.from_numpy(q).requires_grad_()):
        _, report = kdecore.attention(array, array, array, return_report=True)
        assert report.reason.startswith("auto: treecode is expected to be")


def test_pytorch_is_asked_for_the_card_of_a_cuda_device_only(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: asked.append(device) or H200)
    assert [BACKEND.card(device) for device in ("cpu", "meta", "cuda:1")] == ["cpu", "meta", H200]
    assert asked == ["cuda:1"]


def test_cupy_is_asked_once(monkeypatch):
    asked = []
    runtime = SimpleNamespace(getDeviceProperties=lambda number: asked.append(number) or {"name": H200.encode()})
    stand_in = ModuleType("cupy")
    stand_in.cuda = SimpleNamespace(runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    # By its file, so that no other test meets a module that was made with a stand-in.
    spec = importlib.util.find_spec("kdecore_adapters.cupy_backend")
    cupy_backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cupy_backend)
    assert [cupy_backend.BACKEND.card(device) for device in ("cuda:1", "cuda:0", "cuda:1")] == [H200] * 3
    assert asked == [1, 0]
