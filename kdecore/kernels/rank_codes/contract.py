"""What every implementation of `rank_codes` promises, and how much it takes."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.site import Largest, beyond

SAMPLE = 1023
"""Rows, evenly spaced, that quantiles and variances are taken from."""
RATIO = 3.0
"""A direction's variance counts so many times less after each bit that it is given. 4 would be right for uniform
coordinates, and errs more (bench/NOTES.md)."""
MOST_COLUMNS = 64
"""Coordinates, at most, in Numba CUDA, which keeps their variances in shared memory."""


def numba_cuda_limit(largest: Largest) -> str | None:
    """Return why the kernel in Numba CUDA doesn't take so much, or None where it does."""
    return beyond("directions", MOST_COLUMNS, largest.directions)


LIMITS = {"numba-cuda": numba_cuda_limit}


class RankCodes(Protocol):
    """Number the cells of a grid of quantiles, along a curve through all of them."""

    def __call__(self, xp: Namespace, x: Array, bits: int, in_order: int = 0) -> Array:
        """Return the cell of each row.

        The sample are the rows ⌊j n / S⌋, S = min(`SAMPLE`, n). Bits are dealt out one by one, each to the coordinate whose
        variance over the sample is largest (of equal ones the first), which counts `RATIO` times less then. With r sampled
        numbers at most as large as a coordinate, its place at b bits is c = ⌊r 2^b / (S + 1)⌋, and its b-th bit the last
        one of the Gray code c ^ (c >> 1). The code is the inverse Gray code of all bits, in the order in which they were
        dealt, so that cells which follow each other differ in one bit.

        Parameters
        ----------
        xp
            Array namespace of ``x``.
        x
            (G, n, p) float32 or float64; numbers that are not finite count as 0.
        bits
            Of a code, at most 30.
        in_order
            The first so many bits are the node of level ``in_order`` of a tree (`kdecore.core.tree`) that holds the row's
            position.

        Returns
        -------
        Array
            (G, n) int32 in [0, 2**bits). O(G n (p log SAMPLE + bits)).
        """
