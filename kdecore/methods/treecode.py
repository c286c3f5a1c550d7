"""Treecode: near and important keys one by one, the others through the means of tree nodes (beyond the paper; derived).

1. Queries and keys are each ordered by a balanced tree of similar rows, or by one sort; consecutive queries form a block.
2. Each block goes down the tree over the keys once, and opens the nodes that are estimated to err more than a threshold,
   one for all blocks: those that need more keys get more. A pilot of some blocks finds the threshold at which lists are as
   long as the budget in the mean (`kdecore.kernels.pick_threshold`, `open_tree`).
3. A closed node is one key: the mean key, at log-weight ln(count) + half the variance of its logits, with the mean value.
   The keys of an open leaf are listed one by one, and exact.
4. To a closed node's mean value is added what its keys of larger logits make of it, to first order, by matrices measured
   where the attention of the pilot's blocks meets closed nodes (`kdecore.methods.first_order`).
5. A query that has a key of its own (`Problem.own`) sees it beside its block's list.

Rows are compared by what the other side sees of them, in few coordinates whose products add up to nearly the whole logit
(`kdecore.methods.view`). Nothing is random; the estimate is biased, by what nodes hide. With far_field="sample" a closed
node is replaced by one of its keys, drawn at random, and the estimate is unbiased in numerator and denominator.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self

from kdecore.arrays.errors import OptionError
from kdecore.arrays.gradients import without_gradient
from kdecore.arrays.namespace import Array, on_accelerator
from kdecore.arrays.rows import TILE_ELEMENTS, column_ranges
from kdecore.arrays.scalars import one_of
from kdecore.core.chunks import ChunkRange, Features
from kdecore.core.options import DEFAULT_BUDGET, Options, set_integers
from kdecore.core.problem import Problem
from kdecore.core.selection import Opening, Selected, Selection, block_count, equal_blocks
from kdecore.core.tree import node_count
from kdecore.kernels.attend_tree.contract import AT_ONCE
from kdecore.kernels.open_tree.contract import RESIDENT
from kdecore.kernels.pick_threshold.contract import BINS
from kdecore.kernels.registry import Choice
from kdecore.kernels.site import Largest, Site
from kdecore.methods.base import Chunked, Method, Plan, Priors, Stages
from kdecore.methods.choices import item_bytes
from kdecore.methods.costs import CostModel, modelled_cost
from kdecore.methods.first_order import DRAWS
from kdecore.methods.key_tree import KeyTree, build, described_keys, grow, similar_together, summaries
from kdecore.methods.levels import Step
from kdecore.methods.memory import norm_bytes, workspace_bytes
from kdecore.methods.tree_lists import drawn, of_nodes, unlisted
from kdecore.methods.tree_pilot import FEWEST_NODES, WIDEST, asking, calibrate, calibrated, longest_list
from kdecore.methods.tree_queries import PILOT_BLOCKS, Calibration, PreparedTree, pilot_blocks, restrict, with_queries
from kdecore.methods.view import DIRECTIONS, LEAF_SIZE, query_moment

LARGE_BLOCK, SMALL_BLOCK, MANY_QUERIES = 64, 16, 1024
"""Queries of a block of the treecode on accelerators, and of so many queries; and of fewer, which are less alike."""


@dataclass(frozen=True)
class Treecode(Options):
    """Options of ``method="treecode"``: near keys one by one, the others through the means of tree nodes.

    Attributes
    ----------
    num_slots
        Keys and nodes that a query sees in the mean; the budget if None. Blocks that need more see more, at most four times
        as many, twice where Numba opens trees on a device.
    block_size
        Queries that share a list; if None 64, and 16 on the CPU where there are fewer than 1,024 queries, which are less
        alike. Fewer err less and take longer (docs/treecode.md).
    far_field
        What stands for a node that stays closed: ``"mean"``, its mean key and value; or ``"sample"``, one of its keys drawn
        at random, which is unbiased in numerator and denominator, and errs more on all data measured.
    ordering
        How rows that are alike come to lie side by side: ``"tree"``, cut in halves level by level; ``"sort"``, by one sort
        of codes, which errs more and is for GPUs (docs/treecode.md); ``"given"``, as they come, for rows whose neighbours
        are alike, such as patches along a curve; ``"auto"``, by one sort on accelerators and by a tree on the CPU.
    """

    name: ClassVar[str] = "treecode"

    num_slots: int | None = None
    block_size: int | None = None
    far_field: str = "mean"
    ordering: str = "auto"

    @property
    def kernels(self) -> tuple[str, ...]:
        """Kernels that these options need."""
        return (
            "second_moment",
            "balanced_view",
            "project_rows",
            "value_sizes",
            *{"sort": ("rank_codes", "bucket_order"), "given": ()}.get(self.ordering, ("tree_order",)),
            "node_summaries",
            "scaled_nodes",
            "pick_threshold",
            "open_tree",
            *(("gap_moments", "shrink_matrices", "attend_tree") if self.far_field == "mean" else ("draw_uniform",)),
            "attend_blocks",
        )

    def __post_init__(self) -> None:
        set_integers(self, num_slots=1, block_size=1)
        for name, known in (("far_field", ("mean", "sample")), ("ordering", ("auto", "sort", "tree", "given"))):
            one_of(known, name, getattr(self, name))

    @property
    def rows(self) -> int:
        """Queries of a block, of options that nothing is left open in."""
        assert self.block_size is not None
        return self.block_size

    def at(self, accelerator: bool, n_q: int = MANY_QUERIES) -> Self:
        """Return these options with what is left open as suits so many queries on an accelerator, or on the CPU."""
        return replace(
            self,
            block_size=self.block_size or (LARGE_BLOCK if accelerator or n_q >= MANY_QUERIES else SMALL_BLOCK),
            ordering=("sort" if accelerator else "tree") if self.ordering == "auto" else self.ordering,
        )

    def resolve(self, budget: int | None) -> Self:
        """Return these options with num_slots set."""
        if budget is not None and self.num_slots not in (None, budget):
            raise OptionError(f"budget must be None or num_slots = {self.num_slots}, got {budget}")
        return replace(self, num_slots=self.num_slots or budget or DEFAULT_BUDGET)

    def with_budget(self, budget: int) -> Self:
        """Return these options with another budget."""
        return replace(self, num_slots=budget)

    @property
    def budget(self) -> int | None:
        """Keys evaluated per query; None where not resolved."""
        return self.num_slots


def select(problem: Problem, plan: Plan) -> Selected:
    """Select for each block of queries tree nodes and single keys.

    Returns
    -------
    Selection or Opening
        Lists of ``budget`` slots in the mean, with the means of nodes and the keys in the tree's order as keys and values;
        or what they are made of while they are evaluated.
        O(G ((n_q + n_k) (d p + p log n) + n_q · budget · d + d² p)), with p = `DIRECTIONS`.
    """
    return open_for(problem, plan, prepare(problem, plan))


def prepare(problem: Problem, plan: Plan) -> PreparedTree:
    """Build the tree over the keys, and the blocks of queries. O(G ((n_q + n_k) (d p + p log n) + d² p))."""
    moment = query_moment(problem.xp, problem.q, plan.kernels["second_moment"].function)
    return prepare_queries(problem, plan, build(problem, plan, moment))


def describe(problem: Problem, plan: Plan) -> Features:
    """Find coordinates of queries and keys, and sizes of values."""
    moment = query_moment(problem.xp, problem.q, plan.kernels["second_moment"].function)
    view, coordinates, sizes, _ = described_keys(problem, plan, moment)
    of_queries = plan.kernels["project_rows"].function(problem.xp, without_gradient(problem.q), view.queries)
    return Features((of_queries,), (coordinates, sizes), (view.half_norm, view.queries, moment), shared=view)


def prepare_in_order(problem: Problem, plan: Plan, level: int, described: Features) -> PreparedTree:
    """Build trees that have the 2**level equal chunks of keys, and of queries, as nodes."""
    (of_queries,), (coordinates, sizes), (half_norm, queries, moment) = described.queries, described.keys, described.groups
    view = described.shared._replace(half_norm=half_norm, queries=queries)
    # Chunks of chunks have limits of their own.
    limits = column_ranges(problem.xp, without_gradient(problem.v))
    keys = grow(problem, plan, view, coordinates, sizes, limits, moment, level)
    order = order_queries(problem, plan, of_queries, level)
    # Chunks have blocks, pilots and own keys of their own.
    return PreparedTree(keys, of_queries, order, equal_blocks(problem.xp, order, problem.n_q), None, None)


def select_chunk(
    problem: Problem, plan: Plan, prepared: PreparedTree, level: int, number: int, keys: ChunkRange
) -> Selected:
    """Select for the queries of chunk ``number`` of 2**level, which see some chunks of the keys."""
    assert isinstance(plan.options, Treecode)
    queries = (number * problem.n_q) >> level, ((number + 1) * problem.n_q) >> level
    blocks = equal_blocks(problem.xp, prepared.order[:, slice(*queries)], plan.options.rows)
    seen = (keys.first * problem.n_k) >> level, (keys.end * problem.n_k) >> level
    chunk = replace(prepared, blocks=blocks, seen=(level, *keys))
    return open_for(problem, plan, with_queries(problem, plan, chunk, queries, seen))


def order_queries(problem: Problem, plan: Plan, coordinates: Array, in_order: int = 0) -> Array:
    """Order the queries by a tree, its first levels as they are; a single block stays as it is."""
    xp, options = problem.xp, plan.options
    assert isinstance(options, Treecode)
    if problem.n_q <= options.rows:
        every = xp.arange(problem.n_q, dtype=xp.int64, device=problem.device)
        return xp.broadcast_to(every, (problem.groups, problem.n_q))
    # Blocks are parts: one that lay on both sides of a cut would be of queries that have nothing in common.
    parts = block_count(-(-problem.n_q >> in_order), options.rows) << in_order
    return similar_together(problem, plan, coordinates, parts, in_order)


def prepare_queries(problem: Problem, plan: Plan, keys: KeyTree, calibration: Calibration | None = None) -> PreparedTree:
    """Put a problem's queries into blocks."""
    xp, options = problem.xp, plan.options
    assert isinstance(options, Treecode)
    coordinates = plan.kernels["project_rows"].function(xp, without_gradient(problem.q), keys.view.queries)
    order = order_queries(problem, plan, coordinates)
    prepared = PreparedTree(
        keys, coordinates, order, equal_blocks(xp, order, options.rows), None, None, calibration=calibration
    )
    return with_queries(problem, plan, prepared, (0, problem.n_q), (0, problem.n_k))


