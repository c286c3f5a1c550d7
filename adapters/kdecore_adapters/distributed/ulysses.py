"""Ulysses: from shards of the sequence to all of it for some of the heads, and back (Jacobs et al. 2023)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from statistics import fmean
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from kdecore.accuracy.certificate import CONFIDENCE, Certificate
from kdecore.api.attention import attention
from kdecore.api.report import Report
from kdecore.arrays.errors import ShapeError
from kdecore.arrays.namespace import host
from kdecore.arrays.random import piece_seed
from kdecore_adapters.distributed.ranks import (
    Ranks,
    Shard,
    agreed,
    described,
    exchanging,
    group_lengths,
    joined,
    layout_of,
    together,
)

ALIGNED = 16
"""Bytes of which tensors within a buffer take a multiple, so that each begins where numbers of any dtype may."""


@overload
def ulysses_attention(
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
def ulysses_attention(
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
def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = ...,
    return_report: Literal[True],
    group: Any = ...,
    **kdecore_options: Any,
) -> tuple[Tensor, Report]: ...
@overload
def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    return_report: Literal[True],
    group: Any = ...,
    **kdecore_options: Any,
) -> tuple[Tensor, Tensor, Report]: ...
@overload
def ulysses_attention(
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
def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any = None,
    return_lse: bool = False,
    return_report: bool = False,
    **kdecore_options: Any,
) -> Any:
    """Attention of a sequence that is sharded across processes: each evaluates the whole sequence, for some of the heads.

    A call of every process of the group, with the same options. Each rank's heads get what `kdecore.attention` gives for
    these heads by themselves: to rounding exact attention, at a full budget, and otherwise an estimate whose mean of keys
    per query is the budget on every rank (in one process treecode shares it among all heads).

    Parameters
    ----------
    q, k, v
        (…, heads, n_q, d), (…, heads, n_k, d), (…, heads, n_k, d_v): this rank's rows of all heads, those of rank 0 first;
        how many may differ from rank to rank. k and v may have fewer heads, a divisor of q's. The ranks divide q's heads,
        and k's, or k's heads divide the ranks, and are sent to several.
    group
        A group of `torch.distributed`; None for the default one.
    return_lse, return_report
        As in `kdecore.attention`.
    **kdecore_options
        Options of `kdecore.attention` but ``mask``, about the whole sequence: ``key_lengths`` and ``diagonal`` count its
        rows, and ``rtol`` is kept for the heads of each rank. ``seed`` is that of rank 0; other ranks draw numbers of their
        own, the same in every call.

    Returns
    -------
    out : Tensor
        (…, heads, n_q, d_v): this rank's rows. Gradients are recorded, through the exchanges; backward is a call of every
        process too.
    lse : Tensor
        (…, heads, n_q); only with ``return_lse``.
    report : Report
        Of this rank's heads, but its certificate, the same on every rank, is of all heads: means of estimates and of limits,
        which are at least as far apart as those of one sample of all. Only with ``return_report``.

    Raises
    ------
    ShapeError
        The ranks don't divide the heads; shapes differ between ranks by more than their rows.
    OptionError
        Options differ between ranks, or gradients are recorded on some of them only.
    ProcessGroupError
        `torch.distributed` isn't initialised, a process has ended or doesn't come within the group's timeout, or has raised
        another error than kdecore's.
    KdecoreError
        What else `kdecore.attention` raises, on all ranks where on one of them.

    Notes
    -----
    With P ranks and a sequence of n rows each rank computes a P-th of what one process would, whatever is hidden, and sends
    (P − 1)/P² of the numbers of q, k, v and out: n · heads · (2 d + 2 d_v) · (P − 1)/P² numbers with as many queries and
    keys, and as many backward; with ``return_lse`` n · heads more. That is one exchange of q, k and v and one of results,
    forward and backward. It holds n · heads · (2 d + 2 d_v)/P of them. Agreeing takes two exchanges of some hundred bytes,
    which wait for devices.

    References
    ----------
    Jacobs et al. (2023). DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence Transformer
    Models. arXiv:2309.14509.
    """
    ranks = joined(group)

    def describe() -> Shard:
        shard = described(q, k, v, kdecore_options, return_lse=return_lse, return_report=return_report)
        check_heads(shard, ranks)
        return shard

    shards = agreed(ranks, describe)
    layout = layout_of(shards)
    if (lengths := shards[0].options.get("key_lengths")) is not None:
        group_lengths(lengths, shards[0].shapes[1][:-2], sum(layout.keys))
    places = [heads_of(shards[0], ranks, rank) for rank in range(ranks.count)]
    cut = [cut_heads(x, some) for x, some in zip((q, k, v), zip(*places, strict=True), strict=True)]
    given = list(zip(*cut, strict=True))
    rows = [(layout.queries[rank], layout.keys[rank], layout.keys[rank]) for rank in range(ranks.count)]
    shapes = [[with_rows(x, n) for x, n in zip(given[ranks.rank], some, strict=True)] for some in rows]
    came = exchanged(ranks, given, shapes)
    whole = [torch.cat(parts, dim=-2) for parts in zip(*came, strict=True)]
    found: list[Any] = []

    def evaluate() -> Report | None:
        options = of_heads(shards[0], ranks)
        with torch.autocast(q.device.type, enabled=False):
            found.extend(attention(*whole, **options, return_lse=True, return_report=return_report))
        return found[2] if return_report else None

    reports = together(ranks, evaluate)
    results = [found[0], found[1][..., None]] if return_lse else [found[0]]
    out, *lse = to_rows(ranks, results, layout.queries)
    returned: list[Any] = [out, *(x[..., 0] for x in lse)]
    if return_report:
        returned.append(replace(found[2], certificate=of_all_heads(reports)))
    return tuple(returned) if len(returned) > 1 else returned[0]


def check_heads(shard: Shard, ranks: Ranks) -> None:
    """Raise `ShapeError` where heads can't be shared out."""
    of_q, of_k, _ = shard.shapes
    got = f"got q {of_q}, k {of_k} on {ranks.count} ranks"
    if len(of_q) < 3:
        raise ShapeError(f"q must have at least 3 dimensions (…, heads, n_q, d), {got}")
    heads, key_heads = of_q[-3], of_k[-3]
    if heads % ranks.count != 0:
        raise ShapeError(f"q must have heads that the number of ranks divides, {heads} heads by {ranks.count}; {got}")
    if key_heads % ranks.count != 0 and ranks.count % max(1, key_heads) != 0:
        raise ShapeError(
            f"k must have heads that the number of ranks divides or that divide it, {key_heads} heads, {ranks.count} ranks; "
            f"{got}"
        )


