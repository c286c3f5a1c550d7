"""Hosts by their contracts: each is stood for by what calls as it does, written after its own code, and not imported."""

import functools
import inspect
import re
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import kdecore
from kdecore_adapters import hosts
from kdecore_adapters.torch_calls import Count
from kdecore_adapters.torch_encoder import MIN_KEYS

BATCH, HEADS, N, D = 2, 4, 60, 8
ESTIMATED = {"method": "treecode", "budget": 20, "min_keys": 1}
"""Options with which calls as short as these are estimated."""
PLAIN = {name: x for name, x in ESTIMATED.items() if name != "min_keys"}


def arrays(heads_k=HEADS, n=N, dtype=torch.float32):
    """Return query, key and value (batch, heads, n, d)."""
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.standard_normal((BATCH, h, n, D))).to(dtype) for h in (HEADS, heads_k, heads_k)]


def turned(*tensors):
    """Return (batch, n, heads, d) of (batch, heads, n, d)."""
    return [x.transpose(1, 2).contiguous() for x in tensors]


def padding():
    """Return (batch, n), True for what is seen."""
    return torch.arange(N) < torch.tensor([[N], [N - 25]])


# vLLM-Omni: the dispatcher to plugins, as its SPARSE_ATTN backend has it


class SparseAttention:
    """Stand for vLLM-Omni's dispatcher: a plugin is found by an entry point, and called with one flat dict of parameters.

    Attributes
    ----------
    extra
        Of the attention config: ``backend``, the plugin's name, and ``params``, or these beside it.
    """

    def __init__(self, extra, causal=False, softmax_scale=D**-0.5):
        text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
        group = "vllm_omni.sparse_attn"
        named = tomllib.loads(text)["project"]["entry-points"][group]
        found = {name.lower(): EntryPoint(name, value, group) for name, value in named.items()}
        self.callable = found[extra["backend"].lower()].load()
        self.static = extra["params"] if "params" in extra else {name: x for name, x in extra.items() if name != "backend"}
        self.causal, self.softmax_scale = causal, softmax_scale
        self.capabilities = getattr(self.callable, "capabilities", {})

    def forward(self, query, key, value, attn_mask=None, full_attn_spans=None, per_forward=None, extra=None):
        params = {**self.static, **(per_forward or {}), **(extra or {})}
        params = {name: x for name, x in params.items() if x is not None}
        for name, x, capability in (
            ("attn_mask", attn_mask, "supports_attention_mask"),
            ("full_attn_spans", full_attn_spans, "supports_full_attn_spans"),
        ):
            if x is not None:
                if not self.capabilities.get(capability, False):
                    raise ValueError(f"received {name} but does not advertise {capability}")
                params[name] = x
        return self.callable(query, key, value, params, is_causal=self.causal, softmax_scale=self.softmax_scale)


PER_FORWARD = {
    "denoise_step_idx": torch.tensor([3, 3]),
    "total_denoise_steps": torch.tensor([50, 50]),
    "latent_shape": torch.tensor([[5, 8, 12]] * 2),
    "patch_size": torch.tensor([[1, 2, 4]] * 2),
    "total_latent_frames": 5,
    "patches_per_frame": 12,
}


def vllm_omni(q, k, v, options=ESTIMATED, causal=False, scale=D**-0.5, **call):
    layer = SparseAttention({"backend": "kdecore", "params": options}, causal, scale)
    return layer.forward(*turned(q, k, v), per_forward=PER_FORWARD, **call).transpose(1, 2)


# xDiT: its registry, and what it does round a call


def xdit_calls(function, query, key, value, dropout_p=0.0, is_causal=False, attention_kwargs=None):
    """Stand for USP of one rank: trailing padding of keys is cut off unless packed indices come too."""
    given = attention_kwargs or {}
    if (length := given.get("valid_kv_len")) is not None and given.get("indices_k") is None:
        key, value = key[:, :, :length], value[:, :, :length]
    return function(query, key, value, dropout_p=dropout_p, is_causal=is_causal, attention_kwargs=attention_kwargs)


