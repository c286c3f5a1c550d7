"""PyTorch: gradients of the treecode's kernels, and what those of all kernels share."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdecore.arrays.namespace import ACCUMULATION, Namespace, dtype_name, host, namespace_of
from kdecore.core.state import AttentionState, merge_states
from kdecore.core.tree import BlockQueries, Tree, bounds, depth, node_count
from kdecore.kernels.gap_moments.reference import draw
from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.kernels.registry import choose
from kdecore.kernels.runtime.jit import kernel
from kdecore.kernels.runtime.threads import team
from kdecore.kernels.site import Largest, Site


def unrecorded(kernel: str, site: Site) -> Callable[..., Any]:
    """Return the kernel that runs where nothing is recorded.

    Sizes are those of the call at hand, no larger than those that the plan was made for: what the plan says can run does.
    """
    return choose(kernel, site).function


def site_here(tensor: Tensor, **sizes: int) -> Site:
    """Return where a tensor is, with sizes of what is to be computed there."""
    largest = Largest(item_bytes=tensor.element_size(), **sizes)
    return Site("torch", str(tensor.device), ACCUMULATION[dtype_name(tensor)], largest=largest)


def in_dtypes_of(found: Iterable[Tensor], inputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """Cast gradients to the dtypes of what they are the gradients of."""
    return (gradient.to(x.dtype) for gradient, x in zip(found, inputs, strict=True))


class _Tree(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor,
        scale: float,
        coordinates: Tensor,
        index: Tensor,
        apart: bool,
        keys: Tensor,
        spread: Tensor,
        variances: Tensor,
        sizes: Tensor,
        values: Tensor,
        slope: Tensor | None,
        own: Tensor | None,
        limits: tuple[Tensor, Tensor] | None,
        opening: tuple[Tensor, int, tuple[int, int, int]],
        merged: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernel = unrecorded(
            "attend_tree", site_here(q, groups=len(q), n_q=q.shape[1], d=q.shape[2], d_v=values.shape[2] - 1)
        )
        queries, tree = BlockQueries(q, scale, coordinates, index, apart), Tree(keys, spread, variances, sizes)
        nothing = None
        if merged:
            # Of queries in no block, what is merged with others has to mean something.
            shape = q.shape[:2]
            nothing = AttentionState(q.new_zeros(*shape, values.shape[2] - 1), q.new_full(shape, -math.inf))
        part, counts = kernel(namespace_of(q), queries, tree, values, *opening, own, slope, limits, nothing)
        return part.out, part.lse, counts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        q, ctx.scale, coordinates, index, ctx.apart, *tensors, own, _, (threshold, ctx.most, ctx.start), _ = inputs
        ctx.save_for_backward(q, coordinates, index, *tensors, own, threshold, output[1])
        ctx.mark_non_differentiable(output[2])
        with team() as helpers:
            ctx.threads = helpers.threads

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        from kdecore.kernels.attend_tree import cpu_backward

        q, coordinates, index, *nodes, values, slope, own, threshold, lse = ctx.saved_tensors
        queries, tree = BlockQueries(q, ctx.scale, coordinates, index, ctx.apart), Tree(*nodes)
        lse, grad_lse = without_empty(lse, grad_lse)
        opening = threshold, ctx.most, ctx.start
        with team(ctx.threads):
            found = cpu_backward.gradients(queries, tree, values, *opening, own, slope, lse, grad_out, grad_lse)
        of_q, of_keys, of_values, of_slope = (torch.from_numpy(x) for x in found)
        of_first_order = None if slope is None else of_slope
        nothing = (None,) * 4
        return of_q, *nothing, of_keys, None, None, None, of_values, of_first_order, *nothing


class _Gaps(torch.autograd.Function):
    @staticmethod
    def forward(
        keys: Tensor, values: Tensor, key_index: Tensor, share: Tensor, nodes: int, draws: int
    ) -> tuple[Tensor, ...]:
        site = site_here(keys, groups=len(keys), d=keys.shape[2], d_v=values.shape[2] - 1, nodes=nodes)
        return tuple(unrecorded("gap_moments", site)(namespace_of(keys), keys, values, key_index, share, nodes, draws))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.nodes, ctx.draws = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_matrices: Tensor, of_chances: Tensor) -> tuple[Tensor | None, ...]:
        keys, values, key_index, share = ctx.saved_tensors
        drawn, mean = draw(namespace_of(share), key_index, share, ctx.nodes, keys.shape[1] - ctx.nodes, ctx.draws)
        of_keys, of_values = (torch.zeros_like(x, dtype=of_matrices.dtype) for x in (keys, values))
        # A block of a group after another: their gaps, made again, take less memory than those of all.
        for group in range(len(keys)):
            for block in range(drawn.shape[1]):
                rows, means = drawn[group, block], mean[group, block]
                gap, value_gap = (
                    x[group, rows].to(of_keys.dtype) - x[group, means].to(of_keys.dtype) for x in (keys, values[..., :-1])
                )
                square, value_square = (x.square().sum(-1, keepdim=True) for x in (gap, value_gap))
                spread = square.sum()
                unit = torch.where(spread > 0, 1.0 / spread, 0.0)
                # Of Σ κ νᵀ and of Σ ‖κ‖² ‖ν‖², by which both results are in proportion; and of Σ ‖κ‖², which divides them.
                of_products, of_sizes = of_matrices[group, block] * unit, of_chances[group, block] * unit**2
                of_spread = (of_products * (gap.T @ value_gap)).sum() + 2.0 * of_sizes * (square * value_square).sum()
                of_gap = value_gap @ of_products.T + 2.0 * gap * (of_sizes * value_square - of_spread * unit)
                of_value_gap = gap @ of_products + 2.0 * value_gap * of_sizes * square
                of_value_gap = torch.nn.functional.pad(of_value_gap, (0, 1))
                for target, change in ((of_keys, of_gap), (of_values, of_value_gap)):
                    add_rows(target[group], rows, change)
                    add_rows(target[group], means, change, -1.0)
        return *in_dtypes_of((of_keys, of_values), (keys, values)), *(None,) * 4


class _Nodes(torch.autograd.Function):
    @staticmethod
    def forward(
        k: Tensor, v: Tensor, coordinates: Tensor, sizes: Tensor, order: Tensor, leaf_size: int, half_norm: Tensor
    ) -> tuple[Tensor, ...]:
        (groups, n, d), d_v, p = k.shape, v.shape[2], coordinates.shape[2]
        nodes = node_count(n, leaf_size)
        site = site_here(k, groups=groups, n_k=n, d=d, d_v=d_v, directions=p, leaf_size=leaf_size, nodes=nodes)
        kernel = unrecorded("node_summaries", site)
        return tuple(kernel(namespace_of(k), k, v, coordinates, sizes, order, leaf_size, half_norm))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        k, _, _, _, order, ctx.leaf_size, half_norm = inputs
        ctx.dtype = k.dtype
        keys, values, spread, variances, sizes = output
        ctx.save_for_backward(order, half_norm, keys, values[..., -1].contiguous(), spread)
        ctx.mark_non_differentiable(spread, variances, sizes)
        with team() as helpers:
            ctx.threads = helpers.threads

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_keys: Tensor, of_values: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        order, half_norm, keys, last, spread = ctx.saved_tensors
        keys, of_keys, of_values = (x.to(spread.dtype) for x in (keys, of_keys, of_values))
        if keys.device.type == "cpu":
            from kdecore.kernels.node_summaries import cpu_backward

            with team(ctx.threads):
                rows = cpu_backward.gradients(order, half_norm, keys, last, spread, of_keys, of_values, ctx.leaf_size)
            return *(torch.from_numpy(x).to(ctx.dtype) for x in rows), None, None, None, None, None
        groups, n = order.shape
        levels = [host.diff(bounds(n, level)) for level in range(depth(n, ctx.leaf_size) + 1)]
        counts = torch.from_numpy(host.concat(levels)).to(keys)
        nodes, d = len(counts), keys.shape[2]
        frozen = half_norm[:, None] * spread > counts.log()
        of_spread = of_values[:, :nodes, -1] * torch.where(frozen, last[:, :nodes] / (2.0 * spread), 1.0)
        # As kdecore.kernels.node_summaries.cpu_backward has it.
        centred = keys - keys[:, :1]
        of_means = of_keys[:, :nodes] - 2.0 * of_spread[..., None] * centred[:, :nodes]
        shares = torch.cat([of_means, of_values[:, :nodes, :-1], of_spread[..., None]], dim=-1) / counts[:, None]
        found, start = shares[:, :1], 1
        for level in levels[1:]:
            found = found.repeat_interleave(2, dim=1) + shares[:, start : start + len(level)]
            start += len(level)
        found = found.repeat_interleave(torch.from_numpy(levels[-1]).to(order.device), dim=1, output_size=n)
        of_k = of_keys[:, nodes:] + found[..., :d] + 2.0 * found[..., -1:] * centred[:, nodes:]
        of_v = of_values[:, nodes:, :-1] + found[..., d:-1]
        row = (order + n * torch.arange(groups, device=order.device)[:, None]).reshape(-1)

        def in_place(ordered: Tensor) -> Tensor:
            rows = torch.empty(groups * n, ordered.shape[2], dtype=ordered.dtype, device=ordered.device)
            rows[row] = ordered.reshape(groups * n, -1)
            return rows.reshape(ordered.shape).to(ctx.dtype)

        return in_place(of_k), in_place(of_v), None, None, None, None, None


def kept(x: Any) -> Any:
    """Return what can be kept for a backward pass: a tensor that was made in inference mode once more."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


