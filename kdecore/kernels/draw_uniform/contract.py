"""What every implementation of `draw_uniform` promises."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace


class DrawUniform(Protocol):
    """Make the numbers of `kdecore.arrays.random.uniform`, the same bits everywhere."""

    def __call__(self, xp: Namespace, seed: int, stream: int, shape: tuple[int, ...], device: object) -> Array:
        """Return uniform random numbers.

        Parameters
        ----------
        xp
            Array namespace to make them in.
        seed, stream
            As in `kdecore.arrays.random.uniform`.
        shape
            Of the result, of fewer than 2**32 numbers.
        device
            Where.

        Returns
        -------
        Array
            float64 in [0, 1), with 53 random bits each.
        """
