"""`GaussianIndex`: a `KeyIndex` of points under a Gaussian kernel."""

from typing import Any

from kdecore.api.attention import attention
from kdecore.api.index_search import IndexResult
from kdecore.api.key_index import KeyIndex
from kdecore.arrays.namespace import Array, host
from kdecore.arrays.scalars import to_float
from kdecore.core.problem import Problem
from kdecore.core.selection import Slots
from kdecore.core.state import AttentionState
from kdecore.methods import gaussian_tree

SPARSEST = 4
"""So many times budget / n_k of the queries, those with fewest points around them, are evaluated exactly: it takes about as
long as the others do. Nodes look alike from afar, where one point decides: most of the error is theirs (bench/NOTES.md)."""
SAMPLE = 512
"""Points that are asked how many others they have around them, at most one in `SAMPLE_SHARE`."""
SAMPLE_SHARE = 8


class GaussianIndex(KeyIndex):
    """Points and values, for kernel-weighted means of the values around other points.

    Parameters
    ----------
    k
        (n, 2d + 1) NumPy keys that `gaussian_keys` made, finite.
    v
        (n, c) values, finite.
    options
        Those of `KeyIndex`, but for ``scale``.

    Notes
    -----
    Queries are those of `gaussian_queries`; ``return_lse`` is the logarithm of Σ wᵢ exp(−‖y − xᵢ‖²/2). Where this is among
    the least, as low as for a part 4 · budget / n of the points themselves (each without itself), queries are evaluated
    exactly, so that far from all points the nearest one's value is found.
    """

    _build = staticmethod(gaussian_tree.build)

    def __init__(self, k: Array, v: Array, **options: Any) -> None:
        super().__init__(k, v, scale=1.0, **options)
        self._around = host.empty(0)
        if self._segments[0].tree is not None:
            some = host.zeros(self.n_k, dtype=bool)
            some[:: max(SAMPLE_SHARE, self.n_k // SAMPLE)] = True
            queries = gaussian_tree.gaussian_queries(host, k[some, : k.shape[1] // 2])
            how = {"scale": 1.0, "method": "exact", "return_lse": True, "threads": self._settings["threads"]}
            self._around = host.sort(attention(queries, k[~some], v[~some], **how)[1])

    def attend_far(self, points: Array) -> Array:
        """Return exact means (m, c) around float64 points (m, d), however far they are from all keys.

        Without what all of a query's logits have in common, half its square, which would leave no digits for the rest.
        """
        problems, d = [segment.problem for segment in self._segments], int(points.shape[1])
        k, v = (host.concat(parts).astype(host.float64) for parts in zip(*((x.k[0], x.v[0]) for x in problems), strict=True))
        queries, keys = (
            host.concat([x[:, :d], x[:, -1:]], axis=1) for x in (gaussian_tree.gaussian_queries(host, points), k)
        )
        found: Array = attention(queries, keys, v, scale=1.0, method="exact", threads=self._settings["threads"])
        return found

    def _attend_segments(self, problem: Problem, budget: int | None, *, count: bool = False) -> IndexResult:
        found = super()._attend_segments(problem, budget, count=count)
        if budget is None or all(plan.method == "exact" for plan in found.plans):
            return found
        out, lse = found.part.out, found.part.lse
        enough = host.quantile(self._around, min(1.0, SPARSEST * budget / self.n_k))
        rows, estimated = (host.nonzero(some)[0][None] for some in (lse[0] < enough, lse[0] >= enough))
        if rows.size:
            exact = super()._attend_segments(problem.with_queries(rows), None).part
            host.put_along_axis(out, rows[:, :, None], exact.out, axis=1)
            host.put_along_axis(lse, rows, exact.lse, axis=1)
        slots = found.slots
        if count and rows.size:
            slots = [
                Slots(to_float(one.total) + rows.size * segment.problem.n_k, segment.problem.n_k)
                for one, segment in zip(slots, self._segments, strict=True)
            ]
        return IndexResult(AttentionState(out, lse), found.plans, slots, estimated)
