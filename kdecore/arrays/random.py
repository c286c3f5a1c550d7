"""Random numbers from counters: one seed gives the same numbers on every array library, and no global state is touched.

Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"), written in
int64 masked to 32 bits, since some libraries lack arithmetic on unsigned integers.
"""

import functools
import hashlib
import math

from kdecore.arrays.errors import OptionError
from kdecore.arrays.namespace import Array, Namespace, host
from kdecore.arrays.scalars import integer

SAMPLES_STREAM = 1
"""Random stream of what decides which keys are drawn."""

_MASK = 0xFFFFFFFF
PARITY = 0x1BD11BDA
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def check_seed(seed: object, name: str = "seed") -> int:
    """Return ``seed`` as an int in [0, 2**64), or raise `OptionError` naming it."""
    number = integer(name, seed)
    if not 0 <= number < 2**64:
        raise OptionError(f"{name} must lie in [0, 2**64), got {number}")
    return number


def piece_seed(seed: int, piece: tuple[int, ...]) -> int:
    """Return the seed of a piece of a call, told by its path, in [0, 2**64): for each piece another, for () the call's."""
    if not piece:
        return seed
    return int.from_bytes(hashlib.blake2b(repr((seed, piece)).encode(), digest_size=8).digest())


def threefry2x32(key: tuple[int, int], c0: Array, c1: Array) -> tuple[Array, Array]:
    """Encrypt counters (c0, c1) with ``key``: int64 arrays holding 32-bit values, same shape in and out."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ PARITY)
    x0, x1 = (c0 + keys[0]) & _MASK, (c1 + keys[1]) & _MASK
    for step in range(5):
        for rotation in ROTATIONS[step % 2]:
            x0 = (x0 + x1) & _MASK
            x1 = (((x1 << rotation) | (x1 >> (32 - rotation))) & _MASK) ^ x0
        x0 = (x0 + keys[(step + 1) % 3]) & _MASK
        x1 = (x1 + keys[(step + 2) % 3] + step + 1) & _MASK
    return x0, x1


def uniform(xp: Namespace, seed: int, stream: int, count: int, *, device: object = None) -> Array:
    """Return ``count`` float64 numbers in [0, 1), with 53 random bits each.

    Parameters
    ----------
    xp
        Array namespace to make them in.
    seed
        Integer in [0, 2**64).
    stream
        Integer in [0, 2**32): different streams of one seed are independent.
    count
        How many; below 2**32.
    device
        Where; the namespace's default if None.

    Returns
    -------
    Array
        (count,) float64, the same bits whatever the namespace.
    """
    index = xp.arange(count, dtype=xp.int64, device=device)
    x0, x1 = threefry2x32((seed & _MASK, seed >> 32), index, xp.full_like(index, stream))
    return xp.astype(((x0 >> 5) << 26) | (x1 >> 6), xp.float64) * 2.0**-53


@functools.lru_cache(maxsize=64)
def normal(seed: int, stream: int, shape: tuple[int, ...]) -> Array:
    """Return standard normal numbers as a NumPy float64 array of ``shape`` (Box–Muller).

    They are made on the host because logarithm and cosine may differ in the last bit between libraries; meant for small
    arrays such as hyperplanes, of which the last few are kept. The array is read-only.
    """
    count = math.prod(shape)
    half = (count + 1) // 2
    u = uniform(host, seed, stream, 2 * half)
    radius = host.sqrt(-2.0 * host.log(1.0 - u[:half]))
    angle = 2.0 * math.pi * u[half:]
    pairs = host.concat([radius * host.cos(angle), radius * host.sin(angle)])
    numbers = host.reshape(pairs[:count], shape)
    numbers.flags.writeable = False
    return numbers
