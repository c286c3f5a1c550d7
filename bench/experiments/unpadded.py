"""The treecode in the array API without what fills lists up, so that `bench.baselines.counting` counts as its kernels work.

References make all lists as long as the longest one, and walk all blocks anew where one list is too long. Here they are
given one block of one group at a time. The pilot's blocks still go down the tree together.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from kdecore.arrays.namespace import Namespace
from kdecore.core.state import AttentionState
from kdecore.core.tree import BlockQueries, Tree
from kdecore.kernels import registry
from kdecore.kernels.attend_tree.reference import attend_tree
from kdecore.kernels.open_tree.reference import open_tree


@contextmanager
def unpadded() -> Iterator[None]:
    """Call the references of `open_tree` and `attend_tree` one block at a time, for a block of code; PyTorch only.

    On one thread, since operations are so small that several wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with patch.dict(
            registry.KERNELS,
            {
                name: (*registry.KERNELS[name][:-1], replace(registry.KERNELS[name][-1], function=function))
                for name, function in (("open_tree", opened), ("attend_tree", attended))
            },
        ):
            yield
    finally:
        torch.set_num_threads(threads)


def alone(queries: BlockQueries, group: int, block: int) -> BlockQueries:
    """Return one block of one group, whose queries are all there are."""
    rows = queries.index[group, block]
    return queries._replace(
        q=queries.q[group : group + 1, rows],
        coordinates=queries.coordinates[group : group + 1, rows],
        index=torch.arange(len(rows))[None, None],
    )


def opened(
    xp: Namespace, queries: BlockQueries, tree: Tree, threshold: Tensor, most: int, start: tuple[int, int, int]
) -> tuple[Tensor, ...]:
    """Follow `kdecore.kernels.open_tree.contract.OpenTree`."""
    groups, blocks, _ = queries.index.shape
    found = [
        open_tree(xp, alone(queries, g, i), of_group(tree, g), threshold, most, start)
        for g in range(groups)
        for i in range(blocks)
    ]
    longest = max(one[0].shape[2] for one in found)
    *lists, counts = zip(*found, strict=True)
    filled = (
        torch.cat([functional.pad(x, (0, longest - x.shape[2]), value=fill) for x in column])
        for column, fill in zip(lists, (0, -torch.inf, 0.0), strict=True)
    )
    return *(x.reshape(groups, blocks, longest) for x in filled), torch.cat(counts).reshape(groups, blocks)


def attended(
    xp: Namespace,
    queries: BlockQueries,
    tree: Tree,
    values: Tensor,
    threshold: Tensor,
    most: int,
    start: tuple[int, int, int],
    own: Tensor | None = None,
    slope: Tensor | None = None,
    limits: tuple[Tensor, Tensor] | None = None,
    before: None = None,
) -> tuple[AttentionState, Tensor]:
    """Follow `kdecore.kernels.attend_tree.contract.AttendTree`, but for what is merged with."""
    groups, blocks, _ = queries.index.shape
    out = queries.coordinates.new_zeros(groups, queries.q.shape[1], values.shape[2] - 1)
    lse, counts = out.new_full(out.shape[:2], -torch.inf), torch.zeros(groups, blocks, dtype=torch.int64)
    for g in range(groups):
        one = slice(g, g + 1)
        for i in range(blocks):
            rows, number = queries.index[g, i], 0 if slope is None else i * slope.shape[1] // blocks
            part, counts[one, i : i + 1] = attend_tree(
                xp,
                alone(queries, g, i),
                of_group(tree, g),
                values[one],
                threshold,
                most,
                start,
                None if own is None else own[one, rows],
                None if slope is None else slope[one, number : number + 1],
                None if limits is None else (limits[0][one], limits[1][one]),
            )
            out[g, rows], lse[g, rows] = part.out[0], part.lse[0]
    return AttentionState(out, lse), counts


def of_group(tree: Tree, group: int) -> Tree:
    """Return the tree of one group."""
    return Tree(*(x[group : group + 1] for x in tree))
