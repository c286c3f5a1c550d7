"""What every implementation of `draw_indices` promises."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace


class DrawIndices(Protocol):
    """Sample keys for every block, with given inclusion probabilities and without replacement."""

    def __call__(
        self, xp: Namespace, weights: Array, window_start: Array, window_size: int, starts: Array, count: int
    ) -> tuple[Array, Array]:
        """Draw ``count`` distinct positions outside each block's window.

        Position j is drawn with probability π_j = count · weights[j] / T, where T is the sum of the weights outside the
        window (systematic sampling, Madow 1949): ``count`` points spaced T/count apart, the first at starts · T/count,
        each take the position in whose share of [0, T) they fall. Positions that lie next to each other are drawn
        together more rarely than independent draws would, so an order by similarity stratifies the sample.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        weights
            (G, n) float64 > 0, with count · max(weights) ≤ T in every block, so that no position is drawn twice.
        window_start
            (G, B) int64: the window of block i is window_start[:, i] … window_start[:, i] + window_size − 1.
        window_size
            Positions in a window, 0 ≤ window_size ≤ n − count.
        starts
            (G, B) float64 in [0, 1), the only randomness.
        count
            Positions to draw for each block, at least 1.

        Returns
        -------
        positions
            (G, B, count) int64, ascending in each block.
        log_inclusion
            (G, B, count) float64, log π of each drawn position, ≤ 0 up to rounding.
            O(G (n + B · count · log n)) by binary search; O(G (n + B · count)) by a guide table where weights differ little.
        """
