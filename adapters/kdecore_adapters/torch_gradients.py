"""PyTorch: gradients of the attention kernels, from what they kept: inputs, chosen keys and log-sum-exp.

Forward the fastest kernel runs. Backward a fused one does on CUDA devices; elsewhere the logits are made again, tile by
tile, from the rows gathered for a block, as in FlashAttention (Dao et al. 2022). With P = exp(logits − lse) and ∂ for the
gradient of what follows,

    ∂logits = P ∘ (∂out vᵀ − (Σ ∂out ∘ out − ∂lse))    ∂v = Pᵀ ∂out    ∂q = scale · ∂logits k    ∂k = scale · ∂logitsᵀ q

Which keys were chosen, and how they were weighted, are constants. The means of tree nodes, which stand for keys and values,
are not: their gradients go down the tree to the rows in them.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdecore.kernels.attend_blocks.contract import backward_limit
from kdecore.kernels.gap_moments.reference import draw
from kdecore.kernels.jit import kernel
from kdecore.kernels.node_summaries.contract import TreeNodes
from kdecore.kernels.open_tree.contract import BlockQueries, Tree
from kdecore.kernels.registry import choose, triton_problem
from kdecore.kernels.site import Largest, Site
from kdecore.kernels.threads import team
from kdecore.merge import Part, merge
from kdecore.namespaces import ACCUMULATION, Namespace, dtype_name, host, namespace_of, spans
from kdecore.tree import bounds, depth, node_count

TILE_LOGITS, TILE_COPIES = 2**18, 2**19
"""Logits of a tile, and numbers of its keys or values, at most: larger ones take more memory than exact backward passes,
smaller ones longer (bench/NOTES.md)."""
DENSE_ROWS = 256
"""Queries in a tile of exact attention."""


def attend_blocks(
    xp: Namespace,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_index: Tensor,
    key_index: Tensor,
    log_weight: Tensor,
    scale: float,
    bias: Tensor | None = None,
    before: Part | None = None,
) -> Part:
    """Follow `kdecore.kernels.attend_blocks.contract.AttendBlocks`, recorded for gradients in q, k, v and bias."""
    part = Part(*_Blocks.apply(q, k, v, query_index, key_index, log_weight, scale, bias))
    return part if before is None else merge(xp, before, part)


def attend_dense(xp: Namespace, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Part:
    """Follow `kdecore.kernels.attend_dense.contract.AttendDense`, recorded for gradients in q, k and v."""
    return Part(*_Dense.apply(q, k, v, scale))


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
    before: Part | None = None,
) -> tuple[Part, Tensor]:
    """Follow `kdecore.kernels.attend_tree.contract.AttendTree`, recorded for gradients in q, keys, values and slope."""
    # A tree that was built in inference mode can't be kept as it is.
    inputs = map(_kept, (*queries, *tree, values, slope, own))
    out, lse, counts = _Tree.apply(*inputs, limits, (_kept(threshold), most, start), before is not None)
    part = Part(out, lse)
    return (part if before is None else merge(xp, before, part)), counts


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


def backward(kernel: str, site: Site) -> str:
    """Return what computes a kernel's gradients at a site, and why no other."""
    if kernel in ("node_summaries", "attend_tree"):
        return "numba-cpu" if site.device == "cpu" else "PyTorch"
    if kernel == "gap_moments":
        return "PyTorch"
    reason = unfused(site)
    return "triton" if reason is None else f"PyTorch (triton: {reason})"


def unfused(site: Site) -> str | None:
    """Return why the gradients of attention cannot be computed by the kernels in Triton, or None where they can."""
    if torch.are_deterministic_algorithms_enabled():
        return "adds in no fixed order, which torch.use_deterministic_algorithms forbids"
    return triton_problem(site) or backward_limit(site.largest)


def _unrecorded(kernel: str, site: Site) -> Callable[..., Any]:
    """Return the kernel that runs where nothing is recorded.

    Sizes are those of the call at hand, no larger than those that the plan was made for: what the plan says can run does.
    """
    return choose(kernel, site).function


def _fused(site: Site) -> Any:
    """Return the module of gradients in Triton where it can be used, else None."""
    if unfused(site) is not None:
        return None
    from kdecore.kernels.attend_blocks import triton_backward

    return triton_backward


