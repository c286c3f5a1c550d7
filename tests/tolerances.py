"""The tolerance rule: an error may be twice that of a plain implementation in the same dtype, and no more.

The errors are measured against an oracle, as the largest over the array. A floor of ``FLOOR`` ulps of the largest term that
was summed allows for a plain result that happens to be exact, and for another order of summation.
"""

import numpy as np

EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
FLOOR = 4


def assert_accurate(found, truth, plain, dtype, terms):
    """Assert max|found − truth| ≤ 2 max|plain − truth| + FLOOR · eps(dtype) · max|terms|."""
    found, truth, plain, terms = (np.asarray(x, dtype=np.float64) for x in (found, truth, plain, terms))
    assert found.shape == truth.shape
    if truth.size == 0:
        return
    assert np.isfinite(found).all(), "not finite"
    error, yardstick = np.abs(found - truth).max(), np.abs(plain - truth).max()
    allowed = 2 * yardstick + FLOOR * EPS[dtype] * np.abs(terms).max()
    assert error <= allowed, f"error {error:.3g} > {allowed:.3g} (a plain {dtype} implementation errs by {yardstick:.3g})"


def assert_close(found, truth, ulps=64, dtype="float64"):
    """Assert that two results agree to ``ulps`` ulps of the largest, for the same sum taken in another order."""
    found, truth = (np.asarray(x, dtype=np.float64) for x in (found, truth))
    assert found.shape == truth.shape
    np.testing.assert_array_equal(np.isinf(found), np.isinf(truth))
    finite = np.isfinite(truth)
    np.testing.assert_array_equal(found[~finite], truth[~finite])
    limit = ulps * EPS[dtype] * max(1.0, np.abs(truth[finite]).max(initial=0.0))
    np.testing.assert_allclose(found[finite], truth[finite], rtol=0, atol=limit)
