"""`KDEAttention`, `reroute`, `replace_attention`: at a full budget as PyTorch has it, and what becomes of each call."""

import contextvars
import copy
import io
import re
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.overrides import _get_current_function_mode_stack as running_modes
from torch.utils.checkpoint import checkpoint

from kdecore import OptionError
from kdecore_adapters.torch_adapter import collect_reports, scaled_dot_product_attention
from kdecore_adapters.torch_calls import TAKEN, Count
from kdecore_adapters.torch_encoder import POSITION_BIAS
from kdecore_adapters.torch_modules import KDEAttention, NothingReplaced, replace_attention, reroute, restore_attention
from kdecore_adapters.torch_operator import counted_by

FULL = {"method": "treecode", "budget": 1000}
SMALL = {"method": "sortlsh", "budget": 50}
N, WIDTH, HEADS = 90, 16, 2
CHECK = {"rtol": 0, "atol": 1e-12}

pytestmark = [
    # PyTorch's encoder says so where its fast path can't be taken: here on purpose.
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    # Its fast path itself warns once, of the nested tensors that it makes of padded ones.
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"),
]


def rows(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def hidden(*shape):
    return rows(*shape, seed=3) < -0.7


def additive(*shape):
    return rows(*shape, seed=4).masked_fill(hidden(*shape), -torch.inf)


RIGHT = torch.arange(N) >= torch.tensor([N, N - 40])[:, None]
LEFT = RIGHT.flip(1)
CAUSAL = torch.ones(N, N, dtype=torch.bool).triu(1)
CALLS = {
    "plain": {},
    "padding": {"key_padding_mask": RIGHT},
    "padding, additive": {"key_padding_mask": additive(2, N)},
    "mask": {"attn_mask": hidden(N, N)},
    "mask, additive": {"attn_mask": additive(N, N)},
    "mask for each head": {"attn_mask": hidden(2 * HEADS, N, N)},
    "mask for each head, additive": {"attn_mask": additive(2 * HEADS, N, N)},
    "both": {"attn_mask": hidden(N, N), "key_padding_mask": RIGHT},
    "both, additive": {"attn_mask": additive(2 * HEADS, N, N), "key_padding_mask": additive(2, N)},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "causal, padding": {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": RIGHT},
    "causal, padding to the left": {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": LEFT},
    "causal, padding, additive": {
        "attn_mask": additive(N, N).masked_fill(CAUSAL, -torch.inf).masked_fill(~CAUSAL, 0.0),
        "is_causal": True,
        "key_padding_mask": additive(2, N),
    },
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def pair(ours=FULL, **options):
    """Return our module and PyTorch's, of the same weights."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)
    # So that softmax is far from uniform, and biases count.
    for parameter in theirs.parameters():
        parameter.data.copy_(rows(*parameter.shape) / 3)
    found = KDEAttention(WIDTH, HEADS, dtype=torch.float64, **options, **ours)
    found.load_state_dict(theirs.state_dict())
    return found, theirs


class Layer(nn.Module):
    """Self-attention that calls PyTorch's function."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH, dtype=torch.float64)

    def forward(self, x):
        q, k, v = (y.reshape(*x.shape[:-1], HEADS, -1).transpose(1, 2) for y in self.project(x).chunk(3, dim=-1))
        return x + sdpa(2 * q, 2 * k, v).transpose(1, 2).flatten(2)


def model():
    torch.manual_seed(1)
    return nn.Sequential(Layer(), nn.Sequential(nn.Identity(), Layer()))


def encoder(layer=None, **options):
    torch.manual_seed(1)
    own = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, 0.0, batch_first=True, dtype=torch.float64, **options)
    if layer is not None:
        layer.load_state_dict(own.self_attn.state_dict())
        own.self_attn = layer
    return nn.TransformerEncoder(own, 2).eval()


# KDEAttention


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 10, "vdim": 12}], ids=str)
def test_state_dicts_are_those_of_pytorch(options):
    ours, theirs = pair(**options)
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())


@calls
@pytest.mark.parametrize("batch_first", [True, False])
def test_at_a_full_budget_it_is_the_module_of_pytorch(call, batch_first):
    ours, theirs = pair(batch_first=batch_first)
    q, k, v = (rows(2, N, WIDTH, seed=seed) for seed in range(3))
    if not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out, weights = ours(q, k, v, **call)
    assert weights is None
    torch.testing.assert_close(out, theirs(q, k, v, need_weights=False, **call)[0], **CHECK)


@pytest.mark.parametrize("mask_of", [hidden, additive])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n_q", [40, N, 130])
def test_queries_and_keys_of_other_numbers_and_dimensions(mask_of, causal, n_q):
    """Causal is aligned to the first key, as PyTorch has it, with padding too."""
    ours, theirs = pair(kdim=10, vdim=12, batch_first=True, bias=False)
    q, k, v = rows(2, n_q, WIDTH), rows(2, N, 10), rows(2, N, 12)
    mask = torch.ones(n_q, N, dtype=torch.bool).triu(1) if causal else hidden(n_q, N)
    for padding in (None, mask_of(2, N)):
        if padding is not None and padding.dtype != torch.bool:
            mask = torch.zeros(n_q, N, dtype=torch.float64).masked_fill(mask, -torch.inf)
        call = {"attn_mask": mask, "key_padding_mask": padding, "is_causal": causal}
        torch.testing.assert_close(ours(q, k, v, **call)[0], theirs(q, k, v, need_weights=False, **call)[0], **CHECK)


