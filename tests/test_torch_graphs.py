"""CUDA graphs of repeated calls, with a stand-in for PyTorch's that records operations on the CPU and does them again."""

import ast
import gc
import inspect
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kdecore
from kdecore.arrays.errors import DeviceError
from kdecore.arrays.kept import kept_on_device
from kdecore.arrays.memory import from_host
from kdecore.arrays.random import normal
from kdecore.methods import sortlsh
from kdecore_adapters import torch_graphs
from kdecore_adapters.torch_adapter import collect_reports, scaled_dot_product_attention
from kdecore_adapters.torch_graphs import GRAPHS, WARM_UPS, clear_graphs, replayed
from kdecore_adapters.torch_modules import KDEAttention, replace_attention, reroute
from tests.test_structure import FILES

GRAPHED = {"method": "sortlsh", "budget": 20, "cuda_graph": True}


def tensors(number=0, n=40, dtype=torch.float32, device="cpu"):
    rng = np.random.default_rng(number)
    return [torch.from_numpy(rng.standard_normal((2, 3, n, 6))).to(dtype).to(device) for _ in "qkv"]


class Recorded(TorchDispatchMode):
    """Note operations in a graph, the operator of attention being one."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.graph.steps.append((function, args, kwargs or {}, out))
        return out


class Graph:
    """Stand for `torch.cuda.CUDAGraph`: a replay does the same operations on the same memory."""

    def __init__(self):
        self.steps = []


class StandIn:
    """Stand for what of `torch.cuda` graphs are made with.

    Attributes
    ----------
    events
        What was done, with the stream that was current.
    breaks
        What the end of a capture raises, which then leaves its stream as PyTorch's context does; None for nothing.
    """

    def __init__(self):
        self.current, self.made, self.events, self.breaks = 0, 0, [], None

    def note(self, what):
        self.events.append((what, self.current))

    def count(self, what):
        return sum(one == what for one, _ in self.events)

    def stream_class(self):
        """Return a class: others than this library look at it when they are imported."""

        class Stream:
            def __init__(stream, device):  # noqa: N805 - self is the stand-in
                self.made += 1
                stream.cuda_stream = self.made

        return Stream

    @contextmanager
    def within(self, stream):
        before, self.current = self.current, stream.cuda_stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def capture(self, graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        before, self.current = self.current, stream.cuda_stream
        self.note("capture")
        try:
            with Recorded(graph):
                yield
        finally:
            if self.breaks is not None:
                raise self.breaks
            self.current = before

    def replay(self, graph):
        self.note("replay")
        for function, args, kwargs, out in graph.steps:
            for buffer, found in zip(*map(tree_leaves, (out, function(*args, **kwargs))), strict=True):
                buffer.copy_(found)


@pytest.fixture
def cuda(monkeypatch):
    """Let tensors on the CPU be captured, by a stand-in."""
    clear_graphs()
    stand_in = StandIn()
    monkeypatch.setattr(torch_graphs, "DEVICE", "cpu")
    monkeypatch.setattr(Graph, "replay", lambda graph: stand_in.replay(graph), raising=False)
    for name, value in {
        "Stream": stand_in.stream_class(),
        "stream": stand_in.within,
        "current_stream": lambda device: SimpleNamespace(cuda_stream=stand_in.current),
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device: stand_in.note("wait"),
        "CUDAGraph": Graph,
        "graph": stand_in.capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    yield stand_in
    clear_graphs()


def test_a_replay_is_the_call(cuda):
    for number in range(3):
        q, k, v = tensors(number)
        found = scaled_dot_product_attention(q, k, v, **GRAPHED)
        assert torch.equal(found, kdecore.attention(q, k, v, method="sortlsh", budget=20))
    assert (cuda.count("capture"), cuda.count("replay")) == (1, 3)


def test_a_replay_has_the_log_sum_exp_too(cuda):
    for number in range(2):
        q, k, v = tensors(number)
        found = scaled_dot_product_attention(q, k, v, return_lse=True, **GRAPHED)
        expected = kdecore.attention(q, k, v, method="sortlsh", budget=20, return_lse=True)
        assert all(map(torch.equal, found, expected))
    assert (cuda.count("capture"), cuda.count("replay")) == (1, 2)


def test_a_later_call_leaves_results_and_inputs_as_they_are(cuda):
    first, second = tensors(0), tensors(1)
    before = [x.clone() for x in first]
    found = scaled_dot_product_attention(*first, **GRAPHED)
    expected = found.clone()
    scaled_dot_product_attention(*second, **GRAPHED)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, first, before))


def test_a_call_is_warmed_up_and_captured_on_a_stream_of_its_own_and_replayed_on_the_current_one(cuda):
    def call(x):
        cuda.note("call")
        return (x + 1.0,)

    cuda.current = 7
    x = torch.ones(3)
    assert torch.equal(*replayed(call, {"x": x}, ()), x + 1.0)
    aside = 1
    assert cuda.events == [
        ("wait", 7),
        *[("call", aside)] * WARM_UPS,
        ("wait", aside),
        ("capture", aside),
        ("call", aside),
        ("replay", 7),
    ]
    assert cuda.current == 7
    assert torch.equal(*replayed(call, {"x": 2 * x}, ()), 2 * x + 1.0)
    assert cuda.events[8:] == [("replay", 7)]


ALIKE = {
    "strides": lambda: scaled_dot_product_attention(*(x.mT.contiguous().mT for x in tensors()), **GRAPHED),
    "broadcast": lambda: scaled_dot_product_attention(*(x[:1].expand(2, -1, -1, -1) for x in tensors()), **GRAPHED),
    "scale as an array": lambda: scaled_dot_product_attention(*tensors(), scale=torch.tensor(0.5), **GRAPHED),
    "no gradients": lambda: no_gradients(),
    "inference": lambda: in_inference(),
}
OTHERS = {
    "length": lambda: scaled_dot_product_attention(*tensors(n=41), **GRAPHED),
    "dtype": lambda: scaled_dot_product_attention(*tensors(dtype=torch.bfloat16), **GRAPHED),
    "autocast": lambda: in_autocast(),
    "seed": lambda: scaled_dot_product_attention(*tensors(), seed=1, **GRAPHED),
    "scale": lambda: scaled_dot_product_attention(*tensors(), scale=0.3, **GRAPHED),
    "budget": lambda: scaled_dot_product_attention(*tensors(), **{**GRAPHED, "budget": 21}),
    "method": lambda: scaled_dot_product_attention(*tensors(), **{**GRAPHED, "method": "treecode"}),
    "options": lambda: scaled_dot_product_attention(
        *tensors(), method=kdecore.SortLSH(block_size=4, num_samples=16), cuda_graph=True
    ),
    "diagonal": lambda: scaled_dot_product_attention(*tensors(), diagonal=0, **GRAPHED),
    "kernels": lambda: scaled_dot_product_attention(*tensors(), kernels="array-api", **GRAPHED),
}


def no_gradients():
    with torch.no_grad():
        return scaled_dot_product_attention(*(x.requires_grad_() for x in tensors()), **GRAPHED)


def in_inference():
    with torch.inference_mode():
        return scaled_dot_product_attention(*tensors(), **GRAPHED)


def in_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        return scaled_dot_product_attention(*tensors(), **GRAPHED)


def plain(monkeypatch, call):
    """Return what a call does without a graph."""
    monkeypatch.setitem(GRAPHED, "cuda_graph", False)
    found = call()
    monkeypatch.setitem(GRAPHED, "cuda_graph", True)
    return found


@pytest.mark.parametrize("name", [*ALIKE, *OTHERS])
def test_calls_share_a_graph_where_the_same_is_launched(cuda, monkeypatch, name):
    more = {"scale": 0.5} if name == "scale as an array" else {}
    scaled_dot_product_attention(*tensors(1), **more, **GRAPHED)
    call = {**ALIKE, **OTHERS}[name]
    found = call()
    assert cuda.count("capture") == (1 if name in ALIKE else 2)
    assert not found.requires_grad
    assert name == "options" or torch.equal(found, plain(monkeypatch, call))


def test_streams_have_graphs_of_their_own(cuda):
    """On one stream a call waits for the one before; on two, both would write into the same buffers."""
    for stream in (3, 4, 3, 4):
        cuda.current = stream
        scaled_dot_product_attention(*tensors(), **GRAPHED)
    assert cuda.count("capture") == 2
    assert [stream for what, stream in cuda.events if what == "replay"] == [3, 4, 3, 4]


def test_what_is_captured_in_inference_mode_is_replayed_outside(cuda):
    first = in_inference()
    second = scaled_dot_product_attention(*tensors(), **GRAPHED)
    assert cuda.count("capture") == 1
    assert first.is_inference()
    assert not second.is_inference()
    assert torch.equal(first, second)


def test_the_graphs_replayed_last_are_kept_and_others_freed(cuda):
    made = []

    def call(x, number):
        made.append(weakref.ref(x))
        return (x + number,)

    def number(i):
        return float(*replayed(call, {"x": torch.zeros(())}, (i,)))

    assert [number(i) for i in range(GRAPHS)] == list(range(GRAPHS))
    assert number(0) == 0.0
    assert cuda.count("capture") == GRAPHS
    assert number(GRAPHS) == GRAPHS  # in place of 1
    gc.collect()
    assert [made[(WARM_UPS + 1) * i]() is None for i in range(GRAPHS + 1)] == [i == 1 for i in range(GRAPHS + 1)]
    assert number(0) == 0.0
    assert cuda.count("capture") == GRAPHS + 1
    assert number(1) == 1.0
    assert cuda.count("capture") == GRAPHS + 2
    clear_graphs()
    gc.collect()
    assert all(one() is None for one in made)


def test_a_graph_keeps_what_it_reads(cuda, monkeypatch):
    """Hyperplanes are kept for the last few seeds, and a graph knows only where they were: it holds them itself."""
    made = []

    @kept_on_device(2)
    def planes(xp, seed, shape, dtype, on):
        found = from_host(xp, normal(seed, 0, shape), dtype=dtype, device=on.device)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(sortlsh, "_planes", planes)
    scaled_dot_product_attention(*tensors(), **GRAPHED)
    (own,) = made
    for seed in (100, 101, 102):
        kdecore.attention(*tensors(), method="sortlsh", budget=20, seed=seed, kernels="array-api")
    gc.collect()
    assert [one() is None for one in made] == [False, True, False, False]
    clear_graphs()
    gc.collect()
    assert own() is None


def test_every_array_kept_on_devices_is_known_to_graphs():
    """They tell devices apart, by `NamedDevice`."""
    cached = {}
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and "NamedDevice" in ast.unparse(node.args):
                cached[module, node.name] = [ast.unparse(one).partition("(")[0] for one in node.decorator_list]
    assert ("kdecore.methods.sortlsh", "_planes") in cached
    assert all(decorators == ["kept_on_device"] for decorators in cached.values())


def test_a_call_that_raises_while_it_is_captured_leaves_nothing(cuda):
    calls = []

    def call(x):
        calls.append(cuda.current)
        if len(calls) == WARM_UPS + 1:
            cuda.breaks = RuntimeError("capture was invalidated")
            raise RuntimeError("Cannot copy between CPU and CUDA tensors")
        return (x + 1.0,)

    cuda.current = 5
    with pytest.raises(kdecore.OptionError, match=r"^cuda_graph needs a call .*, got RuntimeError: Cannot copy"):
        replayed(call, {"x": torch.ones(3)}, ())
    assert cuda.current == 5
    assert torch_graphs._captured.cache_info().currsize == 0
    assert cuda.count("replay") == 0
    cuda.breaks = None
    assert torch.equal(*replayed(call, {"x": torch.ones(3)}, ()), torch.full((3,), 2.0))
    assert cuda.count("capture") == 2


def test_memory_that_is_short_is_no_wrong_option(cuda):
    def call(x):
        if cuda.count("capture"):
            raise torch.OutOfMemoryError("no memory")
        return x

    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        replayed(call, {"x": torch.ones(3)}, ())
    assert cuda.current == 0


@pytest.mark.parametrize(
    ("shapes", "error"),
    [([(30, 6), (20, 5), (20, 6)], kdecore.ShapeError), ([(30, 6), (20, 6), (21, 6)], kdecore.ShapeError)],
)
def test_what_a_call_refuses_is_raised_as_it_is(cuda, shapes, error):
    with pytest.raises(error):
        scaled_dot_product_attention(*map(torch.ones, shapes), **GRAPHED)
    assert cuda.count("capture") == 0
    assert torch_graphs._captured.cache_info().currsize == 0


def test_tensors_on_two_devices_are_not_brought_together(cuda):
    q, k, v = tensors()
    with pytest.raises(DeviceError, match=r"^key must be on the same device as query"):
        scaled_dot_product_attention(q, k.to("meta"), v, **GRAPHED)
    assert cuda.events == []


REFUSED = {
    "mask": ({"attn_mask": torch.ones(40, 40, dtype=torch.bool)}, r"attn_mask=None, got a mask of shape \(40, 40\)"),
    "causal": ({"is_causal": True}, "is_causal=False, got causal attention, which copies from the host"),
    "lengths": ({"key_lengths": [40, 9]}, r"a call without key_lengths, got \[40, 9\]"),
    "lengths on the device": ({"key_lengths": torch.tensor([40, 9])}, "a call without key_lengths"),
    "window": ({"window": 5}, "a call without window, got 5"),
    "check_finite": ({"check_finite": True}, "a call without check_finite, got True"),
    "rtol": ({"rtol": 0.1, "method": "treecode", "budget": None}, "a call without rtol, got 0.1"),
    "kdeformer": ({"method": "kdeformer", "budget": None}, "a method that doesn't wait for the device, got kdeformer"),
    "kdeformer's options": (
        {"method": kdecore.KDEformer(eps=0.5), "budget": None},
        "a method that doesn't wait .*, got kdeformer",
    ),
}


@pytest.mark.parametrize(("more", "said"), REFUSED.values(), ids=REFUSED)
def test_what_waits_for_a_device_is_refused(cuda, more, said):
    with pytest.raises(kdecore.OptionError, match=f"^cuda_graph needs {said}"):
        scaled_dot_product_attention(*tensors(), **{**GRAPHED, **more})
    assert cuda.events == []


@pytest.mark.parametrize("around", [collect_reports, lambda: reroute(min_keys=1)], ids=["reports", "counts"])
def test_calls_that_are_reported_are_refused(cuda, around):
    with pytest.raises(kdecore.OptionError, match=r"^cuda_graph needs a call that nobody collects reports of"), around():
        scaled_dot_product_attention(*tensors(), **GRAPHED)
    assert cuda.events == []


def test_recorded_gradients_are_refused(cuda):
    q, k, v = tensors()
    with pytest.raises(kdecore.OptionError, match=r"^cuda_graph needs a call whose gradients aren't recorded"):
        scaled_dot_product_attention(q, k, v.requires_grad_(), **GRAPHED)
    assert cuda.events == []


WITHIN = {
    "torch.compile": lambda call: torch.compile(call, fullgraph=True, backend="eager"),
    "torch.func": lambda call: torch.func.vmap(call),
    "a mode": lambda call: lambda *x: in_mode(call, x),
}


def in_mode(call, x):
    with Recorded(Graph()):
        return call(*x)


@pytest.mark.parametrize("within", WITHIN.values(), ids=WITHIN)
def test_calls_that_others_follow_are_refused(cuda, within):
    torch.compiler.reset()
    call = within(lambda q, k, v: scaled_dot_product_attention(q, k, v, **GRAPHED))
    with pytest.raises(Exception, match=r"cuda_graph needs a call outside of torch.compile"):
        call(*tensors())
    assert cuda.events == []


def test_a_capture_around_the_call_is_refused(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(kdecore.OptionError, match=r"^cuda_graph needs a stream that isn't captured already"):
        scaled_dot_product_attention(*tensors(), **GRAPHED)


def test_tensors_elsewhere_are_refused():
    for device in ("cpu", "meta"):
        with pytest.raises(kdecore.OptionError, match=f"^cuda_graph needs tensors on a CUDA device, got query on {device}"):
            scaled_dot_product_attention(*tensors(device=device), **GRAPHED)


def test_what_is_left_to_pytorch_is_pytorchs(cuda):
    arrays = tensors()
    found = scaled_dot_product_attention(*arrays, cuda_graph=True, is_causal=True)
    assert torch.equal(found, functional.scaled_dot_product_attention(*arrays, is_causal=True))
    assert cuda.events == []


class Asks(nn.Module):
    def forward(self, q, k, v):
        return functional.scaled_dot_product_attention(q, k, v)


def by_block(q, k, v):
    with reroute(min_keys=1, **GRAPHED):
        return functional.scaled_dot_product_attention(q, k, v)


def by_model(q, k, v):
    model = Asks()
    replace_attention(model, min_keys=1, **GRAPHED)
    return model(q, k, v)


def by_module(q, k, v):
    module = KDEAttention(6, 3, batch_first=True, device="meta", **GRAPHED)
    with torch.no_grad():
        return module(q[0], k[0], v[0])[0]


def by_name(q, k, v):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    adapter = pytest.importorskip("kdecore_adapters.transformers_adapter")
    adapter.register("kdecore-graphs", min_keys=1, **GRAPHED)
    module = nn.Module()
    module.is_causal = False
    return transformers.AttentionInterface()["kdecore-graphs"](module, q, k, v, None)[0]


@pytest.mark.parametrize("way", [by_block, by_model, by_module, by_name])
def test_every_way_into_a_model_replays(cuda, monkeypatch, way):
    """On the device "meta": what models ask for on the CPU is reported, and so has no graphs."""
    monkeypatch.setattr(torch_graphs, "DEVICE", "meta")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    arrays = tensors(device="meta")
    shapes = [way(*arrays).shape for _ in range(2)]
    assert shapes[0] == shapes[1]
    assert (cuda.count("capture"), cuda.count("replay")) == (1, 2)


def test_the_function_itself_has_no_such_option():
    assert "cuda_graph" not in inspect.signature(kdecore.attention).parameters


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", ["exact", "sortlsh", "hyper", "treecode"])
def test_a_device_replays_what_it_computes(backend, method, dtype):
    if backend.name != "torch-cuda":
        pytest.skip("needs a CUDA device")
    options = {"method": method, "seed": 3} | ({} if method == "exact" else {"budget": 256})
    clear_graphs()
    for number in range(3):
        arrays = backend.arrays(*np.random.default_rng(number).standard_normal((3, 2, 4, 3000, 64)), dtype=dtype)
        found = scaled_dot_product_attention(*arrays, cuda_graph=True, **options)
        torch.testing.assert_close(found, scaled_dot_product_attention(*arrays, **options), rtol=0, atol=0)
    assert torch_graphs._captured.cache_info()[:2] == (2, 1)
    clear_graphs()
