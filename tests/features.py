"""What hides keys, or shares them, each with the bias that says so to the oracle: rows of the table in docs/features.md."""

import numpy as np

from kdecore.testing import AttentionProblem
from tests import oracles

METHODS = ("exact", "sortlsh", "hyper", "treecode", "kdeformer")


def arrays(rng, lead=(2, 2), heads_k=2, n_q=70, n_k=70, d=8, d_v=5):
    q = rng.standard_normal((*lead, n_q, d))
    k, v = (rng.standard_normal((*lead[:-1], heads_k, n_k, width)) for width in (d, d_v))
    return q, k, v


def causal(rng):
    return AttentionProblem(*arrays(rng), {"causal": True}, oracles.causal_bias(70, 70))


def causal_decoding(rng):
    return AttentionProblem(*arrays(rng, n_q=23, n_k=90), {"causal": True}, oracles.causal_bias(23, 90))


def causal_more_queries(rng):
    return AttentionProblem(*arrays(rng, n_q=90, n_k=40), {"causal": True}, oracles.causal_bias(90, 40))


def window(rng):
    return AttentionProblem(*arrays(rng), {"causal": True, "window": 31}, oracles.causal_bias(70, 70, 31))


def window_both_sides(rng):
    distance = np.abs(np.arange(70)[:, None] - np.arange(70)[None, :])
    return AttentionProblem(*arrays(rng), {"window": 29}, np.where(distance < 29, 0.0, -np.inf))


def key_lengths(rng):
    lengths = np.array([55, 0])
    bias = np.where(np.arange(70) < lengths[:, None], 0.0, -np.inf)[:, None, None, :]
    return AttentionProblem(*arrays(rng), {"key_lengths": lengths}, bias)


def causal_key_lengths(rng):
    one = key_lengths(rng)
    options = {"key_lengths": np.array([[55, 70], [33, 0]]), "causal": True}
    bias = np.where(np.arange(70) < options["key_lengths"][..., None], 0.0, -np.inf)[:, :, None, :]
    return AttentionProblem(one.q, one.k, one.v, options, bias + oracles.causal_bias(70, 70))


def padding_mask(rng):
    seen = np.arange(70) >= np.array([9, 30])[:, None]
    return AttentionProblem(*arrays(rng), {"mask": seen[:, None, None, :]}, np.where(seen, 0.0, -np.inf)[:, None, None, :])


def boolean_mask(rng):
    seen = rng.random((2, 1, 70, 70)) < 0.6
    seen[0, 0, 3] = False
    return AttentionProblem(*arrays(rng), {"mask": seen}, np.where(seen, 0.0, -np.inf))


def additive_mask(rng):
    bias = np.where(rng.random((70, 70)) < 0.8, rng.standard_normal((70, 70)), -np.inf)
    return AttentionProblem(*arrays(rng), {"mask": bias}, bias)


def grouped_heads(rng):
    return AttentionProblem(*arrays(rng, lead=(2, 4), heads_k=2), {})


def grouped_heads_causal(rng):
    return AttentionProblem(*arrays(rng, lead=(4,), heads_k=1), {"causal": True}, oracles.causal_bias(70, 70))


def grouped_heads_masks(rng):
    seen = rng.random((4, 70, 70)) < 0.7
    return AttentionProblem(*arrays(rng, lead=(4,), heads_k=2), {"mask": seen}, np.where(seen, 0.0, -np.inf))


FEATURES = {
    "`causal=True`, n_q = n_k": causal,
    "`causal=True`, n_q < n_k (cached decoding)": causal_decoding,
    "`causal=True`, n_q > n_k": causal_more_queries,
    "`causal=True, window=`": window,
    "`window=`, to both sides": window_both_sides,
    "`key_lengths=`": key_lengths,
    "`key_lengths=` for each head, `causal=True`": causal_key_lengths,
    "`mask=`, padding, (…, 1, n_k)": padding_mask,
    "`mask=`, boolean, (…, n_q, n_k)": boolean_mask,
    "`mask=`, additive": additive_mask,
    "grouped heads": grouped_heads,
    "grouped heads, `causal=True`": grouped_heads_causal,
    "grouped heads, a mask for each query head": grouped_heads_masks,
}
"""Name in the table → function of a random generator that makes an example."""
