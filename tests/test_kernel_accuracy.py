"""Numba kernels where errors could build up or leak: many keys, padded slots, stale caches, gradients switched off."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import kdecore
from kdecore.arrays.namespace import host
from tests import oracles
from tests.implementations import on_host

ROOT = Path(kdecore.__file__).parents[1]


@pytest.mark.parametrize("n_k", [2**10, 2**14, 2**17])
@pytest.mark.parametrize("logits", ["flat", "normal"])
def test_float32_error_does_not_grow_with_the_number_of_keys(n_k, logits):
    """At most twice the error of plain float32 NumPy, whose sums are pairwise, plus the floor of 4 eps.

    Values are positive: with mixed signs their sum hides how sums of weights round.
    """
    rng = np.random.default_rng(0)
    q = rng.standard_normal((8, 4)).astype(np.float32) * (0.0 if logits == "flat" else 1.0)
    k = rng.standard_normal((n_k, 4)).astype(np.float32)
    v = (1.0 + rng.random((n_k, 5))).astype(np.float32)
    truth, true_lse = oracles.exact_attention(q, k, v, None)
    plain, plain_lse = oracles.plain_attention(q, k, v, "float32", None)
    out, lse = kdecore.attention(q, k, v, method="exact", kernels="numba-cpu", return_lse=True)
    eps = float(np.finfo(np.float32).eps)
    for found, other, true, size in ((out, plain, truth, 2.0), (lse, plain_lse, true_lse, float(np.abs(true_lse).max()))):
        assert np.abs(found - true).max() <= 2 * np.abs(other - true).max() + 4 * eps * size


@pytest.mark.parametrize("kernels", ["numba-cpu", "array-api"])
def test_infinite_values_do_not_leak_through_padded_slots(kernels):
    q, k = np.ones((1, 8), np.float32), np.ones((700, 8), np.float32)
    out = kdecore.attention(q, k, np.full((700, 1), np.inf, np.float32), method="exact", kernels=kernels)
    np.testing.assert_array_equal(out, np.full((1, 1), np.inf, np.float32))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_kernels_run_where_gradients_are_switched_off(context):
    q = torch.randn(20, 4, requires_grad=True)
    with context():
        out, report = kdecore.attention(q, q, q, method="exact", return_report=True)
    assert report.kernels["attend_dense"].startswith("numba-cpu")
    assert not out.requires_grad


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # PyTorch's own, on first use
def test_forward_mode_tangents_are_kept():
    q, tangent = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    step = 1e-6
    with torch.autograd.forward_ad.dual_level():
        out = kdecore.attention(torch.autograd.forward_ad.make_dual(q, tangent), q, q, method="exact")
        found = torch.autograd.forward_ad.unpack_dual(out).tangent
    ahead, behind = (kdecore.attention(q + s * step * tangent, q, q, method="exact") for s in (1, -1))
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["exact", "sortlsh", "kdeformer"])
def test_results_stay_on_the_device_of_q_whatever_the_default(method):
    q = torch.randn(60, 4)
    expected = kdecore.attention(q, q, q, method=method, budget=20)
    torch.set_default_device("meta")
    try:
        found = kdecore.attention(q, q, q, method=method, budget=20)
    finally:
        torch.set_default_device(None)
    assert found.device == q.device
    torch.testing.assert_close(found, expected)


def test_tensors_with_the_negative_bit():
    q = torch.randn(1, 30, 4, dtype=torch.cfloat).conj().imag
    assert q.is_neg()
    torch.testing.assert_close(kdecore.attention(q, q, q), kdecore.attention(q.clone(), q.clone(), q.clone()))


# A kernel that is compiled in a second.
CALL = """
import numpy as np
from kdecore.kernels.row_norms.cpu import row_norms
print(repr(float(row_norms(np, np.eye(40, 8)[None]).sum())))
"""


def run(source, cache):
    env = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{ROOT / 'adapters'}", "NUMBA_CACHE_DIR": str(cache)}
    return subprocess.run(
        [sys.executable, "-c", CALL], env=env, cwd=source, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_cached_code_goes_out_of_date_with_the_vector_primitives(tmp_path):
    """Numba's own stamp covers the file of the kernel alone, and would go on using code made from the old simd.py."""
    shutil.copytree(ROOT / "kdecore", tmp_path / "kdecore", ignore=shutil.ignore_patterns("__pycache__", "data"))
    first = run(tmp_path, tmp_path / "cache")
    assert run(tmp_path, tmp_path / "cache") == first
    simd = tmp_path / "kdecore" / "kernels" / "runtime" / "simd.py"
    text = simd.read_text(encoding="utf-8")
    least = "largest = cgutils.alloca_once_value(builder, simd.constant(0.0))"
    assert text.count(least) == 1
    simd.write_text(text.replace(least, least.replace("0.0", "3.0")), encoding="utf-8")
    assert run(tmp_path, tmp_path / "cache") != first


def test_the_report_sets_compile_time_apart():
    """A dtype that nothing else has used compiles on the first call of the process, and not on the second."""
    code = """
import numpy as np, kdecore
q = np.eye(40, 8)
for _ in range(2):
    report = kdecore.attention(q, q, q, return_report=True)[1]
    print(report.compile_seconds > 0, report.seconds > 0, "to compile" in str(report))
"""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'adapters'}"}
    found = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True).stdout
    assert found.splitlines() == ["True True True", "False True False"]


def test_importing_and_running_need_no_cache_folder():
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'adapters'}",
        "NUMBA_CACHE_LOCATOR_CLASSES": "ZipCacheLocator",
    }
    subprocess.run([sys.executable, "-c", CALL], env=env, check=True, capture_output=True)


@on_host("hash_codes")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_row_that_is_not_finite_leaves_the_buckets_of_others(implementation, bad):
    """The centre is the mean over rows whose projection is finite; else every row would fall into bucket 0."""
    rng = np.random.default_rng(0)
    x, planes = rng.standard_normal((2, 300, 8)), rng.standard_normal((8, 6))
    others = np.delete(x, 17, axis=1)
    clean = implementation.function(host, others, others, planes)
    x[:, 17] = bad
    with np.errstate(invalid="ignore"):
        found = implementation.function(host, x, x, planes)
    for codes, expected in zip(found, clean, strict=True):
        np.testing.assert_array_equal(np.delete(codes, 17, axis=1), expected)
