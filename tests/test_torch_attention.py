"""Attention as PyTorch's own function has it: masks, alignment, heads, and what surrounds a call."""

import inspect

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils.flop_counter import FlopCounterMode

import kdecore
from kdecore import KeyIndex
from kdecore.arrays.backend import backend_named
from kdecore_adapters.torch_adapter import collect_reports, left_to_torch, scaled_dot_product_attention
from kdecore_adapters.torch_operator import OPTIONS, checked, decoded, encoded

ESTIMATED = {"method": "sortlsh", "budget": 20, "seed": 3}


def tensors(*shapes, dtype=torch.float64, grad=False):
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.standard_normal(shape)).to(dtype).requires_grad_(grad) for shape in shapes]


def same(n_q=30, n_k=30, heads_k=4, **more):
    return tensors((2, 4, n_q, 6), (2, heads_k, n_k, 6), (2, heads_k, n_k, 6), **more)


MASKS = {
    "boolean": lambda: torch.rand(30, 30, generator=torch.manual_seed(0)) < 0.7,
    "added": lambda: torch.randn(2, 1, 30, 30, dtype=torch.float64, generator=torch.manual_seed(0)),
    "padding": lambda: (torch.arange(30) < torch.tensor([[20], [30]]))[:, None, None, :],
    "lower right": lambda: causal_lower_right(30, 30),
    "upper left": lambda: causal_upper_left(30, 30),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("method", ["sortlsh", "treecode"])
def test_masks_mean_what_they_mean_to_pytorch(mask, method):
    q, k, v = same()
    found = scaled_dot_product_attention(q, k, v, mask(), method=method, budget=30)
    expected = functional.scaled_dot_product_attention(q, k, v, mask())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Lower right causal bias:UserWarning")  # of PyTorch, at making one
@pytest.mark.parametrize(("n_q", "n_k"), [(30, 30), (12, 30), (30, 12), (1, 30)])
@pytest.mark.parametrize("mask", ["is_causal", "lower right", "upper left"])
def test_causal_is_aligned_as_pytorch_aligns_it(n_q, n_k, mask):
    arrays = same(n_q, n_k)
    if mask == "is_causal":
        call = {"is_causal": True}
        expected = functional.scaled_dot_product_attention(*arrays, **call)
    else:
        corner = {"lower right": causal_lower_right, "upper left": causal_upper_left}[mask]
        call = {"attn_mask": corner(n_q, n_k)}
        seen = torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q if mask == "lower right" else 0)
        expected = functional.scaled_dot_product_attention(*arrays, attn_mask=seen)
    found = scaled_dot_product_attention(*arrays, method="treecode", budget=30, **call)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