def xdit(q, k, v, options=ESTIMATED, causal=False, mask=None, **call):
    kwargs = {"indices_k": None, "cu_seqlens_k": None, "max_seqlen_k": None, "valid_kv_len": None, "attn_mask": mask}
    out, lse = xdit_calls(hosts.xdit(**options), q, k, v, is_causal=causal, attention_kwargs={**kwargs, **call})
    assert lse is None
    return out


def ring(function, query, key, value, parts):
    """Stand for PyTorch's templated ring attention: parts of the keys, merged by their log-sum-exps."""
    out, lse = torch.zeros(*query.shape), torch.full(query.shape[:-1], -torch.inf)
    for keys, values in zip(key.chunk(parts, 2), value.chunk(parts, 2), strict=True):
        part, part_lse, *_ = function(query, keys, values, is_causal=False, dropout_p=0.0, attention_kwargs=None)
        both = torch.logaddexp(lse, part_lse)
        out = out * (lse - both).exp()[..., None] + part * (part_lse - both).exp()[..., None]
        lse = both
    return out, lse


# ComfyUI: the wrapper of its attention functions, and its own one


def wrap_attn(func):
    """Stand for the wrapper of ComfyUI's attention functions: the outermost one asks a model's override."""

    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        kwargs.pop("preferred_attention", None)
        override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
        within, kwargs["_inside_attn_wrapper"] = "_inside_attn_wrapper" in kwargs, True
        return func(*args, **kwargs) if within or override is None else override(func, *args, **kwargs)

    return wrapper


def attention_pytorch(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
):
    """Stand for ComfyUI's own attention."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (-1, q.shape[-1] // heads)).transpose(1, 2) for x in (q, k, v))
    while mask is not None and mask.ndim < 4:
        mask = mask.unsqueeze(1 if mask.ndim == 3 else 0)
    more = {name: kwargs[name] for name in kwargs.keys() & {"scale", "enable_gqa"}}
    out = functional.scaled_dot_product_attention(q, k, v, mask, **more)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def comfyui(q, k, v, options=ESTIMATED, mask=None, shapes=(False, False), override=None, **call):
    """Call as ComfyUI's models do, and return (batch, heads, n, d)."""
    function = hosts.comfyui(**options) if override is None else attention_pytorch
    model = {"block": ("double", 3), **({} if override is None else {"optimized_attention_override": override})}
    skip_reshape, skip_output_reshape = shapes
    rows = (q, k, v) if skip_reshape else (x.flatten(2) for x in turned(q, k, v))
    more = {name: True for name, skip in zip(("skip_reshape", "skip_output_reshape"), shapes, strict=True) if skip}
    if k.shape[1] != q.shape[1]:
        more["enable_gqa"] = True
    found = wrap_attn(function)(*rows, HEADS, mask, attn_precision=torch.float32, transformer_options=model, **more, **call)
    return found if skip_output_reshape else found.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def comfyui_override(q, k, v, options=ESTIMATED, **call):
    return comfyui(q, k, v, override=hosts.comfyui_override(**options), **call)


# SageAttention: its signature, as diffusers, ComfyUI and xDiT call it


def sage(q, k, v, options=ESTIMATED, causal=False, mask=None, layout="HND", **call):
    rows = (q, k, v) if layout == "HND" else turned(q, k, v)
    kwargs = {"is_causal": causal, "tensor_layout": layout, "sm_scale": None, "smooth_k": False, **call}
    if mask is not None:
        kwargs["attn_mask"] = mask
    out = hosts.sageattention(**options)(*rows, **kwargs)
    return out if layout == "HND" else out.transpose(1, 2)


WAYS = {
    "vllm_omni": vllm_omni,
    "xdit": xdit,
    "comfyui": comfyui,
    "comfyui, heads": functools.partial(comfyui, shapes=(True, True)),
    "comfyui, heads in": functools.partial(comfyui, shapes=(True, False)),
    "comfyui, heads out": functools.partial(comfyui, shapes=(False, True)),
    "comfyui_override": comfyui_override,
    "sageattention": sage,
    "sageattention, NHD": functools.partial(sage, layout="NHD"),
}
MASKED = {
    "vllm_omni": {"attn_mask": padding()},
    "xdit": {"mask": padding()[:, None, None, :]},
    "comfyui": {"mask": torch.where(padding(), 0.0, -torch.inf)[:, None].expand(BATCH, N, N)},
    "comfyui_override": {"mask": padding()[:, None, None, :]},
    "sageattention": {"mask": padding()[:, None, None, :]},
}
of_ways = pytest.mark.parametrize("way", WAYS)
CAUSAL = ("vllm_omni", "xdit", "sageattention", "sageattention, NHD")