def open_for(problem: Problem, plan: Plan, prepared: PreparedTree) -> Selected:
    """Open the tree for every block of queries: as lists where these are changed or recorded, else while it is evaluated."""
    xp, options, keys, blocks = problem.xp, plan.options, prepared.keys, prepared.blocks
    assert isinstance(options, Treecode)
    assert options.budget is not None
    sampled = options.far_field == "sample"
    threshold, most, start, slope = prepared.calibration or calibrate(problem, plan, prepared)
    limits = None if slope is None else keys.limits
    queries = asking(problem, plan, prepared, blocks.index)
    if "attend_tree" in plan.kernels:
        tree, values = summaries(keys)._replace(keys=keys.nodes.keys), keys.nodes.values
        how = prepared.coordinates, queries.apart, tree, values, threshold, most, start
        return Opening(blocks, *how, slope, limits, prepared.own)
    key_index, log_weight, _, _ = plan.kernels["open_tree"].function(xp, queries, summaries(keys), threshold, most, start)
    if sampled:
        return drawn(problem, plan, prepared, key_index, log_weight)
    own = None if prepared.own is None else unlisted(problem, prepared, key_index, log_weight)
    return of_nodes(problem, keys, Selection(blocks, key_index, log_weight, slope=slope, limits=limits, own=own))


