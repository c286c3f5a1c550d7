"""`attend_tree` in the array API: lists are made, and attended to, some blocks of all groups at a time."""

from kdecore.arrays.namespace import Array, Namespace
from kdecore.arrays.rows import TILE_ELEMENTS, first_places, spans, take_rows
from kdecore.core.state import AttentionState, merge_states
from kdecore.core.tree import BlockQueries, Tree
from kdecore.kernels.open_tree.reference import gather, open_tree


def attend_tree(
    xp: Namespace,
    queries: BlockQueries,
    tree: Tree,
    values: Array,
    threshold: Array,
    most: int,
    start: tuple[int, int, int],
    own: Array | None = None,
    slope: Array | None = None,
    limits: tuple[Array, Array] | None = None,
    before: AttentionState | None = None,
) -> tuple[AttentionState, Array]:
    """Follow `kdecore.kernels.attend_tree.contract.AttendTree`."""
    q, scale, coordinates, query_index, _ = queries
    key_index, log_weight, _, counts = open_tree(xp, queries, tree, threshold, most, start)
    groups, blocks, b = query_index.shape
    n_q, nodes = int(q.shape[1]), tree.nodes
    scaled = xp.astype(q, coordinates.dtype, copy=False) * scale
    widest = max(b, int(tree.keys.shape[2]), int(values.shape[2]))
    step = max(1, TILE_ELEMENTS // (groups * int(key_index.shape[2]) * widest))
    outs, sums = [], []
    for some in spans(blocks, step):
        listed = key_index[:, some, :]
        asking, v = gather(xp, scaled, query_index[:, some, :]), gather(xp, values, listed)
        logits = asking @ xp.matrix_transpose(gather(xp, tree.keys, listed)) + log_weight[:, some, None, :]
        top = xp.max(logits, axis=-1, keepdims=True)
        if own is not None:
            place = gather(xp, own[:, :, None], query_index[:, some, :])[..., 0]
            row = xp.where(place < 0, 0, place + nodes)
            hidden = (place < 0) | xp.any(listed[:, :, None, :] == row[..., None], axis=-1)
            mine = xp.where(hidden, -xp.inf, xp.sum(asking * gather(xp, tree.keys, row), axis=-1))[..., None]
            top = xp.maximum(top, mine)
        weights = xp.exp(logits - top)
        total, out = xp.sum(weights, axis=-1, keepdims=True), weights @ v
        if own is not None:
            total, out = total + xp.exp(mine - top), out + xp.exp(mine - top) * gather(xp, values, row)
        out, spreads = out[..., :-1] / total, out[..., -1:] / total
        if slope is not None:
            number = xp.arange(some.start, some.stop, dtype=xp.int64, device=q.device) * int(slope.shape[1]) // blocks
            out = out + spreads * (asking @ xp.take(slope, number, axis=1))
        if limits is not None:
            low, high = (x[:, None, None, :] for x in limits)
            out = xp.minimum(xp.maximum(out, low), high)
        outs.append(out)
        sums.append((top + xp.log(total))[..., 0])
    flat = xp.reshape(query_index + xp.arange(groups, dtype=xp.int64, device=q.device)[:, None, None] * n_q, (-1,))
    place, found = (xp.reshape(x, (groups, n_q)) for x in first_places(xp, flat, groups * n_q))
    out, lse = xp.concat(outs, axis=1), xp.concat(sums, axis=1)
    part = AttentionState(
        xp.where(found[..., None], take_rows(xp, xp.reshape(out, (groups * blocks * b, out.shape[3])), place), 0.0),
        xp.where(found, take_rows(xp, xp.reshape(lse, (-1,)), place), -xp.inf),
    )
    return (part if before is None else merge_states(xp, before, part)), counts