def masked(way):
    return MASKED[way.partition(",")[0]]


@of_ways
@pytest.mark.parametrize("heads_k", [HEADS, 2, 1])
def test_an_estimated_call_is_that_of_the_function(way, heads_k):
    q, k, v = arrays(heads_k)
    found = WAYS[way](q, k, v)
    assert torch.equal(found, kdecore.attention(q, k, v, **PLAIN))
    exact = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert 0 < (found - exact).norm() < 0.7 * exact.norm()


@of_ways
def test_a_masked_call_is_that_of_the_function(way):
    q, k, v = arrays()
    found = WAYS[way](q, k, v, **masked(way))
    torch.testing.assert_close(found, kdecore.attention(q, k, v, key_lengths=[N, N - 25], **PLAIN), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", CAUSAL)
def test_a_causal_call_is_that_of_the_function(way):
    q, k, v = arrays()
    expected = kdecore.attention(q, k, v, causal=True, diagonal=0, **PLAIN)
    assert torch.equal(WAYS[way](q, k, v, causal=True), expected)


SCALED = {"vllm_omni": "scale", "comfyui": "scale", "comfyui_override": "scale", "sageattention": "sm_scale"}


@pytest.mark.parametrize("way", [way for way in WAYS if way.partition(",")[0] in SCALED])
def test_a_scale_is_that_of_the_function(way):
    q, k, v = arrays()
    found = WAYS[way](q, k, v, **{SCALED[way.partition(",")[0]]: 0.7})
    assert torch.equal(found, kdecore.attention(q, k, v, scale=0.7, **PLAIN))


@of_ways
@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("heads_k", [HEADS, 2])
def test_a_short_call_is_pytorchs_own(way, hides, heads_k):
    """Its weights aren't those of an estimate of so many keys."""
    q, k, v = arrays(heads_k)
    found = WAYS[way](q, k, v, options={"method": "sortlsh", "budget": 20}, **(masked(way) if hides else {}))
    mask = padding()[:, None, None, :] if hides else None
    expected = functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=heads_k < HEADS)
    torch.testing.assert_close(found, expected)


@of_ways
def test_options_that_pytorchs_attention_has_not_are_kept_however_short_a_call_is(way):
    q, k, v = arrays()
    expected = kdecore.attention(q, k, v, window=7)
    torch.testing.assert_close(WAYS[way](q, k, v, options={"window": 7}), expected, rtol=1e-5, atol=1e-6)


FACTORIES = ("vllm_omni", "xdit", "comfyui", "comfyui_override", "sageattention")


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize(
    "wrong", [{"budget": 0}, {"method": "magic"}, {"rtoll": 0.1}, {"min_keys": -1}, {"rtol": 0.1, "budget": 9}]
)
def test_options_are_checked_when_they_are_given(factory, wrong):
    with pytest.raises(kdecore.OptionError, match=next(iter(wrong))):
        getattr(hosts, factory)(**wrong)


UNKNOWN = {
    "vllm_omni": ({"extra": {"cu_seqlens_q": torch.tensor([0, 9])}}, "cu_seqlens_q must be None, got Tensor: of params"),
    "xdit": ({"pre_quantized": True}, "pre_quantized must be None, got bool: of attention_kwargs"),
    "comfyui": ({"temperature": 2.0}, "temperature must be None, got float: of kwargs"),
    "comfyui_override": ({"temperature": 2.0}, "temperature must be None, got float: of kwargs"),
    "sageattention": ({"window_size": 9}, "window_size must be None, got int: of kwargs"),
}


