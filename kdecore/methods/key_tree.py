"""The tree over the keys: ordered, summarised, and ready to be opened for any queries and budget."""

from dataclasses import dataclass, replace

from kdecore.arrays.gradients import without_gradient
from kdecore.arrays.namespace import Array
from kdecore.core.problem import Problem
from kdecore.core.tree import Tree, leaves
from kdecore.kernels.balanced_view.contract import View
from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.methods.base import Plan
from kdecore.methods.view import LEAF_SIZE, balanced_view

DEEPER = 0.15
"""An error of a level counts so many octaves more than one of the level above: nodes of fewer keys take fewer slots until
what they hide is found. 0 to 0.2: bench/NOTES.md. Not in trees whose first levels are chunks."""
CODE_BITS = 24
"""Of codes that rows are sorted by: two passes of a radix sort; 16 err as much (bench/NOTES.md)."""


@dataclass(frozen=True)
class KeyTree:
    """What of the treecode follows from the keys and from how queries look: built once for any queries and budgets.

    Attributes
    ----------
    view
        Coordinates of queries and keys.
    order
        (G, n_k) int64: the key at each position of the tree.
    nodes
        Summaries of the tree's nodes, and the keys and values in its order.
    unseen
        (G, N): spreads of the nodes, times the part of them that coordinates don't see (`kdecore.kernels.scaled_nodes`).
    sizes
        (G, N): sizes of the nodes' values, times 2^(`DEEPER` · level).
    limits
        (G, d_v) and (G, d_v), of the values' dtype: the least and the largest of each of their columns, beyond which no mean
        of them lies.
    """

    view: View
    order: Array
    nodes: TreeNodes
    unseen: Array
    sizes: Array
    limits: tuple[Array, Array]

    def without_gradient(self) -> "KeyTree":
        """Return the same tree, of whose nodes no gradients are recorded."""
        return replace(self, nodes=TreeNodes(*(without_gradient(x) for x in self.nodes)))


def build(problem: Problem, plan: Plan, moment: Array) -> KeyTree:
    """Build the tree over a problem's keys for queries whose `query_moment` is ``moment``."""
    view, coordinates, sizes, limits = described_keys(problem, plan, moment)
    return grow(problem, plan, view, coordinates, sizes, limits, moment)


def described_keys(problem: Problem, plan: Plan, moment: Array) -> tuple[View, Array, Array, tuple[Array, Array]]:
    """Return the view, the keys' coordinates (G, n_k, p), and the values' sizes (G, n_k), the largest one 1, and limits."""
    xp, kernels = problem.xp, plan.kernels
    k, v = without_gradient(problem.k), without_gradient(problem.v)
    view = balanced_view(problem, plan, moment)
    coordinates = kernels["project_rows"].function(xp, k, view.keys, view.centre)
    sizes, low, high = kernels["value_sizes"].function(xp, v)
    return view, coordinates, sizes, (low, high)


def grow(
    problem: Problem,
    plan: Plan,
    view: View,
    coordinates: Array,
    sizes: Array,
    limits: tuple[Array, Array],
    moment: Array,
    in_order: int = 0,
) -> KeyTree:
    """Order the keys by a tree, its first levels as they are, and summarise its nodes."""
    xp, kernels = problem.xp, plan.kernels
    order = similar_together(problem, plan, coordinates, leaves(problem.n_k, LEAF_SIZE), in_order)
    nodes: TreeNodes = kernels["node_summaries"].function(
        xp, problem.k, problem.v, coordinates, sizes, order, LEAF_SIZE, view.half_norm
    )
    still = TreeNodes(*(without_gradient(x) for x in nodes))
    # Chunks, whose nodes are the first levels, err more with it.
    octaves = 0.0 if in_order else DEEPER
    unseen, sizes = kernels["scaled_nodes"].function(xp, still, moment, view.queries, view.half_norm, problem.scale, octaves)
    return KeyTree(view, order, nodes, unseen, sizes, limits)


def similar_together(problem: Problem, plan: Plan, coordinates: Array, parts: int, in_order: int) -> Array:
    """Return the order of a tree over rows that ends in equal parts, int64 (G, n), and whose first levels are as they are.

    A sort of codes (`kdecore.kernels.rank_codes`) cuts all levels at once; without either kernel rows stay as they come.
    """
    xp, kernels = problem.xp, plan.kernels
    order: Array
    if "tree_order" in kernels:
        order = kernels["tree_order"].function(xp, coordinates, parts, in_order)
    elif "rank_codes" in kernels:
        codes = kernels["rank_codes"].function(xp, coordinates, CODE_BITS, in_order)
        order = kernels["bucket_order"].function(xp, codes, CODE_BITS)
    else:
        every = xp.arange(int(coordinates.shape[1]), dtype=xp.int64, device=problem.device)
        order = xp.broadcast_to(every, tuple(coordinates.shape[:2]))
    return order


def summaries(keys: KeyTree) -> Tree:
    """Return what of a tree decides how it is opened."""
    still = keys.without_gradient().nodes
    return Tree(still.keys, keys.unseen, still.variances, keys.sizes)
