"""`scaled_nodes` in the array API."""

from collections.abc import Callable
from typing import Any

from kdecore.arrays.kept import kept_on_device
from kdecore.arrays.namespace import Array, NamedDevice, Namespace, named_device
from kdecore.arrays.rows import take_columns
from kdecore.core.tree import depth_of
from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.kernels.open_tree.contract import ALONG
from kdecore.kernels.project_rows.reference import project_rows
from kdecore.kernels.scaled_nodes.contract import spacing


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


def unseen_share(
    xp: Namespace,
    nodes: TreeNodes,
    moment: Array,
    directions: Array,
    half_norm: Array,
    scale: float,
    project: Callable[..., Array],
) -> Array:
    """Return what spreads are multiplied by: (G,). ``project`` is a kernel `project_rows`."""
    keys, _, spread, variances, _ = nodes
    dtype, d = spread.dtype, int(keys.shape[2])
    rows, leaf = sampled_leaves(xp, spread, int(keys.shape[1]))
    gaps = xp.astype(keys[:, rows, :], dtype, copy=False) - xp.astype(take_columns(xp, keys, leaf), dtype, copy=False)
    moment = xp.astype(moment, dtype)
    half = 0.5 * scale**2 / int(gaps.shape[1])
    whole = xp.sum(project(xp, gaps, moment) * gaps, axis=(-2, -1)) * half
    squares = xp.sum((moment @ directions) * directions, axis=-2)
    along = xp.mean(take_columns(xp, variances, leaf), axis=1)
    seen = xp.sum(squares * along, axis=-1) * (0.5 * ALONG)
    around = half_norm * xp.mean(take_columns(xp, spread, leaf), axis=1)
    return xp.clip((whole - seen) / xp.where(around > 0, around, 1.0), 0.0, float(d))


def sampled_leaves(xp: Namespace, spread: Array, total: int) -> tuple[slice, Array]:
    """Return the sampled rows of a tree of so many nodes and keys, by their places there, and the leaves: int64 (m,)."""
    groups, count = spread.shape
    n, last = total - count, depth_of(count)
    step = spacing(n, groups)
    # Position j lies in leaf ⌊((j + 1) 2^last − 1) / n⌋, the node after 2^last − 1 others and as many more.
    first = ((n + 1) << last) - n - 1
    leaf = xp.arange(first, first + (n << last), step << last, dtype=xp.int64, device=spread.device) // n
    return slice(count, None, step), leaf


def scaled(xp: Namespace, nodes: TreeNodes, share: Array, octaves: float) -> tuple[Array, Array]:
    """Return spreads times a share (G,) of each group, and sizes times 2^(octaves · level)."""
    spread, sizes = nodes.spread * share[:, None], nodes.sizes
    if octaves:
        sizes = sizes * level_factors(xp, sizes.shape[1], octaves, sizes.dtype, named_device(sizes))
    return spread, sizes


@kept_on_device(16)
def level_factors(xp: Namespace, nodes: int, octaves: float, dtype: Any, on: NamedDevice) -> Array:
    """Return 2^(octaves · level) for each of so many nodes: (nodes,). The last few are kept, as many steps make them."""
    number = xp.arange(1, nodes + 1, dtype=xp.float64, device=on.device)
    return xp.astype(2.0 ** (octaves * xp.floor(xp.log2(number))), dtype)
