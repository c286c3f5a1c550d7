"""Near neighbours exactly, the rest sampled (DEANN: Karppa, Aumüller & Pagh 2022).

The heavy points come from an inverted-file search: points grouped around ⌈√n⌉ pivots, the groups whose centres promise the
most mass probed, **all** their points evaluated. The rest is sampled without them. Unbiased whatever the search finds; what
it misses shows as variance.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from kdecore.arrays.namespace import Array, Namespace
from kdecore.arrays.random import uniform
from kdecore.arrays.rows import TILE_ELEMENTS, spans
from kdecore.kde.clusters import Clusters, cluster, segment_max
from kdecore.kde.moments import (
    Moments,
    combine,
    concat_moments,
    lifted_points,
    lifted_queries,
    logit_moments,
)
from kdecore.kde.primitive import Answer, Level, exp_capped, to_host_ints
from kdecore.kde.problem import Accuracy, GaussianForm
from kdecore.kde.report import LevelReport
from kdecore.kde.uniform import bernstein, density_of, draws_at, draws_needed

PROBES = 8
"""Groups probed for each query."""


@dataclass(frozen=True)
class NeighbourCarry:
    """Per query: which groups were probed (s, C), the near points' log-sum and count, the bound, and the rest's draws."""

    probed: Array
    log_near: Array
    near: Array
    log_range: Array
    drawn: Moments
    seen: Array

    def take(self, xp: Namespace, rows: Array) -> "NeighbourCarry":
        """Return the carry of some of the queries."""
        arrays = (self.probed, self.log_near, self.near, self.log_range, self.seen)
        probed, log_near, near, log_range, seen = (xp.take(a, rows, axis=0) for a in arrays)
        return NeighbourCarry(probed, log_near, near, log_range, self.drawn.take(xp, rows), seen)


@dataclass(frozen=True)
class Neighbours:
    """Inverted lists, and a growing sample shared by all queries.

    Attributes
    ----------
    form, accuracy
        The problem, and what is asked for.
    groups
        The partition.
    ordered
        (n, d + 1) lifted points, group by group.
    square, promise, narrow
        (C,): ‖centre‖², and what log of a group's expected mass, promise − narrow ‖y − centre‖², is made of.
    drawn, drawn_group
        (n, d + 1) lifted points in random order, and the group of each.
    queries
        (m, d + 1), lifted.
    """

    form: GaussianForm
    accuracy: Accuracy
    groups: Clusters
    ordered: Array
    square: Array
    promise: Array
    narrow: Array
    drawn: Array
    drawn_group: Array
    queries: Array
    name: str = "neighbours"

    @property
    def setup_evaluations(self) -> float:
        """Two assignments to the pivots."""
        return 2.0 * self.form.n * int(self.promise.shape[0])

    def level(self, index: int, pending: int, last: LevelReport | None) -> Level | None:
        """Return a level of twice the last one's draws, up to a third of the points: above, exact is cheaper."""
        samples = draws_at(self.accuracy, index)
        if 3 * samples > self.form.n or int(self.promise.shape[0]) <= PROBES:
            return None
        return Level(index, min(1.0, density_of(self.accuracy, samples)), samples)

    def preprocess(self, level: Level) -> tuple[Level, Array, Array]:
        """Return the draws that are new at this level, and their groups."""
        start = draws_at(self.accuracy, level.index - 1) if level.index else 0
        return level, self.drawn[start : level.samples, :], self.drawn_group[start : level.samples]

    def query(self, structure: tuple[Level, Array, Array], rows: Array, carry: NeighbourCarry | None) -> Answer:
        """Answer the queries whose Bernstein bound is below ε.

        The range in the bound is the largest of the heaviest draw, the heaviest point of the later half of the groups
        probed, and the best promise among the other groups, moved by the most that a probed group's heaviest point was
        above its promise: what the search has missed is taken to be no heavier than what it found last, and promises to
        err by no more than they did.
        So, unlike uniform sampling's, this range is measured and not a bound.
        """
        xp = self.form.xp
        level, fresh, fresh_group = structure
        queries = xp.take(self.queries, rows, axis=0)
        evaluations = float(fresh.shape[0]) * int(rows.shape[0])
        if carry is None:
            probes, probed, promised = self._probe(queries)
            log_near, near, log_range = self._evaluate(queries, probes, promised)
            evaluations += float(xp.sum(near)) + float(self.promise.shape[0]) * int(rows.shape[0])
        else:
            probed, log_near, near, log_range = carry.probed, carry.log_near, carry.near, carry.log_range
        drawn, seen = self._sample(queries, probed, fresh, fresh_group)
        if carry is not None:
            drawn, seen = combine(xp, carry.drawn, drawn), carry.seen + seen
        rest = self.form.n - near
        counted = xp.maximum(seen, xp.ones_like(seen))
        log_sum, answered = bernstein(
            xp, drawn, counted, rest, log_near, xp.maximum(drawn.top, log_range), self.accuracy, replacement=False
        )
        # Without a single draw of the rest there is no estimate of it.
        answered = answered & (seen > 0)
        kept = NeighbourCarry(probed, log_near, near, log_range, drawn, seen)
        return Answer(log_sum, answered, evaluations, kept, level.index + 1)

    def foresee(self, rows: Array, logits: Array) -> Array:
        """Return the evaluations (s,) that queries ``rows`` will take, from their exact logits (s, n)."""
        xp, n = self.form.xp, self.form.n
        if self.level(0, int(rows.shape[0]), None) is None:
            return xp.zeros_like(logits[:, 0]) + 2.0 * n
        queries = xp.take(self.queries, rows, axis=0)
        probes, probed, promised = self._probe(queries)
        _, near, log_range = self._evaluate(queries, probes, promised)
        top = xp.max(logits, axis=1)
        terms = xp.exp(logits - top[:, None])
        rest = xp.where(xp.take(probed, self.groups.label, axis=1), xp.zeros_like(terms), terms)
        widest = xp.maximum(exp_capped(xp, log_range - top), xp.max(rest, axis=1))
        draws = draws_needed(xp, rest, xp.sum(terms, axis=1), n - near, widest, self.accuracy)
        # Above a third of the points, drawing stops and the query is evaluated exactly.
        draws = xp.where(3.0 * draws > n, xp.full_like(draws, n * (1.0 + 0.25)), draws)
        return draws + near + float(self.promise.shape[0])

    def _probe(self, queries: Array) -> tuple[Array, Array, Array]:
        """Choose the groups to probe.

        Returns
        -------
        probes
            (s, PROBES) int64, most promising first.
        probed
            (s, C) bool, the same as a mask.
        promised
            (s, PROBES + 1), logs of the expected sums of these and of the next best.
        """
        xp = self.form.xp
        probes, masks, promises = [], [], []
        for rows in spans(int(queries.shape[0]), max(1, TILE_ELEMENTS // int(self.promise.shape[0]))):
            tile = queries[rows, :]
            y = tile[:, :-1]
            inner = y @ xp.matrix_transpose(self.groups.centre)
            square = xp.sum(y * y, axis=1)[:, None]
            score = self.promise - self.narrow * (square - 2.0 * inner + self.square) + 0.5 * square
            order = xp.argsort(score, axis=1, descending=True, stable=True)
            promises.append(xp.take_along_axis(score, order[:, : PROBES + 1], axis=1))
            probes.append(order[:, :PROBES])
            masks.append(xp.argsort(order, axis=1, stable=False) < PROBES)
        return xp.concat(probes), xp.concat(masks), xp.concat(promises)

    def _evaluate(self, queries: Array, probes: Array, promised: Array) -> tuple[Array, Array, Array]:
        """Evaluate the probed groups, group by group → log-sum, number of points, and log of the range of what is left."""
        xp, starts = self.form.xp, self.groups.starts
        flat = xp.reshape(probes, (-1,))
        order = xp.argsort(flat, stable=True)
        edges = xp.arange(len(starts), dtype=flat.dtype, device=self.form.device)
        bounds = to_host_ints(xp.searchsorted(xp.take(flat, order), edges))
        asking = order // PROBES
        parts = []
        for group, (start, end) in enumerate(pairwise(bounds)):
            points = xp.matrix_transpose(self.ordered[starts[group] : starts[group + 1], :])
            for rows in spans(end - start, max(1, TILE_ELEMENTS // int(points.shape[1]))):
                tile = xp.take(queries, asking[start + rows.start : start + rows.stop], axis=0)
                parts.append(logit_moments(xp, tile @ points, squares=False))
        found = concat_moments(xp, parts).take(xp, xp.argsort(order, stable=True))
        top, first = (xp.reshape(a, (-1, PROBES)) for a in (found.top, found.first))
        highest = xp.max(top, axis=1)
        log_near = highest + xp.log(xp.sum(first * xp.exp(top - highest[:, None]), axis=1))
        widths = [float(b - a) for a, b in pairwise(starts)]
        sizes = xp.asarray(widths, dtype=queries.dtype, device=self.form.device)
        near = xp.sum(xp.reshape(xp.take(sizes, flat), (-1, PROBES)), axis=1)
        next_best = promised[:, PROBES] + xp.max(top - promised[:, :PROBES], axis=1)
        return log_near, near, xp.maximum(next_best, xp.max(top[:, PROBES // 2 :], axis=1))

    def _sample(self, queries: Array, probed: Array, fresh: Array, fresh_group: Array) -> tuple[Moments, Array]:
        """Return the moments of the draws outside each query's near points, and how many they are."""
        xp = self.form.xp
        parts, counts = [], []
        points = xp.matrix_transpose(fresh)
        for rows in spans(int(queries.shape[0]), max(1, TILE_ELEMENTS // int(fresh.shape[0]))):
            hidden = xp.take(probed[rows, :], fresh_group, axis=1)
            logits = xp.where(hidden, -math.inf, queries[rows, :] @ points)
            parts.append(logit_moments(xp, logits, squares=True))
            counts.append(int(fresh.shape[0]) - xp.sum(xp.astype(hidden, queries.dtype), axis=1))
        return concat_moments(xp, parts), xp.concat(counts)


def make_neighbours(form: GaussianForm, accuracy: Accuracy, seed: int, stream: int) -> Neighbours:
    """Return the primitive for one problem; uses random streams ``stream`` and ``stream + 1``. O(n (√n d + log n))."""
    xp, n = form.xp, form.n
    points = lifted_points(form)
    order = xp.argsort(uniform(xp, seed, stream, n, device=form.device), stable=True)
    # Pivots must not be the first draws: a pivot is closer to its group's centre than other points, so draws that
    # depend on the groups are biased.
    pivots = xp.argsort(uniform(xp, seed, stream + 1, n, device=form.device), stable=True)
    count = math.isqrt(n - 1) + 1
    groups = cluster(xp, form.x, xp.take(form.x, pivots[:count], axis=0))
    ordered = xp.take(points, groups.order, axis=0)
    starts = groups.starts
    # A group is taken for an isotropic normal cloud of variance v: the mean kernel over it is
    # (1 + v)^(−d/2) exp(−‖y − centre‖²/(2 (1 + v))).
    highest = segment_max(xp, groups, form.height)
    terms = xp.take(xp.exp(form.height - xp.take(highest, groups.label)), groups.order)
    mass = xp.stack([xp.sum(terms[a:b]) for a, b in pairwise(starts)])
    away = form.x - xp.take(groups.centre, groups.label, axis=0)
    square = xp.take(xp.sum(away * away, axis=1), groups.order)
    wider = 1.0 + xp.stack([xp.mean(square[a:b]) for a, b in pairwise(starts)]) / form.d
    return Neighbours(
        form=form,
        accuracy=accuracy,
        groups=groups,
        ordered=ordered,
        square=xp.sum(groups.centre * groups.centre, axis=1),
        promise=highest + xp.log(mass) - 0.5 * form.d * xp.log(wider),
        narrow=0.5 / wider,
        drawn=xp.take(points, order, axis=0),
        drawn_group=xp.take(groups.label, order),
        queries=lifted_queries(form),
    )