def temporary_bytes(
    problem: Problem, options: Treecode, cuts: tuple[Step, ...], kernels: dict[str, Choice], threads: int
) -> int:
    """Bound what the tree, the pilot and lists take."""
    size = item_bytes(problem)
    rows_q, rows_k = problem.groups * problem.n_q, problem.groups * problem.n_k
    slots = options.budget or problem.n_k
    d, d_v = problem.d, problem.d_v
    p = min(DIRECTIONS, d)
    blocks = problem.groups * block_count(problem.n_q, options.rows)
    # Keys, values and summaries of up to as many nodes.
    nodes = size * rows_k * (2 * (d + d_v) + 2 * p + 4)
    if kernels["node_summaries"].computed_by == "array-api":
        # Sorted rows, by leaves, and what their means and variances are made of.
        nodes += size * 6 * rows_k * (d + d_v + p) + 16 * 8 * rows_k
    # Norms are found before there are nodes. Coordinates, twice while rows are ordered; orders; samples; lists, once for all
    # groups and once for each.
    total = (
        threads * workspace_bytes(problem)
        + max(nodes, norm_bytes(problem, kernels))
        + (rows_q + rows_k) * (size * 5 * max(p, 16) + 8 * 8)
    )
    total += problem.groups * d * 8 * (3 * (min(2048, problem.n_q) + min(2048, problem.n_k)) + 8 * d)
    by_array_api = kernels["pick_threshold"].computed_by == "array-api"
    total += _pilot_bytes(problem, options, cuts, kernels, size)
    longest = longest_list(kernels, slots, problem.n_k)
    if "attend_tree" not in kernels or kernels["attend_tree"].computed_by == "array-api":
        # Lists, each as long as the longest, and searched for own keys; tiles of keys, values and logits.
        total += blocks * longest * (4 * 8 + 2 * size) + size * 3 * rows_q * (d_v + 1)
        if "attend_blocks" not in kernels:
            total += 8 * size * TILE_ELEMENTS
    elif kernels["attend_tree"].computed_by == "triton":
        total += (8 + 2 * size) * max(longest, min(blocks * longest, AT_ONCE))
    else:
        total += threads * size * 4 * longest * (options.rows + d + d_v + 16)
    if kernels["open_tree"].computed_by == "numba-cuda":
        # Logits of what is listed, and half variances, of the blocks worked on at once; means that may be in bfloat16.
        total += size * min(RESIDENT, blocks) * (3 * longest + d + p + 2) * (options.rows + 3)
        total += size * 2 * rows_k * d if problem.input_dtype == "bfloat16" else 0
    if by_array_api:
        # Queries; logits, weights and shares of all nodes met.
        total += size * 3 * rows_q * (d_v + d + p) + size * blocks * 2 * slots * (2 * options.rows + 4 * 8 + d)
    if "attend_blocks" in kernels and kernels["attend_blocks"].computed_by == "array-api":
        # A tile's keys, values and logits; results in the order of blocks and of queries, and where each query is.
        total += size * (8 * TILE_ELEMENTS + 2 * slots * max(d, d_v) + 3 * rows_q * (d_v + 1)) + 6 * 8 * rows_q
    return total


