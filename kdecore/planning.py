"""`make_plan`: what will be done, from shapes and options alone. Touches no array data."""

from dataclasses import dataclass, replace

from kdecore.errors import OptionError
from kdecore.inputs import Problem
from kdecore.kernels.registry import Choice, Site, choose
from kdecore.kernels.threads import thread_count
from kdecore.namespaces import ACCUMULATION, TILE_ELEMENTS, needs_gradient
from kdecore.options import (
    DEFAULT_BUDGET,
    DEFAULT_HASHES,
    METHODS,
    Exact,
    KDEformer,
    Options,
    SortLSH,
    Treecode,
    integer_at_least,
)
from kdecore.randomness import check_seed

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
    call
        What it takes more than exact however little there is to do.
    """

    listed_key: float
    opened_node: float
    row_dimension: float
    row: float
    call: float


COST_MODELS = {
    "treecode": CostModel(3.5, 265.0, 375.0, 33_000.0, 2.2e8),
    "sortlsh": CostModel(0.7, 0.0, 75.0, 16_000.0, 1e7),
    "hyper": CostModel(0.7, 0.0, 75.0, 16_000.0, 1e7),
}


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


def exact_row_cost(problem: Problem) -> float:
    """Return what exact attention of one query is expected to take."""
    return _element_cost(problem) * problem.n_k * (problem.d + problem.d_v + EXP_DIMENSIONS)


def expected_cost(problem: Problem, options: Options) -> Cost:
    """Return what a method is expected to take; kdeformer, which has no model, counts as exact."""
    if options.name not in COST_MODELS or options.budget is None:
        return Cost(0.0, problem.groups * problem.n_q * exact_row_cost(problem))
    model, size = COST_MODELS[options.name], _element_cost(problem)
    key = size * (problem.d + problem.d_v + EXP_DIMENSIONS)
    row = size * (problem.d + problem.d_v) * model.row_dimension + model.row
    return Cost(
        prepare=problem.groups * (problem.n_q + problem.n_k) * row + model.call,
        evaluate=problem.groups * problem.n_q * options.budget * (key * model.listed_key + model.opened_node),
    )


def _element_cost(problem: Problem) -> float:
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
    """

    options: Options
    reason: str
    budget_asked: int | None
    seed: int
    kernels: dict[str, Choice]
    exact: Choice
    threads: int
    temporary_bytes: int

    @property
    def method(self) -> str:
        """Name of the method that will run."""
        return self.options.name


def make_plan(
    problem: Problem,
    *,
    method: str | Options = "auto",
    budget: int | None = None,
    seed: int = 0,
    kernels: str = "auto",
    threads: int | None = None,
) -> Plan:
    """Resolve method, budget and kernels for a problem; parameters as in `kdecore.attention`."""
    seed = check_seed(seed)
    if budget is not None:
        budget = integer_at_least(1, "budget", budget)
    count = thread_count(None if threads is None else integer_at_least(1, "threads", threads))
    gradient = needs_gradient(problem.q, problem.k, problem.v)
    site = Site(problem.library, str(problem.device), ACCUMULATION[problem.input_dtype], gradient)
    options, reason = _resolve_method(problem, method, budget, site, kernels)
    chosen = {name: choose(name, site, kernels) for name in options.kernels}
    exact = choose("attend_dense", replace(site, gradient=False), kernels)
    return Plan(options, reason, budget, seed, chosen, exact, count, _temporary_bytes(problem, options, chosen, count))


def _resolve_method(
    problem: Problem, method: str | Options, budget: int | None, site: Site, kernels: str
) -> tuple[Options, str]:
    options: Options
    if isinstance(method, Options):
        options = method.resolve(budget)
    elif not isinstance(method, str):
        raise OptionError(f"method must be a name or one of kdecore's options objects, got {method!r}")
    elif method in METHODS:
        options = METHODS[method]().resolve(budget)
    elif method != "auto":
        raise OptionError(f"method must be one of {', '.join(('auto', *METHODS))} or an options object, got {method!r}")
    if problem.groups * problem.n_q == 0:
        return Exact(), "there are no queries"
    if method == "auto":
        return _choose_method(problem, DEFAULT_BUDGET if budget is None else budget, site, kernels)
    if options.budget is not None and options.budget >= problem.n_k:
        return Exact(), f"a budget of {options.budget} covers all {problem.n_k} keys"
    return options, "asked for by name"


def _choose_method(problem: Problem, budget: int, site: Site, kernels: str) -> tuple[Options, str]:
    if budget >= problem.n_k:
        return Exact(), f"auto: a budget of {budget} covers all {problem.n_k} keys"
    ratio = expected_cost(problem, Exact()).total / expected_cost(problem, Treecode().resolve(budget)).total
    if ratio <= 1.0:
        return Exact(), f"auto: below the crossover, exact is expected to take {ratio:.2g} × treecode's time"
    if (found := choose("open_tree", site, kernels)).target == "array-api":
        # Many small steps for each round of opening: slower than exact for long.
        return SortLSH().resolve(budget), f"auto: above the crossover, but no kernel opens trees here ({found.reason})"
    return Treecode().resolve(budget), f"auto: above the crossover, expected {ratio:.1f} × faster than exact"


