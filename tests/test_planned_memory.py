"""`Report.temporary_bytes` bounds what is really taken, and not by much; inputs are copied only where they must be."""

import tracemalloc

import numpy as np
import pytest
import torch

from kdecore import SortLSH, Treecode, attention
from kdecore.kernels.registry import KERNELS


def measured(*arrays, **options):
    """Return (planned, peak above inputs and result) of a second call, as NumPy tells; workspaces of Numba do not show."""
    attention(*arrays, **options)
    tracemalloc.start()
    out, report = attention(*arrays, return_report=True, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return report.temporary_bytes, peak - out.nbytes


CASES = {
    "wide rows": (1024, 16384, 256, {"method": SortLSH(block_size=1, num_samples=511)}),
    "tiny budget": (8192, 8192, 64, {"method": "sortlsh", "budget": 3}),
    "default budget": (8192, 8192, 64, {"method": "sortlsh"}),
    "exact": (4096, 4096, 64, {"method": "exact"}),
    "tree": (4096, 4096, 64, {"method": "treecode", "budget": 128}),
    "tree of few queries": (500, 20000, 32, {"method": "treecode", "budget": 256}),
    "tree in small blocks": (4096, 4096, 16, {"method": Treecode(block_size=16), "budget": 256}),
    "tree of one sort": (8192, 8192, 64, {"method": Treecode().at(True), "budget": 512}),
    "few queries": (3, 50000, 64, {"method": "hyper", "budget": 100}),
}


@pytest.mark.parametrize("kernels", ["array-api", "numba-cpu"])
def test_the_plan_counts_many_hyperplanes(kernels):
    q, k, v = np.random.default_rng(0).standard_normal((3, 50_000, 8))
    planned, taken = measured(q, k, v, kernels=kernels, method=SortLSH(block_size=1, num_samples=3, num_hashes=30))
    assert taken <= planned


@pytest.mark.parametrize("kernels", ["array-api", "numba-cpu"])
@pytest.mark.parametrize(("n_q", "n_k", "d", "options"), CASES.values(), ids=CASES)
def test_the_plan_bounds_the_memory_taken(n_q, n_k, d, options, kernels):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, d), dtype=np.float32) for n in (n_q, n_k, n_k))
    planned, taken = measured(q, k, v, kernels=kernels, **options)
    assert taken <= planned <= 4 * taken + 2**23


@pytest.mark.parametrize("kernel", ["", *Treecode().at(False).kernels])
@pytest.mark.parametrize(("n_q", "n_k", "d", "d_v"), [(500, 10000, 32, 300), (10000, 1000, 16, 300), (2000, 2000, 300, 16)])
def test_the_plan_bounds_the_memory_taken_where_one_kernel_is_the_array_api(monkeypatch, n_q, n_k, d, d_v, kernel):
    """As it is for a kernel that doesn't take rows so wide, beside others that do; and where none is."""
    if kernel:
        monkeypatch.setitem(KERNELS, kernel, KERNELS[kernel][-1:])
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, width), dtype=np.float32) for n, width in ((n_q, d), (n_k, d), (n_k, d_v)))
    planned, taken = measured(q, k, v, method="treecode", budget=128)
    assert taken <= planned


RESTRICTED = {
    "causal": (2, 4096, 4096, {"method": "sortlsh", "budget": 128, "causal": True}),
    "causal, no power of two": (2, 5000, 5000, {"method": "sortlsh", "causal": True}),
    "causal, tiny budget": (1, 8192, 8192, {"method": "sortlsh", "budget": 30, "causal": True}),
    "causal tree": (1, 8192, 8192, {"method": "treecode", "budget": 256, "causal": True}),
    "causal tree, no power of two": (2, 5001, 5001, {"method": "treecode", "budget": 128, "causal": True}),
    "causal, exact": (1, 8192, 8192, {"method": "exact", "causal": True}),
    "decoding": (1, 100, 50000, {"method": "treecode", "budget": 200, "causal": True}),
    "window": (1, 8192, 8192, {"method": "sortlsh", "budget": 256, "causal": True, "window": 3000}),
    "window, exact": (1, 8192, 8192, {"method": "exact", "causal": True, "window": 300}),
    "lengths": (2, 4096, 4096, {"method": "sortlsh", "budget": 128, "key_lengths": [3000, 2000]}),
    "mask": (1, 2000, 2000, {"method": "sortlsh", "budget": 128, "mask": True}),
    "mask, tree": (1, 2000, 2000, {"method": "treecode", "budget": 128, "mask": True}),
    "mask, exact": (1, 2000, 2000, {"method": "exact", "mask": True}),
}


@pytest.mark.parametrize("kernels", ["array-api", "numba-cpu"])
@pytest.mark.parametrize(("heads", "n_q", "n_k", "options"), RESTRICTED.values(), ids=RESTRICTED)
def test_the_plan_bounds_the_memory_taken_where_keys_are_hidden(heads, n_q, n_k, options, kernels):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((heads, n, 64), dtype=np.float32) for n in (n_q, n_k, n_k)]
    if "mask" in options:
        options = options | {"mask": rng.random((n_q, n_k)) < 0.5}
    planned, taken = measured(*arrays, kernels=kernels, certificate=0, **options)
    assert taken <= planned <= 10 * taken + 2**23


def test_layouts_that_must_be_copied_are_counted_and_named():
    rng = np.random.default_rng(0)
    heads_last = rng.standard_normal((3, 4096, 4, 32), dtype=np.float32).transpose(0, 2, 1, 3)
    planned, taken = measured(*heads_last, method="sortlsh", budget=64)
    assert taken <= planned
    _, report = attention(*heads_last, method="sortlsh", budget=64, return_report=True)
    assert report.copied == ("q", "k", "v")
    assert "q, k, v" in report.details()
    plain = np.ascontiguousarray(heads_last)
    plain[0].flags.writeable = False
    _, report = attention(*plain, method="sortlsh", budget=64, return_report=True)
    assert report.copied == ()


@pytest.mark.parametrize("change", [lambda x: x[:, ::-1], lambda x: x.astype(">f4"), lambda x: x.astype(np.float16)])
def test_other_reasons_to_copy(change):
    q = np.random.default_rng(0).standard_normal((2, 50, 4), dtype=np.float32)
    changed = change(q)
    out, report = attention(changed, changed, changed, return_report=True)
    assert report.copied == ("q", "k", "v")
    same = np.ascontiguousarray(changed.astype(np.float32))
    np.testing.assert_allclose(out.astype(np.float32), attention(same, same, same), rtol=2e-3)


def test_transposed_tensors_keep_their_gradients():
    q = torch.randn(30, 2, 4, dtype=torch.float64, requires_grad=True)
    out, report = attention(*(q.transpose(0, 1),) * 3, return_report=True)
    assert report.copied == ("q", "k", "v")
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert gradient.shape == q.shape
