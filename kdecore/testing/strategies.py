"""Hypothesis strategies of attention problems, named by shape letters: n_q queries, n_k keys, d, d_v, lead dimensions."""

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from kdecore.testing.oracle import masked_attention


class AttentionProblem(NamedTuple):
    """Arrays and options of a call, and the bias that says to an oracle what the options mean.

    Attributes
    ----------
    q, k, v
        (…, n_q, d), (…, n_k, d), (…, n_k, d_v), NumPy arrays of float64; k and v may have fewer heads, a divisor of q's.
    options
        Of `kdecore.attention`, such as ``scale``, ``causal``, ``window``, ``diagonal``, ``key_lengths`` and ``mask``; arrays
        among them are NumPy's.
    bias
        What they add to the logits, broadcastable to (…, n_q, n_k); −inf for what isn't seen.
    """

    q: Any
    k: Any
    v: Any
    options: dict[str, Any]
    bias: Any = 0.0

    def exact(self) -> tuple[Any, Any]:
        """Return exact attention, (…, n_q, d_v), and its log-sum-exp, (…, n_q), by the oracle: float64, in long double."""
        return masked_attention(self.q, self.k, self.v, self.bias, self.options.get("scale"))


n_q = st.integers(1, 12)
n_k = st.integers(1, 24)
d = st.one_of(st.integers(1, 5), st.sampled_from((17, 33)))
d_v = st.one_of(st.integers(1, 4), st.sampled_from((17, 33)))
lead = st.lists(st.integers(1, 3), max_size=3).map(tuple)
seed = st.integers(0, 2**64 - 1)
dtype = st.sampled_from(("float32", "float64"))
SIZE = st.one_of(st.integers(1, 20), st.integers(1, 150))
KINDS = ("plain", "equal", "line", "giant", "duplicates", "offset")
"""What keys can be like."""


@st.composite
def normal_arrays(draw: DrawFn, shape: tuple[int, ...]) -> Any:
    """Draw standard normal numbers, float64: Hypothesis draws the seed only, so that large arrays stay cheap."""
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1))).standard_normal(shape)


@st.composite
def arrays(draw: DrawFn, lead: SearchStrategy[tuple[int, ...]] = lead) -> tuple[Any, Any, Any]:
    """Draw q, k, v, float64 standard normal, with any leading dimensions; n_q ≠ n_k and d_v ≠ d allowed.

    Parameters
    ----------
    draw
        Hypothesis's own; not given by callers.
    lead
        Strategy of leading dimensions; up to three of up to 3 if not given.
    """
    L, Q, K, D, V = draw(lead), draw(n_q), draw(n_k), draw(d), draw(d_v)
    q, k, v = (draw(normal_arrays((*L, *tail))) for tail in ((Q, D), (K, D), (K, V)))
    return q, k, v