def _site(tensor: Tensor, **sizes: int) -> Site:
    """Return where a tensor is, with sizes of what is to be computed there."""
    largest = Largest(item_bytes=tensor.element_size(), **sizes)
    return Site("torch", str(tensor.device), ACCUMULATION[dtype_name(tensor)], largest=largest)


def _site_of_blocks(q: Tensor, k: Tensor, v: Tensor, query_index: Tensor, key_index: Tensor) -> Site:
    sizes = {"n_q": len(q), "n_k": len(k), "d": q.shape[1], "d_v": v.shape[1]}
    return _site(q, **sizes, rows=query_index.shape[1])


def _site_of_groups(q: Tensor, k: Tensor, v: Tensor) -> Site:
    return _site(q, groups=len(q), n_q=q.shape[1], n_k=k.shape[1], d=q.shape[2], d_v=v.shape[2])


def _in_dtypes_of(found: Iterable[Tensor], inputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """Cast gradients to the dtypes of what they are the gradients of."""
    return (gradient.to(x.dtype) for gradient, x in zip(found, inputs, strict=True))


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_index: Tensor,
        key_index: Tensor,
        log_weight: Tensor,
        scale: float,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        kernel = _unrecorded("attend_blocks", _site_of_blocks(q, k, v, query_index, key_index))
        found = kernel(namespace_of(q), q, k, v, query_index, key_index, log_weight, scale, bias)
        return found.out, found.lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale, bias = inputs
        ctx.save_for_backward(*tensors, bias, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, query_index, key_index, log_weight, bias, lse = ctx.saved_tensors
        lse, grad_lse = _of_rows(lse, grad_lse)
        biased = bias is not None and ctx.needs_input_grad[7]
        if fused := _fused(_site_of_blocks(q, k, v, query_index, key_index)):
            lists, sizes = (query_index, key_index, log_weight), (*query_index.shape, key_index.shape[1])
            found = fused.gradients(q, k, v, lists, sizes, ctx.scale, lse, grad_out, grad_lse, bias, of_bias=biased)
            return *found[:3], None, None, None, None, found[3]
        of_bias = torch.zeros_like(bias) if biased else None
        of_q, of_k, of_v = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        d, d_v = k.shape[1], v.shape[1]
        # A row that is there again doesn't count again.
        again = torch.zeros_like(query_index, dtype=torch.bool)
        again[:, 1:] = query_index[:, 1:] == query_index[:, :-1]
        for block, row in _tiles(len(query_index), query_index.shape[1], key_index.shape[1], max(d, d_v)):
            rows, keys = query_index[block, row], key_index[block].reshape(-1)
            repeated = again[block, row]
            added = log_weight[block, None, :]
            if bias is not None:
                added = added + (bias[:, row] if len(bias) == 1 else bias[block, row])
            shape = (len(rows), -1)
            of_rows, of_keys, of_values, of_logits = _of_tile(
                q[rows].to(lse.dtype) * ctx.scale,
                k.index_select(0, keys).to(lse.dtype).view(*shape, d),
                v.index_select(0, keys).to(lse.dtype).view(*shape, d_v),
                added,
                lse[rows],
                grad_out[rows].masked_fill(repeated[..., None], 0.0),
                grad_lse[rows].masked_fill(repeated, 0.0),
            )
            add_rows(of_q, rows.reshape(-1), of_rows.reshape(-1, d), ctx.scale)
            add_rows(of_k, keys, of_keys.reshape(-1, d))
            add_rows(of_v, keys, of_values.reshape(-1, d_v))
            if of_bias is not None:
                target = of_bias[:, row] if len(of_bias) == 1 else of_bias[block, row]
                target += of_logits.sum(0, keepdim=True) if len(of_bias) == 1 else of_logits
        return *_in_dtypes_of((of_q, of_k, of_v), (q, k, v)), None, None, None, None, of_bias


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        found = _unrecorded("attend_dense", _site_of_groups(q, k, v))(namespace_of(q), q, k, v, scale)
        return found.out, found.lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        lse, grad_lse = _of_rows(lse, grad_lse)
        if fused := _fused(_site_of_groups(q, k, v)):
            sizes, rows = (*q.shape[:2], k.shape[1]), [_flat(x) for x in (q, k, v)]
            found = fused.gradients(
                *rows, None, sizes, ctx.scale, *(_flat(x) for x in (lse, grad_out, grad_lse)), out=_flat(out)
            )
            return *(x.reshape(y.shape) for x, y in zip(found[:3], (q, k, v), strict=True)), None
        of_q, of_k, of_v = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        keys_step = max(1, min(k.shape[1], TILE_LOGITS // DENSE_ROWS))
        for group, row in _tiles(len(q), q.shape[1], keys_step, max(q.shape[2], v.shape[2])):
            queries = q[group, row].to(lse.dtype) * ctx.scale
            for key in spans(k.shape[1], keys_step):
                kept = (lse[group, row], grad_out[group, row], grad_lse[group, row], out[group, row])
                keys, values = k[group, key].to(lse.dtype), v[group, key].to(lse.dtype)
                of_rows, of_keys, of_values, _ = _of_tile(queries, keys, values, None, *kept)
                of_q[group, row].add_(of_rows, alpha=ctx.scale)
                of_k[group, key].add_(of_keys)
                of_v[group, key].add_(of_values)
        return *_in_dtypes_of((of_q, of_k, of_v), (q, k, v)), None


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
        kernel = _unrecorded("attend_tree", _site(q, groups=len(q), n_q=q.shape[1], d=q.shape[2], d_v=values.shape[2] - 1))
        queries, tree = BlockQueries(q, scale, coordinates, index, apart), Tree(keys, spread, variances, sizes)
        nothing = None
        if merged:
            # Of queries in no block, what is merged with others has to mean something.
            shape = q.shape[:2]
            nothing = Part(q.new_zeros(*shape, values.shape[2] - 1), q.new_full(shape, -math.inf))
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
        lse, grad_lse = _of_rows(lse, grad_lse)
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
        site = _site(keys, groups=len(keys), d=keys.shape[2], d_v=values.shape[2] - 1, nodes=nodes)
        return tuple(_unrecorded("gap_moments", site)(namespace_of(keys), keys, values, key_index, share, nodes, draws))

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
        return *_in_dtypes_of((of_keys, of_values), (keys, values)), *(None,) * 4


class _Nodes(torch.autograd.Function):
    @staticmethod
    def forward(
        k: Tensor, v: Tensor, coordinates: Tensor, sizes: Tensor, order: Tensor, leaf_size: int, half_norm: Tensor
    ) -> tuple[Tensor, ...]:
        (groups, n, d), d_v, p = k.shape, v.shape[2], coordinates.shape[2]
        nodes = node_count(n, leaf_size)
        site = _site(k, groups=groups, n_k=n, d=d, d_v=d_v, directions=p, leaf_size=leaf_size, nodes=nodes)
        kernel = _unrecorded("node_summaries", site)
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


def _kept(x: Any) -> Any:
    """Return what can be kept for a backward pass: a tensor that was made in inference mode once more."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


def _flat(x: Tensor) -> Tensor:
    """Return the rows of all groups one after another."""
    return x.reshape(-1, *x.shape[2:])


def _of_rows(lse: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor]:
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


def _tiles(blocks: int, rows: int, slots: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Cut blocks of so many rows and slots into tiles."""
    rows_step = max(1, min(rows, TILE_LOGITS // slots))
    blocks_step = max(1, min(TILE_LOGITS // (slots * rows_step), TILE_COPIES // (slots * width)))
    for block in spans(blocks, blocks_step):
        for row in spans(rows, rows_step):
            yield block, row


def _of_tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    added: Tensor | None,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of scaled queries (N, b, d), keys (N, s, d), values (N, s, d_v) and logits (N, b, s).

    A tile that has all keys of its rows makes Σ ∂out ∘ out itself, and needs no ``out`` (N, b, d_v).
    """
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    weights = torch.bmm(q, keys) if added is None else torch.baddbmm(added, q, keys)
    weights.sub_(lse[..., None]).exp_()
    of_values = torch.bmm(weights.transpose(1, 2), grad_out)
    of_logits = torch.bmm(grad_out, values)
    along = torch.linalg.vecdot(weights, of_logits) if out is None else torch.linalg.vecdot(grad_out, out)
    of_logits.sub_((along - grad_lse)[..., None]).mul_(weights)
    return torch.bmm(of_logits, k), torch.bmm(of_logits.transpose(1, 2), q), of_values, of_logits