def heads_of(shard: Shard, ranks: Ranks, rank: int) -> list[tuple[int, int]]:
    """Return which heads of q, k and v a rank evaluates: from the first to the one before the last."""
    heads, key_heads = shard.shapes[0][-3], shard.shapes[1][-3]
    first, end = (rank * heads // ranks.count, (rank + 1) * heads // ranks.count)
    shared = max(1, heads // max(1, key_heads))
    of_keys = (first // shared, -(-end // shared))
    return [(first, end), of_keys, of_keys]


def cut_heads(x: Tensor, places: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return the heads of each rank, of (…, heads, n, width), from one cut, whose gradients are put together once."""
    size = max(1, places[0][1] - places[0][0])
    pieces = x.split(size, dim=-3)
    return [pieces[first // size] for first, _ in places]


def of_heads(shard: Shard, ranks: Ranks) -> dict[str, Any]:
    """Return options for this rank's heads."""
    options = dict(shard.options)
    (first, _), of_keys, _ = heads_of(shard, ranks, ranks.rank)
    # As of a piece that `max_memory` cuts.
    options["seed"] = piece_seed(options.get("seed", 0), (first, 0) if first else ())
    if options.get("key_lengths") is not None:
        lengths = host.asarray(options["key_lengths"])
        each = lengths.ndim == len(shard.shapes[1]) - 2
        options["key_lengths"] = lengths[..., slice(*of_keys)] if each else lengths
    return options


def with_rows(x: Tensor, n: int) -> torch.Size:
    """Return a tensor's shape with n rows."""
    return torch.Size((*x.shape[:-2], n, x.shape[-1]))


def to_rows(ranks: Ranks, results: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    """Return this rank's rows of all heads, of each of some results (…, heads of this rank, n, width) of all rows."""
    given = list(zip(*(x.split(list(rows), dim=-2) for x in results), strict=True))
    shapes = [with_rows(x, rows[ranks.rank]) for x in results]
    came = exchanged(ranks, given, [shapes] * ranks.count)
    return [torch.cat(parts, dim=-3) for parts in zip(*came, strict=True)]


def exchanged(ranks: Ranks, given: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[torch.Size]]) -> list[list[Tensor]]:
    """Give each rank some tensors, and return what each gave, of these shapes and the same dtypes: one all-to-all."""
    parts = _AllToAll.apply(ranks, list(chain.from_iterable(shapes)), *chain.from_iterable(given))
    width = len(shapes[0])
    return [list(parts[first : first + width]) for first in range(0, len(parts), width)]


class _AllToAll(torch.autograd.Function):
    """`torch.distributed.all_to_all_single` of tensors of any dtypes, whose gradients go back the way that they came."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, shapes: list[torch.Size], *given: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.shapes = ranks, [x.shape for x in given]
        dtypes = [x.dtype for x in given]
        sent, sizes, places = laid_out(ranks, ctx.shapes, dtypes, given[0].device)
        for place, x in zip(places, given, strict=True):
            place.copy_(x)
        came, coming, parts = laid_out(ranks, shapes, dtypes, sent.device)
        with exchanging(ranks, "exchanging heads for rows"):
            dist.all_to_all_single(came, sent, coming, sizes, group=ranks.group)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_AllToAll.apply(ctx.ranks, ctx.shapes, *grads)


def laid_out(
    ranks: Ranks, shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype], device: torch.device
) -> tuple[Tensor, list[int], list[Tensor]]:
    """Return a buffer of bytes, how many of them are each rank's, and views of it, of which each rank has as many."""
    taken = [shape.numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    spans = [-(-n // ALIGNED) * ALIGNED for n in taken]
    buffer = torch.empty(sum(spans), dtype=torch.uint8, device=device)
    views = [
        part[:n].view(dtype).view(shape)
        for part, n, dtype, shape in zip(buffer.split(spans), taken, dtypes, shapes, strict=True)
    ]
    width = len(shapes) // ranks.count
    return buffer, [sum(spans[first : first + width]) for first in range(0, len(spans), width)], views


def of_all_heads(reports: Sequence[Report | None]) -> Certificate | None:
    """Return the certificate of all heads from those of as many on each rank: the means. None where all are exact."""
    known = [one.certificate for one in reports if one is not None and one.certificate is not None]
    if not known:
        return None

    def mean(name: str) -> Any:
        """Return the mean of a field, 0 where heads are exact."""
        values = [getattr(one, name) for one in known]
        missing = len(reports) - len(known)
        if isinstance(values[0], tuple):
            return tuple(fmean([*limits, *[0.0] * missing]) for limits in zip(*values, strict=True))
        return fmean([*values, *[0.0] * missing])

    fields = ("frobenius", "frobenius_interval", "spectral", "spectral_interval")
    means: Mapping[str, Any] = {name: mean(name) for name in fields}
    return Certificate(rows=min(one.rows for one in known), confidence=CONFIDENCE, **means)
