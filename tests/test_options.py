"""Every option by every way in, on calls that are estimated and on short ones: the cells of the table in docs/options.md."""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kdecore
from kdecore import KernelUnavailable, KeyIndex, MemoryLimitError, OptionError, Treecode
from kdecore.kernels.runtime import threads as threads_module
from kdecore_adapters.torch_adapter import collect_reports, scaled_dot_product_attention
from kdecore_adapters.torch_modules import KDEAttention, replace_attention, reroute

N, HEADS, D = 40, 3, 4
KINDS = {"estimated": {"method": "sortlsh", "budget": 12}, "short": {}}
"""What is asked for: an estimate, or nothing, when models leave a call of 40 keys to PyTorch."""
ARRAYS = np.random.default_rng(0).standard_normal((3, 2, HEADS, N, D))
HIDES = np.random.default_rng(1).random((N, N)) < 0.7


class Asks(nn.Module):
    """Ask for PyTorch's attention."""

    def forward(self, q, k, v, call):
        return sdpa(q, k, v, **call)


def rows(q):
    """Return heads side by side, as modules take them."""
    return q.transpose(1, 2).flatten(2)


def heads(x):
    return x.unflatten(-1, (HEADS, D)).transpose(1, 2)


def by_module(q, k, v, call, options):
    module = KDEAttention(HEADS * D, HEADS, bias=False, batch_first=True, dtype=torch.float64, **options)
    eye = torch.eye(HEADS * D, dtype=torch.float64)
    module.in_proj_weight.data.copy_(eye.repeat(3, 1))
    module.out_proj.weight.data.copy_(eye)
    if "attn_mask" in call:
        call = {**call, "attn_mask": ~call["attn_mask"]}  # True for what is hidden
    return heads(module(*map(rows, (q, k, v)), **call)[0])


def by_block(q, k, v, call, options):
    with reroute(**with_short(options)):
        return sdpa(q, k, v, **call)


def by_model(q, k, v, call, options):
    model = Asks()
    replace_attention(model, **with_short(options))
    return model(q, k, v, call)


def by_name(q, k, v, call, options):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    adapter = pytest.importorskip("kdecore_adapters.transformers_adapter")
    adapter.register("kdecore-options", **with_short(options))
    module = nn.Module()
    module.is_causal = False
    call = {"attention_mask": None, **call}
    return transformers.AttentionInterface()["kdecore-options"](module, q, k, v, **call)[0].transpose(1, 2)


def with_short(options):
    """Let models take calls as short as these where a method is named."""
    return {"min_keys": 1, **options} if "method" in options else options


def by_index(q, k, v, call, options):
    asked = ("budget", "rtol", "rtol_norm", "certificate", "return_lse", "return_report")
    per_call = {name: options.pop(name) for name in asked if name in options}
    return KeyIndex(k, v, queries=q, **options).attend(q, **per_call)


def by_packing(q, k, v, call, options):
    return kdecore.packed_attention(q, k, v, [0, N], **options)


WAYS = {
    "attention": lambda q, k, v, call, options: kdecore.attention(q, k, v, **options),
    "packed_attention": by_packing,
    "KeyIndex": by_index,
    "scaled_dot_product_attention": lambda q, k, v, call, options: scaled_dot_product_attention(q, k, v, **call, **options),
    "KDEAttention": by_module,
    "reroute": by_block,
    "replace_attention": by_model,
    "register": by_name,
}
TEXT = (Path(__file__).parent.parent / "docs" / "options.md").read_text(encoding="utf-8")
HEADER, _, *BODY = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("|")]
TABLE = {row[0].strip("`"): dict(zip(WAYS, row[1:], strict=True)) for row in BODY}
CELLS = [(option, way) for option in TABLE for way in WAYS]
of_kinds = pytest.mark.parametrize("kind", KINDS)


