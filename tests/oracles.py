"""Naive definitions in NumPy to test against, beside those that users have: short, slow, sharing nothing with kdecore."""

import numpy as np

from kdecore.testing.oracle import causal_bias, default_scale, exact_attention, masked_attention  # noqa: F401, oracles too


def round_to(x, dtype):
    """Round to a dtype by name; bfloat16 numbers come as float32 with a short mantissa."""
    if dtype != "bfloat16":
        return np.asarray(x).astype(dtype)
    bits = np.asarray(x).astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def plain_attention(q, k, v, dtype, scale=None):
    """Attention as one would write it in ``dtype``, every intermediate result rounded to it: the yardstick for errors."""
    scale = default_scale(q.shape[-1]) if scale is None else scale
    q, k, v = (round_to(x, dtype) for x in (q, k, v))
    logits = round_to(round_to(q * q.dtype.type(scale), dtype) @ np.swapaxes(k, -1, -2), dtype)
    top = logits.max(axis=-1, keepdims=True)
    weights = round_to(np.exp(logits - top), dtype)
    total = round_to(weights.sum(axis=-1, keepdims=True), dtype)
    lse = round_to(top + np.log(total), dtype)[..., 0]
    return round_to(round_to(weights @ v, dtype) / total, dtype), lse


def attend_list(q, k, v, keys, log_weight, scale):
    """One query (d,) on a list of keys with log weights → (d_v,), lse; keys at −inf count for nothing."""
    counts = log_weight != -np.inf
    if not counts.any():
        return np.zeros(v.shape[-1]), -np.inf
    logits = scale * (k[keys[counts]] @ q) + log_weight[counts]
    weights = np.exp(logits - logits.max())
    return weights @ v[keys[counts]] / weights.sum(), logits.max() + np.log(weights.sum())


def attend_blocks(q, k, v, query_index, key_index, log_weight, scale):
    """Every block's queries on its list of keys, in the order of the queries: (R_q, d_v), (R_q,) in float64."""
    q, k, v, log_weight = (np.asarray(x, dtype=np.float64) for x in (q, k, v, log_weight))
    out, lse = np.zeros((len(q), v.shape[-1])), np.zeros(len(q))
    for block, row in np.ndindex(*query_index.shape):
        query = query_index[block, row]
        out[query], lse[query] = attend_list(q[query], k, v, key_index[block], log_weight[block], scale)
    return out, lse


def gray_sequence(bits):
    """Sign patterns in Gray order, as strings, built by reflection."""
    if bits == 0:
        return [""]
    shorter = gray_sequence(bits - 1)
    return ["0" + word for word in shorter] + ["1" + word for word in reversed(shorter)]


def hash_codes(x, planes):
    """Rank in Gray order of each row's centred sign pattern, first plane first: (G, n) ints."""
    rank = {word: position for position, word in enumerate(gray_sequence(planes.shape[1]))}
    codes = np.zeros(x.shape[:2], dtype=int)
    for group in range(x.shape[0]):
        centre = x[group].mean(axis=0)
        for row in range(x.shape[1]):
            codes[group, row] = rank["".join("01"[int((x[group, row] - centre) @ plane > 0)] for plane in planes.T)]
    return codes


def value_weights(v):
    """1 + ‖v‖ / mean ‖v‖ for one group (n, d_v), values that are not finite counting as 0."""
    norms = np.array([np.sqrt(float(row @ row)) if np.isfinite(row).all() else 0.0 for row in v])
    mean = norms.mean()
    return 1.0 + norms / mean if mean > 0 else np.ones(len(v))


def systematic_sample(weights, start, count):
    """Positions that ``count`` points, spacing T / count apart and the first at start · T / count, fall on."""
    spacing = sum(weights) / count
    points = [(start + i) * spacing for i in range(count)]
    position, upto, found = 0, weights[0], []
    for point in points:
        while point >= upto and position < len(weights) - 1:
            position += 1
            upto += weights[position]
        found.append(position)
    return found


def systematic_breakpoints(weights, count):
    """Starts in [0, 1] at which the systematic sample changes, with both ends; those that differ by rounding count once."""
    shares = np.cumsum(weights) * (count / np.sum(weights))
    steps = np.unique(np.concatenate([[0.0], shares - np.floor(shares), [1.0]]))
    return steps[np.diff(steps, prepend=-1.0) > 1e-12]


def nadaraya_watson(x, y, points, bandwidth, weights=None):
    """Mean of y (n, c) over rows x (n, d), by Gaussian kernels around points (m, d): (m, c) float64, in long double."""
    x, y, points = (np.asarray(one, dtype=np.longdouble) for one in (x, y, points))
    logs = np.stack([-np.sum((x - point) ** 2, axis=1) for point in points]) / (2 * np.longdouble(bandwidth) ** 2)
    kernels = np.exp(logs - logs.max(axis=1, keepdims=True)) * (1.0 if weights is None else weights)
    return (kernels @ y / kernels.sum(axis=1, keepdims=True)).astype(np.float64)
