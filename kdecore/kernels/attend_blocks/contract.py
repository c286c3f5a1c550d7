"""What every implementation of `attend_blocks` promises, and how wide the rows are that it takes."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.state import AttentionState
from kdecore.kernels.site import Largest

WIDEST, WIDEST_BACKWARD = 2048, 576
"""Bytes of a key and a value, padded, at most, in Triton, and for gradients there: tiles of wider ones, and of their
gradients, do not fit the registers."""


def parts(width: int) -> tuple[int, int]:
    """Cut a width into a power of two and what is left, padded to one, 0 for none; into one where that is no longer.

    Tensor cores take 16 columns at a time: 65, as of a tree's values with their spread, become 64 and 16, and not 128.
    """
    whole = power_above(max(16, width))
    main = whole // 2
    rest = power_above(max(16, width - main))
    return (main, rest) if 16 <= main < width and rest < main else (whole, 0)


def power_above(x: int) -> int:
    """Return the least power of two that is at least x ≥ 1."""
    return 1 << (x - 1).bit_length()


def padded_bytes(largest: Largest) -> int:
    """Return the bytes of a key and a value, padded."""
    return (sum(parts(largest.d)) + sum(parts(largest.d_v))) * largest.item_bytes


def triton_limit(largest: Largest) -> str | None:
    """Return why the kernel in Triton doesn't take so much, or None where it does."""
    return _wider(WIDEST, largest)


def backward_limit(largest: Largest) -> str | None:
    """Return the same of its gradients."""
    return _wider(WIDEST_BACKWARD, largest)


def _wider(most: int, largest: Largest) -> str | None:
    found = padded_bytes(largest)
    sizes = f"d = {largest.d}, d_v = {largest.d_v}, {largest.item_bytes} bytes each"
    return f"takes a key and a value of ≤ {most} bytes, padded, got {found} ({sizes})" if found > most else None


LIMITS = {"triton": triton_limit}


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
        before: AttentionState | None = None,
        groups: int = 1,
        whole: bool = False,
    ) -> AttentionState:
        """Return softmax attention with logits scale · ⟨q, k⟩ + log_weight + bias.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        q, k, v
            (R_q, d), (R_k, d), (R_k, d_v) rows of one floating dtype; half precision on accelerators only. All other numbers
            are of the dtype that it is computed in, float64 for float64 and float32 for the others.
        query_index
            (N, b) int64 into the rows of q of a block's group: the queries of each block. A row of q is in one block at
            most; it may be there again right after itself.
        key_index
            (N, s) int64 into the rows of k and v of a block's group: the keys of each block.
        log_weight
            (N, s); −inf where a slot does not count.
        scale
            Finite factor on ⟨q, k⟩.
        bias
            (N, b, s), or (1, b, s) for all blocks: what is added to the logit of each query and slot, −inf
            where the query does not see the slot's key, which is finite then; None for nothing.
        before
            Attention to other keys, out (R_q, d_v) and lse (R_q,), to be merged with; its memory may be used for the result.
        groups
            How many groups blocks, and rows, are of: as many of each in every group, one group after another.
        whole
            Whether every row of q is in a block, so that nothing has to be written for those in none.

        Returns
        -------
        AttentionState
            out (R_q, d_v) and lse (R_q,) in q's order; those of ``before``, or 0 and −inf, for a query in no
            block or without counting slots.
            O(N b s (d + d_v)) time; temporaries do not grow with N.
        """
