"""Hypothesis strategies, named by shape letters: G groups, n_q queries, n_k keys, d, d_v, lead dimensions."""

import numpy as np
from hypothesis import strategies as st

G = st.integers(1, 3)
n_q = st.integers(1, 12)
n_k = st.integers(1, 24)
d = st.one_of(st.integers(1, 5), st.sampled_from((17, 33)))
d_v = st.one_of(st.integers(1, 4), st.sampled_from((17, 33)))
lead = st.lists(st.integers(1, 3), max_size=3).map(tuple)
seed = st.integers(0, 2**64 - 1)
dtype = st.sampled_from(("float32", "float64"))
sampling_method = st.sampled_from(("sortlsh", "hyper"))


@st.composite
def budgets_below(draw, n_k):
    """Budgets that leave some key out, with both ends likely."""
    return draw(st.one_of(st.just(1), st.just(n_k - 1), st.integers(1, n_k - 1)))


@st.composite
def normal_array(draw, shape):
    """Standard normal numbers: Hypothesis draws the seed only, so that large arrays stay cheap."""
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1))).standard_normal(shape)


@st.composite
def problems(draw, lead=lead):
    """q, k, v as float64 NumPy arrays with any leading dimensions, n_q ≠ n_k and d_v ≠ d allowed."""
    L, Q, K, D, V = draw(lead), draw(n_q), draw(n_k), draw(d), draw(d_v)
    return tuple(draw(normal_array((*L, *tail))) for tail in ((Q, D), (K, D), (K, V)))


@st.composite
def sampled_problems(draw):
    """q, k, v (G, n, ·) with heavy tails, zeros and numbers that are not finite among v, and a budget below n_k."""
    g, Q, D, V = draw(G), draw(n_q), draw(d), draw(d_v)
    K = draw(st.integers(2, 24))
    q, k, v = (draw(normal_array((g, *tail))) for tail in ((Q, D), (K, D), (K, V)))
    heavy = draw(normal_array((g, K, 1)))
    kind = draw(st.sampled_from(("plain", "heavy", "zero", "one", "infinite", "nan")))
    if kind == "heavy":
        v = v * np.exp(4 * heavy)
    elif kind == "zero":
        v = v * 0.0
    elif kind == "one":
        v[:, 1:] = 0.0
    elif kind in ("infinite", "nan"):
        v[:, 0, 0] = np.inf if kind == "infinite" else np.nan
    return q, k, v, draw(budgets_below(K))
