"""What every implementation of `open_tree` promises."""

from typing import Protocol

from kdecore.namespaces import Array, Namespace

GROWTH = 8
"""A list grows by this part of itself in a round (rounding down, at least by one)."""


class OpenTree(Protocol):
    """Open a tree over the keys, for every block of queries, where closed nodes are estimated to err most."""

    def __call__(
        self,
        xp: Namespace,
        q: Array,
        query_index: Array,
        probes: Array,
        keys: Array,
        half_variances: Array,
        half_spread: Array,
        importance: Array,
        own: Array | None,
        slots: int,
    ) -> tuple[Array, Array]:
        """Return each block's list of nodes and single keys, with log-weights.

        A closed node h of c keys weighs, for query i, exp(⟨qᵢ, k̄_h⟩ + σ + ln c): the logits within it are taken as
        normal with half variance σ = ⟨probesᵢ, half_variances_h⟩. Where σ > ln c, c draws reach no such mean, and
        2 √(σ ln c) − ln c takes its place (the random energy model's frozen phase; derived). The estimated error of
        leaving it closed is its weight over the sum of all listed weights, times σ, times its importance; the node's error
        is the sum of the fourth powers of the block's queries' errors, so that what one query needs is not averaged away.

        A list begins with the root. In each round of a list of f slots, the max(1, ⌊f / `GROWTH`⌋) nodes of largest error
        or as many as slots are left, are opened: their two children take their place. Opening a single key leaves it, with
        an empty slot. Which of equal errors is taken, and the order of a list, are left open.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        q
            (G, n_q, d) finite queries times scale.
        query_index
            (G, B, b) int64: the queries of each block.
        probes
            (G, n_q, p) ≥ 0.
        keys
            (G, N + n_k, d) means of nodes and keys, as `node_means` returns them.
        half_variances
            (G, N, p) ≥ 0: half the variance of the keys of each node along p directions.
        half_spread
            (G, N) ≥ 0: half the mean squared distance of a node's keys to their mean, over d.
        importance
            (G, N) ≥ 0: size of the node's values.
        own
            (G, B, b) int64, ascending: positions in the tree of the keys that each block lists by themselves, which are
            taken out of the nodes that hold them; or None.
        slots
            Length of the lists, more than b where there are own keys; below n_k.

        Returns
        -------
        key_index
            (G, B, slots) int64, rows of ``keys``. The first b are the own keys.
        log_weight
            (G, B, slots) of q's dtype: ln of the number of the node's keys that are not own, plus σ with half_spread times
            the block's mean ‖q‖² as half variance; 0 for single keys; −inf for own keys said before, empty slots and nodes
            of own keys only. O(G B slots (b (d + p) + log slots)): no node is looked at whose parent stayed closed.
        """
