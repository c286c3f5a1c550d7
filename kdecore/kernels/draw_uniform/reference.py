"""`draw_uniform` in the array API: some two hundred operations, whatever the number."""

import math

from kdecore.arrays.namespace import Array, Namespace
from kdecore.arrays.random import uniform


def draw_uniform(xp: Namespace, seed: int, stream: int, shape: tuple[int, ...], device: object) -> Array:
    """Follow `kdecore.kernels.draw_uniform.contract.DrawUniform`."""
    return xp.reshape(uniform(xp, seed, stream, math.prod(shape), device=device), shape)