@of_ways
@pytest.mark.parametrize("options", [ESTIMATED, {}], ids=["estimated", "short"])
def test_what_a_call_asks_for_and_is_not_known_is_refused_by_its_name(way, options):
    """But for what is left to ComfyUI's own attention, which may know it."""
    call, said = UNKNOWN[way.partition(",")[0]]
    if (way, options) == ("comfyui_override", {}):
        assert torch.equal(WAYS[way](*arrays(), options=options, **call), WAYS[way](*arrays(), options=options))
        return
    with pytest.raises(kdecore.OptionError, match=f"^{said}"):
        WAYS[way](*arrays(), options=options, **call)


@of_ways
@pytest.mark.parametrize(
    ("options", "error"), [(ESTIMATED, kdecore.DTypeError), ({}, RuntimeError)], ids=["estimated", "short"]
)
def test_tensors_of_different_dtypes_are_refused(way, options, error):
    """A short call's by PyTorch."""
    q, k, v = arrays()
    with pytest.raises(error, match=r"the same dtype"):
        WAYS[way](q, k, v.double(), options=options)


@pytest.mark.parametrize("options", [ESTIMATED, {}], ids=["estimated", "short"])
@pytest.mark.parametrize(
    "call",
    {
        "vllm_omni": lambda f, q: f(q, q, q, {}, False, 0.3),
        "xdit": lambda f, q: f(q, q, q, 0.0, False, None),
        "comfyui": lambda f, q: f(q, q, q, 1),
        "comfyui_override": lambda f, q: f(attention_pytorch, q, q, q, 1),
        "sageattention": lambda f, q: f(q, q, q),
    }.items(),
    ids=lambda call: call[0],
)
def test_what_is_no_tensor_and_wrong_numbers_of_dimensions_are_refused(call, options):
    name, ask = call
    function = getattr(hosts, name)(**options)
    with pytest.raises(kdecore.DTypeError, match=r"^query must be a PyTorch tensor, got list"):
        ask(function, [[1.0]])
    with pytest.raises(kdecore.ShapeError, match=r"^(query|q) must be \(batch, .*, got shape \(5, 8\)"):
        ask(function, torch.ones(5, 8))


@of_ways
def test_calls_are_counted(way, monkeypatch):
    """By what became of them. vLLM-Omni has one kernel, and is told of options by each call."""
    name, made = way.partition(",")[0], []
    factory = getattr(hosts, name)

    def once(**options):
        made.append(factory(**options))
        return made[-1]

    monkeypatch.setattr(hosts, name, once)
    if name == "vllm_omni":
        monkeypatch.setattr(hosts, "VLLM_OMNI", once())
    WAYS[way](*arrays())
    WAYS[way](*arrays(), options={})
    counts = [dict(one.calls.counts) for one in made]
    estimated, left = {Count("", "treecode"): 1}, {Count("", f"fewer than {MIN_KEYS} keys"): 1}
    assert counts == ([{**estimated, **left}] if name == "vllm_omni" else [estimated, left])


@pytest.mark.parametrize("way", ["vllm_omni", "xdit", "comfyui", "sageattention", "sageattention, NHD"])
@pytest.mark.parametrize("options", [ESTIMATED, {}], ids=["estimated", "short"])
def test_compiled_calls_make_one_graph(way, options):
    function = {"vllm_omni": hosts.vllm_omni, "xdit": hosts.xdit, "comfyui": hosts.comfyui}.get(way, hosts.sageattention)
    function = function(**options)
    q, k, v = arrays()
    call = {
        "vllm_omni": lambda q, k, v: function(q, k, v, {"denoise_step_idx": None}, False, 0.3).sum(1),
        "xdit": lambda q, k, v: function(q, k, v, 0.0, False, {"valid_kv_len": 50})[0],
        "comfyui": lambda q, k, v: function(q, k, v, HEADS, skip_reshape=True),
        "sageattention": lambda q, k, v: function(q, k, v),
        "sageattention, NHD": lambda q, k, v: function(q, k, v, tensor_layout="NHD", return_lse=True)[1],
    }[way]
    torch.compiler.reset()
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), call(q, k, v))
    assert function.calls.compiled