@pytest.mark.parametrize("batch_first", [True, False])
def test_without_a_batch(batch_first):
    ours, theirs = pair(batch_first=batch_first)
    x = rows(N, WIDTH)
    for call in (
        {},
        {"key_padding_mask": RIGHT[1]},
        {"attn_mask": hidden(HEADS, N, N), "key_padding_mask": RIGHT[1]},
        {"attn_mask": CAUSAL, "is_causal": True},
    ):
        out, _ = ours(x, x, x, **call)
        torch.testing.assert_close(out, theirs(x, x, x, need_weights=False, **call)[0], **CHECK)


@pytest.mark.parametrize("padding", [None, RIGHT], ids=["none", "right"])
def test_a_mask_that_is_said_to_be_causal_is_not_looked_at(padding):
    ours, _ = pair(batch_first=True)
    x = rows(2, N, WIDTH)
    expected, _ = ours(x, x, x, attn_mask=CAUSAL, key_padding_mask=padding)
    for mask in (None, torch.ones_like(CAUSAL)):
        out, _ = ours(x, x, x, attn_mask=mask, key_padding_mask=padding, is_causal=True)
        torch.testing.assert_close(out, expected, **CHECK)


def test_masks_of_two_kinds_do_together_what_they_do_as_numbers():
    """PyTorch's module warns of such a pair, and takes it."""
    ours, theirs = pair(batch_first=True)
    x, numbers = rows(2, N, WIDTH), additive(2, N)
    mask = torch.zeros(N, N, dtype=torch.float64).masked_fill(hidden(N, N), -torch.inf)
    expected, _ = theirs(x, x, x, attn_mask=mask, key_padding_mask=numbers, need_weights=False)
    torch.testing.assert_close(ours(x, x, x, attn_mask=hidden(N, N), key_padding_mask=numbers)[0], expected, **CHECK)
    mask, padding = additive(N, N), torch.zeros(2, N, dtype=torch.float64).masked_fill(LEFT, -torch.inf)
    expected, _ = theirs(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False)
    out, _ = ours(x, x, x, attn_mask=mask, key_padding_mask=LEFT)
    torch.testing.assert_close(out, expected, **CHECK)


@calls
def test_with_few_keys_it_is_the_module_of_pytorch_with_dropout_too(call):
    ours, theirs = pair({}, batch_first=True, dropout=0.3)
    x, found = rows(2, N, WIDTH), []
    for module in (ours, theirs):
        torch.manual_seed(5)
        found.append(module(x, x, x, need_weights=False, **call)[0])
    torch.testing.assert_close(*found, **CHECK)
    assert not torch.equal(found[0], ours.eval()(x, x, x, **call)[0])


@pytest.mark.parametrize("call", [CALLS["plain"], CALLS["padding"], CALLS["causal, padding"]])
def test_at_a_small_budget_it_estimates(call):
    ours, theirs = pair(SMALL, batch_first=True)
    x = rows(2, N, WIDTH)
    out, expected = ours(x, x, x, **call)[0], theirs(x, x, x, need_weights=False, **call)[0]
    assert 1e-3 < (out - expected).norm() / expected.norm() < 0.5


def test_autocast_gives_the_dtype_of_pytorch():
    ours, theirs = pair(batch_first=True)
    ours, theirs, x = ours.float(), theirs.float(), rows(2, N, WIDTH).float()
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = ours(x, x, x, **CALLS["padding"])[0], theirs(x, x, x, need_weights=False, **CALLS["padding"])[0]
    assert out.dtype == expected.dtype == torch.bfloat16
    assert (out - expected).norm() / expected.norm() < 0.02


def test_what_can_not_be_kept_is_refused():
    ours, _ = pair(FULL, dropout=0.1)
    x = rows(N, 2, WIDTH)
    for call, message in (
        (lambda: KDEAttention(WIDTH, HEADS, add_bias_kv=True), "add_bias_kv"),
        (lambda: KDEAttention(WIDTH, HEADS, add_zero_attn=True), "add_zero_attn"),
        (lambda: KDEAttention(WIDTH, HEADS, bugdet=3), "options must be one of .* got 'bugdet'; did you mean 'budget'"),
        (lambda: ours(x, x, x, need_weights=True), "need_weights must be False"),
        (lambda: ours(x, x, x), "dropout_p must be 0"),
        (lambda: ours(x, x, x, **CALLS["causal, padding"]), "dropout_p must be 0"),
        (lambda: reroute(bugdet=3), "got 'bugdet'"),
        (lambda: replace_attention(model(), bugdet=3), "got 'bugdet'"),
        (lambda: replace_attention(model(), layers={"0": {"bugdet": 3}}), "got 'bugdet'"),
        (lambda: replace_attention(model(), layers={"7*": {}}), "must name modules of the model, got '7\\*'; it has '0',"),
        (lambda: replace_attention(model(), layers={0: {}}), "must name modules of the model, got 0; it has '0',"),
        (lambda: replace_attention(Layer(), layers={"7": {}}), "got '7'; it has 'project'$"),
        (lambda: replace_attention(model(), min_keys=-1), "min_keys must be an integer of at least 0, got -1"),
        (lambda: reroute(min_keys="3"), "min_keys must be an integer of at least 0, got '3'"),
    ):
        with pytest.raises(OptionError, match=message):
            call()
    ours.eval()(x, x, x)


def test_a_replacement_that_is_refused_leaves_no_hooks():
    found = model()
    with pytest.raises(OptionError):
        replace_attention(found, layers={"0": {}, "7": {}})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in found.modules())


