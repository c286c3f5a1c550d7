"""ListOps as Long Range Arena has it: the value of nested MIN, MAX, MED and SM (sum modulo 10) of digits, ten classes.

A node is an operator with probability 1/4, else a digit; operators have 2 to 10 arguments, and at depth 10 all nodes are
digits. Trees that are too short or too long are drawn anew, and none is there twice. Parentheses of the published files say
nothing and are left out, as its readers do: ``[MAX 2 9 [MIN 4 7 ] 0 ]``.
"""

import random
from collections.abc import Callable
from statistics import median

from bench.lra.samples import Samples, packed

CLASSES = 10
OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "MIN": min,
    "MAX": max,
    "MED": lambda values: int(median(values)),
    "SM": lambda values: sum(values) % 10,
}
WORDS = (*map(str, range(10)), *(f"[{name}" for name in OPERATORS), "]")
"""Token t is the word t − 1; 0 is padding."""
VOCABULARY = len(WORDS) + 1
PROBABILITY, DEPTH, ARGUMENTS = 0.25, 10, (2, 10)
LENGTH, LIMITS = 2048, (500, 2000)
"""Padded length, and between which numbers, both excluded, tokens are."""

FIRST_OPERATOR, END = 11, len(WORDS)


def generate(count: int, length: int, seed: int) -> Samples:
    """Draw so many different expressions.

    Parameters
    ----------
    count
        How many.
    length
        Padded length, 32 or more; the limits on tokens are the published ones in proportion.
    seed
        Of everything.

    Returns
    -------
    Samples
        One part. Most trees are a single digit, and few are long enough: some 0.6 ms each at the published length.

    Raises
    ------
    ValueError
        ``length`` is less.
    """
    if length < 32:
        raise ValueError(f"length must be at least 32, got {length}")
    low, high = (limit * length // LENGTH for limit in LIMITS)
    draws, found = random.Random(seed), dict[bytes, int]()
    while len(found) < count:
        tokens: list[int] = []
        value = grow(tokens, 1, high, draws)
        if low < len(tokens) < high:
            found[bytes(tokens)] = value
    return packed([[tokens] for tokens in found], list(found.values()), length)


def grow(tokens: list[int], depth: int, high: int, draws: random.Random) -> int:
    """Append a tree, and return its value; one that is too long is cut anywhere, and its value is 0."""
    if len(tokens) >= high:
        return 0
    if depth == DEPTH or draws.random() > PROBABILITY:
        digit = draws.randrange(10)
        tokens.append(digit + 1)
        return digit
    operator = draws.randrange(len(OPERATORS))
    tokens.append(FIRST_OPERATOR + operator)
    values = [grow(tokens, depth + 1, high, draws) for _ in range(draws.randint(*ARGUMENTS))]
    tokens.append(END)
    return tuple(OPERATORS.values())[operator](values)


def text(tokens: bytes) -> str:
    """Return an expression as it is written."""
    return " ".join(WORDS[token - 1] for token in tokens)
