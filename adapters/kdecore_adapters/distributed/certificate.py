"""Ring attention: the certificate of what was merged, from rows that every rank evaluates exactly on its own keys."""

import torch
import torch.distributed as dist
from torch import Tensor

from kdecore.accuracy.certificate import Certificate, affordable_rows, estimate_errors, sample_rows
from kdecore.api.attention import attention
from kdecore.arrays.memory import to_host
from kdecore.arrays.namespace import Array, host, namespace_of
from kdecore.core.key_ranges import KeyRanges, sliding
from kdecore.core.state import AttentionState, merge_states
from kdecore.methods.costs import Sizes, exact_row_cost
from kdecore_adapters.distributed.parts import Asked
from kdecore_adapters.distributed.ranks import Ranks, exchanging

EXACTLY = ("scale", "kernels", "threads")
"""Options that exact rows go by too."""


def certified(ranks: Ranks, call: Asked, arrays: tuple[Tensor, ...], cost: float, share: float) -> Certificate:
    """Compare some rows of all ranks with exact attention.

    Parameters
    ----------
    ranks, call
        Who called what.
    arrays
        q, k, v and out, (G, r, n_q, d), (G, 1, n_k, d), (G, 1, n_k, d_v), (G, r, n_q, d_v): this rank's rows, recording
        no gradients.
    cost
        Expected cost of the call, of all ranks.
    share
        Exact rows may take this part of it.

    Returns
    -------
    Certificate
        The same on every rank, as `kdecore.attention` makes it of m rows a group in one process; their exact values are
        merged from those over each rank's keys. O(G m n_k (d + d_v)) in all, a P-th of it on each of P ranks.
    """
    q, k, v, out = arrays
    groups, shared, n_q, d = q.shape
    total, n_k = shared * sum(call.layout.queries), sum(call.layout.keys)
    name = str(q.dtype).removeprefix("torch.")
    pairs = sum(call.seen(rank).pairs for rank in range(ranks.count)) / (sum(call.layout.queries) * n_k)
    row_cost = groups * exact_row_cost(Sizes(groups, total, n_k, d, v.shape[-1], name)) * pairs
    m = affordable_rows(total, cost, max(row_cost, 1.0), share)
    # Query heads that share keys lie side by side, as in `Problem`.
    rows = sample_rows(host, groups, total, m, call.seed, "cpu")
    position, head = rows // shared, rows % shared
    first = call.layout.first_query(ranks.rank)
    mine = host.nonzero((first <= position) & (position < first + n_q))
    where = (mine[0], head[mine], position[mine] - first)
    slots, place = (tuple(torch.from_numpy(x).to(q.device) for x in some) for some in (mine, where))
    sampled = q.new_zeros((groups, m, d + v.shape[-1]), dtype=torch.promote_types(q.dtype, torch.float32))
    sampled[slots] = torch.cat([x[place] for x in (q, out)], dim=-1).to(sampled.dtype)
    with exchanging(ranks, "collecting rows for a certificate"):
        # Each row is one rank's, and 0 on the others.
        dist.all_reduce(sampled, group=ranks.group)
    part = exact_part(call, ranks.rank, sampled[..., :d].to(q.dtype), k, v, position)
    parts = [torch.empty_like(part) for _ in range(ranks.count)]
    with exchanging(ranks, "collecting exact rows for a certificate"):
        dist.all_gather(parts, part, group=ranks.group)
    states = [AttentionState(one[..., :-1], one[..., -1]) for one in parts]
    merged = states[0]
    for one in states[1:]:
        merged = merge_states(namespace_of(q), merged, one)
    shape = (groups, m, 1, v.shape[-1])
    estimate, exact = (host.reshape(to_host(x), shape) for x in (sampled[..., d:], merged.out))
    return estimate_errors(estimate, exact, total)


def exact_part(call: Asked, rank: int, queries: Tensor, k: Tensor, v: Tensor, position: Array) -> Tensor:
    """Return exact attention of queries (G, m, d), at such positions (G, m), to a rank's keys: (G, m, d_v + 1), lse last."""
    groups, m, _ = queries.shape
    first = call.layout.first_key(rank)
    whole = sliding(sum(call.layout.queries), sum(call.layout.keys), call.causal, call.window, call.diagonal or 0)
    restricted = call.causal or call.window is not None
    found = queries.new_zeros((groups, m, v.shape[-1] + 1), dtype=torch.promote_types(queries.dtype, torch.float32))
    found[..., -1] = -torch.inf
    # Groups that see alike at once: sampled rows of each group are others.
    alike = [[group] for group in range(groups)]
    if not restricted:
        lengths = call.lengths.tolist()
        alike = [[group for group in range(groups) if lengths[group] == length] for length in sorted(set(lengths))]
    options = {name: call.options[name] for name in EXACTLY if name in call.options}
    for some in alike:
        keys = call.keys_left(rank, int(call.lengths[some[0]]))
        if keys == 0:
            continue
        mask = seen_mask(whole.rows(position[some[0]]).within(first, first + keys), keys) if restricted else None
        rows = queries[some], k[some, 0, :keys], v[some, 0, :keys]
        mask = None if mask is None else mask.to(queries.device)
        out, lse = attention(*rows, method="exact", mask=mask, return_lse=True, **options)
        found[some] = torch.cat([out.to(found.dtype), lse[..., None]], dim=-1)
    return found


def seen_mask(seen: KeyRanges, keys: int) -> Tensor:
    """Return intervals of keys as a boolean mask (n, keys)."""
    key = host.arange(keys)[None, :]
    return torch.from_numpy((key >= seen.first[:, None]) & (key < seen.end[:, None]))
