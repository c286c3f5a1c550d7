"""What holds for arrays on an accelerator, shown on PyTorch's device "meta", whose tensors hold no numbers to read.

A call that would read one back, and so wait for a device, raises there; what a call launches and copies to it is counted.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kdecore
from kdecore.grouping import sign_lsh
from kdecore.kernels import registry

DTYPES = ("float16", "bfloat16", "float32", "float64")
VIEWS = frozenset(
    ["view", "_unsafe_view", "alias", "expand", "slice", "select", "unsqueeze", "squeeze", "transpose", "permute", "detach"]
) | {"empty", "scalar_tensor"}
"""Operations that launch nothing on a device."""
LAUNCHES = {"hash_codes": 3, "bucket_order": 3, "row_norms": 3, "node_summaries": 7, "draw_indices": 2, "rank_codes": 3}
"""Of a kernel's version for CUDA, and of what it is called with; 1 for the others."""


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
    sign_lsh._planes.cache_clear()
    yield
    sign_lsh._planes.cache_clear()


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


@pytest.mark.parametrize(("method", "most"), [("exact", 25), ("sortlsh", 85), ("hyper", 75), ("treecode", 140)])
def test_calls_launch_little_where_kernels_are_there(monkeypatch, capsys, method, most):
    """References stand for the kernels that a CUDA device would run, and count as so many launches as these have."""

    operations = Operations()

    def counted(kernel, implementation):
        def call(*args, **kwargs):
            operations.paused, before = True, operations.paused
            found = implementation.function(*args, **kwargs)
            operations.paused = before
            operations.launches += LAUNCHES.get(kernel, 1)
            return found

        return replace(implementation, function=call)

    for kernel, every in registry.KERNELS.items():
        if {"numba-cuda", "triton"} & {one.target for one in every}:
            monkeypatch.setitem(registry.KERNELS, kernel, (*every[:-1], counted(kernel, every[-1])))
    q, k, v = inputs("bfloat16")
    kdecore.attention(q, k, v, method=method, budget=256)
    operations.launches = 0
    with operations:
        kdecore.attention(q, k, v, method=method, budget=256)
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
