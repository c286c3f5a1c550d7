"""What holds for arrays on an accelerator, shown on PyTorch's device "meta", whose tensors hold no numbers to read.

A call that would read one back, and so wait for a device, raises there; what a call launches and copies to it is counted.
"""

import weakref
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kdecore
from bench.gpu.profile import LAUNCHES as LAUNCHES_AT_MOST
from kdecore.core.problem import canonicalise
from kdecore.core.state import AttentionState
from kdecore.kernels import registry
from kdecore.methods import sortlsh
from kdecore.methods.plan import make_plan
from tests.launches import LAUNCHES

DTYPES = ("float16", "bfloat16", "float32", "float64")
VIEWS = frozenset(
    ["view", "_unsafe_view", "alias", "expand", "slice", "select", "unsqueeze", "squeeze", "transpose", "permute", "detach"]
) | {"empty", "scalar_tensor"}
"""Operations that launch nothing on a device."""


def any_threshold(xp, queries, tree, budget, most, start):
    """Stand for `pick_threshold`, whose reference reads how wide levels are."""
    return torch.empty((), dtype=queries.coordinates.dtype, device="meta")


def any_lists(xp, queries, tree, threshold, most, start):
    """Stand for `open_tree`, whose reference does so too."""
    shape = (*queries.index.shape[:2], most)
    index, weight, share = (torch.empty(shape, dtype=x, device="meta") for x in (torch.int64, *[tree.spread.dtype] * 2))
    return index, weight, share, index[..., 0]


def any_attention(xp, queries, tree, values, threshold, most, start, *rest):
    """Stand for `attend_tree`, whose reference makes lists."""
    out = torch.empty(*queries.q.shape[:2], values.shape[2] - 1, dtype=tree.spread.dtype, device="meta")
    counts = torch.empty(queries.index.shape[:2], dtype=torch.int64, device="meta")
    return rest[-1] or AttentionState(out, torch.empty_like(out[..., 0])), counts


STAND_INS = {"pick_threshold": any_threshold, "open_tree": any_lists, "attend_tree": any_attention}


class Operations(TorchDispatchMode):
    """Count what launches something on the device, and the numbers that are copied to it."""

    def __init__(self):
        super().__init__()
        self.launches, self.copied, self.paused = 0, 0, False
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type == "meta":
            name = str(function).split(".")[1]
            self.launches += not self.paused and name not in VIEWS
            self.names |= set() if self.paused else {name}
            if not self.paused:
                self.copied += sum(
                    x.numel() for x in args if isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.ndim
                )
        return out


@pytest.fixture(autouse=True)
def no_planes_kept():
    sortlsh._planes.cache_clear()
    yield
    sortlsh._planes.cache_clear()


def inputs(dtype, n=2100, d=32, d_v=24):
    return (torch.empty(2, 3, n, width, dtype=getattr(torch, dtype), device="meta") for width in (d, d, d_v))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["exact", "sortlsh", "hyper"])
def test_calls_with_a_budget_neither_read_from_the_device_nor_copy_to_it(method, dtype):
    q, k, v = inputs(dtype)
    kdecore.attention(q, k, v, method=method, budget=256)
    with Operations() as operations:
        out, lse = kdecore.attention(q, k, v, method=method, budget=256, return_lse=True)
    assert out.dtype == q.dtype
    assert lse.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert out.shape == (2, 3, 2100, 24)
    assert operations.launches > 0
    assert operations.copied == 0


@pytest.mark.parametrize(
    ("method", "most", "diagonal"),
    [
        *((method, most, 0) for method, most in LAUNCHES_AT_MOST.items()),
        ("treecode", 36, None),
        (kdecore.Treecode(ordering="given"), 32, None),
    ],
)
def test_calls_launch_little_where_kernels_are_there(monkeypatch, capsys, method, most, diagonal):
    """References stand for the kernels that a CUDA device would run, and count as so many launches as these have."""

    operations = Operations()

    def counted(kernel, implementation):
        def call(*args, **kwargs):
            operations.paused, before = True, operations.paused
            found = STAND_INS.get(kernel, implementation.function)(*args, **kwargs)
            operations.paused = before
            operations.launches += LAUNCHES.get(kernel, 1)
            return found

        return replace(implementation, function=call)

    for kernel, every in registry.KERNELS.items():
        if every[0].target in ("triton", "numba-cuda"):
            stand_in = counted(kernel, replace(every[-1], target=every[0].target))
            monkeypatch.setitem(registry.KERNELS, kernel, (stand_in,))
    q, k, v = inputs("bfloat16")
    kdecore.attention(q, k, v, method=method, budget=256, diagonal=diagonal)
    operations.launches = 0
    with operations:
        kdecore.attention(q, k, v, method=method, budget=256, diagonal=diagonal)
    with capsys.disabled():
        print(f"\n{method}: {operations.launches} launches")
    assert 3 < operations.launches <= most
    assert operations.copied == 0
    # Factors of matrices take many launches, and waiting, of their own.
    assert not {name for name in operations.names if "linalg" in name}