# PyTorch's encoders, which have a way round the forward of their attention


def test_encoders_in_evaluation_go_through_the_module():
    x = rows(2, N, WIDTH)
    found, plain = encoder(KDEAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64, **FULL)), encoder()
    with torch.no_grad(), collect_reports() as reports:
        torch.testing.assert_close(found(x), plain(x), **CHECK)
        torch.testing.assert_close(found.layers[0](x), plain.layers[0](x), **CHECK)
        assert len(reports) == 3
        expected = plain(x, src_key_padding_mask=RIGHT)
        torch.testing.assert_close(found(x, src_key_padding_mask=RIGHT)[~RIGHT], expected[~RIGHT], **CHECK)
        assert len(reports) == 5


@pytest.mark.xfail(raises=RuntimeError, reason="the encoder was made for nested tensors, which the module can't take")
def test_the_module_may_be_put_into_an_encoder_that_is_there():
    x, plain, found = rows(2, N, WIDTH), encoder(), encoder()
    for layer in found.layers:
        layer.self_attn, weights = pair(batch_first=True)[0], layer.self_attn.state_dict()
        layer.self_attn.load_state_dict(weights)
    found.eval()
    with torch.no_grad():
        out, expected = (each(x, src_key_padding_mask=RIGHT) for each in (found, plain))
    torch.testing.assert_close(out[~RIGHT], expected[~RIGHT], **CHECK)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("block", [True, False])
def test_encoders_in_evaluation_are_met(grad, block):
    """PyTorch's fast path, of nested tensors with padding, calls neither forward nor a function that could be met."""
    x, found = rows(2, N, WIDTH), encoder()
    with torch.set_grad_enabled(grad):
        expected, padded = found(x), found(x, src_key_padding_mask=RIGHT)
        if block:
            with reroute(min_keys=1, **FULL) as met:
                out = found(x), found(x, src_key_padding_mask=RIGHT)
            assert met.counts == {("", "exact"): 4}
        else:
            met = replace_attention(found, min_keys=1, **FULL)
            out = found(x), found(x, src_key_padding_mask=RIGHT)
            assert met.counts == {("layers.0.self_attn", "exact"): 2, ("layers.1.self_attn", "exact"): 2}
    torch.testing.assert_close(out[0], expected, **CHECK)
    torch.testing.assert_close(out[1][~RIGHT], padded[~RIGHT], **CHECK)


@pytest.mark.xfail(raises=AssertionError, reason="the encoder makes nested tensors, its layers are off the fast path")
def test_one_layer_of_an_encoder_is_met():
    x, found = rows(2, N, WIDTH), encoder()
    with torch.no_grad():
        expected = found(x, src_key_padding_mask=RIGHT)
        replace_attention(found.layers[0], min_keys=1, **FULL)
        out = found(x, src_key_padding_mask=RIGHT)
    torch.testing.assert_close(out[~RIGHT], expected[~RIGHT], **CHECK)


# reroute


@calls
def test_multi_head_attention_is_met_and_the_same_at_a_full_budget(call):
    _, module = pair(batch_first=True)
    q, k, v = (rows(2, N, WIDTH, seed=seed) for seed in range(3))
    expected, _ = module(q, k, v, need_weights=False, **call)
    with reroute(min_keys=1, **FULL) as met:
        out, weights = module(q, k, v, need_weights=False, **call)
    assert weights is None
    # PyTorch's module makes numbers of masks.
    of_heads = "attn_mask" in call and call["attn_mask"].ndim == 3
    assert met.counts == {("", POSITION_BIAS if of_heads else "exact"): 1}
    torch.testing.assert_close(out, expected, **CHECK)


def test_multi_head_attention_is_met_within_another_mode():
    """The device that PyTorch makes tensors on is one: its function asks whether there is any."""
    _, module = pair(batch_first=True)
    x = rows(2, N, WIDTH)
    with torch.device("cpu"), reroute(min_keys=1, **SMALL) as met:
        module(x, x, x, need_weights=False)
    assert met.counts == {("", "sortlsh"): 1}


def test_attention_weights_that_are_asked_for_are_those_of_pytorch():
    _, module = pair(batch_first=True)
    x = rows(2, N, WIDTH)
    expected = module(x, x, x, average_attn_weights=False)
    with reroute(min_keys=1, **SMALL) as met:
        found = module(x, x, x, average_attn_weights=False)
    assert met.counts == {("", "attention weights are asked for"): 1}
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CHECK)


BEYOND_PYTORCH = [
    {"window": 5},
    {"key_lengths": [N, 20]},
    {"kernels": "array-api"},
    {"check_finite": True},
    {"max_memory": 10**9},
]


@pytest.mark.parametrize("option", BEYOND_PYTORCH, ids=str)
@pytest.mark.parametrize("block", [True, False])
def test_attention_weights_are_refused_with_options_that_pytorch_has_not(block, option):
    """Weights are PyTorch's own, which would drop the option."""
    _, module = pair(batch_first=True)
    x = rows(2, N, WIDTH)
    if not block:
        replace_attention(module, min_keys=1, **SMALL, **option)
    with (
        pytest.raises(OptionError, match=r"must be left to PyTorch \(attention weights are asked for\), .* none of window"),
        reroute(min_keys=1, **(SMALL if block else {}), **option),
    ):
        module(x, x, x, need_weights=True)
    assert not running_modes()


