"""Ring attention: queries stay, shards of keys and values go round, results are merged by log-sum-exp (Liu et al. 2023)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdecore.accuracy.certificate import Certificate, check_share
from kdecore.api.attention import attention
from kdecore.api.report import Report
from kdecore.arrays.namespace import namespace_of
from kdecore.core.state import AttentionState, merge_states
from kdecore.methods import METHODS
from kdecore.methods.base import expected_cost
from kdecore.methods.costs import Sizes
from kdecore_adapters.distributed.certificate import certified
from kdecore_adapters.distributed.parts import Asked, Part, asked, parts_of
from kdecore_adapters.distributed.ranks import (
    Layout,
    Ranks,
    Shard,
    agreed,
    described,
    exchanging,
    joined,
    layout_of,
    together,
)


@dataclass(frozen=True)
class RingReport:
    """What one call of `ring_attention` did on one rank.

    Attributes
    ----------
    parts
        Rank that a shard of keys is of, and the report of a call on it, in the order they were made.
    certificate
        Of the merged result on all ranks, and the same on all of them; None where it is exact, has no elements, or none was
        asked for.
    keys_per_query
        Keys evaluated per query of this rank, the mean.
    """

    parts: tuple[tuple[int, Report], ...]
    certificate: Certificate | None
    keys_per_query: float

    def __str__(self) -> str:
        rows = [f"shard {source}: {one.method}, {one.keys_per_query:.1f} keys per query" for source, one in self.parts]
        error = "none" if self.certificate is None else str(self.certificate)
        return "\n".join([*rows, f"keys per query: {self.keys_per_query:.1f}", f"certificate: {error}"])


@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = ...,
    return_report: Literal[False] = ...,
    group: Any = ...,
    **kdecore_options: Any,
) -> Tensor: ...
@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    return_report: Literal[False] = ...,
    group: Any = ...,
    **kdecore_options: Any,
) -> tuple[Tensor, Tensor]: ...
@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = ...,
    return_report: Literal[True],
    group: Any = ...,
    **kdecore_options: Any,
) -> tuple[Tensor, RingReport]: ...
@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    return_report: Literal[True],
    group: Any = ...,
    **kdecore_options: Any,
) -> tuple[Tensor, Tensor, RingReport]: ...
@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool = ...,
    return_report: bool = ...,
    group: Any = ...,
    **kdecore_options: Any,
) -> Any: ...
@torch.compiler.disable  # type: ignore[untyped-decorator]
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any = None,
    return_lse: bool = False,
    return_report: bool = False,
    **kdecore_options: Any,
) -> Any:
    """Attention of a sequence that is sharded across processes: each evaluates its queries, shard by shard of the keys.

    A call of every process of the group, with the same options. Any number of heads will do, and no rank holds more than
    two shards of keys; but each shard has a tree, or an order, of its own, and its part of the budget: with as many keys
    per query in the mean estimates err more than `ulysses_attention`'s, which is to be preferred where heads suffice.

    Parameters
    ----------
    q, k, v
        (…, n_q, d), (…, n_k, d), (…, n_k, d_v): this rank's rows, those of rank 0 first; how many may differ from rank to
        rank, and of queries and keys. k and v may have fewer heads, a divisor of q's.
    group
        A group of `torch.distributed`; None for the default one.
    return_lse, return_report
        As in `kdecore.attention`; reports are `RingReport`.
    **kdecore_options
        Options of `kdecore.attention` but ``mask`` and ``rtol``, about the whole sequence: ``key_lengths`` and ``diagonal``
        count its rows. A ``budget`` is shared among the shards that a rank's queries see (`parts.parts_of`). ``max_memory``
        is for each call on a shard. Each of these draws numbers of its own.

    Returns
    -------
    out : Tensor
        (…, n_q, d_v). Gradients are recorded; backward is a call of every process too.
    lse : Tensor
        (…, n_q), in the accumulation dtype; only with ``return_lse``.
    report : RingReport
        Its certificate is made after the merge, from rows of the whole sequence that all ranks evaluate exactly, each on its
        keys; which are those of `kdecore.attention` in one process, where there are as many. Only with ``return_report``.

    Raises
    ------
    ShapeError
        Shapes differ between ranks by more than their rows.
    OptionError
        A mask or ``rtol``; options differ between ranks, or gradients are recorded on some of them only.
    ProcessGroupError
        `torch.distributed` isn't initialised, a process has ended or doesn't come within the group's timeout, or has raised
        another error than kdecore's.
    KdecoreError
        What else `kdecore.attention` raises, on all ranks where on one of them.

    Notes
    -----
    With P ranks and a sequence of n keys each rank makes P calls on n/P keys, or fewer where its queries see none of a
    shard: with ``causal`` the last rank makes P and the first one, so that ranks wait for the last. Each sends n · heads ·
    (d + d_v) · (P − 1)/P numbers, while it evaluates; backward as many, and then n · heads · (d + d_v) in the accumulation
    dtype. Backward evaluates each shard again, with the same seed, so that between the two a rank keeps no more than its
    inputs and results. A certificate of m rows takes m exact rows in all, shared among the ranks, and P · m · (d + d_v)
    numbers a group.

    References
    ----------
    Liu, Zaharia, Abbeel (2023). Ring Attention with Blockwise Transformers for Near-Infinite Context. arXiv:2310.01889.
    """
    ranks = joined(group)
    share = kdecore_options.get("certificate", 0.1)

    def describe() -> Shard:
        check_share(share)
        return described(q, k, v, kdecore_options, return_lse=return_lse, return_report=return_report)

    shards = agreed(ranks, describe)
    call = asked(shards[0], layout_of(shards))
    groups = len(call.lengths)
    shared = math.prod(q.shape[:-2]) // groups if groups else 1
    rows = q.reshape(groups, shared, *q.shape[-2:]), k.reshape(groups, 1, *k.shape[-2:]), v.reshape(groups, 1, *v.shape[-2:])
    reports: list[tuple[int, Report]] | None = [] if return_report else None
    out, lse = _Ring.apply(*rows, ranks, call.layout, parts_of(call, ranks.rank), reports)
    returned: list[Any] = [out.reshape(*q.shape[:-1], v.shape[-1])]
    if return_lse:
        returned.append(lse.reshape(q.shape[:-1]))
    if reports is not None:
        returned.append(reported(ranks, call, (*rows, out), reports, float(share)))
    return tuple(returned) if len(returned) > 1 else returned[0]


def reported(
    ranks: Ranks, call: Asked, rows: tuple[Tensor, ...], reports: list[tuple[int, Report]], share: float
) -> RingReport:
    """Return the report of a call, with a certificate where a rank has estimated anything; ``rows`` are q, k, v and out."""
    q, _, v, _ = rows
    groups, shared, n_q, d = q.shape
    queries = groups * shared * n_q
    keys = sum(one.keys_per_query * one.shape[0] * one.shape[1] for _, one in reports) / max(1, queries)
    estimated = any(one.method != "exact" for _, one in reports)
    said = together(ranks, lambda: (estimated, sum(cost_of(one) for _, one in reports)))
    certificate = None
    # From what all ranks know alike, so that none waits for others: some may have no queries.
    elements = groups * shared * d * v.shape[-1] * sum(call.layout.queries)
    if share > 0 and elements > 0 and any(one for one, _ in said):
        certificate = certified(ranks, call, tuple(x.detach() for x in rows), sum(cost for _, cost in said), share)
    return RingReport(tuple(reports), certificate, keys)


def cost_of(report: Report) -> float:
    """Return what a call was expected to take."""
    return expected_cost(Sizes(*report.shape, report.dtype), METHODS[report.method].options(**report.options)).total


class _Ring(torch.autograd.Function):
    """Attention of q (G, r, n_q, d) to k (G, 1, n_k, d) and v (G, 1, n_k, d_v), and to those of all other ranks.

    With wⱼ = exp(lseⱼ − lse), out = Σ wⱼ outⱼ over the shards: what follows from outⱼ and lseⱼ is ∂outⱼ = wⱼ ∂out and
    ∂lseⱼ = wⱼ (⟨∂out, outⱼ − out⟩ + ∂lse). Backward, shards go round once more, each with its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ranks: Ranks,
        layout: Layout,
        parts: Mapping[int, Sequence[Part]],
        reports: list[tuple[int, Report]] | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=dtype)
        lse = q.new_full(q.shape[:-1], -torch.inf, dtype=dtype)
        failure: list[Exception] = []
        for source, keys, values in going_round(ranks, layout, k, v):
            try:
                for part in parts.get(source, ()) if not failure else ():
                    found, of_part, *report = evaluated(q, keys, values, part, reports is not None)
                    merge_into(out, lse, part, found, of_part)
                    if reports is not None:
                        reports.append((source, report[0]))
            except Exception as error:  # the others wait for the shard that comes next
                failure.append(error)

        def succeed() -> None:
            if failure:
                raise failure[0]

        together(ranks, succeed)
        returned = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ranks, ctx.layout, ctx.parts = ranks, layout, parts
        return returned, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        ranks, layout, grad = ctx.ranks, ctx.layout, grad.to(out.dtype)
        # Σ wⱼ ⟨∂out, outⱼ⟩ is ⟨∂out, out⟩, which every shard subtracts its part of.
        along = grad_lse - torch.linalg.vecdot(grad, out)
        of_q = torch.zeros_like(q, dtype=out.dtype)
        of_shard = tuple(torch.zeros_like(x, dtype=out.dtype) for x in (k, v))
        for source, keys, values in going_round(ranks, layout, k, v):
            for part in ctx.parts.get(source, ()):
                add_gradients((of_q, *of_shard), (q, keys, values), part, lse, grad, along)
            # With the shard they belong to, and at the end home.
            of_shard = passed_on(ranks, of_shard, layout.keys[(source - 1) % ranks.count])()
        return of_q.to(q.dtype), *(x.to(k.dtype) for x in of_shard), None, None, None, None


