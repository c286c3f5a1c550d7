"""What every implementation of `shrink_matrices` promises."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace


class ShrinkMatrices(Protocol):
    """Leave of measured matrices what is surely no chance."""

    def __call__(self, xp: Namespace, matrices: Array, chances: Array, each_block: bool, factor: float) -> Array:
        """Return ``factor`` times what is surely no chance of a group's mean matrix, and of what each has beside that.

        With S the sum of a matrix's squares and c what chance makes of it, that is max(0, 1 − c / S) of the matrix. Of the
        mean of C matrices chance makes the mean of ``chances`` over C; of a matrix less what is left of the mean, its own.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        matrices, chances
            (G, C, d, d_v) and (G, C), as `kdecore.kernels.gap_moments` returns them.
        each_block
            Whether each block has a matrix of its own, or what they have in common is that of all.
        factor
            Finite.

        Returns
        -------
        Array
            (G, C, d, d_v), or (G, 1, d, d_v). O(G C d d_v).
        """
