"""`AttentionState`, attention over some of the keys, and its log-sum-exp merge."""

import math
from dataclasses import dataclass

from kdecore.arrays.memory import quiet
from kdecore.arrays.namespace import Array, Namespace


@dataclass(frozen=True)
class AttentionState:
    """Softmax attention over a set of keys.

    Attributes
    ----------
    out
        (…, n, d_v), the softmax-weighted mean of the set's values; 0 where the set is empty.
    lse
        (…, n), natural log of the sum of exp(logit) over the set; −inf where the set is empty.
    """

    out: Array
    lse: Array


def merge_states(xp: Namespace, a: AttentionState, b: AttentionState) -> AttentionState:
    """Return the attention over the union of two disjoint sets of keys.

    Associative and commutative up to rounding; O(n d_v).
    """
    with quiet():
        lse = xp.logaddexp(a.lse, b.lse)
        # Where both are empty, −inf − −inf would be NaN.
        finite = xp.where(xp.isinf(lse) & (lse < 0), 0.0, lse)
        weight_a, weight_b = xp.exp(a.lse - finite), xp.exp(b.lse - finite)
        return AttentionState(a.out * weight_a[..., None] + b.out * weight_b[..., None], lse)


def softmax_part(xp: Namespace, logits: Array, v: Array) -> AttentionState:
    """Return the attention of logits (…, n, s) on values (…, s, d_v).

    The maximum is subtracted before exp, so logits of any finite size are right; slots at −inf count for nothing, and a
    row with no other slots gives 0 and lse −inf. O(n s d_v).
    """
    top = xp.max(logits, axis=-1, keepdims=True)
    top = xp.where(xp.isinf(top) & (top < 0), 0.0, top)
    weights = xp.exp(logits - top)
    total = xp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0
    total = xp.where(empty, 1.0, total)
    lse = xp.where(empty, -math.inf, top + xp.log(total))
    return AttentionState((weights @ v) / total, xp.squeeze(lse, axis=-1))