def evaluated(q: Tensor, k: Tensor, v: Tensor, part: Part, report: bool = False) -> Any:
    """Return out and lse of a part's groups, and a report where asked for."""
    some = in_part(q, part), *(in_part(x, part)[:, :, : part.keys] for x in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        return attention(*some, **part.options, return_lse=True, return_report=report, certificate=0)


def in_part(x: Tensor, part: Part) -> Tensor:
    """Return the groups of a part, of (G, …): a view where these are all."""
    return x if len(part.groups) == x.shape[0] else x[list(part.groups)]


def merge_into(out: Tensor, lse: Tensor, part: Part, found: Tensor, of_part: Tensor) -> None:
    """Merge the result of a part into that of all groups, in place."""
    before = AttentionState(in_part(out, part), in_part(lse, part))
    merged = merge_states(namespace_of(out), before, AttentionState(found.to(out.dtype), of_part))
    out[list(part.groups)], lse[list(part.groups)] = merged.out, merged.lse


def add_gradients(
    totals: tuple[Tensor, ...], rows: tuple[Tensor, ...], part: Part, lse: Tensor, grad: Tensor, along: Tensor
) -> None:
    """Add the gradients of one part to those of q, and of the shard's k and v."""
    lse, grad, along = (in_part(x, part) for x in (lse, grad, along))
    q, k, v = (in_part(x, part) for x in rows)
    leaves = [x.detach().requires_grad_() for x in (q, k[:, :, : part.keys], v[:, :, : part.keys])]
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        out, of_part = attention(*leaves, **part.options, return_lse=True)
    # Of a query that sees no key nothing follows.
    weight = torch.where(torch.isneginf(lse), 0.0, torch.exp(of_part.detach() - lse))
    of_lse = weight * (torch.linalg.vecdot(grad, out.detach().to(grad.dtype)) + along)
    of_out = (weight[..., None] * grad).to(out.dtype)
    found = torch.autograd.grad((out, of_part), leaves, (of_out, of_lse))
    index = torch.tensor(part.groups, device=q.device)
    totals[0].index_add_(0, index, found[0].to(grad.dtype))
    for total, one in zip(totals[1:], found[1:], strict=True):
        total[:, :, : part.keys].index_add_(0, index, one.to(grad.dtype))


def going_round(ranks: Ranks, layout: Layout, k: Tensor, v: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each rank's number and shard, one's own first; the next one is on its way meanwhile."""
    for step in range(ranks.count):
        source = (ranks.rank - step) % ranks.count
        last = step == ranks.count - 1
        wait = None if last else passed_on(ranks, (k, v), layout.keys[(source - 1) % ranks.count])
        yield source, k, v
        if wait is not None:
            k, v = wait()


def passed_on(ranks: Ranks, rows: Sequence[Tensor], coming: int) -> Callable[[], tuple[Tensor, ...]]:
    """Begin to send tensors (…, n, width) to the next rank; return what waits for those of the one before, of other n."""
    if ranks.count == 1:
        return lambda: tuple(rows)
    sent = [x.contiguous() for x in rows]
    came = tuple(x.new_empty((*x.shape[:-2], coming, x.shape[-1])) for x in sent)
    after, before = (ranks.rank + 1) % ranks.count, (ranks.rank - 1) % ranks.count
    with exchanging(ranks, "passing keys and values on"):
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, x, group=ranks.group, group_peer=after) for x in sent]
            + [dist.P2POp(dist.irecv, x, group=ranks.group, group_peer=before) for x in came]
        )

    def wait() -> tuple[Tensor, ...]:
        with exchanging(ranks, "passing keys and values on"):
            for work in works:
                work.wait()
        # What is on its way must stay until here.
        sent.clear()
        return came

    return wait
