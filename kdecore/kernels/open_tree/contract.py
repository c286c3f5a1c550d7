"""What every implementation of `open_tree` promises."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.tree import BlockQueries, Tree, depth_of
from kdecore.kernels.site import Largest, beyond

START_SHARE = 12
"""A list begins with the nodes of a level that are no more than one in so many of its slots, where there are such."""
STEP = 2
"""Levels between a node and the nodes that take its place: four grandchildren, which lie side by side."""
LEAST = 2.0**-20
"""What takes the place of a threshold that is less, where it is to be doubled."""
ALONG = 0.5
"""Part of the half variance along coordinates that counts; the rest follows from spreads.

Nodes stay closed where their variances happen to be small, so that these are less than the truth (docs/treecode.md).
"""
SHORT = 2.2
"""The largest of c normal numbers is expected √(2 R) deviations above their mean, R = (ln c)² / (ln c + `SHORT`), to 2 % for
all c ≥ 2; its limit for large c, √(2 ln c), is 1.6 times as much for 4."""

MOST_ROWS, WIDEST, MOST_BYTES = 128, 128, 2**15
"""Queries of a block, columns of a key, and bytes of all a block's queries, at most, in Triton: of more, registers are
spilled on sm_80 or sm_90 (tests/triton_compile.py)."""
RESIDENT = 264
"""Blocks of queries that are worked on at once, where they need memory of their own: two on each of 132 multiprocessors."""
MOST_NODES = 2**24 - 1
"""Of a tree, in Triton: float32 holds their numbers."""


def triton_limit(largest: Largest) -> str | None:
    """Return why the kernel in Triton doesn't take so much, or None where it does."""
    sizes = (
        ("d", WIDEST, largest.d),
        ("directions", WIDEST, largest.directions),
        ("queries of a block", MOST_ROWS, largest.rows),
        ("bytes of a block's queries", MOST_BYTES, largest.rows * largest.d * largest.item_bytes),
        ("nodes", MOST_NODES, largest.nodes),
    )
    return next((said for size in sizes if (said := beyond(*size))), None)


LIMITS = {"triton": triton_limit}


class OpenTree(Protocol):
    """Open a tree over the keys, for every block of queries, where nodes are estimated to err more than a threshold."""

    def __call__(
        self,
        xp: Namespace,
        queries: BlockQueries,
        tree: Tree,
        threshold: Array,
        most: int,
        start: tuple[int, int, int],
    ) -> tuple[Array, Array, Array, Array]:
        """Return each block's list of nodes and single keys, with log-weights, and what closed nodes get of the attention.

        A closed node h of c keys weighs, for query i, exp(scale ⟨qᵢ, k̄_h⟩ + σ_h + ln c). The logits within it are taken as
        normal with half variance σ_h = `ALONG` Σ_t m_t variances_ht + m spread_h, where m_t is half the mean over the
        block's queries of coordinates_t², and m their mean ‖scale q‖² / 2d. Where σ_h > ln c, c draws reach no such mean,
        and 2 √(σ_h ln c) − ln c takes its place (the random energy model's frozen phase; derived). The estimated error of
        leaving it closed is the fourth root of the sum, over the block's queries, of (its weight over the sum of all
        weights, times σ_hi)⁴, times its size: what one query needs is not averaged away. σ_hi is σ_h ‖qᵢ‖² over the mean of
        ‖q‖², or σ_h where that is 0; where queries are taken apart, it is what σ_h would be of query i alone.

        A block goes down the tree once. Of the nodes of a level, at first those of ``start``, those whose error is at most
        the threshold are closed. The descendants of the others, two levels further down, or one where that leaves an even
        number of levels, are the nodes of the next level; of a leaf it is the keys, one by one. Sums of weights are those of
        the nodes closed before and the nodes of the level, or of the latter alone where a node opened weighed so much more
        that the dtype holds nothing of the others. Where a list would have more than ``most`` slots the block begins
        anew with twice the threshold, or twice `LEAST` if that is more.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        queries, tree
            Queries in blocks, and what decides how the tree is opened.
        threshold
            (), at least 0.
        most
            Length of a list, at most: at least the nodes of ``start``.
        start
            (level, first, end): lists begin with the nodes first … end − 1 of a level.

        Returns
        -------
        key_index
            (G, B, s) int64, rows of the tree's keys, ascending: closed nodes, then single keys; s as long as the longest
            list, or ``most``, so that accelerators read nothing back. 0 in slots that a list doesn't have.
        log_weight
            (G, B, s): σ_h + ln c, where σ_h > R = (ln c)² / (ln c + `SHORT`) with 2 √(σ_h R) − R for σ_h, which is meant
            before freezing: the largest of c draws is expected there, and no more; 0 for single keys; −inf for slots that a
            list doesn't have. Trees are opened by the larger weight: what may be large is looked at, and counts as what it
            is likely to be (derived).
        share
            (G, B, s): mean share of the attention that a closed node gets of the block's queries, by the weights of the
            nodes closed and the leaves opened; 0 for others.
        counts
            (G, B) int64: how many slots each list has.
            O(Σ counts · b · (d + p)): no node is looked at whose parent stayed closed.
        """


def first_nodes(slots: int, nodes: int, level: int = 0, first: int = 0, end: int = 1) -> tuple[int, int, int]:
    """Return ``start`` of lists that see the nodes first … end − 1 of a level only, in a tree of so many nodes.

    That is, what lies under them at the last level that has no more than one in `START_SHARE` of the slots, or they
    themselves.
    """
    more = max(0, min((slots // START_SHARE // (end - first)).bit_length() - 1, depth_of(nodes) - level))
    return level + more, first << more, end << more
