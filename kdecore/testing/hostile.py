"""Inputs that break attention where it can be broken, as functions of a random generator: q, k, v, float64 (2, n, d)."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

N = 700
"""Queries and keys, if nothing else is said."""
Arrays: TypeAlias = tuple[Any, Any, Any]


def normal(rng: np.random.Generator, n_q: int = N, n_k: int = N, d: int = 8, d_v: int = 5) -> Arrays:
    """Make standard normal numbers."""
    return rng.standard_normal((2, n_q, d)), rng.standard_normal((2, n_k, d)), rng.standard_normal((2, n_k, d_v))


def equal_keys(rng: np.random.Generator) -> Arrays:
    """Make keys that are all alike."""
    q, k, v = normal(rng)
    return q, np.tile(k[:, :1], (1, N, 1)), v


def equal_everything(rng: np.random.Generator) -> Arrays:
    """Make queries, keys and values that are all alike."""
    q, k, v = (np.tile(x[:, :1], (1, N, 1)) for x in normal(rng))
    return q, k, v


def one_giant_key(rng: np.random.Generator) -> Arrays:
    """Make a key 10,000 times as long as others."""
    q, k, v = normal(rng)
    k[:, 321] *= 1e4
    return q, k, v


def keys_on_a_line(rng: np.random.Generator) -> Arrays:
    """Make keys that are multiples of one."""
    q, k, v = normal(rng)
    return q, k[:, :, :1] * rng.standard_normal((2, 1, 8)), v


def zero_queries(rng: np.random.Generator) -> Arrays:
    """Make queries that see no difference between keys."""
    q, k, v = normal(rng)
    return 0.0 * q, k, v


def zero_keys(rng: np.random.Generator) -> Arrays:
    """Make keys of 0 and −0."""
    q, k, v = normal(rng)
    return q, 0.0 * k, v


def zero_values(rng: np.random.Generator) -> Arrays:
    """Make values of 0 and −0."""
    q, k, v = normal(rng)
    return q, k, 0.0 * v


def one_dimension(rng: np.random.Generator) -> Arrays:
    """Make one dimension: d = d_v = 1."""
    return normal(rng, d=1, d_v=1)


def many_dimensions(rng: np.random.Generator) -> Arrays:
    """Make 1,024 dimensions, more than there are keys."""
    return normal(rng, d=1024, d_v=3)


def one_key(rng: np.random.Generator) -> Arrays:
    """Make one key."""
    return normal(rng, n_k=1)


def one_query(rng: np.random.Generator) -> Arrays:
    """Make one query."""
    return normal(rng, n_q=1)


def two_of_each(rng: np.random.Generator) -> Arrays:
    """Make two queries and two keys."""
    return normal(rng, n_q=2, n_k=2)


def duplicates(rng: np.random.Generator) -> Arrays:
    """Make every row seven times."""
    q, k, v = (np.repeat(x[:, : N // 7], 7, axis=1) for x in normal(rng))
    return q, k, v


def sorted_by_a_coordinate(rng: np.random.Generator) -> Arrays:
    """Make rows in the order of their first numbers."""
    q, k, v = (np.take_along_axis(x, np.argsort(x[:, :, :1], axis=1), axis=1) for x in normal(rng))
    return q, k, v


def reversed_order(rng: np.random.Generator) -> Arrays:
    """Make the same order, last row first, by negative strides."""
    q, k, v = (x[:, ::-1] for x in sorted_by_a_coordinate(rng))
    return q, k, v


def identical_queries(rng: np.random.Generator) -> Arrays:
    """Make 100,000 queries that are all alike, on 300 keys."""
    q, k, v = normal(rng, n_q=100_000, n_k=300)
    return np.tile(q[:, :1], (1, 100_000, 1)), k, v


def far_from_the_origin(rng: np.random.Generator) -> Arrays:
    """Make keys whose mean is 100,000 times as long as their deviations."""
    q, k, v = normal(rng)
    return q, k + 1e5, v


def huge_logits(rng: np.random.Generator) -> Arrays:
    """Make logits in the thousands, whose exponentials overflow."""
    q, k, v = normal(rng)
    return 2e3 * q, k, v


def tiny_numbers(rng: np.random.Generator) -> Arrays:
    """Make numbers around 1e-30, whose squares vanish in float32."""
    q, k, v = (1e-30 * x for x in normal(rng))
    return q, k, v


HOSTILE: dict[str, Callable[[np.random.Generator], Arrays]] = {
    make.__name__: make
    for make in (
        normal,
        equal_keys,
        equal_everything,
        one_giant_key,
        keys_on_a_line,
        zero_queries,
        zero_keys,
        zero_values,
        one_dimension,
        many_dimensions,
        one_key,
        one_query,
        two_of_each,
        duplicates,
        sorted_by_a_coordinate,
        reversed_order,
        identical_queries,
        far_from_the_origin,
        huge_logits,
        tiny_numbers,
    )
}
"""Name → function of a random generator that makes q, k and v."""
