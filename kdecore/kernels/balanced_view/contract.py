"""What every implementation of `balanced_view` promises, and how much it takes."""

from typing import NamedTuple, Protocol

from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.site import Largest, beyond

RIDGE = 1e-6
"""Part of the mean eigenvalue that is added to all."""
ORTHOGONAL_ITERATIONS = 2
SMALLEST_SQUARE = 1e-12
"""Squared singular values of the logits count as this part of the largest at least."""
MOST_ROWS, MOST_COLUMNS = 256, 16
"""Dimensions and coordinates, at most, in Numba CUDA, which keeps a basis in shared memory."""


def numba_cuda_limit(largest: Largest) -> str | None:
    """Return why the kernel in Numba CUDA doesn't take so much, or None where it does."""
    return beyond("d", MOST_ROWS, largest.d) or beyond("directions", MOST_COLUMNS, largest.directions)


LIMITS = {"numba-cuda": numba_cuda_limit}


class View(NamedTuple):
    """Coordinates of queries and keys.

    Attributes
    ----------
    queries, keys
        (G, d, p): what turns queries and keys into coordinates; those of queries are scaled.
    centre
        (G, 1, p): coordinates of the mean key.
    half_norm
        (G,): mean ‖scale q‖² / 2d, by which a spread becomes half the variance of a query's logits.
    """

    queries: Array
    keys: Array
    centre: Array
    half_norm: Array


class BalancedView(Protocol):
    """Find coordinates in which queries and keys have the same second moment, a diagonal one."""

    def __call__(
        self, xp: Namespace, query_moment: Array, key_moment: Array, centre: Array, scale: float, p: int, like: Array
    ) -> View:
        """Return what turns queries and keys into coordinates whose products add up to nearly the whole logit.

        `RIDGE` times the mean eigenvalue is added to the diagonal of each moment, or 1 where that is 0: C and S. Of the d
        columns of the unit matrix those p are the first basis whose products of the diagonals of S and C are largest (of
        equal ones the first). Where p < d it becomes an orthonormal basis of S C times itself, `ORTHOGONAL_ITERATIONS`
        times. With W the basis made orthonormal in C, and λ ascending and A the eigenvalues and eigenvectors of Wᵀ C S C W,
        the coordinates are x ↦ (W A)ᵀ x λ^¼ of queries, and x ↦ (C W A)ᵀ x λ^-¼ of keys: both have the moment √λ. For
        small λ, `SMALLEST_SQUARE` of the largest one takes its place. Signs are such that no column of W A has a negative
        sum of cubes.

        Parameters
        ----------
        xp
            Array namespace of the arrays.
        query_moment, key_moment
            (G, d, d) float64, symmetric, positive semidefinite: mean x xᵀ of queries, which are times ``scale`` above, and
            of centred keys.
        centre
            (G, d) float64: the mean key.
        scale
            Finite factor on queries.
        p
            Coordinates, 1 ≤ p ≤ d.
        like
            An array of rows: results are of the dtype that these are computed in. Everything else is in float64.

        Returns
        -------
        View
            O(G d² p).
        """
