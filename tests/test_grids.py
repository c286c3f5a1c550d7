"""The grids that kernels are launched on, by tensors of PyTorch's device "meta", which may be of any size."""

import importlib
from importlib.util import find_spec

import array_api_compat.torch as xp
import pytest
import torch

from kdecore.arrays.errors import KernelUnavailable
from kdecore.core.state import AttentionState
from kdecore.core.tree import BlockQueries, Tree, node_count
from kdecore.kernels.draw_indices.contract import Weights
from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.kernels.runtime import grids
from tests.launches import GROWING, LAUNCHES

G, N, D, D_V, P, LEAF, ROWS, SLOTS, COUNT = 16, 2**27 - 1, 3, 2, 3, 4, 16, 5, 200
"""16 · N rows in all: of one row more in each group there would be more rows than a grid has blocks."""
B = -(-N // ROWS)


def meta(*shape, dtype="float32"):
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def tree():
    return meta(G, N, D), meta(G, N, D_V), meta(G, N, P), meta(G, N), meta(G, N, dtype="int64"), LEAF, meta(G)


def summarised():
    nodes = node_count(N, LEAF)
    found = TreeNodes(meta(G, nodes + N, D), meta(), *(meta(G, nodes, *more) for more in ((), (P,), ())))
    return found, meta(G, D, D, dtype="float64"), meta(G, D, P), meta(G), 0.1, 0.15


def opening(n=N):
    nodes = node_count(n, LEAF)
    summaries = meta(G, nodes + n, D), meta(G, nodes), meta(G, nodes, P), meta(G, nodes)
    queries = BlockQueries(meta(G, N, D), 0.1, meta(G, N, P), meta(G, B, ROWS, dtype="int64"))
    return queries, Tree(*summaries), meta(), SLOTS, (0, 0, 1)


def pilot():
    queries, tree, _, slots, start = opening(2**23)
    return queries, tree, slots, slots, start


def lists():
    return meta(G * B, ROWS, dtype="int64"), meta(G * B, SLOTS, dtype="int64"), meta(G * B, SLOTS)


def groups():
    return meta(G, N, D), meta(G, N, D), meta(G, N, D_V)


def listed():
    return *(x.reshape(-1, x.shape[2]) for x in groups()), *lists(), 0.1


def hashed():
    return meta(G, N, dtype="int16"), meta(G, N, dtype="int64")


def gradients(triton_backward):
    rows = (x.reshape(-1, x.shape[2]) for x in groups())
    return triton_backward.gradients(
        *rows, lists(), (G * B, ROWS, SLOTS), 0.1, meta(G * N), meta(G * N, D_V), meta(G * N), meta(1, ROWS, SLOTS)
    )


NUMBA = {
    "finite_rows": lambda: (meta(G, N, D),),
    "spoil_groups": lambda: (meta(G, N), meta(G, N, D), meta(G, N, D_V)),
    "spoil_rows": lambda: (AttentionState(meta(G, N, D_V), meta(G, N)), meta(G, N, dtype="bool"), meta(1, dtype="bfloat16")),
    "row_norms": lambda: (meta(G, N, D),),
    "value_sizes": lambda: (meta(G, N, D_V, dtype="bfloat16"),),
    "hash_codes": lambda: (meta(G, N, D), meta(G, N, D), meta(D, 12)),
    "bucket_order": lambda: (meta(G, N, dtype="int16"), 12),
    "bucket_windows": lambda: (*hashed(), *hashed(), B, 7),
    "draw_uniform": lambda: (1, 2, (G, N), "meta"),
    "draw_indices": lambda: (
        *(meta(G, N, dtype="int64"), Weights(meta(G, N), meta(G)), meta(G, B, dtype="int64"), 7, 1, 2, COUNT, "float32"),
    ),
    "balanced_view": lambda: (*[meta(G, D, D, dtype="float64")] * 2, meta(G, D, dtype="float64"), 0.1, P, meta(G, N, D)),
    "second_moment": lambda: (meta(G, N, D), 3, True),
    "shrink_matrices": lambda: (meta(G, B, D, D_V), meta(G, B), True, 0.5),
    "rank_codes": lambda: (meta(G, N, P), 24),
    "node_summaries": tree,
    "scaled_nodes": summarised,
    "open_tree": opening,
    "pick_threshold": pilot,
    "attend_blocks": listed,
    "attend_dense": lambda: (*groups(), 0.1),
}
TRITON = {
    "hash_codes": lambda: (meta(G, N, D), meta(G, N, D), meta(D, 12)),
    "project_rows": lambda: (meta(G, N, D), meta(G, D, P)),
    "rank_codes": lambda: (meta(G, N, P), 24),
    "node_summaries": tree,
    "open_tree": lambda: opening(2**23),
    "pick_threshold": pilot,
    "attend_blocks": listed,
    "attend_dense": lambda: (*groups(), 0.1),
}


@pytest.mark.skipif(find_spec("numba_cuda") is None, reason="numba-cuda is not installed")
@pytest.mark.parametrize("kernel", NUMBA)
def test_grids_of_numba_kernels_lie_along_one_axis(monkeypatch, kernel):
    """Of all rows that there may be; what counts beyond them, blocks of positions drawn, no device's memory holds."""
    module, found = importlib.import_module(f"kdecore.kernels.{kernel}.cuda"), []
    launching = importlib.import_module("kdecore.kernels.attend_blocks.cuda") if kernel == "attend_dense" else module
    monkeypatch.setattr(launching, "launch", lambda one, blocks, *_: found.append(grids.flat_grid(one.name, blocks)))
    getattr(module, kernel)(xp, *NUMBA[kernel]())
    assert found
    if kernel not in TRITON and kernel not in ("balanced_view", "bucket_order"):
        assert len(found) == LAUNCHES.get(kernel, 1)
    assert all(0 < blocks <= 2**31 - 1 for (blocks,) in found)


def launches(monkeypatch, module):
    """Keep the name and grid of every launch that a module's functions would make."""
    found = []

    class Recorded:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            found.append((self.name, grid))
            return lambda *arguments, **options: None

    for name, value in vars(module).items():
        if type(value).__name__ in ("JITFunction", "InterpretedFunction") and value.__module__ == module.__name__:
            monkeypatch.setattr(module, name, Recorded(name))
    return found


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("kernel", [*TRITON, "gradients"])
def test_grids_of_triton_kernels_are_checked(monkeypatch, kernel):
    """Along their first axis, the only one that grows."""
    others = {"attend_dense": "attend_blocks.triton", "gradients": "attend_blocks.triton_backward"}
    module = importlib.import_module(f"kdecore.kernels.{others.get(kernel, f'{kernel}.triton')}")
    found, checked = launches(monkeypatch, module), []

    def check(name, blocks):
        checked.append(name)
        return grids.flat_grid(name, blocks)

    monkeypatch.setattr(module, "flat_grid", check)
    if kernel == "gradients":
        gradients(module)
    else:
        getattr(importlib.import_module(f"kdecore.kernels.{kernel}.triton"), kernel)(xp, *TRITON[kernel]())
    assert found
    if kernel not in GROWING | {"attend_blocks", "gradients"}:
        assert len(found) == LAUNCHES.get(kernel, 1)
    assert [one for one, _ in found] == checked
    assert all(0 < grid[0] <= 2**31 - 1 and grid[1:] in ((), (4,)) for _, grid in found)


def test_more_blocks_than_a_grid_has_room_for_are_refused():
    assert grids.flat_grid("draw", 2**31 - 1) == (2**31 - 1,)
    with pytest.raises(KernelUnavailable, match="a grid has at most 2147483647 blocks, got 2147483648 of draw"):
        grids.flat_grid("draw", 2**31)
