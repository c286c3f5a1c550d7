"""What every implementation of `draw_indices` promises."""

from typing import NamedTuple, Protocol

from kdecore.arrays.namespace import Array, Namespace


class Weights(NamedTuple):
    """How much more than the others keys are drawn: key i weighs 1 + sizes[i] / mean, 1 + sizes[i] where the mean is 0.

    Attributes
    ----------
    sizes
        (G, n) floating-point ≥ 0.
    mean
        (G,) ≥ 0, of the same dtype.
    """

    sizes: Array
    mean: Array


class DrawIndices(Protocol):
    """List keys for every block: a window of their order, and a sample of the others, without replacement."""

    def __call__(
        self,
        xp: Namespace,
        order: Array,
        weights: Weights | None,
        window_start: Array,
        window_size: int,
        seed: int,
        stream: int,
        count: int,
        dtype: str,
    ) -> tuple[Array, Array]:
        """Return each block's window, and behind it ``count`` distinct keys outside.

        The key at place j of the order is drawn with probability π_j = count · w_j / T, where T is the sum of the weights
        outside the window, and no weight is more than (m − window_size) / count, with which no probability exceeds 1
        (systematic sampling, Madow 1949): ``count`` points spaced T / count apart, the first at u · T / count, each take the
        place in whose share of [0, T) they fall. Places that lie next to each other are drawn together more rarely than
        independent draws would, so an order by similarity stratifies the sample. Weights and sums are in float64.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        order
            (G, m) int64: the keys to choose from, each once.
        weights
            Of all keys, or None where all weigh 1.
        window_start
            (G, B) int64: the window of block i is window_start[:, i] … window_start[:, i] + window_size − 1 of the order.
        window_size
            Places in a window, 0 ≤ window_size ≤ m − count.
        seed, stream
            Of the only randomness: block i of group g has the number g · B + i of
            `kdecore.kernels.draw_uniform.contract.DrawUniform` as its u.
        count
            Keys to draw for each block, at least 1.
        dtype
            Of log-weights, ``"float32"`` or ``"float64"``.

        Returns
        -------
        key_index
            (G, B, window_size + count) int64: keys of the window, then those drawn, each in their order.
        log_weight
            The same shape: 0 in the window, −log π of each key drawn, ≥ 0 up to rounding.
            O(G (m + B · count · log m)) by binary search; O(G (m + B · (window_size + count))) by a guide table where
            weights differ little.
        """