def without_empty(lse: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return lse and ∂lse; +∞ and 0 where a row has no keys: its weights are 0, and merging made ∂lse NaN."""
    empty = lse == -math.inf
    return lse.masked_fill(empty, math.inf), grad_lse.masked_fill(empty, 0.0)


def add_rows(target: Tensor, index: Tensor, rows: Tensor, factor: float = 1.0) -> None:
    """Add ``factor`` times rows (m, w) to the rows ``index`` (m,) of target (n, w), one after another."""
    if target.device.type == "cpu":
        # PyTorch sorts the index first, which takes ten times as long as adding.
        _add_rows_on_host(target.numpy(), index.numpy(), rows.numpy(), factor)
    else:
        target.index_add_(0, index, rows, alpha=factor)


@kernel()
def _add_rows_on_host(target: Any, index: Any, rows: Any, factor: float) -> None:
    scale = target.dtype.type(factor)
    for i in range(index.shape[0]):
        row = index[i]
        for t in range(target.shape[1]):
            target[row, t] += scale * rows[i, t]


def attend_tree(
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
    before: AttentionState | None = None,
) -> tuple[AttentionState, Tensor]:
    """Follow `kdecore.kernels.attend_tree.contract.AttendTree`, recorded for gradients in q, keys, values and slope."""
    # A tree that was built in inference mode can't be kept as it is.
    inputs = map(kept, (*queries, *tree, values, slope, own))
    out, lse, counts = _Tree.apply(*inputs, limits, (kept(threshold), most, start), before is not None)
    part = AttentionState(out, lse)
    return (part if before is None else merge_states(xp, before, part)), counts


def gap_moments(
    xp: Namespace, keys: Tensor, values: Tensor, key_index: Tensor, share: Tensor, nodes: int, draws: int
) -> tuple[Tensor, Tensor]:
    """Follow `kdecore.kernels.gap_moments.contract.GapMoments`, recorded for gradients in keys and values."""
    matrices, chances = _Gaps.apply(keys, values, key_index, share, nodes, draws)
    return matrices, chances


def node_summaries(
    xp: Namespace,
    k: Tensor,
    v: Tensor,
    coordinates: Tensor,
    sizes: Tensor,
    order: Tensor,
    leaf_size: int,
    half_norm: Tensor,
) -> TreeNodes:
    """Follow `kdecore.kernels.node_summaries.contract.NodeSummaries`; its keys and values are recorded for gradients."""
    return TreeNodes(*_Nodes.apply(k, v, coordinates, sizes, order, leaf_size, half_norm))
