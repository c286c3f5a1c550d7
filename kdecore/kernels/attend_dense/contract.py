"""What every implementation of `attend_dense` promises."""

from typing import Protocol

from kdecore.merge import Part
from kdecore.namespaces import Array, Namespace


class AttendDense(Protocol):
    """Let every query attend to every key."""

    def __call__(self, xp: Namespace, q: Array, k: Array, v: Array, scale: float) -> Part:
        """Return exact softmax attention.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        q, k, v
            (G, n_q, d), (G, n_k, d), (G, n_k, d_v), float32 or float64, n_k ≥ 1.
        scale
            Finite factor on ⟨q, k⟩.

        Returns
        -------
        Part
            out (G, n_q, d_v) and lse (G, n_q) of q's dtype.
            O(G n_q n_k (d + d_v)) time; temporaries do not grow with n_q or n_k.
        """