def test_the_meta_device_would_show_a_read_and_a_copy():
    with pytest.raises(RuntimeError, match="meta"):
        float(torch.empty(3, device="meta").sum())
    with Operations() as operations:
        torch.ones(7).to("meta")
    assert operations.copied == 7


class Memory(TorchDispatchMode):
    """Count the bytes that tensors on the device take, but for ``inputs``."""

    def __init__(self, inputs):
        super().__init__()
        self.taken, self.peak, self.paused = 0, 0, False
        self.held = {x.untyped_storage()._cdata for x in inputs}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not self.paused:
            self.meet(*(out if isinstance(out, (tuple, list)) else [out]))
        return out

    def meet(self, *found):
        for x in found:
            if not isinstance(x, torch.Tensor) or x.untyped_storage()._cdata in self.held:
                continue
            storage = x.untyped_storage()
            self.held.add(storage._cdata)
            self.taken += storage.nbytes()
            self.peak = max(self.peak, self.taken)
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, key, size):
        self.held.discard(key)
        self.taken -= size


def on_cuda(memory, kernel, implementation, reference):
    """Return an implementation that stands for one on a CUDA device, of which no more memory is seen than its results'."""

    def attend(xp, q, k, v, *rest, before=None, **more):
        out = torch.empty(*q.shape[:-1], v.shape[-1], device="meta", dtype=torch.float32)
        return before or AttentionState(out, torch.empty_like(out[..., 0]))

    def call(*given, **more):
        if kernel in ("attend_blocks", "attend_dense"):
            return attend(*given, **more)
        before, memory.paused = memory.paused, True
        found = STAND_INS.get(kernel, reference)(*given, **more)
        memory.paused = before
        if not before:
            memory.meet(*(found if isinstance(found, tuple) else [found]))
        return found

    return replace(
        implementation, function=call, unsupported=lambda site: implementation.unsupported(replace(site, device="cuda:0"))
    )


NUMBA = "numba-cuda"
WIDE = [
    ("float32", 64, 64, "exact", {}),
    ("bfloat16", 300, 300, "exact", {"attend_dense": "triton"}),
    ("float32", 300, 300, "exact", {"attend_dense": NUMBA}),
    ("float32", 300, 300, "exact", {"attend_dense": "array-api"}),
    ("float32", 64, 600, "sortlsh", {"attend_blocks": NUMBA}),
    ("float32", 64, 600, "sortlsh", {"attend_blocks": "array-api"}),
    ("bfloat16", 300, 64, "treecode", {"open_tree": NUMBA, "attend_blocks": "triton", "node_summaries": "triton"}),
    ("float16", 64, 600, "treecode", {"open_tree": "triton", "attend_blocks": NUMBA, "node_summaries": "triton"}),
    ("float16", 64, 600, "treecode", {"open_tree": "triton", "attend_blocks": "array-api", "node_summaries": "triton"}),
    ("float32", 64, 1100, "treecode", {"open_tree": "triton", "attend_blocks": NUMBA, "node_summaries": NUMBA}),
]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("dtype", "d", "d_v", "method", "targets"), WIDE, ids=str)
def test_the_plan_bounds_the_memory_of_what_is_chosen_for_wide_rows(monkeypatch, dtype, d, d_v, method, targets):
    """What a kernel doesn't take, another one computes, which takes memory of its own; matrix products without Numba."""
    q, k, v = inputs(dtype, n=1200, d=d, d_v=d_v)
    memory = Memory([q, k, v])
    monkeypatch.setattr(registry, "cuda_problem", lambda: "not there" if "array-api" in targets.values() else None)
    for kernel, every in registry.KERNELS.items():
        *others, last = every
        of_devices = (one for one in others if one.target in ("triton", NUMBA))
        stand_ins = (on_cuda(memory, kernel, one, last.function) for one in of_devices)
        monkeypatch.setitem(registry.KERNELS, kernel, (*stand_ins, last))
    plan = make_plan(canonicalise(q, k, v), method=method, budget=128)
    assert {name: plan.kernels[name].target for name in targets} == targets
    with memory:
        out = kdecore.attention(q, k, v, method=method, budget=128)
    assert memory.peak - out.untyped_storage().nbytes() <= plan.temporary_bytes
