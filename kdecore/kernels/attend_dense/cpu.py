"""`attend_dense` in Numba for the CPU: `attend_blocks` with one block a group, whose list is all keys."""

import numpy as np

from kdecore.arrays.memory import host_view
from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.state import AttentionState
from kdecore.kernels.attend_blocks import cpu


def attend_dense(xp: Namespace, q: Array, k: Array, v: Array, scale: float) -> AttentionState:
    """Follow `kdecore.kernels.attend_dense.contract.AttendDense`."""
    groups, n_q, d = q.shape
    n_k, d_v = v.shape[1:]
    part = cpu.attend_blocks(
        xp,
        xp.reshape(q, (groups * n_q, d)),
        xp.reshape(k, (groups * n_k, d)),
        xp.reshape(v, (groups * n_k, d_v)),
        np.arange(groups * n_q).reshape(groups, n_q),
        np.arange(groups * n_k).reshape(groups, n_k),
        np.zeros((groups, n_k), host_view(q).dtype),
        scale,
    )
    return AttentionState(xp.reshape(part.out, (groups, n_q, d_v)), xp.reshape(part.lse, (groups, n_q)))
