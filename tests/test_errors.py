"""Every error that `attention` documents: its type, and a message with the argument, what was expected and what came."""

import re
from functools import partial

import array_api_strict
import numpy as np
import pytest
import torch

from kdecore import (
    DeviceError,
    DTypeError,
    Exact,
    Hyper,
    KdecoreError,
    KernelUnavailable,
    OptionError,
    ShapeError,
    SortLSH,
    attention,
)
from kdecore.kernels import registry

A = np.zeros((2, 5, 3))
T = torch.zeros((2, 5, 3), dtype=torch.float64)
META = torch.zeros((2, 5, 3), dtype=torch.float64, device="meta")
STRICT = array_api_strict.zeros((2, 5, 3))
ELSEWHERE = array_api_strict.zeros((2, 5, 3), device=array_api_strict.Device("device1"))

ARRAYS = {
    # name: (q, k, v), error, what the message says, in order
    "q of rank 1": ((A[0, 0], A, A), ShapeError, ["q ", "at least 2 dim", r"\(3,\)"]),
    "k of rank 0": ((A, A[0, 0, 0], A), ShapeError, ["k ", "at least 2 dim", r"\(\)"]),
    "v of rank 1": ((A, A, A[0, 0]), ShapeError, ["v ", "at least 2 dim", r"\(3,\)"]),
    "d differs": ((A, A[..., :2], A), ShapeError, ["k ", "d = 3", r"\(2, 5, 2\)"]),
    "n_k differs": ((A, A, A[:, :4]), ShapeError, ["v ", "n_k = 5", r"\(2, 4, 3\)"]),
    "lead of k": ((A, A[[0, 1, 1]], A), ShapeError, ["k ", r"leading dimensions.*\(2,\)", r"\(3, 5, 3\)"]),
    "lead of grouped k": ((A, A[:1], A), ShapeError, ["v ", r"leading dimensions of k.*\(1,\)", r"k \(1, 5, 3\)"]),
    "lead of v": ((A, A, A[0]), ShapeError, ["v ", r"leading dimensions.*\(2,\)", r"v \(5, 3\)"]),
    "no keys": ((A, A[:, :0], A[:, :0]), ShapeError, ["k ", "at least one", r"\(2, 0, 3\)"]),
    "d is 0": ((A[..., :0], A[..., :0], A), ShapeError, ["q ", "at least 1", r"\(2, 5, 0\)"]),
    "q a list": ((A.tolist(), A, A), DTypeError, ["q ", "array", "list"]),
    "k None": ((A, None, A), DTypeError, ["k ", "array", "NoneType"]),
    "v a float": ((A, A, 1.0), DTypeError, ["v ", "array", "float"]),
    "q int": ((A.astype(int), A, A), DTypeError, ["q ", "float16.*float64", "int64"]),
    "k complex": ((A, A.astype(complex), A), DTypeError, ["k ", "float16.*float64", "complex128"]),
    "v bool": ((A, A, A.astype(bool)), DTypeError, ["v ", "float16.*float64", "bool"]),
    "q object": ((A.astype(object), A, A), DTypeError, ["q ", "float16.*float64", "object"]),
    "torch int": ((T.int(), T.int(), T.int()), DTypeError, ["q ", "float16.*float64", "int32"]),
    "mixed k": ((A, A.astype(np.float32), A), DTypeError, ["k ", "float64", "float32"]),
    "mixed v": ((T, T, T.bfloat16()), DTypeError, ["v ", "float64", "bfloat16"]),
    "masked q": ((np.ma.array(A), A, A), DTypeError, ["q ", "plain", "MaskedArray"]),
    "masked v": ((A, A, np.ma.array(A)), DTypeError, ["v ", "plain", "MaskedArray"]),
    "torch k": ((A, T, A), DeviceError, ["k ", "numpy", "torch"]),
    "NumPy v": ((T, T, A), DeviceError, ["v ", "torch", "numpy"]),
    "strict v": ((A, A, STRICT), DeviceError, ["v ", "numpy", "array_api_strict"]),
    "k on meta": ((T, META, T), DeviceError, ["k ", "cpu", "meta"]),
    "v on meta": ((T, T, META), DeviceError, ["v ", "cpu", "meta"]),
    "q on meta": ((META, T, T), DeviceError, ["k ", "meta", "cpu"]),
    "strict devices": ((STRICT, STRICT, ELSEWHERE), DeviceError, ["v ", "CPU_DEVICE", "device1"]),
}
OPTIONS = {
    "budget 0": ({"budget": 0}, ["budget", "at least 1", "got 0"]),
    "budget -3": ({"budget": -3}, ["budget", "at least 1", "got -3"]),
    "budget 2.5": ({"budget": 2.5}, ["budget", "integer", "got 2.5"]),
    "budget a": ({"budget": "a"}, ["budget", "integer", "got 'a'"]),
    "budget nan": ({"budget": float("nan")}, ["budget", "integer", "got nan"]),
    "budget 0, exact": ({"budget": 0, "method": "exact"}, ["budget", "at least 1", "got 0"]),
    "unknown method": ({"method": "magic"}, ["method", "auto", "exact", "sortlsh", "hyper", "got 'magic'"]),
    "method 3": ({"method": 3}, ["method", "name", "got 3"]),
    "method None": ({"method": None}, ["method", "name", "got None"]),
    "method a class": ({"method": SortLSH}, ["method", "options object", "SortLSH"]),
    "scale nan": ({"scale": float("nan")}, ["scale", "finite", "got nan"]),
    "scale inf": ({"scale": float("inf")}, ["scale", "finite", "got inf"]),
    "scale -inf": ({"scale": -np.inf}, ["scale", "finite", "got -inf"]),
    "scale x": ({"scale": "x"}, ["scale", "finite number", "got 'x'"]),
    "scale '1.5'": ({"scale": "1.5"}, ["scale", "finite number", "got '1.5'"]),
    "scale complex": ({"scale": 1j}, ["scale", "finite number", "got 1j"]),
    "scale an array": ({"scale": np.ones(2)}, ["scale", "finite number", "array"]),
    "scale too large": ({"scale": 10**400}, ["scale", "finite number", "got"]),
    "seed -1": ({"seed": -1}, ["seed", r"\[0, 2\*\*64\)", "got -1"]),
    "seed 2**64": ({"seed": 2**64}, ["seed", r"\[0, 2\*\*64\)", f"got {2**64}"]),
    "seed 1.5": ({"seed": 1.5}, ["seed", "integer", "got 1.5"]),
    "seed None": ({"seed": None}, ["seed", "integer", "got None"]),
    "contradiction": ({"method": SortLSH(2, 1), "budget": 4}, ["budget", "block_size", "= 3", "got 4"]),
    "contradiction, hyper": ({"method": Hyper(2, 1), "budget": 2}, ["budget", "block_size", "= 3", "got 2"]),
    "no room for samples": ({"method": SortLSH(block_size=4), "budget": 4}, ["budget", "exceed", "block_size=4", "got 4"]),
    "no room for a block": ({"method": SortLSH(num_samples=5), "budget": 4}, ["budget", "exceed", "=5", "got 4"]),
    "unknown kernels": ({"kernels": "abacus"}, ["kernels", "auto", "array-api", "got 'abacus'"]),
    "kernels None": ({"kernels": None}, ["kernels", "auto", "got None"]),
}
FIELDS = {
    "block_size -1": ({"block_size": -1}, ["block_size", "at least 0", "got -1"]),
    "block_size 1.5": ({"block_size": 1.5}, ["block_size", "integer", "got 1.5"]),
    "num_samples 0": ({"num_samples": 0}, ["num_samples", "at least 1", "got 0"]),
    "num_hashes 0": ({"num_hashes": 0}, ["num_hashes", "at least 1", "got 0"]),
    "num_hashes 31": ({"num_hashes": 31}, ["num_hashes", "at most 30", "got 31"]),
    "num_hashes a": ({"num_hashes": "a"}, ["num_hashes", "integer", "got 'a'"]),
}


