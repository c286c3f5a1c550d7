"""What every implementation of `open_tree` promises."""

from typing import Protocol

from kdecore.namespaces import Array, Namespace

START_SHARE = 16
"""A list begins with the nodes of a level that are no more than one in so many of its slots, where there are such."""
GROWTH = 8
"""A round opens one in so many of the nodes opened so far (rounding down, at least one)."""
REFRESH = 4
"""Errors are estimated anew when so many times the nodes are listed."""


class OpenTree(Protocol):
    """Open a tree over the keys, for every block of queries, where closed nodes are estimated to err most."""

    def __call__(
        self,
        xp: Namespace,
        q: Array,
        scale: float,
        coordinates: Array,
        query_index: Array,
        keys: Array,
        spread: Array,
        variances: Array,
        sizes: Array,
        own: Array | None,
        slots: int,
        start: tuple[int, int, int],
    ) -> tuple[Array, Array]:
        """Return each block's list of nodes and single keys, with log-weights.

        A closed node h of c keys weighs, for query i, exp(scale ⟨qᵢ, k̄_h⟩ + σ + ln c): the logits within it are taken as
        normal with half variance σ = ½ Σ_t coordinatesᵢₜ² variances_hₜ. Where σ > ln c, c draws reach no such mean, and
        2 √(σ ln c) − ln c takes its place (the random energy model's frozen phase; derived). The estimated error of
        leaving it closed is its weight over the sum of all weights, times σ, times its size; the node's error is the sum of
        the fourth powers of the block's queries' errors, so that what one query needs is not averaged away.

        A list begins with the f nodes of ``start``, whose keys are all that are seen; s of the slots are for own keys. A
        round orders the c = min(max(1, ⌊f / `GROWTH`⌋), slots − s − f) closed nodes of
        largest error (all, if they are fewer), the largest first, opens those for which there is room, and adds c to f. An
        inner node's children take its place, which takes one slot more; a leaf of m keys is listed key by key, which takes
        m − 1 slots more, and keeps its weight in the sums. The list ends with a round that opens nothing, or with f =
        slots − s. Sums of weights are those of the round's beginning. A node's error is that of the first round after it was
        listed, but all are estimated anew in a round that begins with `REFRESH` times the f of the last one that did so, or
        more. Which of equal errors is taken, and the order of a list, are left open.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        q
            (G, n_q, d) queries, of half precision on accelerators only. One with a number that is not finite counts as 0.
            All other numbers are of the dtype that it is computed in, float64 for float64 and float32 for the others.
        scale
            Finite factor on ⟨q, k⟩.
        coordinates
            (G, n_q, p) of the queries, times scale. One whose square is not finite counts as 0.
        query_index
            (G, B, b) int64: the queries of each block.
        keys
            (G, N + n_k, d): mean keys of the nodes, and the keys in the order of the tree.
        spread, variances, sizes
            (G, N), (G, N, p) and (G, N): as `kdecore.kernels.node_summaries.contract.TreeNodes` has them.
        own
            (G, B, s) int64, ascending: positions in the tree of keys that each block lists by themselves, which are taken
            out of the nodes that hold them; or None.
        slots
            Length of the lists, at least s + f; below the number of keys seen.
        start
            (level, first, end): lists begin with the nodes first … end − 1 of a level.

        Returns
        -------
        key_index
            (G, B, slots) int64, rows of ``keys``. The first s are the own keys.
        log_weight
            (G, B, slots): ln of the number of the node's keys that are not own, plus σ with spread times the
            block's mean ‖scale q‖² / 2d as half variance; 0 for single keys; −inf for empty slots, own keys said before and
            keys or nodes that are all own. O(G B slots (b (d + p) + log slots)): no node is looked at whose parent stayed
            closed.
        """


def first_nodes(
    slots: int, nodes: int, level: int = 0, first: int = 0, end: int = 1, share: int = START_SHARE
) -> tuple[int, int, int]:
    """Return ``start`` of lists that see the nodes first … end − 1 of a level only, in a tree of so many nodes.

    That is, what lies under them at the last level that has no more than one in ``share`` of the slots, own keys left out,
    or they themselves.
    """
    last = ((nodes + 1) // 2).bit_length() - 1
    more = max(0, min((slots // share // (end - first)).bit_length() - 1, last - level))
    return level + more, first << more, end << more
