"""`scaled_nodes` on the CPU: array operations, but for the product of rows, by a kernel whose threads end with it."""

from kdecore.arrays.namespace import Array, Namespace
from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.kernels.project_rows.cpu import project_rows
from kdecore.kernels.scaled_nodes.reference import scaled, unseen_share


def scaled_nodes(
    xp: Namespace,
    nodes: TreeNodes,
    moment: Array,
    directions: Array,
    half_norm: Array,
    scale: float,
    octaves: float,
) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.scaled_nodes.contract.ScaledNodes`."""
    share = unseen_share(xp, nodes, moment, directions, half_norm, scale, project_rows)
    return scaled(xp, nodes, share, octaves)
