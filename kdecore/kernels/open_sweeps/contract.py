"""What every implementation of `open_sweeps` promises, and how much it takes."""

from typing import Protocol

from kdecore.kernels.site import Largest, beyond
from kdecore.namespaces import Array, Namespace

GROWTH = 2.5
"""A node whose error is e times as large is taken to need e**`GROWTH` times as many slots, until nothing below it errs more.
1.5 to 4 err about as much (bench/NOTES.md)."""
START_SHARE = 4
"""A list begins with the nodes of a level that are no more than one in so many of its slots, where there are such."""
SUMMED_SWEEPS = 4
"""Sweeps at whose beginning weights are summed anew: later ones change the sums little."""
MORE_SWEEPS = 6
"""Sweeps beyond one for each level."""
OCTAVES = 96
"""Thresholds are looked for so many octaves below the largest rank, in so many halvings as `HALVINGS`."""
HALVINGS = 11
RESIDENT = 264
"""Blocks of queries that are worked on at once, where they need memory of their own: two on each of 132 multiprocessors."""
PART = 2**20
"""Logits, at most, of what the blocks list that the array API opens at once, but for one block of each group."""
LEAST_SHARE, LARGEST_SHARE = -20.0, 60.0
"""A node's logit counts as at least, and at most, so much more than the logarithm of all that was listed when its parent
was opened: of what hardly counts, nodes of large spread are opened where slots are left, which may hide a key that does."""
LARGEST_ERROR = 1e30
"""Of the sum of fourth powers, so that ranks are finite."""
MOST_ROWS, MOST_SLOTS, WIDEST, MOST_BYTES = 128, 1024, 128, 2**15
"""Queries of a block, slots of a list, columns of a key, and bytes of all a block's queries, at most, in Triton: of more,
registers are spilled on sm_80 or sm_90 (tests/triton_compile.py)."""
MOST_NODES = 2**24 - 1
"""Of a tree, in Triton: float32 holds their numbers."""


def triton_limit(largest: Largest) -> str | None:
    """Return why the kernel in Triton doesn't take so much, or None where it does."""
    sizes = (
        ("d", WIDEST, largest.d),
        ("directions", WIDEST, largest.directions),
        ("queries of a block", MOST_ROWS, largest.rows),
        ("bytes of a block's queries", MOST_BYTES, largest.rows * largest.d * largest.item_bytes),
        ("slots", MOST_SLOTS, largest.slots),
        ("nodes", MOST_NODES, largest.nodes),
    )
    return next((said for size in sizes if (said := beyond(*size))), None)


LIMITS = {"triton": triton_limit}


class OpenSweeps(Protocol):
    """Open a tree over the keys for every block of queries, in few sweeps over what is listed."""

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

        Arguments, weights w of nodes, and the list that is returned are those of
        `kdecore.kernels.open_tree.contract.OpenTree`, where a round opens the nodes of largest error; here a sweep opens all
        whose rank is above a threshold at once, which follows from what slots are left (derived). Parallel machines like
        that, and it errs less: keys that stand out are hidden deep in the tree, and to open nodes that need many slots for
        few keys finds them.

        A list begins with the nodes of ``start``. With L, for each query, ln of the sum of weights over what is listed,
        opened leaves among it, at the beginning of the sweep that opens a node's parent (of the last of `SUMMED_SWEEPS` for
        later ones; for the first nodes, over these), the error of a node h of m keys for query i is
        exp(ln w − L, within `LEAST_SHARE` and `LARGEST_SHARE`) · σ · size, and its rank
        r_h = min(Σ_i error⁴, `LARGEST_ERROR`)**(`GROWTH` / 4) / m. A sweep takes T as the least threshold found for which
        what is listed needs at most slots − s: a node with r_h > T is predicted to need min(m, max(2, r_h / T)) slots, or m
        where it is a leaf, any other one, and so does a key. log₂ T is what `HALVINGS` halvings of [t − `OCTAVES`, t] leave
        as the upper end, t = 1 + log₂ of the largest rank, so that nothing is above where nothing fits. All nodes above T
        are opened: a leaf is listed key by key, and the children of the others take their places. The list ends with a sweep
        that opens nothing, or after as many as there are levels from that of ``start`` to the leaves and `MORE_SWEEPS` more.

        Parameters and returns: see `kdecore.kernels.open_tree.contract.OpenTree`. q's logits may be rounded as its dtype
        and that of ``keys`` are multiplied; so may what is opened, therefore, where two ranks are alike.
        O(G B slots (b (d + p) + `HALVINGS` log n)): what is listed, and every parent of it, is weighed once or twice.
        """