@pytest.mark.parametrize("way", ["vllm_omni", "xdit", "comfyui", "sageattention"])
def test_gradients_are_recorded(way):
    q, k, v = (x.requires_grad_() for x in arrays())
    found = torch.autograd.grad(WAYS[way](q, k, v).square().sum(), (q, k, v))
    expected = torch.autograd.grad(kdecore.attention(q, k, v, **PLAIN).square().sum(), (q, k, v))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("way", CAUSAL)
@pytest.mark.parametrize("options", [ESTIMATED, {}], ids=["estimated", "short"])
def test_a_diagonal_holds_or_is_refused(way, options):
    q, k, v = arrays()
    with pytest.raises(kdecore.OptionError, match=r"diagonal must be None where the first query .*, got 3"):
        WAYS[way](q, k, v, options={**options, "diagonal": 3}, causal=True)
    found = WAYS[way](q, k, v, options={**options, "diagonal": 0}, causal=True)
    assert torch.equal(found, WAYS[way](q, k, v, options=options, causal=True))


@pytest.mark.parametrize("options", [ESTIMATED, {}], ids=["estimated", "short"])
@pytest.mark.parametrize("enable_gqa", [False, True])
def test_heads_that_do_not_go_together_are_refused(options, enable_gqa):
    q, k, v = arrays(2 if not enable_gqa else HEADS)
    k = k if not enable_gqa else k[:1].expand(3, -1, -1, -1)
    which = "before heads, n and d" if enable_gqa else "before n and d, enable_gqa=False,"
    shapes = r"\(2, 4, 60, 8\), \(3, 4, 60, 8\)" if enable_gqa else r"\(2, 4, 60, 8\), \(2, 2, 60, 8\)"
    with pytest.raises(kdecore.ShapeError, match=f"^query, key and value must have dimensions {which} .* got {shapes}"):
        hosts.comfyui(**options)(q, k, v, HEADS, skip_reshape=True, enable_gqa=enable_gqa)


@pytest.mark.parametrize("options", [ESTIMATED, {}], ids=["estimated", "short"])
@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"budgett": 3}, r"budgett must be None, got int.* did you mean 'budget'"),
        ({"budget": 0}, "budget must be an integer of at least 1, got 0"),
    ],
)
def test_one_graph_says_what_it_refuses(params, said, options):
    q, k, v = turned(*arrays())
    kernel = hosts.vllm_omni(**options)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=said):
        torch.compile(lambda q: kernel(q, k, v, params, False, None), fullgraph=True, backend="aot_eager")(q)


# vLLM-Omni alone


def test_the_installed_kernel_says_what_it_can_do():
    layer = SparseAttention({"backend": "KDEcore", "rtol": 0.05})
    assert layer.callable is hosts.VLLM_OMNI
    assert layer.capabilities == {"supports_attention_mask": True, "supports_full_attn_spans": False}
    with pytest.raises(ValueError, match="full_attn_spans"):
        layer.forward(*turned(*arrays()), full_attn_spans=[[(0, 3)]])


def test_options_of_the_attention_config_replace_those_of_a_kernel():
    q, k, v = arrays()
    kernel = hosts.vllm_omni(method="sortlsh", budget=9, seed=4)
    out = kernel(*turned(q, k, v), {"budget": 30, "min_keys": 1, **PER_FORWARD}, is_causal=False, softmax_scale=0.3)
    expected = kdecore.attention(q, k, v, method="sortlsh", budget=30, seed=4, scale=0.3)
    assert torch.equal(out.transpose(1, 2), expected)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"budget": 0}, "budget must be an integer of at least 1, got 0"),
        ({"min_keys": 0.5}, "min_keys must be an integer"),
        ({"causal": True}, "causal must be None, got bool"),
        ({"topk": 0.3}, "topk must be None, got float"),
        ({"return_lse": True}, "return_lse must be None, got bool"),
    ],
)
def test_wrong_options_of_an_attention_config_are_refused(params, said):
    with pytest.raises(kdecore.OptionError, match=f"^{said}"):
        vllm_omni(*arrays(), options=params)


