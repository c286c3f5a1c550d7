"""Triton kernels in Triton's interpreter: in a process of their own, since it is chosen when kernels are declared.

`tests/test_triton.py` starts it. Products are made by NumPy, and float32 ones are not made of tf32 products.
"""

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns of its next default where nothing is said

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from kdecore.kernels.attend_blocks import triton, triton_backward
from tests.poison import poisoned

assert os.environ.get("TRITON_INTERPRET") == "1", "these tests are for TRITON_INTERPRET=1"


def wide(handle):
    """Return the numbers of a bfloat16 tensor, whose bits the interpreter holds, in float32."""
    if handle.data.dtype != np.uint16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@pytest.fixture(autouse=True)
def as_devices_do(monkeypatch):
    """Multiply bfloat16 numbers, not their bits as the interpreter would, and warn of no NaN."""
    multiply = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: multiply(self, wide(a), wide(b), *rest)
    )
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Let PyTorch's empty tensors be poisoned."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture
def tiny(monkeypatch):
    """Make tiles as small as they can be, so that few rows need several."""
    for limits in (triton.ATTEND, triton_backward.OF_QUERIES, triton_backward.OF_KEYS):
        for itemsize, found in limits.items():
            monkeypatch.setitem(limits, itemsize, found._replace(kept=16, met=16))


@pytest.fixture(params=["tiny tiles", "whole tiles"])
def tiles(request):
    """Make tiles tiny, or leave them as they are."""
    if request.param == "tiny tiles":
        request.getfixturevalue("tiny")


@pytest.fixture
def rng():
    return np.random.default_rng(20230702)