def _temporary_bytes(problem: Problem, options: Options, kernels: dict[str, Choice], threads: int) -> int:
    """Bound the temporaries from above: copied inputs, the Selection while it is made, and what the kernels work in."""
    size = 8 if ACCUMULATION[problem.input_dtype] == "float64" else 4
    rows_q, rows_k = problem.groups * problem.n_q, problem.groups * problem.n_k
    sizes = {"q": rows_q * problem.d, "k": rows_k * problem.d, "v": rows_k * problem.d_v}
    total = size * sum(sizes[name] for name in problem.copied)
    if options.name == "exact":
        if kernels["attend_dense"].target == "array-api":
            # Logits, shifted logits and weights of a tile; results of two tiles and their merge.
            return total + size * (4 * TILE_ELEMENTS + 6 * min(problem.n_q, 256) * (problem.d + problem.d_v))
        return total + threads * _workspace_bytes(problem, size) + 8 * (2 * rows_q + 2 * rows_k)
    slots = min(options.budget or problem.n_k, problem.n_k)
    if isinstance(options, Treecode):
        return total + _treecode_bytes(problem, options, kernels, size) + threads * _workspace_bytes(problem, size)
    blocks = problem.groups * (-(-problem.n_q // options.rows) if isinstance(options, SortLSH) else 1)
    # Positions, indices, probabilities and log-weights, each once as it is made and once as it is passed on.
    total += blocks * slots * (7 * 8 + 2 * size)
    # Codes, order, sampling weights, their sums and logarithms, guide, norms; projections of one side at a time.
    total += (rows_q + rows_k) * 6 * 8 + rows_k * 8 * 8
    if isinstance(options, SortLSH):
        vectors = -(-(options.num_hashes or DEFAULT_HASHES) * size // 64)
        total += max(rows_q, rows_k) * 2 * 64 * vectors
    if kernels["attend_blocks"].target == "array-api":
        rows = min(problem.n_q, options.rows if isinstance(options, SortLSH) else problem.n_q)
        tile = max(TILE_ELEMENTS, slots * max(problem.d, problem.d_v))
        total += size * 7 * tile + size * (rows_q + blocks * rows) * (problem.d_v + 1)
        total += 4 * 8 * rows_k * problem.d_v if "row_norms" in kernels else 0
    else:
        total += threads * _workspace_bytes(problem, size)
    if isinstance(options, KDEformer):
        # The density estimates' own copies of queries and keys, with a coordinate more, and their tiles.
        total += size * (8 * (rows_q + rows_k) * (problem.d + 1) + 16 * TILE_ELEMENTS)
    return total


def _treecode_bytes(problem: Problem, options: Treecode, kernels: dict[str, Choice], size: int) -> int:
    rows_q, rows_k = problem.groups * problem.n_q, problem.groups * problem.n_k
    slots = options.budget or problem.n_k
    d, d_v = problem.d, problem.d_v
    p = min(Treecode.DIRECTIONS, d)
    blocks = problem.groups * -(-problem.n_q // options.block_size)
    # Coordinates, twice while rows are ordered; orders; keys, values and summaries of up to as many nodes; samples; lists,
    # once for all groups and once for each.
    total = size * ((rows_q + rows_k) * 5 * max(p, 16) + rows_k * (2 * (d + d_v) + 2 * p + 4)) + 8 * 8 * (rows_q + rows_k)
    total += problem.groups * d * 8 * (3 * (min(4096, problem.n_q) + min(4096, problem.n_k)) + 8 * d)
    # Results before and after the first-order term.
    total += blocks * slots * (2 * 8 + size) + size * rows_q * (d_v + 1)
    if kernels["open_tree"].target == "array-api":
        # Sorted rows and their products; logits and errors of all blocks' queries, and what a round makes of them.
        total += size * (3 * rows_q + 6 * rows_k) * (d + d_v + p) + 16 * 8 * rows_k
        total += size * blocks * slots * (8 * options.block_size + 8 * 8)
        total += size * (8 * TILE_ELEMENTS + 2 * slots * max(d, d_v) + 2 * rows_q * (d_v + 1))
    return total


def _workspace_bytes(problem: Problem, size: int) -> int:
    """Return what a thread of the Numba attention kernel works in: a chunk of keys and values, and a task's queries."""
    rows, slots = 256, 640
    return size * slots * (problem.d + problem.d_v + 32) + rows * (size * problem.d + 8 * (problem.d_v + 8))