@st.composite
def problems(draw: DrawFn, restricted: bool = True) -> AttentionProblem:
    """Draw problems (batch, heads, n, d) of up to 150 rows: grouped heads, structured keys, magnitudes up to 1e4.

    Keys are i.i.d., all alike, on a line, duplicated, far from the origin, or one of them is a giant. Queries are 0 to 1e4
    times standard normal, values 0 to 1e4 times.

    Parameters
    ----------
    draw
        Hypothesis's own; not given by callers.
    restricted
        Whether options may hide keys: causal, windows, diagonals, lengths, boolean and additive masks, and any of these
        together. Without them k and v have as many heads as q.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, heads_k = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    r = draw(st.sampled_from((1, 1, 2, 3))) if restricted else 1
    Q, K, D, V = draw(SIZE), draw(SIZE), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    q = rng.standard_normal((batch, heads_k * r, Q, D)) * draw(st.sampled_from((0.0, 1e-3, 1.0, 30.0, 1e4)))
    k = structured(rng, rng.standard_normal((batch, heads_k, K, D)), draw(st.sampled_from(("plain", *KINDS))))
    v = rng.standard_normal((batch, heads_k, K, V)) * draw(st.sampled_from((0.0, 1e-4, 1.0, 1e4)))
    options, bias = draw(restrictions(rng, batch, Q, K)) if restricted else ({}, 0.0)
    scale = draw(st.sampled_from((None, None, 0.1, -0.5, 2.0)))
    return AttentionProblem(q, k, v, options if scale is None else options | {"scale": scale}, bias)


def structured(rng: np.random.Generator, k: Any, kind: str) -> Any:
    """Return keys of a kind made from keys (…, n_k, d) that are i.i.d.; ``kind`` is one of `KINDS`."""
    if kind == "equal":
        return np.repeat(k[..., :1, :], k.shape[-2], axis=-2)
    if kind == "line":
        return k[..., :1] * rng.standard_normal(k.shape[-1])
    if kind == "giant":
        return np.where(np.arange(k.shape[-2])[:, None] == k.shape[-2] // 2, 1e3 * k, k)
    if kind == "duplicates":
        return k[..., np.arange(k.shape[-2]) // 3, :]
    return k + 100.0 if kind == "offset" else k


@st.composite
def restrictions(draw: DrawFn, rng: np.random.Generator, batch: int, n_q: int, n_k: int) -> tuple[dict[str, Any], Any]:
    """Draw options that hide keys, and the bias (batch, 1, n_q, n_k) that they mean."""
    bias = np.zeros((batch, 1, n_q, n_k))
    options: dict[str, Any] = {}
    offset = draw(st.one_of(st.none(), st.integers(-n_q - 2, n_k + 2)))
    if offset is not None:
        options["diagonal"] = offset
    distance = np.arange(n_q)[:, None] + (n_k - n_q if offset is None else offset) - np.arange(n_k)
    if draw(st.booleans()):
        options["causal"] = True
        bias = bias + np.where(distance >= 0, 0.0, -np.inf)
    if draw(st.booleans()):
        lengths = rng.integers(0, n_k + 1, batch)
        options["key_lengths"] = lengths
        bias = bias + np.where(np.arange(n_k) < lengths[:, None], 0.0, -np.inf)[:, None, None, :]
    if draw(st.sampled_from((False, False, True))):
        options["window"] = draw(st.integers(1, n_k + 3))
        bias = bias + np.where(np.abs(distance) < options["window"], 0.0, -np.inf)
    mask = draw(st.sampled_from((None, None, "rows", "keys", "full", "additive")))
    if mask is not None:
        shape = {"rows": (n_q, 1), "keys": (batch, 1, 1, n_k)}.get(mask, (1, n_q, n_k))
        seen = rng.random(shape) < draw(st.sampled_from((0.1, 0.5, 0.9)))
        options["mask"] = np.where(seen, rng.standard_normal(shape), -np.inf) if mask == "additive" else seen
        bias = bias + (options["mask"] if mask == "additive" else np.where(seen, 0.0, -np.inf))
    return options, bias


@st.composite
def mild_problems(draw: DrawFn) -> AttentionProblem:
    """Draw problems on which every method's estimates are near their limit laws: (2, n, d), values with a mean that isn't 0.

    96 to 200 queries and keys, i.i.d., in clusters or duplicated, with logits of a spread of up to 1.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    Q, K, D, V = (draw(st.integers(*ends)) for ends in ((96, 200), (96, 200), (2, 16), (1, 4)))
    q, k, v = (rng.standard_normal((2, *tail)) for tail in ((Q, D), (K, D), (K, V)))
    kind = draw(st.sampled_from(("plain", "clusters", "duplicates")))
    if kind == "clusters":
        k = rng.standard_normal((8, D))[rng.integers(0, 8, (2, K))] + 0.2 * k
    elif kind == "duplicates":
        k = structured(rng, k, kind)
    return AttentionProblem(q, k, v + 2.0, {"scale": draw(st.sampled_from((1.0, 0.5, 0.25))) / float(np.sqrt(D))})
