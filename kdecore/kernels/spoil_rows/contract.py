"""What every implementation of `spoil_rows` promises."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.state import AttentionState


class SpoilRows(Protocol):
    """Let queries that are not finite do what they do to their results, and round these to the dtype asked for."""

    def __call__(self, xp: Namespace, part: AttentionState, finite: Array, like: Array) -> AttentionState:
        """Return a result that is NaN for queries which are not ``finite`` and see a key, and where its lse is NaN.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        part
            out (G, n_q, d_v) and lse (G, n_q), of the dtype that is computed in; −∞ of a query that sees no key.
        finite
            (G, n_q) bool.
        like
            An array of the dtype that results are to have, floating.

        Returns
        -------
        AttentionState
            out of that dtype and lse. O(G n_q d_v).
        """