@pytest.mark.parametrize("how", ["block", "model", "compiled"])
def test_without_attention_weights_these_options_hold(how):
    """Compiled in one graph it would be left to PyTorch: the graph is broken instead."""
    torch.compiler.reset()
    _, module = pair(batch_first=True)
    x, distance = rows(2, N, WIDTH), torch.arange(N)[:, None] - torch.arange(N)
    expected, _ = module(x, x, x, attn_mask=distance.abs() >= 5, need_weights=False)
    if how == "block":
        with reroute(window=5):
            out, _ = module(x, x, x, need_weights=False)
    else:
        replace_attention(module, window=5)
        call = torch.compile(module, backend="eager") if how == "compiled" else module
        with torch.no_grad():
            out, _ = call(x, x, x, need_weights=False)
    torch.testing.assert_close(out, expected, **CHECK)
    assert not running_modes()


@pytest.mark.parametrize("block", [True, False])
def test_what_can_not_hold_in_one_graph_raises(block):
    torch.compiler.reset()
    _, module = pair(batch_first=True)
    x = rows(2, N, WIDTH)
    if not block:
        replace_attention(module, window=5)
    one_graph = torch.compile(module, backend="eager", fullgraph=True)
    met = reroute(window=5) if block else nullcontext()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="OptionError"), met:
        one_graph(x, x, x, need_weights=False)
    assert not running_modes()


@pytest.mark.parametrize(("min_keys", "outcome"), [(1, "exact"), (1000, "fewer than 1000 keys")])
@pytest.mark.parametrize(("n_q", "n_k"), [(N, N), (60, N), (N, 60)])
@pytest.mark.parametrize(
    "call",
    [
        {"is_causal": True},
        {"scale": 0.9},
        {"enable_gqa": True, "is_causal": True},
        {"attn_mask": "boolean"},
        {"attn_mask": "additive", "enable_gqa": True},
    ],
    ids=str,
)
def test_the_function_is_met_with_all_its_arguments(n_q, n_k, call, min_keys, outcome):
    heads = 2 if "enable_gqa" in call else 4
    masks = {"boolean": ~hidden(2, 1, n_q, n_k), "additive": additive(n_q, n_k)}
    call = {name: masks.get(value, value) for name, value in call.items()}
    q, k, v = rows(2, 4, n_q, 8), rows(2, heads, n_k, 8, seed=1), rows(2, heads, n_k, 8, seed=2)
    with reroute(min_keys=min_keys, **FULL) as met:
        out = sdpa(q, k, v, **call)
    assert met.counts == {("", outcome): 1}
    torch.testing.assert_close(out, sdpa(q, k, v, **call), **CHECK)


REASONS = {
    "fewer than 50 keys": (N, 49, {}, SMALL),
    "fewer than 32 queries": (31, N, {}, SMALL),
    "dropout": (N, N, {"dropout_p": 0.2}, SMALL),
    "no more keys than the budget": (N, N, {}, {"budget": N}),
    "exact attention is expected to be about as fast": (N, N, {}, {"budget": 80}),
    POSITION_BIAS: (N, N, {"attn_mask": additive(2, N, N)}, SMALL),
}


@pytest.mark.parametrize(("reason", "case"), REASONS.items(), ids=REASONS)
def test_what_is_left_to_pytorch_is_counted_with_its_reason(reason, case):
    n_q, n_k, call, options = case
    q, k, v = (rows(1, 2, n, 8) for n in (n_q, n_k, n_k))
    torch.manual_seed(0)
    expected = sdpa(q, k, v, **call)
    torch.manual_seed(0)
    with reroute(min_keys=50, **options) as met, collect_reports() as reports:
        out = sdpa(q, k, v, **call)
    assert met.counts == {("", reason): 1}
    assert not reports
    assert torch.equal(out, expected)


def test_a_dtype_that_is_not_known_is_left_to_pytorch():
    q = rows(1, 2, N, 8).to(torch.complex64)
    with pytest.raises(NotImplementedError, match="ComplexFloat"), reroute(min_keys=1, **SMALL) as met:
        sdpa(q, q, q)
    assert met.counts == {("", "dtype complex64"): 1}


def test_the_least_numbers_of_keys_and_queries_are_estimated():
    q, k = rows(1, 2, 32, 8), rows(1, 2, 60, 8)
    with reroute(min_keys=60, **SMALL) as met, collect_reports() as reports:
        sdpa(q, k, k)
    assert met.counts == {Count("", "sortlsh"): 1}
    assert re.search(r"\n–  +1 +50 +0\.\d+ +\d+\.\d  sortlsh$", str(met))
    assert [report.budget for report in reports] == [50]


def test_the_block_ends_with_an_exception_too():
    q = rows(1, 2, N, 8)
    with pytest.raises(RuntimeError, match="must match"), reroute(min_keys=1, **SMALL) as met:
        torch.cat([sdpa(q, q, q), q[..., :3]])
    assert not running_modes()
    sdpa(q, q, q)
    assert met.counts == {("", "sortlsh"): 1}


def test_the_functions_of_pytorch_are_unchanged_in_the_block():
    before = functional.scaled_dot_product_attention, functional.multi_head_attention_forward
    replace_attention(model(), **SMALL)
    with reroute(**SMALL):
        now = functional.scaled_dot_product_attention, functional.multi_head_attention_forward
        assert all(x is y for x, y in zip(now, before, strict=True))
        sdpa(*[rows(1, 2, N, 8)] * 3)


