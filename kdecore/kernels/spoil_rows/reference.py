"""`spoil_rows` in the array API."""

from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.state import AttentionState


def spoil_rows(xp: Namespace, part: AttentionState, finite: Array, like: Array) -> AttentionState:
    """Follow `kdecore.kernels.spoil_rows.contract.SpoilRows`."""
    lse = xp.where(finite | (part.lse == -xp.inf), part.lse, xp.nan)
    out = xp.where(xp.isnan(lse)[..., None], xp.nan, part.out)
    return AttentionState(xp.astype(out, like.dtype, copy=False), lse)