def test_the_table_has_every_option_and_way():
    import inspect

    assert HEADER[1:] == [f"`{way}`" for way in WAYS]
    parameters = [p.name for p in inspect.signature(kdecore.attention).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert sorted(TABLE) == sorted([*parameters, "cuda_graph", "layout"])


def ask(way, options, call=None, arrays=ARRAYS):
    q, k, v = map(torch.from_numpy, arrays)
    return WAYS[way](q, k, v, call or {}, dict(options))


def base(way, kind):
    """Return what is asked for beside the option, as far as a way takes it."""
    # An index is asked itself, and has a tree over more keys than its own budget.
    return {"method": Treecode(num_slots=12)} if way == "KeyIndex" else dict(KINDS[kind])


def same(way, options, reference, call=None):
    """Check a result against that of the function itself."""
    found, expected = ask(way, options, call), kdecore.attention(*map(torch.from_numpy, ARRAYS), **reference)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


CHANGES = {
    "window": {"window": 5},
    "diagonal": {"window": 5, "diagonal": 7},
    "key_lengths": {"key_lengths": [N, 25]},
    "causal": {"causal": True},
    "mask": {"mask": torch.from_numpy(HIDES)},
    "scale": {"scale": 1.3},
    "method": {"method": "treecode", "budget": 20},
    "budget": {"budget": 20},
    "seed": {"seed": 9},
    "rtol": {"rtol": 0.3},
    "rtol_norm": {"rtol": 0.3, "rtol_norm": "spectral"},
    "kernels": {"kernels": "array-api"},
    "threads": {"threads": 1},
}
"""Option → what is to be as the function has it."""
BAD = {
    "method": "magic",
    "budget": 0,
    "rtol": -1.0,
    "rtol_norm": "max",
    "causal": "yes",
    "window": 0,
    "diagonal": 0.5,
    "key_lengths": [N, N + 1],
    "mask": HIDES[:7],
    "scale": math.inf,
    "seed": -1,
    "kernels": "magic",
    "threads": 0,
    "certificate": -1.0,
    "check_finite": "yes",
    "max_memory": 0,
    "cuda_graph": "yes",
    "layout": "sbhd",
    "return_lse": "yes",
    "return_report": "yes",
}


@of_kinds
@pytest.mark.parametrize(
    ("option", "way"), [cell for cell in CELLS if cell[0] in CHANGES and TABLE[cell[0]][cell[1]] == "✓"]
)
def test_an_option_is_honoured(option, way, kind):
    change = CHANGES[option]
    asked = base(way, kind)
    if "rtol" in change:
        asked.pop("budget", None)
    reference = {**asked, **change}
    if way == "KeyIndex":
        change = {"method": Treecode(num_slots=12, block_size=8)} if option == "method" else change
        # It finds budgets of its own: of so few queries it evaluates all exactly.
        reference = {"method": "exact"} if "rtol" in change else {"method": "treecode", "budget": 12, **change}
        reference = change if option == "method" else reference
    same(way, {**asked, **change}, reference)


def used(monkeypatch):
    """Return what is used from here on, where it is used: threads, and what a search for a budget goes by."""
    found, function, index = {}, sys.modules["kdecore.api.attention"], sys.modules["kdecore.api.key_index"]
    find, doubled = function.find, index.doubled

    def search(share, settings, tried, rtol, rtol_norm, limit):
        found.update(rtol=rtol, rtol_norm=rtol_norm)
        return find(share, settings, tried, rtol, rtol_norm, limit)

    def search_in_index(*arguments):
        *_, rtol, norm = arguments
        found.update(rtol=rtol, rtol_norm=norm)
        return doubled(*arguments)

    def team(threads):
        found.update(threads=threads)
        return threads_module.team(threads)

    monkeypatch.setattr(function, "find", search)
    monkeypatch.setattr(index, "doubled", search_in_index)
    for module in (function, index):
        monkeypatch.setattr(module, "team", team)
    return found


@pytest.mark.parametrize(
    ("option", "way"),
    [cell for cell in CELLS if cell[0] in ("rtol", "rtol_norm", "threads") and TABLE[cell[0]][cell[1]] == "✓"],
)
def test_what_results_of_few_keys_do_not_show_is_used(monkeypatch, option, way):
    """So few keys are evaluated exactly within any tolerance, and by any number of threads alike."""
    asked, change = base(way, "estimated"), CHANGES[option]
    if "rtol" in change:
        asked.pop("budget", None)
    found = used(monkeypatch)
    ask(way, {**asked, **change})
    assert {name: found[name] for name in change} == change


SAID = {
    "causal": lambda name: ({name: True}, {"causal": True, "diagonal": 0}),
    "mask": lambda name: ({name: torch.from_numpy(HIDES)[None, None]}, {"mask": torch.from_numpy(HIDES)}),
    "scale": lambda name: ({name: 1.3}, {"scale": 1.3}),
}


@of_kinds
@pytest.mark.parametrize(("option", "way"), [cell for cell in CELLS if TABLE[cell[0]][cell[1]] not in ("✓", "–")])
def test_what_pytorch_names_otherwise_means_the_same(option, way, kind):
    call, reference = SAID[option](TABLE[option][way])
    if way == "KDEAttention":
        call = {name: x[0, 0] if name == "attn_mask" else x for name, x in call.items()}
    asked = base(way, kind)
    same(way, asked, {**asked, **reference}, call)
    with pytest.raises((OptionError, TypeError), match=option):
        ask(way, {**asked, option: BAD[option]})


@of_kinds
@pytest.mark.parametrize(("option", "way"), [cell for cell in CELLS if TABLE[cell[0]][cell[1]] == "–"])
def test_an_option_that_is_not_there_is_refused(option, way, kind):
    with pytest.raises((OptionError, TypeError), match=option):
        ask(way, {**base(way, kind), option: CHANGES.get(option, {option: True})[option]})


@of_kinds
@pytest.mark.parametrize(("option", "way"), [cell for cell in CELLS if TABLE[cell[0]][cell[1]] == "✓"])
def test_a_value_out_of_its_range_is_refused(option, way, kind):
    asked = base(way, kind)
    value = torch.from_numpy(BAD[option]) if option == "mask" else BAD[option]
    if option in ("rtol", "rtol_norm"):
        asked.pop("budget", None)
    more = {"rtol": 0.5} if option == "rtol_norm" else {}
    with pytest.raises((OptionError, ValueError), match=option):
        ask(way, {**asked, **more, option: value})


@of_kinds
@pytest.mark.parametrize("way", WAYS)
def test_an_unknown_name_is_refused(way, kind):
    with pytest.raises((OptionError, TypeError), match="budgett"):
        ask(way, {**base(way, kind), "budgett": 3})


@of_kinds
@pytest.mark.parametrize("way", [way for way in WAYS if TABLE["kernels"][way] == "✓"])
def test_kernels_that_can_not_run_are_refused(way, kind):
    # Tensors on the CPU are computed as NumPy arrays, which is nothing that a caller knows.
    with pytest.raises(KernelUnavailable, match="triton: needs PyTorch tensors on a CUDA device, got torch on cpu"):
        ask(way, {**base(way, kind), "kernels": "triton"})


@pytest.mark.parametrize("way", [way for way in WAYS if TABLE["cuda_graph"][way] == "✓"])
def test_graphs_are_refused_where_there_are_none_but_by_pytorchs_own_attention(way):
    """What replays where there is a device: tests/test_torch_graphs.py."""
    with pytest.raises(OptionError, match="cuda_graph needs tensors on a CUDA device, got query on cpu"):
        ask(way, {**base(way, "estimated"), "cuda_graph": True})
    same(way, {"cuda_graph": True}, {})


@of_kinds
@pytest.mark.parametrize("way", [way for way in WAYS if TABLE["max_memory"][way] == "✓"])
def test_memory_is_bounded(way, kind):
    with pytest.raises(MemoryLimitError, match="max_memory must be at least"):
        ask(way, {**base(way, kind), "max_memory": 1000})


@of_kinds
@pytest.mark.parametrize("way", [way for way in WAYS if TABLE["check_finite"][way] == "✓"])
def test_numbers_that_are_not_finite_are_looked_for(way, kind):
    spoilt = ARRAYS.copy()
    spoilt[1, 1, 2, 5, 3] = np.nan
    # Rows of a module mix what heads have.
    with pytest.raises(OptionError, match="k must be finite"):
        ask(way, {**base(way, kind), "check_finite": True}, arrays=spoilt)
    assert torch.isnan(ask(way, base(way, kind), arrays=spoilt)).any()


@pytest.mark.parametrize("way", [way for way in WAYS if TABLE["certificate"][way] == "✓"])
def test_certificates_take_their_part(way):
    """All rows, or none."""
    asked = base(way, "estimated")
    for share, rows_compared in ((1e6, N), (0.0, None)):
        with collect_reports() as reports:
            returned = {"return_report": True} if TABLE["return_report"][way] == "✓" else {}
            found = ask(way, {**asked, "certificate": share, **returned})
        report = found[-1] if returned else reports[0]
        report = report[0] if isinstance(report, tuple) else report
        assert (report.certificate and report.certificate.rows) == rows_compared


@of_kinds
@pytest.mark.parametrize("way", [way for way in WAYS if TABLE["layout"][way] == "✓"])
def test_layouts_are_views_of_the_same(way, kind):
    found = ask(way, {**base(way, kind), "layout": "bshd"}, arrays=ARRAYS.swapaxes(2, 3))
    torch.testing.assert_close(found, ask(way, base(way, kind)).transpose(1, 2), rtol=0, atol=1e-12)


@of_kinds
@pytest.mark.parametrize("way", [way for way in WAYS if TABLE["return_lse"][way] == "✓"])
def test_more_is_returned_where_it_is_asked_for(way, kind):
    returned = {name: True for name in ("return_lse", "return_report") if TABLE[name][way] == "✓"}
    out, lse, *reports = ask(way, {**base(way, kind), **returned})
    assert out.shape == (2, HEADS, N, D)
    assert lse.shape == (2, HEADS, N)
    assert len(reports) == len(returned) - 1
    for report in reports:
        assert re.search("^method", str(report[0] if isinstance(report, tuple) else report))