def test_other_threads_see_nothing_of_a_block_or_of_a_model_that_runs():
    q, found = rows(1, 2, N, 8), []

    def ask(*_):
        thread = threading.Thread(target=lambda: found.append(sdpa(q, q, q)))
        thread.start()
        thread.join()

    with pytest.warns(NothingReplaced), reroute(min_keys=1, **SMALL) as met:
        ask()
    replaced = model()
    replaced[1].register_forward_pre_hook(ask)
    replacement = replace_attention(replaced, min_keys=1, **SMALL)
    replaced(rows(2, N, WIDTH))
    assert len(found) == 2
    assert all(torch.equal(out, sdpa(q, q, q)) for out in found)
    assert not met.counts
    assert replacement.counts == {("0", "sortlsh"): 1, ("1.1", "sortlsh"): 1}


# replace_attention


def test_a_model_that_runs_in_several_threads_at_once():
    found, x = model(), rows(2, N, WIDTH)
    replace_attention(found, min_keys=1, **SMALL)
    expected, outs = found(x), [None] * 6
    barrier = threading.Barrier(6)

    def wait(*_):
        barrier.wait(60)

    found[0].register_forward_pre_hook(wait)

    def ask(place):
        outs[place] = found(x)

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, expected) for out in outs)
    assert not running_modes()


def test_layers_are_counted_and_have_options_of_their_own():
    """Those of a module are its parts' too; parts may have others."""
    found, x = model(), rows(2, N, WIDTH)
    layers = {"1": {"method": "treecode", "seed": 3}, "1.?": {"budget": 60}}
    replacement = replace_attention(found, min_keys=1, layers=layers, **SMALL)
    with collect_reports() as reports:
        found(x)
    assert [(report.method, report.budget) for report in reports] == [("sortlsh", 50), ("treecode", 60)]
    found(x[:, :20])
    assert replacement.counts == {
        ("0", "sortlsh"): 1,
        ("1.1", "treecode"): 1,
        ("0", "fewer than 32 queries"): 1,
        ("1.1", "fewer than 32 queries"): 1,
    }
    assert re.match(r"1\.1 +1 +\d\d +0\.\d+ +\d+\.\d  treecode$", str(replacement).splitlines()[2])
    assert re.match(r"0 +1 +\d+\.\d  PyTorch: fewer than 32 queries$", str(replacement).splitlines()[3])


def test_a_layer_at_a_full_budget_is_exact_beside_one_that_is_not():
    found, x = model(), rows(2, N, WIDTH)
    between = []
    found[0].register_forward_hook(lambda module, args, out: between.append(out))
    expected = found(x)
    replace_attention(found, min_keys=1, layers={"0": FULL}, **SMALL)
    out = found(x)
    torch.testing.assert_close(between[1], between[0], **CHECK)
    assert 1e-4 < (out - expected).norm() / expected.norm() < 0.2


def test_a_part_of_the_model_that_is_called_alone_is_met():
    found = model()
    replacement = replace_attention(found, min_keys=1, **SMALL)
    found[1][1](rows(2, N, WIDTH))
    assert replacement.counts == {("1.1", "sortlsh"): 1}


def test_restore_leaves_attention_to_pytorch():
    found, x = model(), rows(2, N, WIDTH)
    expected = found(x)
    replacement = replace_attention(found, min_keys=1, **SMALL)
    assert not torch.equal(found(x), expected)
    counted = dict(replacement.counts)
    replacement.restore()
    assert torch.equal(found(x), expected)
    assert replacement.counts == counted
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in found.modules())


def test_restore_while_another_thread_runs_the_model():
    """What that asks for from then on is PyTorch's, and nothing stays behind where it ends."""
    found, x = model(), rows(2, N, WIDTH)
    replacement = replace_attention(found, min_keys=1, **SMALL)
    began, go_on, modes = threading.Event(), threading.Event(), []

    def wait(*_):
        began.set()
        go_on.wait(60)

    handle = found[0].register_forward_pre_hook(wait)

    def ask():
        found(x)
        modes.append(running_modes())

    thread = threading.Thread(target=ask)
    thread.start()
    began.wait(60)
    replacement.restore()
    go_on.set()
    thread.join()
    handle.remove()
    assert modes == [[]]
    assert not replacement.counts
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in found.modules())


@pytest.mark.parametrize("how", ["itself", "twice", "pickled", "copied"])
def test_restore_attention_leaves_any_model_to_pytorch(how):
    """Of a copy, `Replacement.restore` of what was copied knows nothing."""
    found, x = model(), rows(2, N, WIDTH)
    keys, expected = list(found.state_dict()), found(x)
    replace_attention(found, min_keys=1, layers={"0": {"method": "treecode"}}, **SMALL)
    if how == "twice":
        replace_attention(found[1], min_keys=1, **SMALL)
    estimated, restored = found(x), found
    if how == "pickled":
        file = io.BytesIO()
        torch.save(found, file)
        file.seek(0)
        restored = torch.load(file, weights_only=False)
    elif how == "copied":
        restored = copy.deepcopy(found)
    assert torch.equal(restored(x), estimated)
    assert not torch.equal(estimated, expected)
    restore_attention(restored)
    assert torch.equal(restored(x), expected)
    assert list(restored.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in restored.modules())
    if restored is not found:
        assert torch.equal(found(x), estimated)


def test_restore_attention_leaves_other_hooks_and_models_alone():
    found, x, calls = model(), rows(2, N, WIDTH), []
    found[0].register_forward_hook(lambda *_: calls.append(1))
    expected = found(x)
    restore_attention(found)
    assert torch.equal(found(x), expected)
    assert len(calls) == 2


