"""`make_plan`: what will be done, from shapes and options alone. Touches no array data."""

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from kdecore.errors import OptionError, did_you_mean
from kdecore.inputs import Problem
from kdecore.kernels.attend_tree.contract import AT_ONCE
from kdecore.kernels.open_tree.contract import RESIDENT
from kdecore.kernels.pick_threshold.contract import BINS
from kdecore.kernels.registry import Choice, check_target, choose
from kdecore.kernels.site import Largest, Site
from kdecore.kernels.threads import thread_count
from kdecore.namespaces import (
    ACCUMULATION,
    TILE_ELEMENTS,
    device_name,
    dtype_name,
    gradient_mode,
    host,
    namespace_name,
    on_accelerator,
)
from kdecore.options import (
    DEFAULT_BUDGET,
    DEFAULT_HASHES,
    METHOD_NAMES,
    METHODS,
    Exact,
    KDEformer,
    Options,
    SortLSH,
    Treecode,
    integer_at_least,
)
from kdecore.randomness import check_seed
from kdecore.stretches import cut, inner_keys, remainder
from kdecore.tree import node_count
from kdecore.visibility import Visible

# Costs fitted to times on two cores (bench/NOTES.md), in units of one dimension of one float32 key, evaluated for one query.
EXP_DIMENSIONS = 20
"""What exp and the sums cost, as so many dimensions more."""


@dataclass(frozen=True)
class CostModel:
    """What an approximate method takes.

    Attributes
    ----------
    listed_key, opened_node
        A slot of a list: for each dimension of its key, exp's among them; and whatever the dimension.
    row_dimension, row
        Ordering and summarising a row: for each dimension, and whatever the dimension.
    group
        Moments of a group, for each pair of dimensions.
    call
        What it takes more than exact however little there is to do.
    """

    listed_key: float
    opened_node: float
    row_dimension: float
    row: float
    group: float
    call: float


PILOT_BLOCKS = 64
"""Of the treecode: blocks of all groups that the threshold and first-order matrices come from."""
ALL_DRAWS, DRAWS, FEWEST_DRAWS = 2**15, 512, 64
"""Keys that the matrices of all blocks are measured with, and of one block, at most and at least: stretches of causal
attention have a pilot each."""
PILOT_SHARE = 8
"""The pilot has at most one in so many of a group's blocks."""
WIDEST, FEWEST_NODES = 2, 64
"""A block of the pilot has at most so many times the budget's nodes in a level, or so many."""
LONGEST, LONGEST_EVALUATED = 4, 2
"""A list of the treecode has at most so many times the budget's slots; fewer where all that there may be are evaluated."""
WORTHWHILE = 1.3
"""``"auto"`` estimates where that is expected to be so many times as fast as exact: an error for no gain helps nobody."""

COST_MODELS = {
    "treecode": CostModel(1.24, 167.0, 305.0, 51_400.0, 14_700.0, 5.1e8),
    "sortlsh": CostModel(0.7, 0.0, 75.0, 16_000.0, 0.0, 1e7),
    "hyper": CostModel(0.7, 0.0, 75.0, 16_000.0, 0.0, 1e7),
}


FEWEST_QUERIES = 64
"""So few queries of one group aren't cut for want of memory."""


@dataclass(frozen=True)
class Cost:
    """What a call is expected to take.

    Attributes
    ----------
    prepare
        What no budget changes.
    evaluate
        For all queries, with the budget.
    """

    prepare: float
    evaluate: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.prepare + self.evaluate


class Sizes(NamedTuple):
    """What of a problem costs follow from, where every query sees all keys; as in `Problem`."""

    groups: int
    n_q: int
    n_k: int
    d: int
    d_v: int
    input_dtype: str
    visible: Visible | None = None


def exact_row_cost(problem: Problem | Sizes) -> float:
    """Return what exact attention of one query is expected to take."""
    return _element_cost(problem) * problem.n_k * (problem.d + problem.d_v + EXP_DIMENSIONS)


