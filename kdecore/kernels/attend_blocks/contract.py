"""What every implementation of `attend_blocks` promises."""

from typing import Protocol

from kdecore.merge import Part
from kdecore.namespaces import Array, Namespace


class AttendBlocks(Protocol):
    """Let each block of queries attend to its own list of keys."""

    def __call__(
        self,
        xp: Namespace,
        q: Array,
        k: Array,
        v: Array,
        query_index: Array,
        key_index: Array,
        log_weight: Array,
        scale: float,
        bias: Array | None = None,
        before: Part | None = None,
    ) -> Part:
        """Return softmax attention with logits scale · ⟨q, k⟩ + log_weight + bias.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        q, k, v
            (R_q, d), (R_k, d), (R_k, d_v) rows of one floating dtype; half precision on accelerators only. All other numbers
            are of the dtype that it is computed in, float64 for float64 and float32 for the others.
        query_index
            (N, b) int64 into the rows of q: the queries of each block. A row of q is in one block at most; it may be there
            again right after itself.
        key_index
            (N, s) int64 into the rows of k and v: the keys of each block.
        log_weight
            (N, s); −inf where a slot does not count.
        scale
            Finite factor on ⟨q, k⟩.
        bias
            (N, b, s), or (1, b, s) for all blocks: what is added to the logit of each query and slot, −inf
            where the query does not see the slot's key, which is finite then; None for nothing.
        before
            Attention to other keys, out (R_q, d_v) and lse (R_q,), to be merged with; its memory may be used for the result.

        Returns
        -------
        Part
            out (R_q, d_v) and lse (R_q,) in q's order; those of ``before``, or 0 and −inf, for a query in no
            block or without counting slots.
            O(N b s (d + d_v)) time; temporaries do not grow with N.
        """
