"""What holds for arrays on an accelerator, shown on PyTorch's device "meta", whose tensors hold no numbers to read.

A call that would read one back, and so wait for a device, raises there; what a call copies to a device is counted.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kdecore
from kdecore.grouping import sign_lsh

DTYPES = ("float16", "bfloat16", "float32", "float64")
VIEWS = set(
    [
        "view",
        "_unsafe_view",
        "alias",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "transpose",
        "permute",
        "detach",
        "empty",
    ]
)


class Operations(TorchDispatchMode):
    """Collect the names of operations that launch something, and how many numbers are copied to the device."""

    def __init__(self):
        super().__init__()
        self.names, self.copied = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = str(function).split(".")[1]
        if (
            isinstance(out, torch.Tensor)
            and out.device.type == "meta"
            and not name.startswith("empty")
            and name not in VIEWS
        ):
            self.names.append(name)
        from_host = [x for x in args if isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.ndim > 0]
        if isinstance(out, torch.Tensor) and out.device.type == "meta":
            if name not in VIEWS:
                self.names.append(name)
            self.copied += sum(x.numel() for x in args if isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.ndim)
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
    assert operations.names
    assert operations.copied == 0


def test_the_meta_device_would_show_a_read():
    with pytest.raises(RuntimeError, match="meta"):
        float(torch.empty(3, device="meta").sum())
