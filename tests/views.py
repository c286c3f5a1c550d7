"""Moments for tests of `balanced_view`."""

import numpy as np

from kdecore.arrays.namespace import host
from kdecore.kernels.balanced_view.reference import with_ridge


def arguments(given, p, scale=1.0):
    """Return what `balanced_view` takes beside the namespace, of two moments (G, d, d) and a mean key."""
    groups, d, _ = given[0].shape
    centre = np.sin(np.arange(groups * d, dtype=np.float64)).reshape(groups, d)
    return *given, centre, scale, p, centre[:, None, :]


def moments(rows):
    """Return the second moments of rows (…, n, d)."""
    return np.swapaxes(rows, -1, -2) @ rows / rows.shape[-2]


def graded_moments(rng, d, rows=200):
    """Two of 2 groups each, of queries and keys whose eigenvalues lie apart."""
    return moments(rng.standard_normal((2, 2, rows, d)) * np.geomspace(1.0, 0.1, d))


DEGENERATE = {
    "zero": lambda rng, d: np.zeros((2, 1, d, d)),
    "no queries": lambda rng, d: moments(rng.standard_normal((2, 1, 50, d))) * np.array([0.0, 1.0])[:, None, None, None],
    "rank one": lambda rng, d: moments(rng.standard_normal((2, 1, 1, d))),
    "rank three": lambda rng, d: moments(rng.standard_normal((2, 1, 3, d))),
    "ones": lambda rng, d: np.ones((2, 1, d, d)),
    "large and small": lambda rng, d: graded_moments(rng, d)[:, :1] * np.array([1e20, 1e-20])[:, None, None, None],
}
"""Moments of queries and keys (2, G, d, d) by name."""


def assert_same_view(found, expected, query_moment, key_moment):
    """Assert that two views give the same logits, up to 1e-6 of their mean square, and that the first one is balanced."""
    c, s = with_ridge(host, query_moment), with_ridge(host, key_moment)
    by_queries, by_keys = np.linalg.cholesky(c), np.linalg.cholesky(s)
    wrong = found[0] @ found[1].swapaxes(1, 2) - expected[0] @ expected[1].swapaxes(1, 2)
    logits = by_queries.swapaxes(1, 2) @ by_keys
    off = np.linalg.norm(by_queries.swapaxes(1, 2) @ wrong @ by_keys, axis=(1, 2))
    assert (off <= 1e-6 * np.linalg.norm(logits, axis=(1, 2))).all()
    of_queries, of_keys = found[0].swapaxes(1, 2) @ c @ found[0], found[1].swapaxes(1, 2) @ s @ found[1]
    diagonal = np.diagonal(of_queries, axis1=1, axis2=2)
    limit = 1e-5 * diagonal.max(axis=1)[:, None, None]
    assert (np.abs(of_queries - diagonal[:, None, :] * np.eye(diagonal.shape[1])) <= limit).all()
    assert (np.abs(of_queries - of_keys) <= limit).all()
    assert (np.diff(diagonal, axis=1) >= -limit[:, 0]).all()
