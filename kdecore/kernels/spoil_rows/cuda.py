"""`spoil_rows` in Numba CUDA: a result is read once and written once, in the dtype asked for.

Traffic on paper: 2,097,152 rows of 64 float32 numbers read and as many bfloat16 numbers written are 0.81 GB, 0.27 ms at 3.0
TB/s. Array operations read and write three times as much, and take six launches.
"""

from typing import Any

import numpy as np
from numba import cuda

from kdecore.arrays.namespace import Array, Namespace, dtype_name
from kdecore.core.state import AttentionState
from kdecore.kernels.runtime.cuda_jit import WRITERS, CudaKernel, cuda_kernel, launch

THREADS = 256
NUMBERS = 8
"""Numbers that a thread reads and writes, a block's width apart."""


def spoil_rows(xp: Namespace, part: AttentionState, finite: Array, like: Array) -> AttentionState:
    """Follow `kdecore.kernels.spoil_rows.contract.SpoilRows`."""
    groups, n_q, d_v = part.out.shape
    rows = groups * n_q
    out = xp.empty((groups, n_q, d_v), dtype=like.dtype, device=part.out.device)
    lse = xp.empty((groups, n_q), dtype=part.lse.dtype, device=part.lse.device)
    given = xp.reshape(part.out, (rows, d_v)), xp.reshape(part.lse, (-1,)), xp.reshape(finite, (-1,))
    kernel = SPOIL.get(dtype_name(like), SPOIL["number"])
    blocks = -(-rows * max(1, d_v) // (THREADS * NUMBERS))
    launch(kernel, blocks, THREADS, *given, xp.reshape(out, (rows, d_v)), xp.reshape(lse, (-1,)))
    return AttentionState(out, lse)


def make(stored: str, write: Any) -> CudaKernel:
    """Make the kernel."""

    @cuda_kernel("number[:, ::1], number[::1], boolean[::1], stored[:, ::1], number[::1]", THREADS, stored)
    def spoil(rows, lse, finite, out, out_lse):
        """Write some numbers of a result; the first of a row, or a row without any, with its logarithm."""
        d = max(1, rows.shape[1])
        first = cuda.blockIdx.x * THREADS * NUMBERS + cuda.threadIdx.x
        for j in range(NUMBERS):
            i = first + j * THREADS
            row = i // d
            if row < rows.shape[0]:
                kept = lse[row]
                spoilt = kept != kept or (not finite[row] and kept != -np.inf)
                if rows.shape[1] > 0:
                    out[row, i - row * d] = write(rows.dtype.type(np.nan) if spoilt else rows[row, i - row * d])
                if i == row * d:
                    out_lse[row] = lse.dtype.type(np.nan) if spoilt else kept

    return spoil


SPOIL = {name: make(name, write) for name, write in WRITERS.items()}
"""The kernel, by the dtype of what it writes."""
