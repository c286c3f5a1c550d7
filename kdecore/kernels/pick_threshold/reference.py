"""`pick_threshold` in the array API. Widths of levels are read from the arrays."""

from kdecore.arrays.namespace import Array, Namespace
from kdecore.arrays.rows import take_along_rows
from kdecore.core.tree import BlockQueries, Tree, depth_of
from kdecore.kernels.open_tree.contract import STEP
from kdecore.kernels.open_tree.reference import Sums, compact, descendants, first_level, load, weigh
from kdecore.kernels.pick_threshold.contract import ABOVE


def pick_threshold(
    xp: Namespace,
    queries: BlockQueries,
    tree: Tree,
    budget: int,
    most: int,
    start: tuple[int, int, int],
) -> Array:
    """Follow `kdecore.kernels.pick_threshold.contract.PickThreshold`."""
    loaded, (groups, blocks, _) = load(xp, queries), queries.index.shape
    last, (level, first, end) = depth_of(tree.nodes), start
    room = (budget - (end - first)) * groups * blocks
    current, sums = first_level(xp, start, loaded)
    above = xp.full(current.shape, xp.inf, dtype=sums.top.dtype, device=sums.top.device)
    bounds: list[Array] = []
    gains: list[Array] = []
    while True:
        step = STEP - (last - level) % STEP
        sums, logits, _, error = weigh(xp, tree, loaded, level, current, sums)
        bound = xp.minimum(above, error)
        gain = xp.zeros_like(current) + ((1 << step) - 1)
        if level == last:
            gain = (((current + 1) * tree.n) >> level) - ((current * tree.n) >> level) - 1
        bounds.append(xp.reshape(xp.where(current < 0, 0.0, bound), (-1,)))
        gains.append(xp.reshape(xp.where(current < 0, 0, gain), (-1,)))
        threshold = cut(xp, xp.concat(bounds), xp.concat(gains), room)
        if level == last:
            return threshold * ABOVE
        opened = (current >= 0) & (bound > threshold)
        opened = opened & (xp.cumulative_sum(xp.astype(opened, xp.int64), axis=-1) << step <= most)
        shut = ((current >= 0) & ~opened)[:, :, None, :]
        closed = xp.sum(xp.where(shut, xp.exp(logits - sums.top[..., None]), 0.0), axis=-1)
        sums = Sums(sums.top, sums.closed + closed)
        below = descendants(xp, xp.where(opened, current, -1), step)
        of_parents = xp.broadcast_to(bound[..., None], (*bound.shape, 1 << step))
        above = xp.where(below < 0, -xp.inf, xp.reshape(of_parents, below.shape))
        current, above = compact(xp, below, above)
        level += step


def cut(xp: Namespace, bounds: Array, gains: Array, room: int) -> Array:
    """Return the first of the bounds (m,), the largest first, that there is no room for; 0 where there is for all."""
    order = xp.argsort(bounds, descending=True, stable=True)[None, :]
    bounds, gains = (take_along_rows(xp, x[None, :], order)[0, :] for x in (bounds, gains))
    fits = xp.cumulative_sum(gains, axis=0) <= room
    return xp.max(xp.where(fits, 0.0, bounds))
