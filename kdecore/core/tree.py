"""The shape of a balanced binary tree over n ordered rows, which follows from n alone.

Node i of level ℓ holds the positions ⌊i·n / 2**ℓ⌋ … ⌊(i + 1)·n / 2**ℓ⌋ − 1, so that nodes of a level differ by at most one
row, for any n. Nodes are numbered through all levels: h = 2**ℓ − 1 + i, with the children 2h + 1 and 2h + 2. The nodes of
the last level are the leaves.
"""

from typing import NamedTuple

from kdecore.arrays.namespace import Array, Namespace, host


def depth(n: int, leaf_size: int) -> int:
    """Return the level of the leaves: the least one whose nodes hold at most ``leaf_size`` rows."""
    return (-(-n // leaf_size) - 1).bit_length()


def node_count(n: int, leaf_size: int) -> int:
    """Return how many nodes there are, leaves included."""
    return (2 << depth(n, leaf_size)) - 1


def bounds(n: int, level: int) -> Array:
    """Return where the nodes of a level begin, and where the last one ends: NumPy int64 (2**level + 1,)."""
    return (host.arange(2**level + 1, dtype=host.int64) * n) >> level


def leaves(n: int, leaf_size: int) -> int:
    """Return how many leaves there are."""
    return 1 << depth(n, leaf_size)


def cuts(n: int, parts: int, level: int) -> Array:
    """Return where nodes of a level begin, and the last one ends, if they consist of whole ones of ``parts`` equal parts.

    Part j holds the positions ⌊j·n / parts⌋ … ⌊(j + 1)·n / parts⌋ − 1, node i of level ℓ the parts ⌊i·parts / 2**ℓ⌋ …
    ⌊(i + 1)·parts / 2**ℓ⌋ − 1: all nodes of the level if there are at least as many parts. Those of a tree's leaves, or of
    any other power of two, make its `bounds`. NumPy int64 (2**level + 1,).
    """
    return bounds(parts, level) * n // parts


def node_bounds(xp: Namespace, node: Array, n: int) -> tuple[Array, Array]:
    """Return where the positions of nodes begin and end; all int64, as ``node``."""
    edges = xp.bitwise_left_shift(
        xp.ones((n.bit_length() + 1,), dtype=node.dtype, device=node.device),
        xp.arange(1, n.bit_length() + 2, dtype=node.dtype, device=node.device),
    )
    number = node + 1
    level = xp.reshape(xp.searchsorted(edges, xp.reshape(number, (-1,)), side="right"), node.shape)
    level = xp.astype(level, node.dtype, copy=False)
    place = number - (xp.ones_like(node) << level)
    return (place * n) >> level, ((place + 1) * n) >> level


def depth_of(nodes: int) -> int:
    """Return the level of the leaves of a tree of so many nodes."""
    return ((nodes + 1) // 2).bit_length() - 1


class BlockQueries(NamedTuple):
    """Queries, some or all of which stand in blocks.

    All numbers but those of q are of the dtype that is computed in, float64 for float64 and float32 for the others.

    Attributes
    ----------
    q
        (G, n_q, d), of half precision on accelerators only. One with a number that is not finite counts as 0.
    scale
        Finite factor on ⟨q, k⟩.
    coordinates
        (G, n_q, p) of the queries, times scale. One whose square is not finite counts as 0.
    index
        (G, B, b) int64: the queries of each block.
    apart
        Whether half variances are each query's own where errors are estimated, as blocks of queries that are less alike
        need; or the block's, in proportion to the query's squared norm, which takes less time.
    """

    q: Array
    scale: float
    coordinates: Array
    index: Array
    apart: bool = False


class Tree(NamedTuple):
    """What decides how a tree of N nodes over n_k keys is opened.

    Attributes
    ----------
    keys
        (G, N + n_k, d): mean keys of the nodes, and the keys in the order of the tree.
    spread, variances, sizes
        (G, N), (G, N, p) and (G, N), at least 0: as the method scales what `node_summaries` finds.
    """

    keys: Array
    spread: Array
    variances: Array
    sizes: Array

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return int(self.spread.shape[1])

    @property
    def n(self) -> int:
        """Number of keys."""
        return int(self.keys.shape[1]) - self.nodes