def _pilot_bytes(problem: Problem, options: Treecode, cuts: tuple[Step, ...], kernels: dict[str, Choice], size: int) -> int:
    """Bound what the pilot takes: its blocks' queries, nodes and weights, and the keys that matrices are measured with."""
    # Levels of what sees intervals have budgets of their own, and more groups.
    slots = max((step.budget for step in cuts), default=options.budget or problem.n_k)
    blocks = problem.groups * pilot_blocks(problem.groups, block_count(problem.n_q, options.rows))
    blocks = max(blocks, PILOT_BLOCKS) if cuts else blocks
    rows = blocks * options.rows
    numbers = 2 if kernels["pick_threshold"].computed_by == "numba-cuda" else 1
    met = blocks * (WIDEST * slots + FEWEST_NODES) * (size * (numbers * options.rows + 2) + 4 * 8)
    met += 0 if kernels["pick_threshold"].computed_by in ("numba-cpu", "array-api") else 16 * 4 * BINS
    met += blocks * longest_list(kernels, slots, problem.n_k) * (8 + 2 * size)
    # Second moments of chunks.
    chunks = 1 << sum(step.level for step in cuts[:-1])
    met += problem.groups * chunks * 5 * 8 * problem.d**2 if cuts else 0
    drawn = blocks * DRAWS * 8 * 8
    if "gap_moments" in kernels and kernels["gap_moments"].computed_by == "array-api":
        drawn += blocks * DRAWS * 3 * size * (problem.d + problem.d_v)
    return met + size * rows * (problem.d + 16) + drawn


