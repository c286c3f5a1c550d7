"""KDEformer's practical algorithm (Zandieh, Han, Daliri, Karbasi, ICML 2023, Algorithm 3): A = A_spar + A_res.

A_spar, where the heavy entries are expected, is evaluated exactly: queries and keys are sorted by hash, and each block of
queries meets the stretch of keys at its place. A_res, the rest, is sampled. Where this departs from the released code
(each derived here and checked in tests):

- The hash is centred, and buckets lie in true Gray order.
- A block's stretch follows its bucket: a query block a third of the way through its bucket meets the keys a third of the
  way through theirs. For equal queries and keys that is the block diagonal; for n_q ≠ n_k, or queries and keys that fill the
  buckets differently, it keeps a block at keys of its own hash.
- Sampling is systematic, without replacement, separately for every block and only among the keys outside its stretch, so
  no key counts twice and the errors of different blocks do not add up.
- Everything stays in log space.
"""

from dataclasses import dataclass

from kdecore.grouping.sign_lsh import HashOrder, hash_codes, sort_codes
from kdecore.inputs import Problem
from kdecore.namespaces import Array, take_along_rows
from kdecore.options import SortLSH
from kdecore.planning import Plan
from kdecore.randomness import SAMPLES_STREAM
from kdecore.selection import Selection, equal_blocks
from kdecore.stretches import Described, Stretch

STRETCH_ROWS = 64
"""Queries in a block of a stretch, at least: none has its own keys among those chosen from, and small blocks take long."""


@dataclass(frozen=True)
class Prepared:
    """Everything that no budget changes.

    Attributes
    ----------
    queries, keys
        Their hash orders.
    weights
        (G, n_k) float64 ≥ 1: sampling weight of the key at each place of the keys' order.
    """

    queries: HashOrder
    keys: HashOrder
    weights: Array


def select(problem: Problem, plan: Plan) -> Selection:
    """Select each block's own stretch of keys, and a sample of the others with probability ∝ 1 + ‖v‖ / mean ‖v‖."""
    return block_and_sample(problem, plan, prepare(problem, plan))


def prepare(problem: Problem, plan: Plan) -> Prepared:
    """Hash and sort, and weigh the keys by their values. O(G ((n_q + n_k) (d · num_hashes + log n) + n_k d_v))."""
    return sort_described(problem, plan, 0, describe(problem, plan))


def describe(problem: Problem, plan: Plan) -> Described:
    """Hash, and weigh the keys by their values."""
    return hashed(problem, plan, value_weights(problem, plan))


def hashed(problem: Problem, plan: Plan, weights: Array) -> Described:
    """Hash queries and keys, which are sampled by ``weights`` (G, n_k)."""
    codes = (hash_codes(problem, plan, x) for x in (problem.q, problem.k))
    return Described((next(codes),), (next(codes), weights))


def sort_described(problem: Problem, plan: Plan, level: int, described: Described) -> Prepared:
    """Sort queries and keys by hash, and the keys' weights with them; the same at every level."""
    (query_codes,), (key_codes, weights) = described.queries, described.keys
    queries, keys = sort_codes(problem, plan, query_codes), sort_codes(problem, plan, key_codes)
    return Prepared(queries, keys, take_along_rows(problem.xp, weights, keys.order))


def select_stretch(problem: Problem, plan: Plan, prepared: Prepared, level: int, number: int, keys: Stretch) -> Selection:
    """Select for the queries of stretch ``number`` of 2**level, which see some stretches of the keys.

    What is left of an order after others are taken out is the order of those left: nothing is sorted again.
    """
    xp = problem.xp

    def left(order: Array, n: int, some: Stretch, *those: Array) -> list[Array]:
        begin, stop = (some.first * n) >> level, (some.end * n) >> level
        # In every group the same number; taken by place, which is several times as fast as by a mask.
        (inside,) = xp.nonzero(xp.reshape((order >= begin) & (order < stop), (-1,)))
        return [xp.reshape(xp.take(xp.reshape(x, (-1,)), inside), (problem.groups, stop - begin)) for x in (order, *those)]

    own = Stretch(number, number + 1)
    queries = left(prepared.queries.order, problem.n_q, own, prepared.queries.codes)
    *seen, weights = left(prepared.keys.order, problem.n_k, keys, prepared.keys.codes, prepared.weights)
    return block_and_sample(problem, plan, Prepared(HashOrder(*queries), HashOrder(*seen), weights), STRETCH_ROWS)


def value_weights(problem: Problem, plan: Plan) -> Array:
    """Return 1 + ‖v‖ / mean ‖v‖ as float64 (G, n_k); keys whose value is not finite count as ‖v‖ = 0.

    The 1 stands for the denominator, in which every key counts alike (the column of ones that Algorithm 3 appends to V);
    dividing by the mean makes the choice independent of V's units (derived).
    """
    xp = problem.xp
    norms = plan.kernels["row_norms"].function(xp, problem.v)
    mean = xp.mean(norms, axis=1, keepdims=True)
    return 1.0 + norms / xp.where(mean > 0, mean, 1.0)


def block_and_sample(problem: Problem, plan: Plan, prepared: Prepared, least_rows: int = 1) -> Selection:
    """Select block_size keys at each query block's place in hash order, and num_samples of the others.

    Parameters
    ----------
    problem
        Canonical inputs.
    plan
        With resolved `SortLSH` or `Hyper` options.
    prepared
        Hash orders and weights.
    least_rows
        Queries in a block, at least.

    Returns
    -------
    Selection
        Own keys at log-weight 0, sampled ones at −log of their inclusion probability.
        O(G (n_k + B · budget)) for B blocks.
    """
    xp, options = problem.xp, plan.options
    assert isinstance(options, SortLSH)
    own_size, samples = int(options.block_size or 0), int(options.num_samples or 0)
    queries, keys = prepared.queries, prepared.keys
    blocks = equal_blocks(xp, queries.order, max(options.rows, least_rows))
    shape = (problem.groups, len(blocks.starts) - 1)
    own_start = plan.kernels["bucket_windows"].function(xp, queries.codes, keys.codes, shape[1], own_size)
    starts = plan.kernels["draw_uniform"].function(xp, plan.draw_seed, SAMPLES_STREAM, shape, problem.device)
    # Since every weight is at least 1, this ceiling keeps every inclusion probability at or below 1 in every block.
    ceiling = (int(keys.order.shape[1]) - own_size) / samples
    capped = xp.where(prepared.weights > ceiling, ceiling, prepared.weights)
    sampled, log_inclusion = plan.kernels["draw_indices"].function(xp, capped, own_start, own_size, starts, samples)

    own = own_start[..., None] + xp.arange(own_size, dtype=xp.int64, device=problem.device)
    positions = xp.concat([own, sampled], axis=-1)
    of_own = xp.zeros(own.shape, dtype=problem.dtype, device=problem.device)
    log_weight = xp.concat([of_own, xp.astype(-log_inclusion, problem.dtype)], axis=-1)
    return Selection(blocks, take_along_rows(xp, keys.order, positions), log_weight)