class Raises(nn.Module):
    """Raise what it is made with."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        ValueError,
        pytest.param(
            KeyboardInterrupt,
            marks=pytest.mark.xfail(raises=AssertionError, reason="hooks with always_call aren't called then"),
        ),
    ],
)
def test_a_model_that_raises_is_left(error):
    found, x = nn.Sequential(model(), Raises(error("in the model"))), rows(2, N, WIDTH)
    replacement = replace_attention(found, min_keys=1, **SMALL)
    with pytest.raises(error, match="in the model"):
        found(x)
    left = running_modes()
    for mode in left:  # Not to be in the way of other tests.
        mode.__exit__(None, None, None)
    assert not left
    sdpa(*[rows(1, 2, N, 8)] * 3)
    assert replacement.counts.total() == 2


@pytest.mark.parametrize("how", ["restored", "called again"])
def test_what_a_keyboard_interrupt_leaves_is_taken_away(how):
    found, x = nn.Sequential(model(), Raises(KeyboardInterrupt())), rows(2, N, WIDTH)
    replacement = replace_attention(found, min_keys=1, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        found(x)
    if how == "restored":
        replacement.restore()
    else:
        found[1] = nn.Identity()
        found(x)
    assert not running_modes()


def test_an_exception_of_another_hook_that_the_model_catches():
    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Layer(), Layer()

        def forward(self, x):
            with pytest.raises(ValueError, match="in the hook"):
                self.first(x)
            return self.second(x)

    def raises(*_):
        raise ValueError("in the hook")

    found = Tries()
    found.first.register_forward_pre_hook(raises)
    replacement = replace_attention(found, min_keys=1, **SMALL)
    found(rows(2, N, WIDTH))
    assert replacement.counts == {("second", "sortlsh"): 1}
    assert not running_modes()


class Checkpointed(nn.Module):
    """Call two layers, the activations of which may be made again for their gradients."""

    def __init__(self, **how):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.how = Layer(), Layer(), how

    def forward(self, x):
        for layer in (self.first, self.second):
            x = checkpoint(layer, x, **self.how) if self.how else layer(x)
        return x


class CheckpointedInside(Checkpointed):
    """The same, but functions are checkpointed that aren't modules."""

    def forward(self, x):
        return checkpoint(lambda x: self.second(self.first(x)), x, **self.how)


def gradients(found, x):
    x = x.clone().requires_grad_()
    (found(x) * rows(*x.shape, seed=9)).sum().backward()
    return [x.grad, *(parameter.grad for parameter in found.parameters())]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", [Checkpointed, CheckpointedInside])
