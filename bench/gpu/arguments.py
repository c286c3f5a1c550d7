"""Random arguments for every kernel, as `bench.gpu.checks` gives them to an implementation and to its reference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kdecore.arrays.namespace import ACCUMULATION, Array, host
from kdecore.core.state import AttentionState
from kdecore.core.tree import BlockQueries, Tree, leaves, node_count
from kdecore.kernels.draw_indices.contract import Weights
from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.kernels.node_summaries.reference import node_summaries as summarise
from kdecore.kernels.open_tree.contract import first_nodes
from kdecore.kernels.tree_order.reference import tree_order as order_tree

LEAF_SIZE = 4
LARGE = 5000
"""Rows from which widths are those of attention heads."""


@dataclass(frozen=True)
class Rows:
    """Numbers of the dtype that inputs are stored in."""

    array: Array


@dataclass(frozen=True)
class Numbers:
    """Numbers of the dtype computed in."""

    array: Array


@dataclass(frozen=True)
class Device:
    """Stands for the device, as its library has it."""


def rounded(array: Array, dtype: str) -> Array:
    """Return numbers that the dtype holds, in float64."""
    return torch.tensor(array).to(getattr(torch, dtype)).double().numpy()


def for_reference(argument: Any, dtype: str) -> Any:
    """Return an argument of the reference: NumPy, float64, the numbers that the implementation gets."""
    match argument:
        case Rows(array):
            return rounded(array, dtype)
        case Numbers(array):
            return rounded(array, ACCUMULATION[dtype])
        case AttentionState(out, lse):
            return AttentionState(for_reference(out, dtype), for_reference(lse, dtype))
        case Device():
            return "cpu"
        case BlockQueries() | Tree() | TreeNodes() | Weights():
            return type(argument)(*(for_reference(x, dtype) for x in argument))
    return argument


def for_library(argument: Any, dtype: str, convert: Callable[[Array, str | None], Any]) -> Any:
    """Return an argument of an implementation; ``convert`` takes NumPy, and a dtype's name or None for the array's own."""
    match argument:
        case Rows(array):
            return convert(rounded(array, dtype), dtype)
        case Numbers(array):
            return convert(rounded(array, ACCUMULATION[dtype]), ACCUMULATION[dtype])
        case AttentionState(out, lse):
            return AttentionState(*(for_library(x, dtype, convert) for x in (out, lse)))
        case Device():
            return convert(np.zeros(1), None).device
        case np.ndarray():
            return convert(argument, None)
        case BlockQueries() | Tree() | TreeNodes() | Weights():
            return type(argument)(*(for_library(x, dtype, convert) for x in argument))
    return argument


def width(n: int) -> int:
    """Return d: odd for few rows."""
    return 64 if n >= LARGE else 19


def with_holes(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return normal numbers, of which a few are not finite."""
    rows = rng.standard_normal(shape)
    for number in (np.nan, np.inf, -np.inf):
        rows[tuple(rng.integers(shape))] = number
    return rows


def clustered(rng: np.random.Generator, groups: int, n: int, d: int) -> Array:
    """Return rows in clusters."""
    centres = rng.standard_normal((groups, 12, d))
    return rng.standard_normal((groups, n, d)) + 2.0 * centres[:, rng.integers(0, 12, n)]


def permutations(rng: np.random.Generator, groups: int, n: int) -> Array:
    """Return an order of n rows for each group."""
    return rng.permuted(np.tile(np.arange(n), (groups, 1)), axis=1)


