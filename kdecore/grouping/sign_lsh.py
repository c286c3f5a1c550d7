"""Order by centred sign-LSH in Gray order (KDEformer, Algorithm 3, steps 1 and 2)."""

from dataclasses import dataclass

from kdecore.inputs import Problem
from kdecore.namespaces import Array, from_host, take_along_rows
from kdecore.options import SortLSH
from kdecore.planning import Plan
from kdecore.randomness import normal

PLANES_STREAM = 0
"""Random stream of the hyperplanes."""


@dataclass(frozen=True)
class HashOrder:
    """Rows sorted by bucket.

    Attributes
    ----------
    order
        (G, n) int64: original row at each sorted position.
    codes
        (G, n) integers, ascending: the bucket at each sorted position.
    """

    order: Array
    codes: Array


def hash_codes(problem: Problem, plan: Plan, rows: Array) -> Array:
    """Return the buckets (G, n) of a problem's queries or keys (G, n, d), centred on their mean; the planes are the seed's.

    Subtracting the mean key changes no softmax, and the mean query is subtracted for grouping only: without it, data with
    an offset falls into few buckets. O(G n d · num_hashes).
    """
    assert isinstance(plan.options, SortLSH)
    xp, num_hashes = problem.xp, int(plan.options.num_hashes or 0)
    planes = from_host(
        xp, normal(plan.seed, PLANES_STREAM, (problem.d, num_hashes)), dtype=problem.q.dtype, device=problem.device
    )
    codes: Array = plan.kernels["hash_codes"].function(xp, rows, planes)
    return codes


def sort_codes(problem: Problem, plan: Plan, codes: Array) -> HashOrder:
    """Sort rows by bucket, those of one bucket as they are. O(G n log n)."""
    order = plan.kernels["bucket_order"].function(problem.xp, codes)
    return HashOrder(order, take_along_rows(problem.xp, codes, order))
