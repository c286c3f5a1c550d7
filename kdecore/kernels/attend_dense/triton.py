"""`attend_dense` in Triton for NVIDIA devices: `attend_blocks` with one block a group, and no lists.

On paper, for n = 131,072 queries and keys of 16 heads, d = d_v = 64 in bfloat16: 4 n² · 64 · 16 = 7.0e13 operations in
products, 88 ms at an H100's 798 TFLOP/s, and 2.7e11 exp2, 75 ms at 16 for each of 132 multiprocessors and cycle, which
overlap only in part: 176 ms at the 400 TFLOP/s that fused kernels are assumed to reach. From memory come 0.8 GB once; tiles
of 128 queries read a head's 33 MB of keys and values 1,024 times through the second-level cache, 550 GB, about as long as
the products: the programs that run together meet the same keys at about the same time.
"""

from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.state import AttentionState
from kdecore.kernels.attend_blocks.triton import attend_lists


def attend_dense(xp: Namespace, q: Array, k: Array, v: Array, scale: float) -> AttentionState:
    """Follow `kdecore.kernels.attend_dense.contract.AttendDense`, within the limit of `attend_blocks`."""
    groups, n_q, _ = q.shape
    rows, keys, values = (x.reshape(-1, x.shape[2]) for x in (q, k, v))
    part = attend_lists(rows, keys, values, None, (groups, n_q, v.shape[1]), scale)
    return AttentionState(part.out.reshape(groups, n_q, v.shape[2]), part.lse.reshape(groups, n_q))
