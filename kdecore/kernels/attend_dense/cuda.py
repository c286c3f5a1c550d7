"""`attend_dense` in Numba CUDA: `attend_blocks` with one block a group, and no lists.

On paper, for n = 131,072 queries and keys of 16 heads, d = d_v = 64 in float32 on an H100: 4 n² · 64 · 16 = 7.0e13
operations, 1.1 s at 67 TFLOP/s and 2.2 s since they are half of what is issued. Tiles of the array API, 2¹⁸ logits, are 67
million operations, 1 µs, in some 27 launches of 5 µs at least: a million tiles take 140 s.

They are faster where there are few queries, and so few thread blocks that most of the device idles: one takes some 7,000
cycles for 32 keys, 0.12 n_k µs in all, and tiles take 0.0005 G n_q n_k µs: as long for 240 queries.
"""

from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.state import AttentionState
from kdecore.kernels.attend_blocks.cuda import attend_lists

TINY: dict[str, int] = {}
"""Tests in the simulator put everything in place in `attend_blocks`."""


def attend_dense(xp: Namespace, q: Array, k: Array, v: Array, scale: float) -> AttentionState:
    """Follow `kdecore.kernels.attend_dense.contract.AttendDense`."""
    (groups, n_q, _), (n_k, d_v) = q.shape, v.shape[1:]
    rows, keys, values = (xp.reshape(x, (x.shape[0] * x.shape[1], x.shape[2])) for x in (q, k, v))
    part = attend_lists(xp, rows, keys, values, None, (groups, n_q, n_k), scale)
    return AttentionState(xp.reshape(part.out, (groups, n_q, d_v)), xp.reshape(part.lse, (groups, n_q)))