def adapted(problem: Problem, options: Treecode, site: Site, kernels: str) -> tuple[Options, str]:
    """Return the options with what was left open; under a mask with keys drawn from nodes."""
    if not isinstance(problem.q.shape[1], int):
        # A trace would take sizes for numbers that change, and a tree's shape follows from them.
        raise OptionError(f"method must not be treecode where torch.jit traces operations, got {options}")
    options, reason = options.at(on_accelerator(problem.q), problem.n_q), "asked for by name"
    if problem.mask is None:
        return options, reason
    return replace(options, far_field="sample"), f"{reason}; a mask may hide parts of nodes: these are sampled"


def block_rows(problem: Problem, options: Treecode) -> int:
    """Return how many queries a block has."""
    return options.at(on_accelerator(problem.q), problem.n_q).rows


def largest(problem: Problem, options: Treecode, kernel: str, chosen: dict[str, Choice], sizes: Largest) -> Largest:
    """Return the largest sizes of what a kernel is given."""
    sizes = replace(
        sizes,
        directions=min(DIRECTIONS, problem.d),
        leaf_size=LEAF_SIZE,
        nodes=node_count(problem.n_k, LEAF_SIZE),
        rows=options.rows,
    )
    bfloat16 = problem.input_dtype == "bfloat16" and sizes.item_bytes == 2
    if kernel in ("open_tree", "pick_threshold", "attend_tree"):
        stored_so = bfloat16 and chosen["node_summaries"].computed_by == "triton"
        return replace(sizes, item_bytes=2 if stored_so else item_bytes(problem))
    if kernel == "attend_blocks" and options.far_field == "mean":
        # Means of nodes, with their spread beside the values; float16 might not hold a spread.
        return replace(sizes, d_v=problem.d_v + 1, item_bytes=2 if bfloat16 else item_bytes(problem))
    return sizes


PRIORS = Priors(("num_slots",), 96, 0.005, 0.8, thinned=True, suits=lambda options: options.far_field == "mean")
"""Error on easy data (bench/NOTES.md); how it falls is measured."""
METHOD = Method(
    Treecode,
    select,
    temporary_bytes=temporary_bytes,
    cost=partial(modelled_cost, CostModel(1.24, 167.0, 305.0, 51_400.0, 14_700.0, 5.1e8)),
    adapted=adapted,
    largest=largest,
    longest_list=longest_list,
    stages=Stages(prepare, open_for, restrict, block_rows, calibrated),
    chunked=Chunked(describe, prepare_in_order, select_chunk, True),
    priors=PRIORS,
)