def expected_cost(problem: Problem | Sizes, options: Options) -> Cost:
    """Return what a method is expected to take; kdeformer, which has no model, counts as exact."""
    visible = problem.visible
    if options.name not in COST_MODELS or options.budget is None:
        seen = 1.0 if visible is None else visible.pairs / (problem.n_q * problem.n_k)
        return Cost(0.0, problem.groups * problem.n_q * exact_row_cost(problem) * seen)
    # Each level orders all rows again.
    times = 1 if isinstance(problem, Sizes) or visible is None else len(levels_and_tile(problem, visible, options.budget)[0])
    model, size = COST_MODELS[options.name], _element_cost(problem)
    key = size * (problem.d + problem.d_v + EXP_DIMENSIONS)
    row = size * (problem.d + problem.d_v) * model.row_dimension + model.row
    return Cost(
        prepare=times * (problem.groups * ((problem.n_q + problem.n_k) * row + model.group * problem.d**2) + model.call),
        evaluate=problem.groups * problem.n_q * options.budget * (key * model.listed_key + model.opened_node),
    )


TILE_BIAS = 2**22
"""Numbers of a tile's mask, at most."""
MASK_TILE = 2 * TILE_ELEMENTS
"""Logits that a mask is applied to at a time where all keys are evaluated, at most."""
EXACT_STRETCH = 512
"""Queries in a stretch of exact attention, no more than the keys that they see."""
LEAST_STRETCH = 32
"""But so many at least; and a tile of so many is evaluated in halves."""
TILE_SHARE = 4
"""A tile has at most one in so many of the budget's keys."""
LEVEL_BITS = 2
"""A level cuts into 2**2 stretches, for approximate methods: of fewer there are too many levels to share the budget, of more
too few queries to find similar ones among (bench/NOTES.md)."""
LEVEL_RATIO = 1.5
"""A level has so many times the budget of the next one, whose queries see fewer keys."""
LARGEST_FACTOR, ROUGHLY = 4.0, 0.05
"""Budgets of levels are scaled by so much at most, and not where they are as good as right."""
COMMON_SHARE = 0.25
"""Keys that all queries see are evaluated by themselves where they are this part of what a query sees in the mean."""


class Step(NamedTuple):
    """How a problem whose queries see intervals of its keys is cut (`kdecore.evaluate`).

    Attributes
    ----------
    level
        Queries and keys are cut into 2**level stretches.
    budget
        Keys per query for what a stretch sees as a whole.
    """

    level: int
    budget: int


