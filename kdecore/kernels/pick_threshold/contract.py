"""What every implementation of `pick_threshold` promises."""

from typing import Protocol

from kdecore.arrays.namespace import Array, Namespace
from kdecore.core.tree import BlockQueries, Tree
from kdecore.kernels.open_tree.contract import triton_limit

ABOVE = 1.0 + 2.0**-18
"""The threshold is so much above the bound of a node that is to stay closed, so that rounding doesn't open it."""
STEPS, OCTAVES, TOP_OCTAVE = 32, 64, 5
"""Of the bins that accelerators count bounds in: steps to an octave, octaves, and the exponent that they end at."""
BINS = STEPS * OCTAVES
LIMITS = {"triton": triton_limit}


class PickThreshold(Protocol):
    """Find the error above which nodes are opened, so that lists have a given length in the mean."""

    def __call__(
        self,
        xp: Namespace,
        queries: BlockQueries,
        tree: Tree,
        budget: int,
        most: int,
        start: tuple[int, int, int],
    ) -> Array:
        """Return the threshold for `kdecore.kernels.open_tree`, from some blocks.

        All blocks go down the tree together, as `kdecore.kernels.open_tree.contract.OpenTree` has it, a level at a time. A
        node's bound is its error, or that of its parent's bound if that is less: with a threshold below it the node is
        opened. After each level the bounds of all nodes met so far, of all blocks, are taken from the largest on, while the
        slots that these nodes take more, opened, are no more than there is room for: (budget − nodes of ``start``) a block.
        The first bound for which there is no room is the threshold for this level, 0 if there is none; nodes of larger
        bounds are opened, but for those of a block that would then have more than ``most`` nodes in a level. The threshold
        of the last level, times `ABOVE`, is the result.

        On accelerators, bounds are sorted no finer than by `STEPS` to an octave: bound x counts in bin
        ⌊(log₂ x + `OCTAVES` − `TOP_OCTAVE`) `STEPS`⌋ of `BINS`, or the nearest, and where there is no room for all of a bin,
        where it ends is the threshold. Counts are integers, which threads may add in any order.

        Parameters
        ----------
        xp, queries, tree, start
            As `OpenTree` takes them, of some blocks.
        budget
            Slots of a list in the mean over these blocks, at most; at least the nodes of ``start``.
        most
            Nodes of a level in one block, at most.

        Returns
        -------
        Array
            (), of the dtype that it is computed in. O(G C budget b (d + p)).
        """
