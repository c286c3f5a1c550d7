"""Problems for attention kernels: rows of a dtype, and the same numbers in float64."""

import array_api_compat.torch as xp
import numpy as np
import torch

from kdecore.core.state import AttentionState
from kdecore.kernels.attend_blocks import reference
from tests.tolerances import EPS, assert_close

DTYPES = ("float16", "bfloat16", "float32")


def rows(rng, dtype, *shapes):
    """Return random rows of each shape."""
    return [torch.from_numpy(rng.standard_normal(shape)).to(getattr(torch, dtype)) for shape in shapes]


def lists(rng, R_q, R_k, N, b, s):
    """Return queries in any order, the last block filled up with its last one where it has several; keys; log weights."""
    order = rng.permutation(R_q)[: N * b]
    query_index = np.concat([order, np.repeat(order[-1:], N * b - len(order))]).reshape(N, b)
    index = (torch.from_numpy(x) for x in (query_index, rng.integers(0, R_k, (N, s))))
    return (*index, torch.from_numpy(rng.standard_normal((N, s), dtype=np.float32)))


def bias(rng, N, b, s, hidden=0.4):
    """Return a bias of which a share is hidden, and a whole row, the middle one."""
    found = torch.from_numpy(rng.standard_normal((N, b, s), dtype=np.float32))
    found[torch.from_numpy(rng.random((N, b, s)) < hidden)] = -torch.inf
    found[:, b // 2] = -torch.inf
    return found


def expected(q, k, v, query_index, key_index, log_weight, scale, added=None, before=None):
    """Return what the reference finds of the same numbers in float64."""
    q, k, v, log_weight, *rest = (x.double() for x in (q, k, v, log_weight, *([] if added is None else [added])))
    return reference.attend_blocks(xp, q, k, v, query_index, key_index, log_weight, scale, *(rest or [None]), before)


def assert_part(found, truth, v, dtype):
    """Assert that a Part is as accurate as its dtype allows.

    Products of half-precision numbers are exact in float32, so that lse has float32's errors only. For the product with the
    values weights are rounded to their dtype, by half an ulp: a mean of values errs by as much of the largest.
    """
    assert isinstance(found, AttentionState)
    assert found.out.dtype == found.lse.dtype == torch.float32
    assert_close(found.lse, truth.lse, ulps=64, dtype="float32")
    size = float(v[torch.isfinite(v)].abs().max())
    rounding = EPS[dtype] / 2 * size if dtype != "float32" else 0.0
    limit = rounding + 64 * EPS["float32"] * max(1.0, size)
    np.testing.assert_allclose(found.out, truth.out, rtol=0, atol=limit)
