"""How many thread blocks, or programs, a launch may have: checked wherever a kernel is launched.

All grids lie along their first axis, whose limit no arrays that a device holds come near; the other two end at 65,535.
"""

from kdecore.arrays.errors import KernelUnavailable

MOST_BLOCKS = 2**31 - 1
"""Of a grid along its first axis, on every NVIDIA device."""


def flat_grid(kernel: str, blocks: int) -> tuple[int]:
    """Return the grid of so many thread blocks.

    Raises
    ------
    KernelUnavailable
        There are more of them than a device launches.
    """
    if blocks > MOST_BLOCKS:
        raise KernelUnavailable(f"a grid has at most {MOST_BLOCKS} blocks, got {blocks} of {kernel}")
    return (blocks,)
