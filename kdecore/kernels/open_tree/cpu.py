"""`open_tree` in Numba for the CPU: a block a task, its queries across the lanes, its list of weights in cache.

Weights and errors of all listed nodes are kept relative to each query's largest logit so far, in units of log 2, and brought
down when an opened node's child exceeds it.
"""

import math

import numpy as np

from kdecore.kernels.attend_blocks.cpu import load_queries, round_up
from kdecore.kernels.jit import kernel
from kdecore.kernels.open_tree.contract import GROWTH
from kdecore.kernels.simd import (
    TILE_ROWS,
    VECTOR_BYTES,
    add_spreads,
    column_max,
    copy_rows,
    exp2_columns,
    fourth_powers,
    multiply_rows,
    multiply_tile,
    scale_columns,
)
from kdecore.kernels.threads import run_tasks
from kdecore.namespaces import Array, Namespace, from_host_like, host_view

LN2 = math.log(2.0)


def open_tree(
    xp: Namespace,
    q: Array,
    query_index: Array,
    probes: Array,
    keys: Array,
    half_variances: Array,
    half_spread: Array,
    importance: Array,
    own: Array | None,
    slots: int,
) -> tuple[Array, Array]:
    """Follow `kdecore.kernels.open_tree.contract.OpenTree`."""
    inputs = [host_view(x) for x in (q, query_index, probes, keys, half_variances, half_spread, importance)]
    queries, index = inputs[:2]
    groups, blocks, _ = index.shape
    own_ = np.empty((groups, blocks, 0), np.int64) if own is None else np.array(host_view(own))
    own_.flags.writeable = False
    key_index = np.empty((groups, blocks, slots), np.int64)
    log_weight = np.empty((groups, blocks, slots), queries.dtype)
    run_tasks(lambda first, last: open_blocks(*inputs, own_, key_index, log_weight, first, last), groups * blocks, chunk=4)
    return from_host_like(xp, key_index, q), from_host_like(xp, log_weight, q)


