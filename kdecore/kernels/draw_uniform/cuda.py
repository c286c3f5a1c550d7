"""`draw_uniform` in Numba CUDA: a number a thread, by Threefry-2x32 on 32-bit words.

On paper: 110 integer operations and 8 bytes written for a number; 16,384 of them, one for each block of queries, are nothing
beside a launch.
"""

import math

import numpy as np
from numba import cuda

from kdecore.arrays.namespace import Array, Namespace
from kdecore.arrays.random import PARITY, ROTATIONS
from kdecore.kernels.runtime.cuda_jit import cuda_kernel, launch

THREADS = 256
ROTATE = np.array(ROTATIONS, dtype=np.uint32)
TO_UNIT = 2.0**-53


def draw_uniform(xp: Namespace, seed: int, stream: int, shape: tuple[int, ...], device: object) -> Array:
    """Follow `kdecore.kernels.draw_uniform.contract.DrawUniform`."""
    numbers = xp.empty((math.prod(shape),), dtype=xp.float64, device=device)
    launch(threefry, -(-math.prod(shape) // THREADS), THREADS, numbers, *halves(seed), stream)
    return xp.reshape(numbers, shape)


def halves(seed: int) -> tuple[int, int]:
    """Return the words of a seed, the lower one first."""
    return seed & 0xFFFFFFFF, seed >> 32


@cuda.jit(device=True)
def random_number(low, high, stream, i):
    """Return number ``i`` of a stream of a seed, whose halves are ``low`` and ``high``: its place and stream encrypted."""
    rotate = cuda.const.array_like(ROTATE)
    word = np.uint32(0xFFFFFFFF)
    keys = cuda.local.array(3, np.uint32)
    keys[0], keys[1] = np.uint32(low), np.uint32(high)
    keys[2] = keys[0] ^ keys[1] ^ np.uint32(PARITY)
    x0, x1 = np.uint32(i) + keys[0] & word, np.uint32(stream) + keys[1] & word
    for step in range(5):
        for turn in range(4):
            left = rotate[step % 2, turn]
            x0 = np.uint32(x0 + x1)
            x1 = np.uint32(x1 << left | x1 >> np.uint32(32) - left) ^ x0
        x0 = np.uint32(x0 + keys[(step + 1) % 3])
        x1 = np.uint32(x1 + keys[(step + 2) % 3] + np.uint32(step + 1))
    return (np.int64(x0 >> np.uint32(5)) << 26 | np.int64(x1 >> np.uint32(6))) * TO_UNIT


@cuda_kernel("float64[::1], int64, int64, int64", THREADS)
def threefry(numbers, low, high, stream):
    """Write each number."""
    i = cuda.grid(1)
    if i < numbers.size:
        numbers[i] = random_number(low, high, stream, i)