def test_a_tolerance_takes_the_place_of_a_budget_and_a_budget_of_one():
    q = torch.randn(1, 1500, 2, 8)
    for given, own in (({"budget": 64}, {"rtol": 0.3}), ({"rtol": 0.3}, {"budget": 64})):
        kernel = hosts.vllm_omni(method="treecode", **given)
        found = kernel(q, q, q, own, False, None)
        expected = kdecore.attention(*(q.transpose(1, 2),) * 3, method="treecode", **own)
        torch.testing.assert_close(found.transpose(1, 2), expected)


def test_a_misspelt_option_of_an_attention_config_gets_a_hint():
    q = torch.randn(1, 40, 2, 8)
    with pytest.raises(kdecore.OptionError, match=r"budgett must be None.* did you mean 'budget'"):
        hosts.VLLM_OMNI(q, q, q, {"budgett": 64}, False, None)
    with pytest.raises(kdecore.OptionError, match="params must be a mapping of options, got NoneType"):
        hosts.VLLM_OMNI(q, q, q, None, False, None)


def test_a_mask_of_keys_that_is_added_is_not_taken_for_one_of_what_is_seen():
    q = torch.randn(1, 40, 2, 8)
    with pytest.raises(kdecore.DTypeError, match=r"attn_mask \(batch, n_k\) must be boolean"):
        hosts.VLLM_OMNI(q, q, q, {"attn_mask": torch.zeros(1, 40)}, False, None)


def test_no_more_keys_of_xdit_are_valid_than_there_are():
    q = torch.randn(1, 2, 40, 8)
    with pytest.raises(kdecore.OptionError, match="valid_kv_len must be at most the number of keys, 40, got 41"):
        hosts.xdit()(q, q, q, 0.0, False, {"valid_kv_len": 41})


