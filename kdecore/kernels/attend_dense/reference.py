"""`attend_dense` in the array API: tiles of logits, merged over the keys by log-sum-exp (as in FlashAttention)."""

from functools import partial, reduce

from kdecore.arrays.namespace import Array, Namespace, accumulation_dtype, dtype_name
from kdecore.arrays.rows import TILE_ELEMENTS, spans
from kdecore.core.state import AttentionState, merge_states, softmax_part

ROWS = 256
"""Queries in a tile: enough for the matrix product to run at full rate."""


def attend_dense(xp: Namespace, q: Array, k: Array, v: Array, scale: float) -> AttentionState:
    """Follow `kdecore.kernels.attend_dense.contract.AttendDense`."""
    groups, n_q, _ = q.shape
    n_k = int(k.shape[1])
    rows_step = max(1, min(n_q, ROWS))
    keys_step = min(n_k, TILE_ELEMENTS // rows_step)
    groups_step = max(1, TILE_ELEMENTS // (rows_step * keys_step))
    dtype = accumulation_dtype(xp, dtype_name(q))
    out = xp.empty((groups, n_q, v.shape[2]), dtype=dtype, device=q.device)
    lse = xp.empty((groups, n_q), dtype=dtype, device=q.device)

    def wide(rows: Array) -> Array:
        return xp.astype(rows, dtype, copy=False)

    for group in spans(groups, groups_step):
        for row in spans(n_q, rows_step):
            queries = wide(q[group, row, :]) * scale
            parts = (
                softmax_part(xp, queries @ xp.matrix_transpose(wide(k[group, key, :])), wide(v[group, key, :]))
                for key in spans(n_k, keys_step)
            )
            part = reduce(partial(merge_states, xp), parts)
            out[group, row, :] = part.out
            lse[group, row] = part.lse
    return AttentionState(out, lse)