SHAPES = {
    "one head": [(30, 6), (20, 6), (20, 5)],
    "no heads": [(2, 30, 6), (2, 20, 6), (2, 20, 5)],
    "one batch of keys": [(2, 4, 30, 6), (1, 4, 20, 6), (1, 4, 20, 5)],
    "keys for all heads": [(2, 4, 30, 6), (2, 1, 20, 6), (2, 1, 20, 5)],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_leading_dimensions_are_broadcast(shapes):
    arrays = tensors(*shapes)
    found = scaled_dot_product_attention(*arrays, method="sortlsh", budget=20, scale=0.3)
    torch.testing.assert_close(found, functional.scaled_dot_product_attention(*arrays, scale=0.3), rtol=1e-9, atol=1e-9)


def test_dimensions_that_can_not_be_broadcast_are_refused():
    q, k = tensors((2, 4, 40, 8), (2, 2, 40, 8))
    options = {"method": "treecode", "budget": 9}
    with pytest.raises(kdecore.ShapeError, match=r"enable_gqa=False, that can be broadcast, got \(2, 4, 40, 8\), \(2, 2,"):
        scaled_dot_product_attention(q, k, k, **options)
    with pytest.raises(
        kdecore.ShapeError, match=r"before heads, n and d that can be broadcast, got \(2, 4, 40, 8\), \(3, 4,"
    ):
        scaled_dot_product_attention(q, *tensors(*((3, 4, 40, 8),) * 2), enable_gqa=True, **options)


def test_grouped_heads_are_those_of_pytorch():
    arrays = tensors((2, 4, 30, 6), (1, 2, 20, 6), (1, 2, 20, 5))
    found = scaled_dot_product_attention(*arrays, method="sortlsh", budget=20, enable_gqa=True)
    expected = functional.scaled_dot_product_attention(*(x.expand(2, *x.shape[1:]) for x in arrays), enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(kdecore.ShapeError, match="enable_gqa=False"):
        scaled_dot_product_attention(*arrays, method="sortlsh", budget=20)


def test_options_are_those_of_the_function():
    q, k, v = same(40, 40)
    options = {"method": kdecore.SortLSH(block_size=5, num_samples=7, num_hashes=3), "seed": 5}
    found = scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    torch.testing.assert_close(found, kdecore.attention(q, k, v, causal=True, **options), rtol=0, atol=0)
    lengths = torch.tensor([40, 25])
    found = scaled_dot_product_attention(q, k, v, key_lengths=lengths, **ESTIMATED)
    torch.testing.assert_close(found, kdecore.attention(q, k, v, key_lengths=lengths, **ESTIMATED), rtol=0, atol=0)


@pytest.mark.parametrize(
    "method",
    [
        "treecode",
        kdecore.Treecode(far_field="sample"),
        kdecore.KDEformer(eps=0.5),
        kdecore.KDEformer(eps=np.float32(0.5)),
        kdecore.Exact(),
    ],
)
def test_options_survive_being_text(method):
    assert decoded(encoded({"method": method, "budget": 7})) == {"method": method, "budget": 7}


def test_every_option_of_the_function_is_one_or_has_a_place_of_its_own():
    own = {"q", "k", "v", "mask", "causal", "scale", "seed", "return_lse", "return_report"}
    assert {*OPTIONS, *own} == {*inspect.signature(kdecore.attention).parameters, "cuda_graph"}


WRONG = {
    "mask and causal": {"attn_mask": torch.ones(30, 30, dtype=torch.bool), "is_causal": True},
    "dropout": {"dropout_p": 0.1},
    "unknown option": {"bugdet": 3},
    "negative seed": {"seed": -1},
    "large seed": {"seed": 2**63},
    "unknown method": {"method": "magic"},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_errors_name_the_argument(wrong):
    name = {"bugdet": "bugdet", "attn_mask": "attn_mask"}.get(next(iter(wrong)), next(iter(wrong)))
    with pytest.raises(kdecore.OptionError, match=name):
        scaled_dot_product_attention(*same(), **{**ESTIMATED, **wrong})


NO_TENSORS = {
    "list": (lambda x: x.tolist(), "must be a PyTorch tensor, got list"),
    "array": (lambda x: x.numpy(), "must be a PyTorch tensor, got ndarray"),
    "nothing": (lambda x: None, "must be a PyTorch tensor, got NoneType"),
    "sparse": (lambda x: x.to_sparse(), "must be a plain array, got a tensor of layout torch.sparse_coo; pass .*to_dense"),
}


@pytest.mark.parametrize("options", [ESTIMATED, {}], ids=["estimated", "short"])
@pytest.mark.parametrize(("given", "said"), NO_TENSORS.values(), ids=NO_TENSORS)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_is_no_tensor_is_refused_by_its_name(name, given, said, options):
    arrays = dict(zip(("query", "key", "value"), same(), strict=True))
    with pytest.raises(kdecore.DTypeError, match=f"^{name} {said}"):
        scaled_dot_product_attention(**{**arrays, name: given(arrays[name])}, **options)


@pytest.mark.parametrize("options", [ESTIMATED, {}], ids=["estimated", "short"])
@pytest.mark.parametrize("given", [case for case in NO_TENSORS if case != "nothing"])
def test_what_is_no_mask_is_refused_by_its_name(given, options):
    convert, said = NO_TENSORS[given]
    mask = convert(torch.ones(30, 30, dtype=torch.bool))
    with pytest.raises(kdecore.DTypeError, match=f"^attn_mask {said}"):
        scaled_dot_product_attention(*same(), mask, **options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("options", [ESTIMATED, {}], ids=["estimated", "short"])
@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask"])
def test_a_nested_tensor_beside_plain_ones_is_refused_by_its_name(name, options, layout):
    arrays = dict(zip(("query", "key", "value"), same(), strict=True))
    nested = torch.nested.nested_tensor([torch.ones(n, 4, 6, dtype=torch.float64) for n in (30, 20)], layout=layout)
    with pytest.raises(kdecore.DTypeError, match=f"^{name} must be a plain array, got a nested tensor; pass .*key_lengths="):
        scaled_dot_product_attention(**{**arrays, name: nested}, **options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("option", [{"window": 5}, {"check_finite": True}, {"kernels": "array-api"}], ids=str)
def test_nested_tensors_are_refused_where_a_call_can_not_be_left_to_pytorch(name, option):
    arrays = dict(zip(("query", "key", "value"), same(), strict=True))
    nested = torch.nested.nested_tensor(list(arrays[name]))
    with pytest.raises(kdecore.DTypeError, match=f"^{name} must be a plain array, got a nested tensor; pass .*key_lengths="):
        scaled_dot_product_attention(**{**arrays, name: nested}, **option)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # of PyTorch's own forward mode
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("options", [ESTIMATED, {"method": "exact"}, {"window": 5}], ids=str)
def test_forward_mode_is_refused_where_it_would_be_lost(place, options):
    """An operator passes nothing on: results would have no tangents, or zeros."""
    arrays, forward = [*same(), MASKS["added"]()], torch.autograd.forward_ad

    def call(x):
        return scaled_dot_product_attention(*arrays[:place], x, *arrays[place + 1 :], **options)

    step = torch.ones_like(arrays[place])
    said = "query, key, value and attn_mask must record no forward-mode derivatives"
    with pytest.raises(kdecore.OptionError, match=said):
        torch.func.jvp(call, (arrays[place],), (step,))
    for how in (lambda call: call, lambda call: torch.compile(call, backend="aot_eager")):
        torch.compiler.reset()
        with forward.dual_level(), pytest.raises(kdecore.OptionError, match=said):
            how(call)(forward.make_dual(arrays[place], step))


@pytest.mark.parametrize(
    "wrong", [{"budget": 0}, {"method": "magic"}, {"rtol": 0.1, "budget": 3}, {"seed": -1}, {"bugdet": 3}]
)
def test_options_are_tried_before_they_are_kept(wrong):
    with pytest.raises(kdecore.OptionError):
        checked(wrong)


def test_options_that_depend_on_arrays_are_kept():
    for options in ({"max_memory": 1}, {"key_lengths": [3, 4]}, {"kernels": "numba-cpu", "threads": 1}):
        assert checked(options) == options


# Layouts, and log-sum-exp


def exact_lse(q, k, scale=None, mask=None):
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.logsumexp(logits if mask is None else logits.masked_fill(~mask, -torch.inf), -1)


LSE_CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": MASKS["boolean"]()},
    "scale": {"scale": 0.3},
    "window": {"window": 5, "diagonal": 0},
    "rtol": {"rtol": 0.1},
    "budget": {"budget": 9},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("call", LSE_CALLS.values(), ids=LSE_CALLS)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_what_would_be_left_to_pytorch_has_an_exact_log_sum_exp(call, layout):
    q, k, v = same(heads_k=2 if "enable_gqa" in call else 4)
    place = torch.arange(30)
    seen = {
        "is_causal": place <= place[:, None],
        "attn_mask": call.get("attn_mask"),
        "window": (place - place[:, None]).abs() < 5,
    }
    mask = next((seen[name] for name in seen if name in call), None)
    plain = {name: x for name, x in call.items() if name in ("scale", "enable_gqa")}
    expected = functional.scaled_dot_product_attention(q, k, v, mask, **plain)
    of_heads = exact_lse(q, k.repeat_interleave(4 // k.shape[1], 1), call.get("scale"), mask)
    if layout == "bshd":
        q, k, v, expected, of_heads = (x.transpose(1, 2) for x in (q, k, v, expected, of_heads))
    found = scaled_dot_product_attention(q, k, v, layout=layout, return_lse=True, **call)
    torch.testing.assert_close(found, (expected, of_heads), rtol=1e-9, atol=1e-9)
    alone = scaled_dot_product_attention(q, k, v, layout=layout, **call)
    torch.testing.assert_close(alone, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [ESTIMATED, {"method": "treecode", "budget": 20}, {"key_lengths": [50, 0], **ESTIMATED}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_log_sum_exp_is_that_of_the_function(options, dtype):
    q, k, v = same(50, 50, heads_k=2, dtype=dtype)
    out, lse = kdecore.attention(q, k, v, return_lse=True, **options)
    found = scaled_dot_product_attention(q, k, v, enable_gqa=True, return_lse=True, **options)
    assert all(map(torch.equal, found, (out, lse)))
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rows = (x.transpose(1, 2) for x in (q, k, v))
    found = scaled_dot_product_attention(*rows, enable_gqa=True, layout="bshd", return_lse=True, **options)
    assert all(map(torch.equal, found, (out.transpose(1, 2), lse.transpose(1, 2))))


@pytest.mark.parametrize("options", [ESTIMATED, {}], ids=["estimated", "short"])
def test_a_result_of_another_layout_is_a_view(options):
    q, k, v = (x.transpose(1, 2).contiguous() for x in same())
    out = scaled_dot_product_attention(q, k, v, layout="bshd", **options)
    assert out.shape == q.shape
    assert out._base is not None or out.is_contiguous()


@pytest.mark.parametrize("options", [ESTIMATED, {}], ids=["estimated", "short"])
def test_parts_of_the_keys_are_merged_by_their_log_sum_exps(options):
    """As in ring attention; budgets are full."""
    q, k, v = same(40, 40)
    options = {**options, **({"budget": 40} if options else {})}
    parts = [scaled_dot_product_attention(q, k[..., s, :], v[..., s, :], return_lse=True, **options) for s in HALVES]
    lse = torch.stack([lse for _, lse in parts])
    out = (torch.stack([out for out, _ in parts]) * lse.softmax(0)[..., None]).sum(0)
    torch.testing.assert_close(out, functional.scaled_dot_product_attention(q, k, v), rtol=1e-9, atol=1e-9)


HALVES = slice(15), slice(15, None)

LAYOUT_ERRORS = {
    "layout": ({"layout": "nhd"}, kdecore.OptionError, "layout must be one of bhsd, bshd, got 'nhd'"),
    "no string": ({"layout": None}, kdecore.OptionError, "layout must be one of bhsd, bshd, got None"),
    "return_lse": ({"return_lse": 1}, kdecore.OptionError, "return_lse must be True or False, got 1"),
    "dropout": ({"return_lse": True, "dropout_p": 0.5}, kdecore.OptionError, "dropout_p must be 0 where .*, got 0.5"),
}


@pytest.mark.parametrize("options", [ESTIMATED, {}], ids=["estimated", "short"])
@pytest.mark.parametrize(("call", "error", "said"), LAYOUT_ERRORS.values(), ids=LAYOUT_ERRORS)
def test_layouts_and_log_sum_exps_that_there_are_not_are_refused(call, error, said, options):
    with pytest.raises(error, match=f"^{said}"):
        scaled_dot_product_attention(*same(), **call, **options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_tensors_that_a_layout_does_not_fit_are_refused():
    with pytest.raises(kdecore.ShapeError, match=r'^key must be \(…, n, heads, d\) with layout="bshd", got shape \(30, 6\)'):
        scaled_dot_product_attention(*tensors((30, 2, 6), (30, 6), (30, 2, 6)), layout="bshd")
    with pytest.raises(kdecore.DTypeError, match=r"^value must be a PyTorch tensor, got NoneType"):
        scaled_dot_product_attention(*tensors((30, 2, 6), (30, 2, 6)), None, layout="bshd")
    nested = torch.nested.nested_tensor([torch.ones(n, 4, 6) for n in (30, 20)], layout=torch.jagged)
    assert scaled_dot_product_attention(nested, nested, nested, layout="bshd").shape == nested.shape
    with pytest.raises(kdecore.DTypeError, match=r"^query must be a plain array, got a nested tensor"):
        scaled_dot_product_attention(nested, nested, nested, layout="bshd", return_lse=True)


@pytest.mark.parametrize("options", [ESTIMATED, {}], ids=["estimated", "short"])
def test_layouts_and_log_sum_exps_make_one_graph(options):
    arrays = [x.detach().transpose(1, 2).requires_grad_() for x in same(50, 50)]

    def attend(q, k, v):
        return scaled_dot_product_attention(q * 1.0, k, v, layout="bshd", return_lse=True, **options)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*arrays), attend(*arrays)
    assert all(map(torch.equal, found, expected))
    slopes = (torch.autograd.grad(out.square().sum() + lse.sin().sum(), arrays) for out, lse in (found, expected))
    for x, y in zip(*slopes, strict=True):
        assert torch.equal(x, y)

    class Both(torch.nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v)

    exported = torch.export.export(Both(), tuple(x.detach() for x in arrays)).module()
    assert all(map(torch.equal, exported(*arrays), expected))


@pytest.mark.parametrize("grad", ["both", "out", "lse"])
def test_log_sum_exps_are_mapped_over_and_their_gradients(grad):
    q, k, v = tensors((3, 2, 30, 6), (2, 20, 6), (3, 2, 20, 5), grad=True)

    def slopes(attend):
        out, lse = torch.func.vmap(attend, in_dims=(0, None, 0))(q, k, v)
        total = {"both": out.square().sum() + lse.sin().sum(), "out": out.square().sum(), "lse": lse.sin().sum()}[grad]
        return torch.autograd.grad(total, (q, k, v), allow_unused=True, materialize_grads=True)

    found = slopes(lambda *x: scaled_dot_product_attention(*x, method="treecode", budget=20, return_lse=True))
    expected = slopes(lambda q, k, v: ((q @ k.mT / 6**0.5).softmax(-1) @ v, exact_lse(q, k)))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_autocast_leaves_log_sum_exps_in_float32():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = scaled_dot_product_attention(*same(dtype=torch.float32), return_lse=True, **ESTIMATED)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


# What is left to PyTorch


def test_short_calls_are_pytorchs_own():
    arrays = same(dtype=torch.float32)
    torch.manual_seed(0)
    found = scaled_dot_product_attention(*arrays, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(found, functional.scaled_dot_product_attention(*arrays, dropout_p=0.5))


def empty(*shape, **more):
    return torch.empty(shape, device="meta", **more)


def reason(n_q, n_k, options=None, dtype=torch.float32, **more):
    q, k = empty(1, 4, n_q, 64, dtype=dtype), empty(1, 4, n_k, 64, dtype=dtype)
    return left_to_torch(q, k, k, options or {"method": "treecode"}, **more)


def test_reasons_for_leaving_calls_to_pytorch():
    assert reason(50_000, 50_000) == ""
    assert reason(50, 50) == ""
    assert reason(50, 50, min_keys=51) == "fewer than 51 keys"
    assert reason(50, 500, min_keys=51, min_queries=51) == "fewer than 51 queries"
    assert reason(50, 50, dtype=torch.complex64) == "dtype complex64"
    assert "meta" in reason(50_000, 50_000, {"method": "auto"})
    nested = torch.nested.nested_tensor([torch.ones(2, 4, 8), torch.ones(2, 5, 8)], layout=torch.jagged)
    assert left_to_torch(nested, nested, nested, {}) == "nested tensors"


@pytest.mark.parametrize(("n_q", "n_k", "estimated"), [(100, 100, False), (16_384, 16_384, True), (1, 16_384, False)])
@pytest.mark.parametrize("options", [{}, {"method": "auto", "budget": 256}, {"rtol": 0.1}])
def test_auto_estimates_where_that_is_expected_to_be_faster(n_q, n_k, estimated, options):
    q, k = (torch.empty(()).expand(1, 4, n, 64) for n in (n_q, n_k))
    assert (left_to_torch(q, k, k, options) == "") == estimated


# What surrounds a call


def test_torch_compile_makes_one_graph():
    arrays = same(50, 50, grad=True)

    def double(q, k, v, seed):
        return 2 * scaled_dot_product_attention(q * 1.0, k, v, is_causal=True, **{**ESTIMATED, "seed": seed})

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    for seed in (1, 2, 3):
        found, expected = compiled(*arrays, seed), double(*arrays, seed)
        assert torch.equal(found, expected)
        for x, y in zip(*(torch.autograd.grad(out.sum(), arrays) for out in (found, expected)), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("options", [ESTIMATED, {}], ids=["estimated", "short"])
def test_lengths_in_a_tensor_make_one_graph(options):
    arrays = same(50, 50, grad=True)

    def attend(q, k, v, lengths):
        return scaled_dot_product_attention(q * 1.0, k, v, key_lengths=lengths, **options)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for lengths in (torch.tensor([50, 21]), torch.tensor([9, 1])):
        found, expected = compiled(*arrays, lengths), attend(*arrays, lengths)
        assert torch.equal(found, expected)
        seen = (torch.arange(50) < lengths[:, None])[:, None, None, :]
        if not options:
            torch.testing.assert_close(expected, functional.scaled_dot_product_attention(*arrays, seen))
        for x, y in zip(*(torch.autograd.grad(out.sum(), arrays) for out in (found, expected)), strict=True):
            assert torch.equal(x, y)


def test_lengths_are_mapped_over():
    q, k, v = (x[None].expand(3, *x.shape) for x in same(30, 30))
    lengths = torch.tensor([[30, 9], [4, 30], [1, 2]])
    call = lambda *x: scaled_dot_product_attention(*x[:3], key_lengths=x[3], **ESTIMATED)  # noqa: E731
    for dims, some in (((0, 0, 0, 0), lengths), ((0, 0, 0, None), lengths[0])):
        found = torch.func.vmap(call, in_dims=dims)(q, k, v, some)
        expected = [call(q[i], k[i], v[i], some[i] if dims[3] == 0 else some) for i in range(3)]
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() < 0.9 * other.norm()
            seen = some[0] if dims[3] == 0 else some
        hidden = v.clone()
        hidden[0, 0, :, int(seen[0]) :] = 1e6
        again = torch.func.vmap(call, in_dims=dims)(q, k, hidden, some)
        assert torch.equal(again[0, 0], found[0, 0])


def test_lengths_in_a_list_are_those_in_a_tensor():
    arrays = same()
    listed, lengths = (
        lambda *x, given=given: scaled_dot_product_attention(*x, key_lengths=given, **ESTIMATED)
        for given in ([30, 9], torch.tensor([30, 9]))
    )
    expected = lengths(*arrays)
    assert torch.equal(listed(*arrays), expected)
    assert torch.equal(torch.compile(listed, fullgraph=True, backend="aot_eager")(*arrays), expected)
    mapped = [x[None].expand(3, *x.shape) for x in arrays]
    assert torch.equal(torch.func.vmap(listed)(*mapped), torch.func.vmap(lengths)(*mapped))
    for wrong in ([30, 9.5], [30, 31], [30, 9, 3]):
        with pytest.raises(kdecore.KdecoreError, match=r"^key_lengths must"):
            scaled_dot_product_attention(*arrays, key_lengths=wrong, **ESTIMATED)


CHANGED = {
    "budget": (10, 20, 30, 25),
    "window": (3, 5, 9, 20),
    "diagonal": (0, 1, 7, 30),
    "certificate": (0.0, 1e6, 0.0, 1e5),
    "rtol": (0.5, 0.1, 0.25),
    "scale": (1.0, 0.5, 2.0),
}


@pytest.mark.parametrize("option", CHANGED)
def test_a_compiled_call_takes_options_that_changed(option):
    """From its second value on a number is a symbol to the compiler: no graph of another value may be taken."""
    torch.compiler.reset()
    arrays = same(60, 60)
    base = {"method": "sortlsh"} if option == "rtol" else {**ESTIMATED, "window": 9 if option == "diagonal" else None}

    def attend(q, k, v, value):
        return scaled_dot_product_attention(q, k, v, **{**base, option: value})

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for value in CHANGED[option]:
        with collect_reports() as reports:
            found, expected = compiled(*arrays, value), attend(*arrays, value)
        assert torch.equal(found, expected)
        # A tolerance is seen in the reason only: so few keys are evaluated exactly.
        ours, theirs = ((one.budget, one.diagonal, one.reason, one.certificate and one.certificate.rows) for one in reports)
        assert ours == theirs
        assert option != "rtol" or f"rtol {value}" in ours[2]


# What follows the operations of `kdecore.attention` itself, which otherwise are not PyTorch's on the CPU

BY_OPERATIONS = {"exact": {"method": "exact"}, "sortlsh": ESTIMATED}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Dynamo :UserWarning")  # of where it breaks the graph, and of caches
@pytest.mark.parametrize(("how", "method"), [("trace", "exact"), ("trace", "sortlsh"), ("compile", "exact")])
def test_what_is_traced_is_attention_of_other_arrays_too(how, method):
    """And not the result for those that it was traced with."""
    torch.compiler.reset()
    q, k, v = same()

    def attend(q, k, v):
        return kdecore.attention(q, k, v, kernels="array-api", **BY_OPERATIONS[method])

    if how == "trace":
        traced = torch.jit.trace(attend, (q, k, v), check_trace=False)
    else:
        traced = torch.compile(attend, backend="eager")
        traced(q, k, v)
    # Hashes, of which a trace may make constants, are the same for longer queries.
    torch.testing.assert_close(traced(2 * q, k, 3 * v), attend(2 * q, k, 3 * v), rtol=1e-9, atol=1e-12)


UNTRACED = {
    "auto": lambda k, v: lambda q: kdecore.attention(q, k, v),
    "exact": lambda k, v: lambda q: kdecore.attention(q, k, v, method="exact"),
    "sortlsh": lambda k, v: lambda q: kdecore.attention(q, k, v, **ESTIMATED),
    "treecode": lambda k, v: lambda q: kdecore.attention(q, k, v, method="treecode", budget=20),
    "index of few keys": lambda k, v: KeyIndex(k, v, budget=40).attend,
    "index": lambda k, v: KeyIndex(k, v, budget=20).attend,
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Dynamo :UserWarning")
@pytest.mark.parametrize("attends", UNTRACED.values(), ids=UNTRACED)
@pytest.mark.parametrize("how", ["trace", "compile"])
def test_what_are_no_operations_of_pytorchs_is_not_traced(how, attends):
    """But refused: a trace would keep the result of the arrays that it was made with."""
    torch.compiler.reset()
    q, k, v = same()
    attend = attends(k, v)
    said = "kernels must be \"array-api\" where .* traces operations, got 'auto'; .*scaled_dot_product_attention"
    with pytest.raises(kdecore.OptionError, match=said):
        torch.jit.trace(attend, (q,)) if how == "trace" else torch.compile(attend, backend="eager")(q)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:DeprecationWarning")
def test_trees_are_not_traced_by_jit():
    """Their shape follows from the numbers of rows, which are tensors then."""
    q, k, v = same()
    options = {"budget": 20, "kernels": "array-api"}
    said = "method must not be treecode where torch.jit traces operations"
    for attend in (
        lambda q: kdecore.attention(q, k, v, method="treecode", **options),
        KeyIndex(k, v, **options).attend,
    ):
        with pytest.raises(kdecore.OptionError, match=said):
            torch.jit.trace(attend, (q,))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:DeprecationWarning")
def test_jit_traces_the_operator():
    q, k, v = same()
    attend = lambda q, k, v: scaled_dot_product_attention(q, k, v, **ESTIMATED)  # noqa: E731
    traced = torch.jit.trace(attend, (q, k, v), check_trace=False)
    assert torch.equal(traced(2 * q, k, 3 * v), attend(2 * q, k, 3 * v))


@pytest.mark.parametrize("options", BY_OPERATIONS.values(), ids=BY_OPERATIONS)
def test_what_can_not_be_traced_is_refused_by_pytorch(options):
    with pytest.raises(RuntimeError, match="value out of a tracing tensor"):
        make_fx(lambda *x: kdecore.attention(*x, **options))(*same())


@pytest.mark.parametrize("options", BY_OPERATIONS.values(), ids=BY_OPERATIONS)
def test_modes_meet_the_operations(options):
    arrays = same()
    call = {"kernels": "array-api", **options}
    expected = kdecore.attention(*arrays, **call)
    with FlopCounterMode(display=False) as counter:
        found = kdecore.attention(*arrays, **call)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert counter.get_total_flops() > 0
    # A mode of functions, as the device that tensors are made on, follows what is called and not what is done.
    with torch.device("cpu"):
        assert torch.equal(kdecore.attention(*arrays, **call), expected)


def test_torch_compile_takes_any_length():
    explained = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = torch.compile(lambda q, k, v: scaled_dot_product_attention(q, k, v, **ESTIMATED), backend=explained, dynamic=True)
    for n in (30, 45, 61, 80):
        arrays = same(n, n)
        assert torch.equal(call(*arrays), scaled_dot_product_attention(*arrays, **ESTIMATED))
    # Once for the first call, and once for lengths that are any number.
    assert explained.frame_count <= 2


class Layer(torch.nn.Module):
    def forward(self, q, k, v):
        return scaled_dot_product_attention(q, k, v, **ESTIMATED)


def test_torch_export_keeps_lengths_open():
    n, m = torch.export.Dim("n", min=2), torch.export.Dim("m", min=2)
    shapes = {"q": {2: n}, "k": {2: m}, "v": {2: m}}
    exported = torch.export.export(Layer(), tuple(same(30, 40)), dynamic_shapes=shapes).module()
    arrays = same(50, 60)
    assert torch.equal(exported(*arrays), Layer()(*arrays))


def test_the_operator_keeps_pytorchs_rules():
    call = (*same(25, 25, grad=True), None, None, False, None, 0, encoded({"method": "sortlsh", "budget": 9}))
    found = torch.library.opcheck(torch.ops.kdecore.attention.default, call)
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dims", [(1, 1, 1, None), (0, None, None, None), (0, 0, 0, 0), (None, None, None, 0)])
def test_vmap_adds_a_leading_dimension(dims):
    shapes = [(3, 2, 30, 6), (3, 2, 20, 6), (3, 2, 20, 5), (3, 30, 20)]
    arrays = []
    for x, shape, dim in zip(tensors(*shapes), shapes, dims, strict=True):
        whole = x if len(shape) == 4 else x > 0
        arrays.append(whole[0] if dim is None else whole.movedim(0, dim))

    def call(q, k, v, mask):
        return scaled_dot_product_attention(q, k, v, mask, method="treecode", budget=20)

    found = torch.func.vmap(call, in_dims=dims)(*arrays)
    for i in range(3):
        one = call(*(x if dim is None else x.select(dim, i) for x, dim in zip(arrays, dims, strict=True)))
        torch.testing.assert_close(found[i], one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("shapes", [((3, 30, 6), (20, 6), (3, 20, 5)), ((3, 2, 30, 6), (2, 20, 6), (3, 2, 20, 5))])
def test_gradients_flow_through_vmap(learned, shapes):
    """The mask has no dimension of heads, which q, k and v may have."""
    *arrays, mask = tensors(*shapes, (3, 30, 20), grad=True)
    mask.requires_grad_(learned)
    wanted = [*arrays, mask] if learned else arrays

    def both(attend):
        out = torch.func.vmap(attend, in_dims=(0, None, 0, 0))(*arrays, mask)
        return torch.autograd.grad((out * torch.linspace(-1, 1, 5, dtype=out.dtype)).sum(), wanted)

    found = both(lambda *x: scaled_dot_product_attention(*x, method="treecode", budget=20))
    expected = both(lambda q, k, v, mask: (q @ k.mT / 6**0.5 + mask).softmax(-1) @ v)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernels", ["auto", "array-api"])
def test_autocast_decides_the_results_dtype_and_nothing_inside(kernels):
    q, k, v = same(dtype=torch.float32, grad=True)
    options = {**ESTIMATED, "kernels": kernels}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scaled_dot_product_attention(q, k, v, **options)
        assert found.dtype == functional.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        found.float().square().sum().backward()
    again = [x.detach().requires_grad_() for x in (q, k, v)]
    expected = kdecore.attention(*(x.bfloat16() for x in again), **options)
    assert torch.equal(found, expected)
    expected.float().square().sum().backward()
    for x, y in zip((q, k, v), again, strict=True):
        assert x.grad.dtype == torch.float32
        assert torch.equal(x.grad, y.grad)


def test_reports_of_calls_are_collected_compiled_ones_too():
    arrays = same(60, 60)
    compiled = torch.compile(lambda *x: scaled_dot_product_attention(*x, **ESTIMATED), backend="aot_eager")
    with collect_reports() as reports:
        scaled_dot_product_attention(*arrays, **ESTIMATED)
        compiled(*arrays)
        with collect_reports() as inner:
            scaled_dot_product_attention(*arrays, method="treecode", budget=30)
    scaled_dot_product_attention(*arrays, **ESTIMATED)
    assert [report.method for report in reports] == ["sortlsh", "sortlsh"]
    assert [report.method for report in inner] == ["treecode"]
    assert reports[0].certificate.frobenius > 0


def test_no_random_state_is_touched():
    before = torch.get_rng_state()
    q, k, v = same(grad=True)
    scaled_dot_product_attention(q, k, v, **ESTIMATED).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_exact_attention_is_pytorchs():
    q, k, v = tensors((3, 20, 4), (3, 25, 4), (3, 25, 7))
    found = backend_named("torch").exact_attention(q, k, v, 0.4)
    torch.testing.assert_close(found, functional.scaled_dot_product_attention(q, k, v, scale=0.4))
