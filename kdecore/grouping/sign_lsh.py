"""Order by centred sign-LSH in Gray order (KDEformer, Algorithm 3, steps 1 and 2)."""

from dataclasses import dataclass
from functools import lru_cache

from kdecore.inputs import Problem
from kdecore.namespaces import (
    Array,
    NamedDevice,
    Namespace,
    from_host,
    named_device,
    outside_inference_mode,
    take_along_rows,
)
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
    xp, shape = problem.xp, (problem.d, int(plan.options.num_hashes or 0))
    planes = _planes(xp, plan.seed, shape, problem.dtype, named_device(rows))
    codes: Array = plan.kernels["hash_codes"].function(xp, rows, planes)
    return codes


@lru_cache(maxsize=64)
@outside_inference_mode()
def _planes(xp: Namespace, seed: int, shape: tuple[int, int], dtype: object, on: NamedDevice) -> Array:
    """Return hyperplanes on a device. The last few are kept: making them there takes a copy that waits for it."""
    return from_host(xp, normal(seed, PLANES_STREAM, shape), dtype=dtype, device=on.device)


def sort_codes(problem: Problem, plan: Plan, codes: Array) -> HashOrder:
    """Sort rows by bucket, those of one bucket as they are. O(G n log n)."""
    assert isinstance(plan.options, SortLSH)
    order = plan.kernels["bucket_order"].function(problem.xp, codes, int(plan.options.num_hashes or 0))
    return HashOrder(order, take_along_rows(problem.xp, codes, order))
