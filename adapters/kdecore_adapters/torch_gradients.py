"""PyTorch: gradients of the attention kernels, from what they kept: inputs, chosen keys and log-sum-exp.

Forward the fastest kernel runs. Backward a fused one does on CUDA devices; elsewhere the logits are made again, tile by
tile, from the rows gathered for a block, as in FlashAttention (Dao et al. 2022). With P = exp(logits − lse) and ∂ for the
gradient of what follows,

    ∂logits = P ∘ (∂out vᵀ − (Σ ∂out ∘ out − ∂lse))    ∂v = Pᵀ ∂out    ∂q = scale · ∂logits k    ∂k = scale · ∂logitsᵀ q

Which keys were chosen, and how they were weighted, are constants. The means of tree nodes, which stand for keys and values,
are not: their gradients go down the tree to the rows in them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdecore.arrays.namespace import Namespace, namespace_of
from kdecore.arrays.rows import of_all_groups, spans
from kdecore.core.state import AttentionState, merge_states
from kdecore.kernels.attend_blocks.contract import backward_limit
from kdecore.kernels.registry import triton_problem
from kdecore.kernels.site import Site
from kdecore_adapters.torch_tree_gradients import (
    add_rows,
    attend_tree,
    gap_moments,
    in_dtypes_of,
    node_summaries,
    site_here,
    unrecorded,
    without_empty,
)

__all__ = ["attend_blocks", "attend_dense", "attend_tree", "backward", "gap_moments", "node_summaries"]

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
    before: AttentionState | None = None,
    groups: int = 1,
    whole: bool = False,
) -> AttentionState:
    """Follow `kdecore.kernels.attend_blocks.contract.AttendBlocks`, recorded for gradients in q, k, v and bias."""
    lists = (of_all_groups(xp, x, groups, len(rows) // groups) for x, rows in ((query_index, q), (key_index, k)))
    part = AttentionState(*_Blocks.apply(q, k, v, *lists, log_weight, scale, bias))
    return part if before is None else merge_states(xp, before, part)


def attend_dense(xp: Namespace, q: Tensor, k: Tensor, v: Tensor, scale: float) -> AttentionState:
    """Follow `kdecore.kernels.attend_dense.contract.AttendDense`, recorded for gradients in q, k and v."""
    return AttentionState(*_Dense.apply(q, k, v, scale))


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


def _fused(site: Site) -> Any:
    """Return the module of gradients in Triton where it can be used, else None."""
    if unfused(site) is not None:
        return None
    from kdecore.kernels.attend_blocks import triton_backward

    return triton_backward


def _site_of_blocks(q: Tensor, k: Tensor, v: Tensor, query_index: Tensor, key_index: Tensor) -> Site:
    sizes = {"n_q": len(q), "n_k": len(k), "d": q.shape[1], "d_v": v.shape[1]}
    return site_here(q, **sizes, rows=query_index.shape[1])


def _site_of_groups(q: Tensor, k: Tensor, v: Tensor) -> Site:
    return site_here(q, groups=len(q), n_q=q.shape[1], n_k=k.shape[1], d=q.shape[2], d_v=v.shape[2])


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
        kernel = unrecorded("attend_blocks", _site_of_blocks(q, k, v, query_index, key_index))
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
        lse, grad_lse = without_empty(lse, grad_lse)
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
        return *in_dtypes_of((of_q, of_k, of_v), (q, k, v)), None, None, None, None, of_bias


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        found = unrecorded("attend_dense", _site_of_groups(q, k, v))(namespace_of(q), q, k, v, scale)
        return found.out, found.lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        lse, grad_lse = without_empty(lse, grad_lse)
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
        return *in_dtypes_of((of_q, of_k, of_v), (q, k, v)), None


def _flat(x: Tensor) -> Tensor:
    """Return the rows of all groups one after another."""
    return x.reshape(-1, *x.shape[2:])


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
