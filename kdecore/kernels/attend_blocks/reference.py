"""`attend_blocks` in the array API: gather, product, softmax, product, over tiles that stay in cache."""

from kdecore.arrays.namespace import Array, Namespace, accumulation_dtype, dtype_name
from kdecore.arrays.rows import TILE_ELEMENTS, first_places, of_all_groups, spans, take_rows
from kdecore.core.state import AttentionState, merge_states, softmax_part


def attend_blocks(
    xp: Namespace,
    q: Array,
    k: Array,
    v: Array,
    query_index: Array,
    key_index: Array,
    log_weight: Array,
    scale: float,
    bias: Array | None = None,
    before: AttentionState | None = None,
    groups: int = 1,
    whole: bool = False,
) -> AttentionState:
    """Follow `kdecore.kernels.attend_blocks.contract.AttendBlocks`."""
    blocks, rows = query_index.shape
    query_index = of_all_groups(xp, query_index, groups, int(q.shape[0]) // groups)
    key_index = of_all_groups(xp, key_index, groups, int(k.shape[0]) // groups)
    slots = int(key_index.shape[1])
    rows_step = min(rows, max(1, TILE_ELEMENTS // slots))
    # Copies of keys and values count like logits: with few rows a block they are the larger part.
    blocks_step = max(1, TILE_ELEMENTS // (slots * max(rows_step, int(k.shape[1]), int(v.shape[1]))))
    dtype = accumulation_dtype(xp, dtype_name(q))
    out = xp.empty((blocks, rows, v.shape[1]), dtype=dtype, device=q.device)
    lse = xp.empty((blocks, rows), dtype=dtype, device=q.device)

    def gather(source: Array, index: Array) -> Array:
        return xp.astype(take_rows(xp, source, index), dtype, copy=False)

    for block in spans(blocks, blocks_step):
        keys = xp.matrix_transpose(gather(k, key_index[block, :]))
        values = gather(v, key_index[block, :])
        weight = log_weight[block, None, :]
        for row in spans(rows, rows_step):
            logits = (gather(q, query_index[block, row]) * scale) @ keys + weight
            if bias is not None:
                added = bias[:, row, :] if bias.shape[0] == 1 else bias[block, row, :]
                # Not by the sum alone: that of NaN and −∞ is NaN.
                logits = xp.where(added > -xp.inf, logits + added, -xp.inf)
            part = softmax_part(xp, logits, values)
            out[block, row, :] = part.out
            lse[block, row] = part.lse
    out, lse = xp.reshape(out, (blocks * rows, v.shape[1])), xp.reshape(lse, (-1,))
    place, found = first_places(xp, xp.reshape(query_index, (-1,)), int(q.shape[0]))
    part = AttentionState(
        xp.where(found[:, None], take_rows(xp, out, place), 0.0), xp.where(found, take_rows(xp, lse, place), -xp.inf)
    )
    return part if before is None else merge_states(xp, before, part)