def test_values_of_comfyui_may_be_wider_than_grouped_keys():
    q, k, v = torch.randn(1, 50, 4 * 16), torch.randn(1, 50, 2 * 16), torch.randn(1, 50, 2 * 32)
    found = hosts.comfyui()(q, k, v, 4, enable_gqa=True)
    heads = (x.unflatten(-1, (number, -1)).transpose(1, 2) for x, number in ((q, 4), (k, 2), (v, 2)))
    expected = functional.scaled_dot_product_attention(*heads, enable_gqa=True)
    torch.testing.assert_close(found, expected.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("options", [ESTIMATED, {}], ids=["estimated", "short"])
def test_masks_of_vllm_omni_that_can_not_be_kept_are_refused(options):
    with pytest.raises(kdecore.OptionError, match=r"^attn_mask must be None with is_causal=True"):
        vllm_omni(*arrays(), options=options, causal=True, attn_mask=padding())
    with pytest.raises(kdecore.ShapeError, match=r"^attn_mask must be \(batch, n_k\), .* got shape \(2, 1, 60\)"):
        vllm_omni(*arrays(), options=options, attn_mask=padding()[:, None])


# xDiT alone


@pytest.mark.parametrize("options", [{**ESTIMATED, "budget": N}, {}], ids=["estimated", "short"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_rings_of_xdit_merge_what_is_returned(options, parts):
    q, k, v = arrays()
    out, lse = ring(hosts.xdit(return_lse=True, **options), q, k, v, parts)
    torch.testing.assert_close(out, functional.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, torch.logsumexp(q @ k.mT / D**0.5, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [ESTIMATED, {}], ids=["estimated", "short"])
@pytest.mark.parametrize("packed", [False, True])
def test_padding_of_xdit_is_cut_off(options, packed):
    """Whether xDiT did it itself or not: it doesn't where packed indices say the same."""
    q, k, v = arrays()
    indices = {"indices_k": torch.arange(41), "cu_seqlens_k": torch.tensor([0, 41]), "max_seqlen_k": 41} if packed else {}
    found = xdit(q, k, v, options=options, valid_kv_len=41, **indices)
    plain = {name: x for name, x in options.items() if name != "min_keys"}
    torch.testing.assert_close(found, kdecore.attention(q, k[:, :, :41], v[:, :, :41], **plain), rtol=1e-4, atol=1e-5)
    both = xdit(q, k, v, options=options, mask=torch.ones(BATCH, 1, 1, N, dtype=torch.bool), valid_kv_len=41, **indices)
    torch.testing.assert_close(both, found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [ESTIMATED, {}], ids=["estimated", "short"])
def test_packed_samples_of_xdit_are_refused(options):
    with pytest.raises(kdecore.OptionError, match=r"^indices_k must be None, got Tensor: of attention_kwargs"):
        xdit(*arrays(), options=options, indices_k=torch.arange(41))
    with pytest.raises(kdecore.OptionError, match=r"^valid_kv_len must be an integer of at least 1, got 0"):
        hosts.xdit(**options)(*arrays(), 0.0, False, {"valid_kv_len": 0})


def test_dropout_of_xdit_is_pytorchs_or_refused():
    q, k, v = arrays()
    torch.manual_seed(0)
    out, _ = xdit_calls(hosts.xdit(**ESTIMATED), q, k, v, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(out, functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    for options in ({"return_lse": True}, {"window": 5}):
        with pytest.raises(kdecore.OptionError, match=r"^dropout_p must be 0"):
            xdit_calls(hosts.xdit(**options), q, k, v, dropout_p=0.5)
    with pytest.raises(kdecore.OptionError, match=r"^return_lse must be True or False"):
        hosts.xdit(return_lse="yes")


# ComfyUI alone


def test_what_an_override_leaves_is_the_hosts_own():
    """Called as the override was, whatever that returns."""
    calls = []

    def own(*args, **kwargs):
        calls.append((args, kwargs))
        return "the host's"

    q, k, v = (x.flatten(2) for x in turned(*arrays()))
    kwargs = {"transformer_options": {}, "_inside_attn_wrapper": True, "attn_precision": None}
    assert hosts.comfyui_override()(own, q, k, v, HEADS, None, **kwargs) == "the host's"
    ((args, given),) = calls
    assert args == (q, k, v, HEADS, None)
    assert given == kwargs
    found = hosts.comfyui_override(**ESTIMATED)(own, q, k, v, HEADS, None, **kwargs)
    assert isinstance(found, Tensor)
    assert len(calls) == 1
    # What it may know, and kdecore doesn't.
    kwargs |= {"temperature": 2.0, "attn_precision": torch.float64}
    assert hosts.comfyui_override()(own, q, k, v, HEADS, None, **kwargs) == "the host's"
    with pytest.raises(kdecore.OptionError, match="temperature must be None"):
        hosts.comfyui_override(**ESTIMATED)(own, q, k, v, HEADS, None, **kwargs)


@pytest.mark.parametrize("way", ["comfyui", "comfyui_override"])
def test_calls_of_comfyui_that_must_not_be_coarse_are_exact(way):
    q, k, v = arrays()
    expected = functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(WAYS[way](q, k, v, low_precision_attention=False), expected)
    windowed = WAYS[way](q, k, v, options={**ESTIMATED, "window": 9}, low_precision_attention=False)
    exact = kdecore.attention(q, k, v, method="exact", window=9)
    torch.testing.assert_close(windowed, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [ESTIMATED, {}], ids=["estimated", "short"])
def test_masks_of_comfyui_have_two_to_four_dimensions(options):
    q, k, v = arrays()
    mask = torch.rand(BATCH, HEADS, N, N, generator=torch.manual_seed(0)) < 0.7
    plain = {name: x for name, x in options.items() if name != "min_keys"}
    for given, whole in ((mask[0, 0], mask[:1, :1]), (mask[:, 0], mask[:, :1]), (mask, mask)):
        found = comfyui(q, k, v, options=options, mask=given)
        expected = kdecore.attention(q, k, v, mask=whole, **plain)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


COMFYUI_ERRORS = {
    "precision": ({"attn_precision": torch.float64}, kdecore.OptionError, "attn_precision must be None or at most"),
    "heads": ({"heads": 5}, kdecore.ShapeError, r"q must be \(batch, n, heads · d\) with 5 heads, got shape \(2, 60, 32\)"),
    "no heads": ({"heads": 0}, kdecore.OptionError, "heads must be an integer of at least 1, got 0"),
    "other heads": (
        {"heads": 3, "skip_reshape": True},
        kdecore.ShapeError,
        r"q must be \(batch, 3, n, d\) with skip_reshape=True, got shape \(2, 4, 60, 8\)",
    ),
}


@pytest.mark.parametrize("options", [ESTIMATED, {}], ids=["estimated", "short"])
@pytest.mark.parametrize(("call", "error", "said"), COMFYUI_ERRORS.values(), ids=COMFYUI_ERRORS)
def test_calls_of_comfyui_that_can_not_be_kept_are_refused(options, call, error, said):
    rows = arrays() if "skip_reshape" in call else [x.flatten(2) for x in turned(*arrays())]
    with pytest.raises(error, match=f"^{said}"):
        hosts.comfyui(**options)(*rows, **{"heads": HEADS, **call})


# SageAttention alone


@pytest.mark.parametrize("options", [ESTIMATED, {}], ids=["estimated", "short"])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("heads_k", [HEADS, 2])
def test_the_log_sum_exp_is_by_heads_whatever_the_layout(options, layout, heads_k):
    q, k, v = arrays(heads_k)
    rows = (q, k, v) if layout == "HND" else turned(q, k, v)
    function = hosts.sageattention(**options)
    out, lse = function(*rows, tensor_layout=layout, return_lse=True)
    plain = {name: x for name, x in options.items() if name != "min_keys"}
    expected, expected_lse = kdecore.attention(q, k, v, return_lse=True, **plain)
    assert torch.equal(out if layout == "HND" else out.transpose(1, 2), expected)
    assert torch.equal(lse, expected_lse)
    assert lse.dtype == torch.float32
    assert function.calls.counts == {Count("", "treecode" if options else "exact"): 1}


def test_hosts_see_that_masks_are_taken():
    """ComfyUI looks for the argument."""
    assert list(inspect.signature(hosts.sageattention()).parameters) == [
        *("q", "k", "v", "tensor_layout", "is_causal", "sm_scale", "return_lse", "attn_mask", "kwargs")
    ]


def test_layouts_that_there_are_not_are_refused():
    function = hosts.sageattention()
    with pytest.raises(kdecore.OptionError, match=r"^tensor_layout must be one of HND, NHD, got 'BHND'"):
        function(*arrays(), tensor_layout="BHND")
    with pytest.raises(kdecore.OptionError, match=r"^return_lse must be True or False, got 1"):
        function(*arrays(), return_lse=1)


@pytest.mark.parametrize("name", hosts.QUANTISED)
def test_how_sageattention_rounds_changes_nothing(name):
    q, k, v = arrays()
    assert torch.equal(hosts.sageattention(**ESTIMATED)(q, k, v, **{name: "fp32"}), kdecore.attention(q, k, v, **PLAIN))


@pytest.mark.parametrize("name", FACTORIES)
def test_what_hosts_are_given_is_documented(name):
    function = getattr(hosts, name)
    doc = inspect.getdoc(function)
    for section in ("Parameters", "Returns", "Raises"):
        assert f"\n{section}\n{'-' * len(section)}\n" in doc
    assert name in hosts.__all__


DOCS = Path(__file__).parent.parent / "docs"


def test_every_row_of_the_table_names_tests_that_are_there():
    text = (DOCS / "integrations.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.split("\n## ")[0].splitlines() if line.startswith("|")][2:]
    assert len(rows) >= len(FACTORIES)
    for *_, tests in rows:
        (path,) = re.findall(r"\]\(([^)]+)\)", tests)
        assert (DOCS / path).is_file()


def test_code_in_the_documentation_makes_what_hosts_call():
    """Of those that are here; hosts themselves aren't installed, and what they are told is left out."""
    text = (DOCS / "integrations.md").read_text(encoding="utf-8")
    for name in FACTORIES:
        calls = re.findall(rf"\b{name}\(([^()]*)\)", text)
        assert calls
        for arguments in calls:
            assert callable(eval(f"hosts.{name}({arguments})", {"hosts": hosts}))
