"""Processes of a group: what they agree on before rows are exchanged, and an error that all of them raise."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kdecore.api.call import call_options
from kdecore.arrays.errors import DTypeError, KdecoreError, OptionError, ShapeError
from kdecore.arrays.namespace import Array, host
from kdecore.arrays.scalars import check_boolean
from kdecore.core.problem import check_alike, check_scale, check_shapes
from kdecore.engine.restrictions import integers
from kdecore_adapters.torch_backend import BACKEND
from kdecore_adapters.torch_operator import check_no_forward_mode

Found = TypeVar("Found")
OTHERS = ("scale", "key_lengths")
"""Options of calls beside those of `kdecore.api.call.CallOptions`."""


class ProcessGroupError(KdecoreError, RuntimeError):
    """Processes of a group can't reach each other, or one of them failed beside the others; the message says which."""


@dataclass(frozen=True)
class Ranks:
    """The processes that a sequence is sharded across.

    Attributes
    ----------
    group
        Of `torch.distributed`; None for the default group.
    rank
        This one's number in the group.
    count
        How many there are.
    """

    group: dist.ProcessGroup | None
    rank: int
    count: int


@dataclass(frozen=True)
class Shard:
    """What a process was given.

    Attributes
    ----------
    shapes
        Of q, k and v.
    dtype, device
        Of all three; the device without its number.
    records
        Whether gradients of any of them are recorded.
    options
        Of the call, in plain values.
    returned
        ``return_lse`` and ``return_report``, on which it depends which exchanges there are.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: str
    records: bool
    options: Mapping[str, Any]
    returned: Mapping[str, bool]


@dataclass(frozen=True)
class Layout:
    """How many rows of the whole sequence each rank has, those of rank 0 first.

    Attributes
    ----------
    queries, keys
        Rows of each rank.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]

    def first_query(self, rank: int) -> int:
        """Return the position of a rank's first query."""
        return sum(self.queries[:rank])

    def first_key(self, rank: int) -> int:
        """Return the position of a rank's first key."""
        return sum(self.keys[:rank])


def joined(group: Any) -> Ranks:
    """Return this process's place in a group, or raise `OptionError`; `ProcessGroupError` where there are no groups."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ProcessGroupError("torch.distributed must be initialised in every process: init_process_group wasn't called")
    if group is not None and (not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0):
        raise OptionError(f"group must be None or a ProcessGroup that this process belongs to, got {group!r}")
    return Ranks(group, dist.get_rank(group), dist.get_world_size(group))


@contextmanager
def exchanging(ranks: Ranks, what: str) -> Iterator[None]:
    """Raise `ProcessGroupError` where processes can't reach each other."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ProcessGroupError(
            f"{what} failed on rank {ranks.rank} of {ranks.count}: another process has ended, or has not come to the same "
            f"call within the group's timeout ({reason})"
        ) from error


def together(ranks: Ranks, say: Callable[[], Found]) -> list[Found]:
    """Return what each rank says, or raise the same error on all of them where one can't.

    So that none waits for others that have left. What is said must be picklable. An exchange of some hundred bytes, which
    waits for devices.
    """
    error, mine = None, None
    try:
        mine = say()
    except Exception as raised:
        error = raised
    foreign = error is not None and not isinstance(error, KdecoreError)
    told = ProcessGroupError(f"{type(error).__name__}: {error}") if foreign else error
    said: list[Any] = [None] * ranks.count
    with exchanging(ranks, "agreeing on a call"):
        dist.all_gather_object(said, (told, mine), group=ranks.group)
    if foreign:
        assert error is not None
        raise error
    for rank, (one, _) in enumerate(said):
        if one is not None:
            raise type(one)(f"{one} (on rank {rank} of {ranks.count})") from error
    return [found for _, found in said]


def described(q: Any, k: Any, v: Any, options: Mapping[str, Any], **returned: object) -> Shard:
    """Check by itself what a process was given; raise what `kdecore.attention` would, and for what isn't sharded."""
    flags = {name: check_boolean(name, flag) for name, flag in returned.items()}
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise DTypeError(f"{name} must be a PyTorch tensor, got {type(x).__name__}")
    if options.get("mask") is not None:
        raise OptionError("mask must be None where a sequence is sharded: causal, window and key_lengths say what is hidden")
    plain = {name: x for name, x in options.items() if name != "mask"}
    call_options(plain, *OTHERS)
    check_alike(q=q, k=k, v=v)
    check_shapes(q, k, v)
    check_no_forward_mode(q, k, v)
    plain["scale"] = check_scale(plain.get("scale"), q.shape[-1])
    if plain.get("key_lengths") is not None:
        plain["key_lengths"] = integers("key_lengths", plain["key_lengths"]).tolist()
    shapes = tuple(tuple(x.shape) for x in (q, k, v))
    return Shard(shapes, q.dtype, q.device.type, BACKEND.gradient_mode(q, k, v) != "", plain, flags)


def agreed(ranks: Ranks, describe: Callable[[], Shard]) -> list[Shard]:
    """Return what each rank was given, or raise the same error on all of them where it doesn't fit together.

    What is left out is given as None, which is not the same as a default.
    """
    shards = together(ranks, describe)
    first = shards[0]
    for rank, one in enumerate(shards):

        def differ(ours: object, theirs: object, rank: int = rank) -> str:
            return f"the same on all ranks, got {ours!r} on rank 0 and {theirs!r} on rank {rank}"

        for name, mine, other in zip("qkv", first.shapes, one.shapes, strict=True):
            if (*mine[:-2], mine[-1]) != (*other[:-2], other[-1]):
                raise ShapeError(f"the shape of {name} must, but for its rows, be {differ(mine, other)}")
        if (first.dtype, first.device) != (one.dtype, one.device):
            here, there = (f"{x.dtype} on {x.device}" for x in (first, one))
            raise DTypeError(f"dtype and device of q, k and v must be {differ(here, there)}")
        if first.records != one.records:
            raise OptionError("q, k and v must record gradients on all ranks or on none: backward is a call of all of them")
        said, others = ({**x.options, **x.returned} for x in (first, one))
        for name in {**said, **others}:
            if said.get(name) != others.get(name):
                raise OptionError(f"{name} must be {differ(said.get(name), others.get(name))}")
    return shards


def layout_of(shards: list[Shard]) -> Layout:
    """Return how many rows each rank has."""
    return Layout(tuple(one.shapes[0][-2] for one in shards), tuple(one.shapes[1][-2] for one in shards))


def group_lengths(given: Any, lead: tuple[int, ...], n_k: int) -> Array:
    """Return the number of keys in each group (G,), of lengths for the leading dimensions of k or the first of them."""
    lengths = host.asarray(n_k if given is None else given, dtype=host.int64)
    if lengths.shape != lead[: lengths.ndim]:
        raise ShapeError(
            f"key_lengths must have the leading dimensions of k or the first of them, {lead}, got {lengths.shape}"
        )
    if lengths.size and not 0 <= int(host.min(lengths)) <= int(host.max(lengths)) <= n_k:
        raise OptionError(f"key_lengths must lie in 0 … {n_k}, the keys of all ranks, got {lengths.tolist()}")
    spread = host.reshape(lengths, (*lengths.shape, *(1,) * (len(lead) - lengths.ndim)))
    return host.reshape(host.broadcast_to(spread, lead), (-1,))
