"""Points grouped around pivots: bounds for uniform sampling, and the inverted lists of the neighbour search."""

from dataclasses import dataclass
from itertools import pairwise

from kdecore.arrays.namespace import Array, Namespace
from kdecore.arrays.rows import TILE_ELEMENTS, invert_permutation, spans
from kdecore.kde.primitive import to_host_ints


@dataclass(frozen=True)
class Clusters:
    """A partition of n points.

    Attributes
    ----------
    order
        (n,) int64: points, cluster by cluster.
    label
        (n,) int64: cluster of each point.
    starts
        C + 1 Python ints: cluster j is order[starts[j] … starts[j + 1] − 1], never empty.
    centre
        (C, d), the mean of each.
    """

    order: Array
    label: Array
    starts: tuple[int, ...]
    centre: Array


def nearest(xp: Namespace, x: Array, centre: Array) -> Array:
    """Return the index of the nearest centre (C, d) for each point (n, d), int64 (n,). O(n C d)."""
    half = 0.5 * xp.sum(centre * centre, axis=1)
    step = max(1, TILE_ELEMENTS // int(centre.shape[0]))
    centre_t = xp.matrix_transpose(centre)
    return xp.concat([xp.argmax(x[rows, :] @ centre_t - half, axis=1) for rows in spans(int(x.shape[0]), step)])


def cluster(xp: Namespace, x: Array, pivots: Array) -> Clusters:
    """Group points (n, d) around the nearest of ``pivots`` (C, d): one step of Lloyd's algorithm. O(n C d)."""
    for _ in range(2):
        label = nearest(xp, x, pivots)
        order = xp.argsort(label, stable=True)
        edges = xp.arange(int(pivots.shape[0]) + 1, dtype=label.dtype, device=x.device)
        starts = sorted(set(to_host_ints(xp.searchsorted(xp.take(label, order), edges))))
        ordered = xp.take(x, order, axis=0)
        pivots = xp.stack([xp.mean(ordered[a:b, :], axis=0) for a, b in pairwise(starts)])
    sizes = xp.asarray([b - a for a, b in pairwise(starts)], dtype=xp.int64, device=x.device)
    by_position = xp.repeat(xp.arange(int(pivots.shape[0]), dtype=xp.int64, device=x.device), sizes)
    inverse = invert_permutation(xp, order[None, :])[0, :]
    return Clusters(order, xp.take(by_position, inverse), tuple(starts), pivots)


def segment_max(xp: Namespace, clusters: Clusters, values: Array) -> Array:
    """Return the maximum of ``values`` (n,) over each cluster, (C,)."""
    ordered = xp.take(values, clusters.order)
    starts = clusters.starts
    return xp.stack([xp.max(ordered[a:b]) for a, b in pairwise(starts)])
