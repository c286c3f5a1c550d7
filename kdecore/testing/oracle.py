"""Attention by its definition, in plain NumPy: short, slow, and sharing nothing with what kdecore computes by."""

from typing import Any

import numpy as np


def default_scale(d: int) -> float:
    """Return the factor on ⟨q, k⟩ where none is given, 1/√d."""
    return float(1.0 / np.sqrt(d))


def exact_attention(q: Any, k: Any, v: Any, scale: float | None = None) -> tuple[Any, Any]:
    """Softmax attention, and the log of its denominators.

    Parameters
    ----------
    q, k, v
        (…, n_q, d), (…, n_k, d), (…, n_k, d_v): NumPy arrays of one number of leading dimensions.
    scale
        Factor on ⟨q, k⟩; 1/√d if None.

    Returns
    -------
    out, lse
        (…, n_q, d_v) and (…, n_q), float64; computed in long double. O(n_q n_k (d + d_v)) time, and memory for all weights.
    """
    q, k, v = (np.asarray(x, dtype=np.longdouble) for x in (q, k, v))
    scale = default_scale(q.shape[-1]) if scale is None else scale
    logits = scale * np.einsum("...qd,...kd->...qk", q, k)
    top = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    out, lse = np.einsum("...qk,...kc->...qc", weights / total, v), (top + np.log(total))[..., 0]
    return out.astype(np.float64), lse.astype(np.float64)


def masked_attention(q: Any, k: Any, v: Any, bias: Any, scale: float | None = None) -> tuple[Any, Any]:
    """Softmax attention of grouped heads, some keys hidden.

    Parameters
    ----------
    q, k, v
        (…, h, n_q, d), (…, h_k, n_k, d), (…, h_k, n_k, d_v): NumPy arrays; h_k is h, or a divisor of it.
    bias
        Added to the logits, broadcastable to (…, n_q, n_k); −inf for what isn't seen, which counts for nothing, whatever
        it holds.
    scale
        Factor on ⟨q, k⟩; 1/√d if None.

    Returns
    -------
    out, lse
        (…, n_q, d_v) and (…, n_q), float64; 0 and −inf for a query that sees nothing. Computed in long double, a query at
        a time.
    """
    scale = default_scale(q.shape[-1]) if scale is None else scale
    if q.ndim > 2 and q.shape[-3] != k.shape[-3]:
        k, v = (np.repeat(x, q.shape[-3] // x.shape[-3], axis=-3) for x in (k, v))
    q, k, v = (np.asarray(x, dtype=np.longdouble) for x in (q, k, v))
    bias = np.broadcast_to(bias, (*q.shape[:-1], k.shape[-2]))
    out, lse = np.zeros((*q.shape[:-1], v.shape[-1])), np.full(q.shape[:-1], -np.inf)
    for at in np.ndindex(*q.shape[:-1]):
        seen = bias[at] > -np.inf
        if seen.any():
            logits = scale * (k[at[:-1]][seen] @ q[at]) + bias[at][seen]
            weights = np.exp(logits - logits.max())
            total = weights.sum()
            out[at], lse[at] = weights / total @ v[at[:-1]][seen], logits.max() + np.log(total)
    return out, lse


def causal_bias(n_q: int, n_k: int, window: int | None = None) -> Any:
    """Return (n_q, n_k): 0 where query i sees key j ≤ i + n_k − n_q, of those the last ``window``; −inf elsewhere."""
    distance = np.arange(n_q)[:, None] + (n_k - n_q) - np.arange(n_k)[None, :]
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return np.where(seen, 0.0, -np.inf)