def rows_alone(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments of `finite_rows`, `row_norms` and `value_sizes`."""
    return (Rows(with_holes(rng, (3, n, width(n)))),)


def hash_codes(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments, of codes wider than int16 for few rows."""
    bits = 12 if n >= LARGE else 17
    rows = (Rows(1.0 + rng.standard_normal((3, m, width(n)))) for m in (n, n - n // 3))
    return *rows, Numbers(rng.standard_normal((width(n), bits)))


def bucket_order(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments, for several passes over few rows."""
    bits = 12 if n >= LARGE else 23
    return rng.integers(0, 2**bits, (3, n)).astype("int16" if bits <= 15 else "int32"), bits


def bucket_windows(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments."""
    codes = [rng.integers(0, 2**9, (3, m)).astype("int16") for m in (n, n + n // 3)]
    queries, keys = ((x, np.argsort(x, axis=1, stable=True)) for x in codes)
    return *queries, *keys, -(-n // 16), min(n, 170)


def draw_uniform(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments."""
    return int(rng.integers(2**63)), int(rng.integers(2**31)), (3, n), Device()


def draw_indices(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments; sizes that every dtype holds, so that all draw the same keys."""
    window, count, blocks = n // 8, max(1, min(n // 4, 341)), 33
    sizes = rng.integers(0, 2**8, (3, n)) / 2**8
    weights = Weights(Numbers(sizes), Numbers(np.full(3, 0.5)))
    first, seed = rng.integers(0, n - window + 1, (3, blocks)), int(rng.integers(2**63))
    return permutations(rng, 3, n), weights, first, window, seed, 1, count, "float64"


def balanced_view(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments: moments of more directions than coordinates, whose eigenvalues are far enough apart."""
    d = width(n)
    rows = rng.standard_normal((2, 3, 8 * d, d)) * np.geomspace(1.0, 0.1, d)
    queries, keys = np.swapaxes(rows, 2, 3) @ rows / (8 * d)
    return queries, keys, rng.standard_normal((3, d)), 0.3, 16, Rows(np.zeros(1))


def second_moment(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments."""
    return Rows(rng.standard_normal((3, n, width(n)))), 3, True


def project_rows(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments."""
    return Rows(rng.standard_normal((3, n, width(n)))), Numbers(rng.standard_normal((3, width(n), 16)))


def rank_codes(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments; coordinates of widths that no rounding puts in another order."""
    rows = rng.standard_normal((3, n, 16)) * 0.8 ** np.arange(16)
    rows[1, n // 2, 3] = np.nan
    return Numbers(rows), 24, 0


def tree_order(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments."""
    return Numbers(clustered(rng, 2, min(n, 2000), 16)), leaves(min(n, 2000), LEAF_SIZE)


def node_summaries(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments."""
    k, v = (Rows(rng.standard_normal((2, n, width(n)))) for _ in "kv")
    coordinates, sizes = Numbers(rng.standard_normal((2, n, 16))), Numbers(0.5 + rng.random((2, n)))
    return k, v, coordinates, sizes, permutations(rng, 2, n), LEAF_SIZE, Numbers(np.array([0.1, 5.0]))


def scaled_nodes(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments."""
    d, scale, half_norm = width(n), 0.2, np.array([0.03, 0.1])
    k, sizes, order = rng.standard_normal((2, n, d)), 0.5 + rng.random((2, n)), permutations(rng, 2, n)
    keys, values, *others = summarise(host, k, k[:, :, :1], k[:, :, :16], sizes, order, LEAF_SIZE, half_norm)
    nodes = TreeNodes(Rows(keys), *(Numbers(x) for x in (values, *others)))
    queries = rng.standard_normal((2, 8 * d, d))
    directions = np.tile(0.5 * scale * np.eye(d)[:, :16], (2, 1, 1))
    return nodes, np.swapaxes(queries, 1, 2) @ queries / (8 * d), Numbers(directions), Numbers(half_norm), scale, 0.15


def pick_threshold(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments: lists of a quarter of the keys, of one in eight of more."""
    d, rows, p = (64, 64, 16) if n >= LARGE else (19, 16, 5)
    n = min(n, 3000)
    slots = max(n // 8 if n > 1500 else n // 4, 20)
    keys, q = clustered(rng, 2, n, d), rng.standard_normal((2, n, d))
    sizes = 0.5 + rng.random((2, n))
    nodes = summarise(host, keys, keys, keys[:, :, :p], sizes, order_tree(host, keys, LEAF_SIZE), LEAF_SIZE, np.ones(2))
    blocks = max(1, n // rows // 4)
    query_index = permutations(rng, 2, n)[:, : blocks * rows].reshape(2, blocks, -1)
    queries = BlockQueries(Rows(q), 0.3, Numbers(0.3 * q[:, :, :p]), query_index, True)
    tree = Tree(*(Numbers(x) for x in (nodes.keys, nodes.spread, nodes.variances, nodes.sizes)))
    return queries, tree, slots, 4 * slots, first_nodes(slots, nodes.spread.shape[1])


def open_tree(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments."""
    queries, tree, _, most, start = pick_threshold(rng, n)
    return queries, tree, Numbers(np.asarray(0.1)), most, start


def attend_tree(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments: with own keys, a matrix for each half of the blocks, and something to merge with."""
    queries, tree, *opening = open_tree(rng, n)
    (groups, rows, d), n_q = tree.keys.array.shape, queries.q.array.shape[1]
    values = Numbers(rng.standard_normal((groups, rows, d + 1)))
    own, slope = rng.integers(-1, n_q, (groups, n_q)), Numbers(rng.standard_normal((groups, 2, d, d)))
    before = AttentionState(Numbers(rng.standard_normal((groups, n_q, d))), Numbers(rng.standard_normal((groups, n_q))))
    return queries, tree, values, *opening, own, slope, None, before


def gap_moments(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments: lists of nodes only."""
    nodes = node_count(n, LEAF_SIZE)
    keys, values = (Numbers(rng.standard_normal((2, nodes + n, columns))) for columns in (width(n), width(n) + 1))
    return keys, values, rng.integers(0, nodes, (2, 3, 200)), Numbers(rng.random((2, 3, 200))), nodes, 512


def attend_blocks(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments: with a bias, and something to merge with, for few rows."""
    d, rows = width(n), 128 if n >= LARGE else 13
    slots = 512 if n >= LARGE else max(1, n // 3)
    blocks = n // rows
    q, k, v = (Rows(rng.standard_normal((n, columns))) for columns in (d, d, d + 1))
    query_index = rng.permutation(n)[: blocks * rows].reshape(blocks, rows)
    log_weight = rng.standard_normal((blocks, slots))
    log_weight[rng.random((blocks, slots)) < 0.1] = -np.inf
    few = n < LARGE
    bias = Numbers(np.where(rng.random((blocks, rows, slots)) < 0.2, -np.inf, 0.5)) if few else None
    before = AttentionState(Numbers(rng.standard_normal((n, d + 1))), Numbers(rng.standard_normal(n))) if few else None
    return q, k, v, query_index, rng.integers(0, n, (blocks, slots)), Numbers(log_weight), d**-0.5, bias, before


def attend_dense(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments."""
    d, n = width(n), min(n, 4099)
    return (*(Rows(rng.standard_normal((2, n, columns))) for columns in (d, d, d + 1)), d**-0.5)


def shrink_matrices(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments: of some matrices chance makes more than there is."""
    shape = (3, 5, width(n), width(n) + 1)
    return Numbers(rng.standard_normal(shape)), Numbers(rng.random((3, 5)) * 1.2 * shape[2] * shape[3]), True, 0.85


def spoil_groups(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments, of which two groups of three are spoilt."""
    rows = [rng.standard_normal((3, n, columns)) for columns in (width(n), 7)]
    rows[0][1, n // 2, 3], rows[1][2, n - 1, 0] = np.nan, np.inf
    return Numbers(lse_with_holes(rng, n)), *map(Rows, rows)


def spoil_rows(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Make arguments."""
    out = Numbers(rng.standard_normal((3, n, width(n))))
    return AttentionState(out, Numbers(lse_with_holes(rng, n))), rng.random((3, n)) < 0.9, Rows(np.zeros(1))


def lse_with_holes(rng: np.random.Generator, n: int) -> Array:
    """Return logarithms of denominators, of queries that see no key among them."""
    return np.where(rng.random((3, n)) < 0.05, -np.inf, rng.standard_normal((3, n)))


ARGUMENTS: dict[str, Callable[[np.random.Generator, int], tuple[Any, ...]]] = {
    "finite_rows": rows_alone,
    "row_norms": rows_alone,
    "spoil_groups": spoil_groups,
    "spoil_rows": spoil_rows,
    "value_sizes": rows_alone,
    "hash_codes": hash_codes,
    "bucket_order": bucket_order,
    "bucket_windows": bucket_windows,
    "draw_uniform": draw_uniform,
    "draw_indices": draw_indices,
    "balanced_view": balanced_view,
    "second_moment": second_moment,
    "shrink_matrices": shrink_matrices,
    "project_rows": project_rows,
    "rank_codes": rank_codes,
    "tree_order": tree_order,
    "node_summaries": node_summaries,
    "scaled_nodes": scaled_nodes,
    "pick_threshold": pick_threshold,
    "open_tree": open_tree,
    "attend_tree": attend_tree,
    "gap_moments": gap_moments,
    "attend_blocks": attend_blocks,
    "attend_dense": attend_dense,
}
"""Kernel → what makes its arguments, all but the namespace, for about n rows."""