def assert_raises(call, error, words):
    with pytest.raises(KdecoreError) as caught:
        call()
    assert type(caught.value) is error
    assert re.search(".*".join(words), str(caught.value)), str(caught.value)


@pytest.mark.parametrize("method", ["auto", "exact", "sortlsh", "hyper"])
@pytest.mark.parametrize(("arrays", "error", "words"), ARRAYS.values(), ids=ARRAYS)
def test_arrays(arrays, error, words, method):
    assert_raises(partial(attention, *arrays, method=method), error, words)


@pytest.mark.parametrize(("options", "words"), OPTIONS.values(), ids=OPTIONS)
def test_options(options, words):
    assert_raises(partial(attention, A, A, A, **options), OptionError, words)


@pytest.mark.parametrize("method", [SortLSH, Hyper])
@pytest.mark.parametrize(("fields", "words"), FIELDS.values(), ids=FIELDS)
def test_options_objects(method, fields, words):
    assert_raises(partial(method, **fields), OptionError, words)


def test_errors_are_also_the_builtin_kind():
    """A caller who knows nothing of kdecore can catch ValueError, TypeError and RuntimeError."""
    kinds = {ShapeError: ValueError, DTypeError: TypeError, DeviceError: ValueError, OptionError: ValueError}
    for error, builtin in {**kinds, KernelUnavailable: RuntimeError}.items():
        assert issubclass(error, builtin)
        assert issubclass(error, KdecoreError)


def test_kernels_that_cannot_run_say_why(monkeypatch):
    spare = registry.Implementation("abacus", lambda: None, lambda site: f"no beads for {site.library}")
    kernels = {name: (spare, *found) for name, found in registry.KERNELS.items()}
    monkeypatch.setattr(registry, "KERNELS", kernels)
    monkeypatch.setattr(registry, "TARGETS", ("abacus", *registry.TARGETS))
    assert_raises(
        partial(attention, A, A, A, kernels="abacus"), KernelUnavailable, ["attend_dense", "abacus", "no beads for numpy"]
    )
    _, report = attention(A, A, A, kernels="auto", return_report=True)
    assert "no beads for numpy" in report.kernels["attend_dense"]


def test_the_budget_may_repeat_what_the_options_say():
    assert attention(A, A, A, method=SortLSH(2, 1), budget=3).shape == A.shape
    assert attention(A, A, A, method=Exact(), budget=3).shape == A.shape
    assert attention(A, A, A, budget=np.int32(3), seed=np.uint64(2**64 - 1), method="sortlsh").shape == A.shape