def steps(problem: Problem, options: Options) -> tuple[Step, ...]:
    """Return how a problem whose queries see intervals of its keys is cut, and cut again; () for one tile, and any other.

    Tiles of at most a quarter of the budget are exact, after their own halves, where one sees all of the other; the rest of
    the budget is for the levels. Only T − 1 of T stretches of causal attention have keys that all of their queries see:
    these get so much more, that the mean is the budget.
    """
    visible = problem.visible
    if visible is None or problem.mask is not None:
        return ()
    # Of grouped heads, queries at one position see the same keys.
    n_q = problem.n_q // problem.repeats
    if isinstance(options, Exact):
        rows = min(EXACT_STRETCH, max(LEAST_STRETCH, visible.pairs // problem.n_q))
        return (Step((-(-n_q // rows) - 1).bit_length(), 0),)
    budget = options.budget or DEFAULT_BUDGET
    levels, tile_rows = levels_and_tile(problem, visible, budget)
    if not levels:
        return ()
    weights = [LEVEL_RATIO**-i for i in range(len(levels))]
    rest = max(0, budget - tile_rows) / sum(weights)
    seeing = [1.0 - 0.5**level if level else 1.0 for level in levels]
    budgets = [max(1, int(rest * weight / share)) for weight, share in zip(weights, seeing, strict=True)]
    halves = [Step(1, tile_rows)] if tile_rows >= LEAST_STRETCH else []
    found = (*(Step(level, number) for level, number in zip(levels, budgets, strict=True)), *halves)
    # Windows leave more or less to the levels than causal attention does.
    of_levels = slots_of_levels(visible, problem.n_k, found)
    chosen, exact = sum(of_levels[: len(levels)]), sum(of_levels[len(levels) :])
    factor = min(LARGEST_FACTOR, max(0.0, problem.n_q * budget - exact) / max(1, chosen))
    if abs(factor - 1.0) > ROUGHLY:
        found = (*(Step(level, max(1, int(number * factor))) for level, number in found[: len(levels)]), *halves)
    return found


def levels_and_tile(problem: Problem, visible: Visible, budget: int) -> tuple[list[int], int]:
    """Return the levels of an approximate method, each cutting into 2**level stretches, and the queries of a tile."""
    n_q = problem.n_q // problem.repeats
    tile = max(8, budget // TILE_SHARE)
    bits = (-(-n_q // tile) - 1).bit_length()
    count = -(-bits // LEVEL_BITS)
    levels = [(bits * (i + 1)) // count - (bits * i) // count for i in reversed(range(count))]
    first, end = visible.inner
    if end - first > COMMON_SHARE * visible.pairs / problem.n_q:
        levels = [0, *levels]
    return levels, -(-n_q >> bits)


def slots_of_levels(visible: Visible, n_k: int, levels: tuple[Step, ...]) -> list[int]:
    """Return how many slots each level evaluates for all queries, and in the end the tiles, as `kdecore.evaluate` cuts."""
    known: dict[tuple[int, int, bytes, bytes], list[int]] = {}

    def count(visible: Visible, n_k: int, depth: int) -> list[int]:
        kind = depth, n_k, visible.first.tobytes(), visible.end.tobytes()
        if kind in known:
            return known[kind]
        slots = [0] * (len(levels) + 1)
        if depth == len(levels):
            low, high = visible.outer
            slots[depth] = len(visible.first) * (high - low)
        else:
            level, budget = levels[depth]
            for queries in cut(len(visible.first), 1 << level):
                seen = visible.rows(slice(*queries))
                _, (first, end) = inner_keys(seen, n_k, level)
                slots[depth] += (queries[1] - queries[0]) * min(end - first, budget)
                rest = remainder(queries, seen, (first, end))
                if rest.visible.pairs:
                    left = sum(b - a for a, b in rest.keys)
                    slots = [x + y for x, y in zip(slots, count(rest.visible, left, depth + 1), strict=True)]
        known[kind] = slots
        return slots

    return count(visible, n_k, 0)


def exact_over_treecode(problem: Problem | Sizes, budget: int) -> float:
    """Return how many times as long as the treecode's of a budget exact attention is expected to take."""
    return expected_cost(problem, Exact()).total / expected_cost(problem, Treecode().resolve(budget)).total


def _element_cost(problem: Problem | Sizes) -> float:
    return 2.0 if ACCUMULATION[problem.input_dtype] == "float64" else 1.0


@dataclass(frozen=True)
class Plan:
    """A resolved call: integers and names only.

    Attributes
    ----------
    options
        Options object of the method that will run, every field set.
    reason
        Why this method.
    budget_asked
        The ``budget`` argument as given.
    seed
        In [0, 2**64).
    kernels
        Kernel name → implementation chosen.
    exact
        Implementation of attend_dense for what is evaluated exactly beside the method.
    threads
        Threads of the Numba kernels.
    temporary_bytes
        Upper bound of temporaries above inputs and results.
    steps
        How a problem whose queries see intervals of its keys is cut; else ().
    piece
        Path to the piece of the call that this plans, so that each draws random numbers of its own.
    """

    options: Options
    reason: str
    budget_asked: int | None
    seed: int
    kernels: dict[str, Choice]
    exact: Choice
    threads: int
    temporary_bytes: int
    steps: tuple[Step, ...] = ()
    piece: tuple[int, ...] = ()

    @property
    def method(self) -> str:
        """Name of the method that will run."""
        return self.options.name

    def part(self, *numbers: int) -> "Plan":
        """Return the plan of a piece of this piece."""
        return replace(self, piece=(*self.piece, *numbers))

    @property
    def draw_seed(self) -> int:
        """Seed of what this piece of the call draws: for each piece another."""
        if not self.piece:
            return self.seed
        return int.from_bytes(hashlib.blake2b(repr((self.seed, self.piece)).encode(), digest_size=8).digest())


def check_settings(seed: object = 0, kernels: str = "auto", threads: int | None = None) -> dict[str, Any]:
    """Return what all plans of a call share, each in its range, or raise `OptionError`."""
    count = thread_count(None if threads is None else integer_at_least(1, "threads", threads))
    return {"seed": check_seed(seed), "kernels": check_target(kernels), "threads": count}


def check_method(method: str | Options, budget: int | None) -> Options | None:
    """Return the options that a method and a budget mean, every field set; None for ``"auto"``; or raise `OptionError`."""
    if budget is not None:
        budget = integer_at_least(1, "budget", budget)
    if isinstance(method, Options):
        return method.resolve(budget)
    if not isinstance(method, str) or method not in METHOD_NAMES:
        expected = f"one of the names {', '.join(METHOD_NAMES)} or an options object"
        raise OptionError(f"method must be {expected}, got {method!r}{did_you_mean(method, METHOD_NAMES)}")
    return None if method == "auto" else METHODS[method]().resolve(budget)


def site_of(problem: Problem) -> Site:
    """Return where the kernels of a problem are to run, and its sizes."""
    masks = [] if problem.mask is None else [problem.mask.values]
    gradient = gradient_mode(problem.q, problem.k, problem.v, *masks)
    dtype = ACCUMULATION[problem.input_dtype]
    library = namespace_name(problem.xp)
    return Site(library, device_name(problem.q), dtype, gradient, _sizes(problem), problem.library)


def make_plan(
    problem: Problem,
    *,
    method: str | Options = "auto",
    budget: int | None = None,
    seed: int = 0,
    kernels: str = "auto",
    threads: int | None = None,
    limit: float = math.inf,
) -> Plan:
    """Resolve method, budget and kernels for a problem; parameters as in `kdecore.attention`.

    Where ``"auto"`` would take what even for few queries of one group takes more than ``limit`` bytes, exact is planned.
    """
    seed, kernels, count = check_settings(seed, kernels, threads).values()
    site = site_of(problem)
    options, reason = _resolve_method(problem, check_method(method, budget), budget, site, kernels)
    if isinstance(options, Treecode):
        if not isinstance(problem.q.shape[1], int):
            # A trace would take sizes for numbers that change, and a tree's shape follows from them.
            raise OptionError(f"method must not be treecode where torch.jit traces operations, got {method!r}")
        options = options.at(on_accelerator(problem.q), problem.n_q)
    cuts = steps(problem, options)
    chosen = _choices(problem, options, site, kernels)
    if method == "auto" and limit < math.inf and not isinstance(options, Exact):
        few = _few_queries(problem)
        least = _temporary_bytes(few, options, steps(few, options), chosen, count)
        if least > limit:
            reason = f"auto: {options.name} takes at least {least} bytes here, of which max_memory leaves {limit:.0f}"
            options = Exact()
            cuts = steps(problem, options)
            chosen = _choices(problem, options, site, kernels)
    exact = choose("attend_dense", replace(site, gradient=""), kernels)
    temporary_bytes = _temporary_bytes(problem, options, cuts, chosen, count)
    return Plan(options, reason, budget, seed, chosen, exact, count, temporary_bytes, cuts)


def _choices(problem: Problem, options: Options, site: Site, kernels: str) -> dict[str, Choice]:
    """Choose an implementation of every kernel that options need."""
    needed = dict.fromkeys(options.kernels)
    if on_accelerator(problem.q):
        needed |= dict.fromkeys(("finite_rows",))
    restricted = problem.visible is not None or problem.mask is not None
    if restricted:
        needed |= dict.fromkeys(("attend_dense", "attend_blocks"))
    chosen: dict[str, Choice] = {}
    for name in needed:
        place = replace(site, largest=_largest(problem, options, name, chosen))
        if name == "attend_tree" and not _fused(problem, place, kernels):
            continue
        if name == "attend_blocks" and "attend_tree" in chosen and not restricted:
            continue
        chosen[name] = choose(name, place, kernels)
    return chosen


def _fused(problem: Problem, site: Site, kernels: str) -> bool:
    """Return whether what a tree opens to is evaluated while it is opened, and no lists are made in memory.

    Lists are made where gradients are recorded and no kernel knows those of both, and on accelerators without a kernel.
    """
    accelerator = on_accelerator(problem.q)
    if site.gradient:
        return not accelerator and choose("attend_tree", site, kernels).target == "torch-autograd"
    return not accelerator or choose("attend_tree", site, kernels).target != "array-api"


def _few_queries(problem: Problem) -> Problem:
    """Return a problem of one group and so few queries that it isn't cut for want of memory."""
    visible = None if problem.visible is None else problem.visible.rows(slice(FEWEST_QUERIES))
    q, k, v = problem.q[:1, :FEWEST_QUERIES, :], problem.k[:1, ...], problem.v[:1, ...]
    return replace(problem, q=q, k=k, v=v, visible=visible)


def _sizes(problem: Problem) -> Largest:
    """Return the sizes of a problem, which those of its pieces do not pass.

    Samples of queries, exact rows, shares, parts of them and stretches have no more queries or keys in a group, and the same
    d and d_v. Stretches become more groups of fewer rows: together the keys left to the next level may be some more than
    the problem's, for which launches check their grids again. An index plans for each of its trees.
    """
    half = dtype_name(problem.q) in ("float16", "bfloat16")
    size = 2 if half else item_bytes(problem)
    return Largest(problem.groups, problem.n_q, problem.n_k, problem.d, problem.d_v, size)


def _largest(problem: Problem, options: Options, kernel: str, chosen: dict[str, Choice]) -> Largest:
    """Return the largest sizes of what a kernel is given, where others are ``chosen`` that run before it."""
    largest = _sizes(problem)
    if not isinstance(options, Treecode):
        return largest
    largest = replace(
        largest,
        directions=min(Treecode.DIRECTIONS, problem.d),
        leaf_size=Treecode.LEAF_SIZE,
        nodes=node_count(problem.n_k, Treecode.LEAF_SIZE),
        rows=options.rows,
    )
    bfloat16 = problem.input_dtype == "bfloat16" and largest.item_bytes == 2
    if kernel in ("open_tree", "pick_threshold", "attend_tree"):
        stored_so = bfloat16 and chosen["node_summaries"].computed_by == "triton"
        return replace(largest, item_bytes=2 if stored_so else item_bytes(problem))
    if kernel == "attend_blocks" and options.far_field == "mean":
        # Means of nodes, with their spread beside the values; float16 might not hold a spread.
        return replace(largest, d_v=problem.d_v + 1, item_bytes=2 if bfloat16 else item_bytes(problem))
    return largest


def _resolve_method(
    problem: Problem, options: Options | None, budget: int | None, site: Site, kernels: str
) -> tuple[Options, str]:
    if problem.groups * problem.n_q == 0:
        return Exact(), "there are no queries"
    if problem.visible is not None and problem.visible.pairs == 0:
        return Exact(), "no query sees a key"
    if problem.mask is not None:
        return _masked_method(problem, options)
    if options is None:
        return _choose_method(problem, DEFAULT_BUDGET if budget is None else budget, site, kernels)
    if options.budget is not None and options.budget >= _most_seen(problem):
        return Exact(), f"a budget of {options.budget} covers all {_most_seen(problem)} keys"
    if problem.visible is not None and isinstance(options, KDEformer):
        options = replace(options, normaliser="sampled")
        return options, "asked for by name; pieces of intervals are merged: sampled denominators"
    return options, "asked for by name"


def _most_seen(problem: Problem) -> int:
    """Return how many keys a query sees at most."""
    visible = problem.visible
    return problem.n_k if visible is None else int(host.max(visible.end - visible.first))


def _masked_method(problem: Problem, options: Options | None) -> tuple[Options, str]:
    if options is None:
        return Exact(), "auto: a mask that is no interval may hide whatever an estimate rests on"
    if options.budget is not None and options.budget >= _most_seen(problem):
        return Exact(), f"a budget of {options.budget} covers all {_most_seen(problem)} keys"
    if isinstance(options, Treecode):
        return replace(options, far_field="sample"), "asked for by name; a mask may hide parts of nodes: these are sampled"
    if isinstance(options, KDEformer):
        return replace(options, normaliser="sampled"), "asked for by name; densities know no masks: sampled denominators"
    return options, "asked for by name"


def _choose_method(problem: Problem, budget: int, site: Site, kernels: str) -> tuple[Options, str]:
    if budget >= _most_seen(problem):
        return Exact(), f"auto: a budget of {budget} covers all {_most_seen(problem)} keys"
    ratio = exact_over_treecode(problem, budget)
    expected = f"treecode is expected to be {ratio:.2g} × as fast as exact, where an estimate has to be {WORTHWHILE} ×"
    if ratio < WORTHWHILE:
        return Exact(), f"auto: {expected}"
    if (found := tree_opener(problem, site, kernels, budget)).target == "array-api":
        # Many small steps for each round of opening: slower than exact for long.
        return SortLSH().resolve(budget), f"auto: {expected}, but no kernel opens trees here ({found.reason})"
    return Treecode().resolve(budget), f"auto: {expected}"


def tree_opener(problem: Problem, site: Site, kernels: str, budget: int = DEFAULT_BUDGET) -> Choice:
    """Return what opens trees for the treecode as it is where nothing but the budget is said."""
    options = Treecode().resolve(budget).at(on_accelerator(problem.q), problem.n_q)
    chosen = _choices(problem, options, site, kernels)
    return chosen["open_tree"]


def item_bytes(problem: Problem) -> int:
    """Return the bytes of a number in the accumulation dtype."""
    return 8 if ACCUMULATION[problem.input_dtype] == "float64" else 4


def _temporary_bytes(
    problem: Problem, options: Options, cuts: tuple[Step, ...], kernels: dict[str, Choice], threads: int
) -> int:
    """Bound the temporaries from above: copied inputs, the Selection while it is made, and what the kernels work in."""
    size = item_bytes(problem)
    rows_q, rows_k = problem.groups * problem.n_q, problem.groups * problem.n_k
    sizes = {"q": rows_q * problem.d, "k": rows_k * problem.d, "v": rows_k * problem.d_v}
    total = size * sum(sizes[name] for name in problem.copied)
    if on_accelerator(problem.q):
        total += _unread_bytes(problem, kernels, size)
    if problem.visible is not None or problem.mask is not None:
        total += _restricted_bytes(problem, options, cuts, kernels, size)
    if options.name == "exact":
        if problem.visible is not None and problem.mask is None and kernels["attend_blocks"].computed_by == "array-api":
            # Keys and values are gathered for each stretch.
            total += size * (7 * TILE_ELEMENTS + 3 * problem.n_k * (problem.d + problem.d_v))
        if kernels["attend_dense"].computed_by == "array-api":
            # Logits, shifted logits and weights of a tile; results of two tiles and their merge.
            return total + size * (4 * TILE_ELEMENTS + 6 * min(problem.n_q, 256) * (problem.d + problem.d_v))
        return total + threads * _workspace_bytes(problem, size) + 8 * (2 * rows_q + 2 * rows_k)
    slots = min(options.budget or problem.n_k, problem.n_k)
    if isinstance(options, Treecode):
        total += threads * _workspace_bytes(problem, size)
        return total + _treecode_bytes(problem, options, cuts, kernels, size, threads)
    blocks = problem.groups * (-(-problem.n_q // options.rows) if isinstance(options, SortLSH) else 1)
    # Positions, indices, probabilities and log-weights, each once as it is made and once as it is passed on.
    total += blocks * slots * (7 * 8 + 2 * size)
    # Codes, order, sampling weights, their sums and logarithms, guide, norms; projections of one side at a time.
    total += (rows_q + rows_k) * 6 * 8 + rows_k * 8 * 8 + _norm_bytes(problem, kernels)
    if isinstance(options, SortLSH):
        vectors = -(-(options.num_hashes or DEFAULT_HASHES) * size // 64)
        total += max(rows_q, rows_k) * 2 * 64 * vectors
    if kernels["attend_blocks"].computed_by == "array-api":
        rows = min(problem.n_q, options.rows if isinstance(options, SortLSH) else problem.n_q)
        tile = max(TILE_ELEMENTS, slots * max(problem.d, problem.d_v))
        total += size * 7 * tile + size * (rows_q + blocks * rows) * (problem.d_v + 1)
    else:
        total += threads * _workspace_bytes(problem, size)
    if isinstance(options, KDEformer):
        # The density estimates' own copies of queries and keys, with a coordinate more, and their tiles.
        total += size * (8 * (rows_q + rows_k) * (problem.d + 1) + 16 * TILE_ELEMENTS)
    return total


def _unread_bytes(problem: Problem, kernels: dict[str, Choice], size: int) -> int:
    """Bound what it takes to treat numbers that are not finite without reading any: queries, and results, once more."""
    rows_q, rows_k = problem.groups * problem.n_q, problem.groups * problem.n_k
    stored = _sizes(problem).item_bytes
    total = stored * rows_q * problem.d + 2 * size * rows_q * (problem.d_v + 1)
    if kernels["finite_rows"].computed_by == "array-api":
        # Absolute values, and what is said of each number.
        total += (stored + 3) * max(rows_q * problem.d, rows_k * problem.d, rows_k * problem.d_v)
    return total


def _restricted_bytes(
    problem: Problem, options: Options, levels: tuple[Step, ...], kernels: dict[str, Choice], size: int
) -> int:
    """Bound what intervals and masks take: rows stacked again for each level, results merged, lists kept, and biases."""
    rows_q, rows_k = problem.groups * problem.n_q, problem.groups * problem.n_k
    width = problem.d + problem.d_v
    visible = problem.visible
    if problem.mask is not None or visible is None:
        tile = min(MASK_TILE, problem.groups * problem.n_q * problem.n_k)
        listed = 0 if isinstance(options, Exact) else min(options.budget or 0, problem.n_k)
        if isinstance(options, Treecode):
            listed = longest_list(kernels, listed, problem.n_k)
        return max(tile, problem.n_q * problem.groups * listed) * (3 * 8 + 3 * size) + size * rows_q * (problem.d_v + 1)
    cuts = 1 << sum(step.level for step in levels)
    alike = problem.n_q == problem.n_k and problem.n_q % cuts == 0 and int(host.max(visible.first)) == 0
    # Stretches that are alike and cover everything are stacked without a copy.
    rows = -(-problem.n_q // cuts)
    # What is left to a level: about the keys at the queries' positions, at either side of a window.
    sides = 3 if int(host.max(visible.first)) > 0 else 1
    left = min(rows_k, 2 * rows_q) * sides
    copies = 0 if alike else len(levels) * size * (rows_q * (problem.d + 2 * problem.d_v + 2) + left * width)
    if levels and levels[0].level == 0 and not isinstance(options, Exact):
        copies += size * rows_k * width
    tile = rows if alike else 4 * rows + sides * rows
    bias = 3 * 8 * min(TILE_BIAS, rows * min(problem.n_k, tile))
    lists = 2 * 8 * rows_q * (1 + len(levels)) + 4 * 8 * (rows_q + rows_k)
    return copies + bias + lists + size * 2 * rows_q * (problem.d_v + 1)


def _norm_bytes(problem: Problem, kernels: dict[str, Choice]) -> int:
    """Bound what norms of values take in the array API: these in float64, relative to the largest, and their squares."""
    by_array_api = "row_norms" in kernels and kernels["row_norms"].computed_by == "array-api"
    return 4 * 8 * problem.groups * problem.n_k * problem.d_v if by_array_api else 0


def _treecode_bytes(
    problem: Problem,
    options: Treecode,
    cuts: tuple[Step, ...],
    kernels: dict[str, Choice],
    size: int,
    threads: int,
) -> int:
    rows_q, rows_k = problem.groups * problem.n_q, problem.groups * problem.n_k
    slots = options.budget or problem.n_k
    d, d_v = problem.d, problem.d_v
    p = min(Treecode.DIRECTIONS, d)
    blocks = problem.groups * -(-problem.n_q // options.rows)
    # Keys, values and summaries of up to as many nodes.
    nodes = size * rows_k * (2 * (d + d_v) + 2 * p + 4)
    if kernels["node_summaries"].computed_by == "array-api":
        # Sorted rows, by leaves, and what their means and variances are made of.
        nodes += size * 6 * rows_k * (d + d_v + p) + 16 * 8 * rows_k
    # Norms are found before there are nodes. Coordinates, twice while rows are ordered; orders; samples; lists, once for all
    # groups and once for each.
    total = max(nodes, _norm_bytes(problem, kernels)) + (rows_q + rows_k) * (size * 5 * max(p, 16) + 8 * 8)
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


def longest_list(kernels: dict[str, Choice], budget: int, n_k: int) -> int:
    """Return how long a list of the treecode may be."""
    every = kernels["open_tree"].computed_by == "numba-cuda"
    return min(n_k, (LONGEST_EVALUATED if every else LONGEST) * budget)


def key_draws(blocks: int) -> int:
    """Return how many keys the first-order matrices of so many blocks are measured with, each."""
    return max(FEWEST_DRAWS, min(DRAWS, ALL_DRAWS // blocks // 32 * 32))


def pilot_blocks(groups: int, blocks: int) -> int:
    """Return how many of the blocks of each group are the treecode's pilot."""
    return max(1, min(PILOT_BLOCKS // groups, -(-blocks // PILOT_SHARE)))


def _pilot_bytes(problem: Problem, options: Treecode, cuts: tuple[Step, ...], kernels: dict[str, Choice], size: int) -> int:
    """Bound what the pilot takes: its blocks' queries, nodes and weights, and the keys that matrices are measured with."""
    # Levels of what sees intervals have budgets of their own, and more groups.
    slots = max((step.budget for step in cuts), default=options.budget or problem.n_k)
    blocks = problem.groups * pilot_blocks(problem.groups, -(-problem.n_q // options.rows))
    blocks = max(blocks, PILOT_BLOCKS) if cuts else blocks
    rows = blocks * options.rows
    numbers = 2 if kernels["pick_threshold"].computed_by == "numba-cuda" else 1
    met = blocks * (WIDEST * slots + FEWEST_NODES) * (size * (numbers * options.rows + 2) + 4 * 8)
    met += 0 if kernels["pick_threshold"].computed_by in ("numba-cpu", "array-api") else 16 * 4 * BINS
    met += blocks * longest_list(kernels, slots, problem.n_k) * (8 + 2 * size)
    # Second moments of stretches.
    stretches = 1 << sum(step.level for step in cuts[:-1])
    met += problem.groups * stretches * 5 * 8 * problem.d**2 if cuts else 0
    drawn = blocks * DRAWS * 8 * 8
    if "gap_moments" in kernels and kernels["gap_moments"].computed_by == "array-api":
        drawn += blocks * DRAWS * 3 * size * (problem.d + problem.d_v)
    return met + size * rows * (problem.d + 16) + drawn


def _workspace_bytes(problem: Problem, size: int) -> int:
    """Return what a thread of the Numba attention kernel works in: a chunk of keys and values, and a task's queries."""
    rows, slots = 256, 640
    return size * slots * (problem.d + problem.d_v + 32) + rows * (size * problem.d + 8 * (problem.d_v + 8))