@kernel()
def open_blocks(
    q, query_index, probes, keys, half_variances, half_spread, importance, own, key_index, log_weight, first, last
):
    """Open the tree for blocks first … last − 1, counted through all groups."""
    _, blocks, rows = query_index.shape
    n_q, d = q.shape[1:]
    total = keys.shape[1]
    inner, p = half_variances.shape[1:]
    n = total - inner
    own_count = own.shape[2]
    wanted = key_index.shape[2] - own_count
    lanes = VECTOR_BYTES // q.itemsize
    filled = round_up(rows, lanes)
    flat_q, flat_probes, flat_keys = q.reshape(-1), probes.reshape(-1), keys.reshape(-1)
    flat_variances = half_variances.reshape(-1)
    factor = q.dtype.type(1.0 / LN2)
    query_rows = np.empty(filled, np.int64)
    queries, block_probes = np.empty(filled * d, q.dtype), np.empty(filled * p, q.dtype)
    most = round_up(2 * max(1, wanted // GROWTH), TILE_ROWS)
    child_keys, child_variances = np.zeros(most * d, q.dtype), np.zeros(most * p, q.dtype)
    logits, spreads = np.empty(most * lanes, q.dtype), np.empty(most * lanes, q.dtype)
    sizes, values = np.zeros(most, q.dtype), np.zeros(most, q.dtype)
    child_slots = np.empty(most, np.int64)
    zeros = np.zeros(TILE_ROWS, q.dtype)
    weights, errors = np.empty(filled * wanted, q.dtype), np.empty(filled * wanted, q.dtype)
    tops, totals = np.empty(filled, q.dtype), np.empty(filled, q.dtype)
    before, unused = np.empty(lanes, q.dtype), np.empty(lanes, q.dtype)
    error, work = np.empty(wanted, q.dtype), np.empty(wanted, q.dtype)
    distinct = np.empty(own_count, np.int64)
    level, place = np.empty(wanted, np.int64), np.empty(wanted, np.int64)
    chosen = np.empty(max(1, wanted // GROWTH), np.int64)
    for task in range(first, last):
        group, block = task // blocks, task % blocks
        norm = 0.0
        for r in range(filled):
            query_rows[r] = group * n_q + query_index[group, block, min(r, rows - 1)]
        for r in range(rows):
            for t in range(d):
                norm += np.float64(flat_q[query_rows[r] * d + t]) ** 2
        norm /= rows
        for lane in range(0, filled, lanes):
            load_queries(flat_q, query_rows, lane, d, factor, queries)
            load_queries(flat_probes, query_rows, lane, p, factor, block_probes)
        tops[:] = -np.inf
        level[0], place[0] = 0, 0
        used, children = 1, 1
        child_slots[0] = 0
        while True:
            # Weigh the nodes at child_slots.
            width = round_up(children, TILE_ROWS)
            for j in range(children):
                slot = child_slots[j]
                start, end = bounds(level[slot], place[slot], n)
                node = (1 << level[slot]) - 1 + place[slot]
                row = node if node < inner else inner + start
                copy_rows(flat_keys, (group * total + row) * d, child_keys, j * d, d)
                if end - start > 1:
                    copy_rows(flat_variances, (group * inner + node) * p, child_variances, j * p, p)
                    sizes[j] = np.log2(np.float64(end - start))
                    values[j] = importance[group, node]
                else:
                    child_variances[j * p : (j + 1) * p] = 0.0
                    sizes[j] = 0.0
                    values[j] = 0.0
            for lane in range(0, filled, lanes):
                for j in range(0, width, TILE_ROWS):
                    multiply_tile(
                        child_variances, j * p, p, 1, block_probes, lane * p, p, zeros, 0, spreads, j * lanes, True
                    )
                    multiply_tile(child_keys, j * d, d, 1, queries, lane * d, d, zeros, 0, logits, j * lanes, True)
                add_spreads(logits, 0, spreads, 0, children, sizes, 0)
                before[:] = tops[lane : lane + lanes]
                column_max(logits, 0, children, tops, lane)
                changed = False
                for i in range(lanes):
                    changed |= before[i] != tops[lane + i]
                    before[i] = np.exp2(before[i] - tops[lane + i]) if before[i] != tops[lane + i] else 1.0
                base = lane * wanted
                old = used if used > 1 else 0
                scale_columns(weights, base, old, before, 0, totals, lane)
                if changed:
                    scale_columns(errors, base, old, before, 0, unused, 0)
                exp2_columns(logits, 0, children, tops, lane, totals, lane)
                multiply_rows(logits, 0, spreads, 0, children, values, 0)
                for j in range(children):
                    copy_rows(logits, j * lanes, weights, base + child_slots[j] * lanes, lanes)
                    copy_rows(spreads, j * lanes, errors, base + child_slots[j] * lanes, lanes)
            if used >= wanted:
                break
            # The nodes of largest error.
            count = min(max(1, used // GROWTH), wanted - used)
            for lane in range(0, filled, lanes):
                for i in range(lanes):
                    before[i] = 1.0 / totals[lane + i] if lane + i < rows else 0.0
                fourth_powers(errors, lane * wanted, used, before, 0, error, lane == 0)
            choose_worst(error, work, level, used, count, chosen)
            # Open them.
            children = 0
            for c in range(count):
                slot, other = chosen[c], used + c
                start, end = bounds(level[slot], place[slot], n) if level[slot] >= 0 else (0, 0)
                for lane in range(0, filled, lanes):
                    for i in range(lanes):
                        weights[lane * wanted + other * lanes + i] = 0.0
                        errors[lane * wanted + other * lanes + i] = 0.0
                        if end - start > 1:
                            weights[lane * wanted + slot * lanes + i] = 0.0
                            errors[lane * wanted + slot * lanes + i] = 0.0
                if end - start > 1:
                    level[slot], place[slot] = level[slot] + 1, 2 * place[slot]
                    level[other], place[other] = level[slot], place[slot] + 1
                    child_slots[children], child_slots[children + 1] = slot, other
                    children += 2
                else:
                    level[other] = -1
            used += count
        list_own(own, group, block, inner, distinct, key_index, log_weight)
        for slot in range(wanted):
            index, weight = 0, -np.inf
            if level[slot] >= 0:
                start, end = bounds(level[slot], place[slot], n)
                node = (1 << level[slot]) - 1 + place[slot]
                index = node if node < inner else inner + start
                count = end - start - (first_at_least(distinct, end) - first_at_least(distinct, start))
                if count > 0:
                    weight = np.log(np.float64(count))
                    if end - start > 1:
                        weight += frozen(half_spread[group, node] * norm, weight)
            key_index[group, block, own_count + slot] = index
            log_weight[group, block, own_count + slot] = weight


@kernel()
def choose_worst(error, work, level, used, count, chosen):
    """Write the ``count`` used slots of largest error to ``chosen``; empty slots and errors that are NaN come last."""
    for slot in range(used):
        if level[slot] < 0 or not error[slot] >= 0:
            error[slot] = -1.0
        work[slot] = error[slot]
    least = nth_largest(work, used, count)
    found = 0
    for slot in range(used):
        if error[slot] > least:
            chosen[found] = slot
            found += 1
    for slot in range(used):
        if found < count and error[slot] == least:
            chosen[found] = slot
            found += 1


@kernel()
def nth_largest(values, used, count):
    """Return the count-th largest of the first ``used`` values, which are put in another order (Hoare's selection)."""
    low, high, target = 0, used - 1, count - 1
    while low < high:
        pivot = values[(low + high) >> 1]
        i, j = low, high
        while i <= j:
            while values[i] > pivot:
                i += 1
            while pivot > values[j]:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if target <= j:
            high = j
        elif target >= i:
            low = i
        else:
            break
    return values[target]


@kernel()
def list_own(own, group, block, inner, distinct, key_index, log_weight):
    """List a block's own keys, and write them to ``distinct``, those said before as a position after all others."""
    count = own.shape[2]
    found = 0
    for i in range(count):
        position = own[group, block, i]
        again = i > 0 and position == own[group, block, i - 1]
        key_index[group, block, i] = inner + position
        log_weight[group, block, i] = -np.inf if again else 0.0
        if not again:
            distinct[found] = position
            found += 1
    distinct[found:] = np.iinfo(np.int64).max


@kernel()
def frozen(half_variance, log_size):
    """Return ln of the mean of exp over so many normal numbers, as the contract has it."""
    if half_variance > log_size:
        return 2.0 * np.sqrt(half_variance * log_size) - log_size
    return half_variance


@kernel()
def first_at_least(ascending, value):
    """Return the first place whose number is at least ``value``, or the length."""
    low, high = 0, ascending.shape[0]
    while low < high:
        middle = (low + high) >> 1
        if ascending[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


@kernel()
def bounds(level, place, n):
    """Return where a node's positions begin and end."""
    return (place * n) >> level, ((place + 1) * n) >> level