@pytest.mark.parametrize("options", [FULL, SMALL], ids=str)
def test_gradients_and_those_of_activations_made_again(reentrant, kind, options):
    x, plain, found, again = rows(2, N, WIDTH), Checkpointed(), Checkpointed(), kind(use_reentrant=reentrant)
    exact = gradients(plain, x)
    replace_attention(found, min_keys=1, **options)
    replacement = replace_attention(again, min_keys=1, **options)
    estimated = gradients(found, x)
    for ours, theirs in zip(gradients(again, x), estimated, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert replacement.counts.total() == 4
    error = (estimated[0] - exact[0]).norm() / exact[0].norm()
    assert error < 1e-12 if options is FULL else 1e-3 < error < 0.5


@pytest.mark.xfail(raises=(AssertionError, RuntimeError), reason="no hook runs where the activations are made again")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_of_what_a_module_checkpoints_of_itself(reentrant):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [Layer(), Layer()]  # Not registered, as a function isn't.

        def forward(self, x):
            return checkpoint(lambda x: self.layers[1](self.layers[0](x)), x, use_reentrant=reentrant)

    found, x = Inside(), rows(2, N, WIDTH)
    with reroute(min_keys=1, **SMALL):
        expected = gradients(nn.Sequential(*found.layers), x)[0]
    replace_attention(found, min_keys=1, **SMALL)
    torch.testing.assert_close(gradients(found, x)[0], expected, rtol=1e-12, atol=1e-12)


def test_a_saved_model_loads_without_hooks():
    found, x = model(), rows(2, N, WIDTH)
    keys, expected = list(found.state_dict()), found(x)
    replace_attention(found, min_keys=1, **SMALL)
    file = io.BytesIO()
    torch.save(found.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert list(saved) == keys
    fresh = model()
    for parameter in fresh.parameters():
        parameter.data.zero_()
    fresh.load_state_dict(saved)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in fresh.modules())
    assert torch.equal(fresh(x), expected)


@pytest.mark.parametrize("copied", ["pickled", "copied"])
def test_a_model_that_is_pickled_or_copied_whole_goes_on_estimating(copied):
    found, x = model(), rows(2, N, WIDTH)
    replacement = replace_attention(found, min_keys=1, layers={"0": {"method": "treecode"}}, **SMALL)
    expected = found(x)
    if copied == "pickled":
        file = io.BytesIO()
        torch.save(found, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(found)
    counted = replacement.counts
    assert torch.equal(other(x), expected)
    assert replacement.counts == counted == {("0", "treecode"): 1, ("1.1", "sortlsh"): 1}
    replacement.restore()
    assert not torch.equal(found(x), expected)
    assert torch.equal(other(x), expected)


# What happens where nothing is met, and what is said of what was


class OwnSoftmax(nn.Module):
    """Attention that calls none of PyTorch's functions for it."""

    def forward(self, x):
        return torch.softmax(x @ x.mT, dim=-1) @ x


def test_a_model_with_a_softmax_of_its_own_is_warned_of():
    found, x = nn.Sequential(OwnSoftmax()), rows(2, N, WIDTH)
    replacement = replace_attention(found, min_keys=1, **SMALL)
    with pytest.warns(NothingReplaced, match="no attention was met"):
        found(x)
    assert str(replacement) == repr(replacement) == "no attention was met"
    with pytest.warns(NothingReplaced, match="no attention was met"), reroute(min_keys=1, **SMALL):
        OwnSoftmax()(x)


@pytest.mark.parametrize("option", [{"window": 5}, {"kernels": "array-api"}, {"check_finite": True}], ids=str)
@pytest.mark.parametrize("block", [True, False])
def test_an_option_that_pytorch_has_not_is_refused_where_nothing_is_met(block, option):
    found, x = nn.Sequential(OwnSoftmax()), rows(2, N, WIDTH)
    ((name, value),) = option.items()
    if not block:
        replace_attention(found, **option)
    with (
        pytest.raises(OptionError, match=f"{name} must not be given where no attention is met, got {value!r}"),
        reroute(**option) if block else nullcontext(),
    ):
        found(x)


def test_a_compiled_encoder_in_evaluation_loses_no_window():
    """PyTorch has a function for a layer then, which is not met: no graph of it may come out with all keys seen."""
    torch.compiler.reset()
    compiled = torch.compile(encoder(), backend="eager")
    with (
        torch.no_grad(),
        pytest.raises(OptionError, match="window must not be given where no attention is met, got 5"),
        reroute(window=5),
    ):
        compiled(rows(2, N, WIDTH))


@pytest.mark.parametrize("block", [True, False])
def test_the_warning_names_the_line_that_called(block):
    """And no line of PyTorch's modules, nor of these."""
    found, x = nn.Sequential(nn.Sequential(OwnSoftmax())), rows(2, N, WIDTH)
    if not block:
        replace_attention(found, min_keys=1, **SMALL)
    with pytest.warns(NothingReplaced) as warned, reroute(min_keys=1, **SMALL) if block else nullcontext():
        found(x)
    assert [one.filename for one in warned] == [__file__]


def test_parts_without_attention_and_models_that_raise_are_not():
    found, x = nn.Sequential(nn.Identity(), Layer(), Raises(ValueError("in the model"))), rows(2, N, WIDTH)
    replace_attention(found, min_keys=1, **SMALL)
    found[0](x)
    first = nn.Sequential(Raises(ValueError("in the model")), Layer())
    replace_attention(first, min_keys=1, **SMALL)
    with pytest.raises(ValueError, match="in the model"):
        first(x)
    with pytest.raises(ValueError, match="in the block"), reroute(**SMALL):
        raise ValueError("in the block")


def test_the_table_says_what_ran_and_what_it_took():
    """Exact runs of kdecore are no estimates; errors are certified where that is asked for."""
    found, x = model(), rows(2, 300, WIDTH)
    layers = {"0": {"method": "exact"}}
    replacement = replace_attention(found, min_keys=1, layers=layers, certificate=1.0, **SMALL)
    for _ in range(2):
        found(x)
    assert replacement.counts == {("0", "exact"): 2, ("1.1", "sortlsh"): 2}
    exact, estimated = replacement.calls.tallies[("0", "exact")], replacement.calls.tallies[("1.1", "sortlsh")]
    assert (exact.keys, estimated.keys) == (600.0, 100.0)
    assert exact.error is None
    assert 0.001 < estimated.error < 1.0
    assert min(exact.seconds, estimated.seconds) > 0
    head, *lines = str(replacement).splitlines()
    assert head.split("  ")[0] == "layer"
    assert re.match(r"0 +2 +300 +\d+\.\d  exact$", lines[0])
    assert re.match(r"1\.1 +2 +50 +0\.\d+ +\d+\.\d  sortlsh$", lines[1])


@pytest.mark.parametrize(("device", "reason"), [("cuda", ""), ("cuda", "dropout"), ("cpu", "dropout"), ("cpu", "")])
def test_a_call_is_counted_once_wherever_it_runs(device, reason):
    """Of what lies on a device nothing waits for a report; the block around it must not ask for one either."""
    q, there = rows(1, 2, N, 8), SimpleNamespace(device=torch.device(device))
    with reroute(min_keys=1, **SMALL) as met:
        met.calls.watch("", reason, there, lambda: scaled_dot_product_attention(q, q, q, **SMALL))
    assert met.counts == {("", reason or {"cpu": "sortlsh", "cuda": TAKEN}[device]): 1}


def test_counting_may_end_in_another_context_than_it_began_in():
    """As where a KeyboardInterrupt leaves what another thread or task began."""
    counted, other = [], contextvars.copy_context()
    counting = counted_by(counted.append)
    other.run(counting.__enter__)
    counting.__exit__(None, None, None)
    scaled_dot_product_attention(*[rows(1, 2, N, 8)] * 3, **SMALL)
    assert not counted


def test_checking_options_leaves_no_report_behind():
    with collect_reports() as reports:
        reroute(method="exact")
        replace_attention(model(), method="exact")
        KDEAttention(WIDTH, HEADS, method="exact")
    assert not reports


def test_an_option_that_pytorch_has_not_holds_for_short_inputs_too():
    q, k, v = (rows(2, HEADS, 40, 8, seed=seed) for seed in range(3))
    distance = torch.arange(40)[:, None] - torch.arange(40)
    with reroute(window=5) as met:
        out = sdpa(q, k, v)
        step = sdpa(q[..., -1:, :], k, v)
    torch.testing.assert_close(out, sdpa(q, k, v, distance.abs() < 5), **CHECK)
    torch.testing.assert_close(step, sdpa(q[..., -1:, :], k, v, (distance.abs() < 5)[-1:]), **CHECK)
    assert met.counts == {("", "exact"): 2}
    with pytest.raises(OptionError, match="dropout_p must be 0"), reroute(window=5):
        sdpa(q, k, v, dropout_p=0.1)


def test_rows_that_attend_to_themselves_have_own_keys():
    """KDEAttention is told so by getting one tensor for queries and keys."""
    ours, _ = pair({"method": "treecode", "budget": 64}, batch_first=True)
    x = rows(1, N, WIDTH)
    with collect_reports() as reports:
        ours(x, x, x)
        ours(x, x.clone(), x)
    assert [report.diagonal for report in reports] == [0, None]


@pytest.mark.parametrize("call", ["plain", "both", "causal", "causal, padding", "causal, padding, additive"])
@pytest.mark.parametrize("diagonal", [0, 3])
def test_a_diagonal_of_the_module_holds_or_is_refused(diagonal, call):
    """PyTorch's causal attention is aligned to the first query and key, with padding too."""
    ours, theirs = pair({**FULL, "diagonal": diagonal}, batch_first=True)
    x, call = rows(2, N, WIDTH), CALLS[call]
    if diagonal and "is_causal" in call:
        with pytest.raises(OptionError, match="diagonal must be None where the first query stands at the first key, got 3"):
            ours(x, x, x, **call)
        return
    with collect_reports() as reports:
        out, _ = ours(x, x, x, **call)
    assert [report.diagonal for report in reports] == [diagonal]
    torch.testing.assert_close(out, theirs(x, x, x, need_weights=False, **call)[0], **CHECK)


# torch.compile


@pytest.fixture
def compiled():
    """Return torch.compile in one graph, and the list of graphs that were made."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    yield (lambda found: torch.compile(found, backend=backend, fullgraph=True)), graphs
    torch.compiler.reset()


@pytest.mark.parametrize("call", [CALLS["plain"], CALLS["causal, padding"], CALLS["both"]])
def test_the_module_compiles_to_one_graph(call):
    torch.compiler.reset()
    ours, _ = pair(SMALL, batch_first=True)
    x = rows(2, N, WIDTH)
    out, _ = torch.compile(ours, backend="aot_eager", fullgraph=True)(x, x, x, **call)
    torch.testing.assert_close(out, ours(x, x, x, **call)[0], **CHECK)


def test_a_replaced_model_compiles_to_one_graph_with_gradients():
    torch.compiler.reset()
    found, x = model(), rows(2, N, WIDTH)
    replace_attention(found, min_keys=1, layers={"0": FULL}, **SMALL)
    expected, expected_gradients = found(x), gradients(found, x)
    found.zero_grad()
    one_graph = torch.compile(found, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(one_graph(x), expected, **CHECK)
    for ours, theirs in zip(gradients(one_graph, x), expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", [True, False])
def test_the_graph_holds_the_operator(compiled, block):
    compile_, graphs = compiled
    found, x = model(), rows(2, N, WIDTH)
    if block:
        with reroute(min_keys=1, **SMALL) as met:
            compile_(found)(x)
    else:
        met = replace_attention(found, min_keys=1, **SMALL)
        compile_(found)(x)
    assert len(graphs) == 1
    if block:
        assert met.counts == {("", "sortlsh"): 2}
    else:
        assert str(met) == "no attention was met\ncompiled: not counted"
    assert graphs[0].code.count("kdecore.attention") == 2
    assert "scaled_dot_product_attention" not in graphs[0].code


def test_a_model_that_unflattens_compiles_to_one_graph(compiled):
    compile_, graphs = compiled
    found = nn.Sequential(nn.Unflatten(0, (2, 1)), nn.Flatten(0, 1), Layer())
    replace_attention(found, min_keys=1, **SMALL)
    compile_(found)(rows(2, N, WIDTH))
    assert len(graphs) == 1


def test_a_model_that_is_called_again_is_not_compiled_again(compiled):
    compile_, graphs = compiled
    found = model()
    replace_attention(found, min_keys=1, **SMALL)
    one_graph = compile_(found)
    for _ in range(3):
        one_graph(rows(2, N, WIDTH))
    assert len(graphs) == 1


def test_multi_head_attention_in_a_graph_is_left_to_pytorch():
    torch.compiler.reset()
    x, found = rows(2, N, WIDTH), encoder()
    expected = found(x)
    replacement = replace_attention(found, min_keys=1, **SMALL)
    torch.testing.assert_close(torch.compile(found, backend="eager")(x), expected, **CHECK)
    assert not replacement.counts
    assert str(replacement) == "no attention was met\ncompiled: not counted"


@pytest.mark.parametrize("min_keys", [1, 1000], ids=["estimated", "short"])
def test_a_diagonal_that_causal_attention_contradicts_is_refused(min_keys):
    q = rows(1, HEADS, N, 8)
    for diagonal in (None, 0):
        with reroute(method="treecode", budget=20, min_keys=min_keys, diagonal=diagonal) as met:
            sdpa(q, q, q, is_causal=True)
        assert met.counts.total() == 1
    with (
        pytest.raises(OptionError, match="diagonal must be None where the first query stands at the first key, got 3"),
        reroute(method="treecode", budget=20, min_keys=min_keys, diagonal=3),
    ):
        sdpa(q, q, q, is_causal=True)
