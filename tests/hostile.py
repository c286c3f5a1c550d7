"""Inputs that break attention where it can be broken, as functions of a random generator: q, k, v, float64 (2, n, d)."""

import numpy as np

N = 700


def normal(rng, n_q=N, n_k=N, d=8, d_v=5):
    return rng.standard_normal((2, n_q, d)), rng.standard_normal((2, n_k, d)), rng.standard_normal((2, n_k, d_v))


def equal_keys(rng):
    q, k, v = normal(rng)
    return q, np.tile(k[:, :1], (1, N, 1)), v


def equal_everything(rng):
    q, k, v = (np.tile(x[:, :1], (1, N, 1)) for x in normal(rng))
    return q, k, v


def one_giant_key(rng):
    q, k, v = normal(rng)
    k[:, 321] *= 1e4
    return q, k, v


def keys_on_a_line(rng):
    q, k, v = normal(rng)
    return q, k[:, :, :1] * rng.standard_normal((2, 1, 8)), v


def zero_queries(rng):
    q, k, v = normal(rng)
    return 0.0 * q, k, v


def zero_keys(rng):
    q, k, v = normal(rng)
    return q, 0.0 * k, v


def zero_values(rng):
    q, k, v = normal(rng)
    return q, k, 0.0 * v


def one_dimension(rng):
    return normal(rng, d=1, d_v=1)


def many_dimensions(rng):
    return normal(rng, d=1024, d_v=3)


def one_key(rng):
    return normal(rng, n_k=1)


def one_query(rng):
    return normal(rng, n_q=1)


def two_of_each(rng):
    return normal(rng, n_q=2, n_k=2)


def duplicates(rng):
    return tuple(np.repeat(x[:, : N // 7], 7, axis=1) for x in normal(rng))


def sorted_by_a_coordinate(rng):
    return tuple(np.take_along_axis(x, np.argsort(x[:, :, :1], axis=1), axis=1) for x in normal(rng))


def reversed_order(rng):
    return tuple(x[:, ::-1] for x in sorted_by_a_coordinate(rng))


def identical_queries(rng):
    q, k, v = normal(rng, n_q=100_000, n_k=300)
    return np.tile(q[:, :1], (1, 100_000, 1)), k, v


def far_from_the_origin(rng):
    q, k, v = normal(rng)
    return q, k + 1e5, v


def huge_logits(rng):
    q, k, v = normal(rng)
    return 2e3 * q, k, v


def tiny_numbers(rng):
    return tuple(1e-30 * x for x in normal(rng))


HOSTILE = {
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
