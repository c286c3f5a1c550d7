"""Order by centred sign-LSH in Gray order (KDEformer, Algorithm 3, steps 1 and 2)."""

from dataclasses import dataclass

from kdecore.inputs import Problem
from kdecore.namespaces import Array, from_host, take_along_rows
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


def hash_orders(problem: Problem, plan: Plan, num_hashes: int) -> tuple[HashOrder, HashOrder]:
    """Sort queries and keys by bucket of the same hyperplanes, each centred on its own mean.

    Subtracting the mean key changes no softmax, and the mean query is subtracted for grouping only: without it, data with
    an offset falls into few buckets. O(G n (d r + log n)).

    Returns
    -------
    queries, keys
        Their hash orders.
    """
    xp = problem.xp
    planes = from_host(
        xp, normal(plan.seed, PLANES_STREAM, (problem.d, num_hashes)), dtype=problem.q.dtype, device=problem.device
    )

    def sort(x: Array) -> HashOrder:
        codes = plan.kernels["hash_codes"].function(xp, x, planes)
        order = plan.kernels["bucket_order"].function(xp, codes)
        return HashOrder(order, take_along_rows(xp, codes, order))

    return sort(problem.q), sort(problem.k)
