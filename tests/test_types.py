"""What calls return, as editors are told and as it is: this file is run, and `make lint` checks its types."""

from typing import Any, assert_type

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import kdecore
from kdecore import Report
from kdecore.api.call import AttentionOptions, IndexOptions, PackedOptions
from kdecore.kde import KdeReport, log_gaussian_kde, log_weighted_exponential_kde
from kdecore.kde.problem import KdeOptions
from kdecore.neighbors import KernelDensity
from kdecore_adapters.distributed import RingReport, ring_attention, ulysses_attention
from kdecore_adapters.torch_adapter import scaled_dot_product_attention

X: NDArray[np.float64] = np.random.default_rng(0).standard_normal((2, 40, 4))
FLAG: bool = bool(len(X))
"""Nobody knows which, before it runs."""


def test_attention() -> None:
    assert isinstance(assert_type(kdecore.attention(X, X, X), NDArray[np.float64]), np.ndarray)
    out, lse = assert_type(kdecore.attention(X, X, X, causal=True, return_lse=True), tuple[NDArray[np.float64], Any])
    assert out.shape == (*lse.shape, 4)
    out, report = assert_type(kdecore.attention(X, X, X, return_report=True), tuple[NDArray[np.float64], Report])
    assert report.method == "exact"
    both = assert_type(
        kdecore.attention(X, X, X, budget=8, return_lse=True, return_report=True), tuple[NDArray[np.float64], Any, Report]
    )
    assert isinstance(both[2], Report)
    assert len(assert_type(kdecore.attention(X, X, X, return_report=FLAG), Any)) == 2
    tensor = torch.from_numpy(X)
    assert assert_type(kdecore.attention(tensor, tensor, tensor), Tensor).shape == (2, 40, 4)


def test_packed_attention() -> None:
    assert_type(kdecore.packed_attention(X, X, X, [0, 10, 40], causal=True), NDArray[np.float64])
    out, reports = assert_type(
        kdecore.packed_attention(X, X, X, [0, 10, 40], return_report=True),
        tuple[NDArray[np.float64], tuple[Report | None, ...]],
    )
    assert out.shape == X.shape
    assert [isinstance(report, Report) for report in reports] == [True, True]
    assert_type(kdecore.packed_attention(X, X, X, [0, 40], return_lse=True), tuple[NDArray[np.float64], Any])


def test_an_index() -> None:
    index = kdecore.KeyIndex(X, X, budget=16)
    assert_type(index.attend(X), NDArray[np.float64])
    assert_type(index.attend(X, return_lse=True), tuple[NDArray[np.float64], Any])
    assert isinstance(assert_type(index.attend(X, return_report=True), tuple[NDArray[np.float64], Report])[1], Report)
    three = index.attend(X, budget=8, return_lse=True, return_report=True)
    assert isinstance(assert_type(three, tuple[NDArray[np.float64], Any, Report])[2], Report)
    assert_type(index.attend_and_append(X, X, X), NDArray[np.float64])
    assert len(assert_type(index.attend_and_append(X, X, X, return_lse=True), tuple[NDArray[np.float64], Any])) == 2


def test_densities() -> None:
    assert_type(log_gaussian_kde(X, X, 0.5), Any)
    assert isinstance(assert_type(log_gaussian_kde(X, X, return_report=True), tuple[Any, KdeReport])[1], KdeReport)
    summed = log_weighted_exponential_kde(X, X, eps=0.1, return_report=True)
    assert isinstance(assert_type(summed, tuple[Any, KdeReport])[1], KdeReport)


def test_estimated_densities() -> None:
    model = KernelDensity(0.5).fit(X[0])
    assert_type(model.score_samples(X[0]), Any)
    assert isinstance(assert_type(model.score_samples(X[0], return_report=True), tuple[Any, Report])[1], Report)


def test_pytorch() -> None:
    x = torch.from_numpy(X)
    assert_type(scaled_dot_product_attention(x, x, x, is_causal=True), Tensor)
    _, lse = assert_type(scaled_dot_product_attention(x, x, x, return_lse=True), tuple[Tensor, Tensor])
    assert lse.shape == (2, 40)


def types_of_several_processes(x: Tensor) -> None:
    """Checked, and not run: calls of every process of a group."""
    assert_type(ring_attention(x, x, x, return_report=True), tuple[Tensor, RingReport])
    assert_type(ring_attention(x, x, x, budget=8), Tensor)
    assert_type(ulysses_attention(x, x, x, return_lse=True, return_report=True), tuple[Tensor, Tensor, Report])


def test_overloads_have_the_arguments_of_what_runs() -> None:
    for function, positional, options in (
        (kdecore.attention, {"q", "k", "v", "return_lse", "return_report"}, AttentionOptions),
        (kdecore.KeyIndex.attend, {"self", "q", "return_lse", "return_report"}, IndexOptions),
        (log_gaussian_kde, {"x", "y", "bandwidth", "normalised", "return_report"}, KdeOptions),
    ):
        assert names_of(function) == positional | options.__annotations__.keys()
    both = PackedOptions.__annotations__.keys() | {"key_lengths", "mask"}
    assert both == AttentionOptions.__annotations__.keys()


def names_of(function: Any) -> set[str]:
    """Return the names of a function's parameters."""
    code = function.__code__
    return set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
