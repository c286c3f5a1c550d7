"""What every implementation of `attend_dense` promises, and how wide the rows are that it takes."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.state import AttentionState
from kdecore.kernels.attend_blocks.contract import LIMITS as LIMITS


class AttendDense(Protocol):
    """Let every query attend to every key."""

    def __call__(self, xp: Namespace, q: Array, k: Array, v: Array, scale: float) -> AttentionState:
        """Return exact softmax attention.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        q, k, v
            (G, n_q, d), (G, n_k, d), (G, n_k, d_v) of one floating dtype, half precision on accelerators only; n_k ≥ 1.
        scale
            Finite factor on ⟨q, k⟩.

        Returns
        -------
        AttentionState
            out (G, n_q, d_v) and lse (G, n_q), float64 for float64 and float32 for the others.
            O(G n_q n_k (d + d_v)) time; temporaries do not grow with n_q or n_k.
        """
