"""Methods by name, and their options as frozen objects for those who want control over a method's parts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from kdecore.errors import OptionError, did_you_mean
from kdecore.namespaces import host, to_float, to_integer

DEFAULT_BUDGET = 512
"""Keys evaluated per query when neither ``budget`` nor options say otherwise."""
LARGE_BLOCK, SMALL_BLOCK, MANY_QUERIES = 64, 16, 1024
"""Queries of a block of the treecode on accelerators, and of so many queries; and of fewer, which are less alike."""
DEFAULT_HASHES = 12
"""Hyperplanes: 4,096 buckets, several times the number of blocks up to n = 131,072 (more splits no bucket usefully)."""
MAX_HASHES = 30
SAMPLED_ROWS = 64
"""Queries in a block that has no keys of its own."""


def integer_at_least(minimum: int, name: str, value: object) -> int:
    """Return ``value`` as an int of at least ``minimum``, or raise `OptionError` naming it; booleans are no integers."""
    number = to_integer(value)
    if number is None or number < minimum:
        got = value if number is None else number
        raise OptionError(f"{name} must be an integer of at least {minimum}, got {got!r}")
    return number


def integer(name: str, value: object) -> int:
    """Return ``value`` as an int, or raise `OptionError` naming it; booleans are no integers."""
    number = to_integer(value)
    if number is None:
        raise OptionError(f"{name} must be an integer, got {value!r}")
    return number


def check_boolean(name: str, value: object) -> bool:
    """Return a boolean of Python or NumPy as a bool, or raise `OptionError` naming it."""
    if not isinstance(value, bool | host.bool):
        raise OptionError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def one_of(known: Sequence[str], name: str, value: object) -> str:
    """Return ``value`` where it is one of the known words, or raise `OptionError` naming it and the word most like it."""
    if not isinstance(value, str) or value not in known:
        raise OptionError(f"{name} must be one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}")
    return value


def set_integers(options: object, **minima: int) -> None:
    """Make those fields of a frozen options object that aren't None Python integers of at least so much each."""
    for name, minimum in minima.items():
        value = getattr(options, name)
        if value is not None:
            object.__setattr__(options, name, integer_at_least(minimum, name, value))


@dataclass(frozen=True)
class Exact:
    """Every query attends to every key; no options."""

    name: ClassVar[str] = "exact"
    kernels: ClassVar[tuple[str, ...]] = ("attend_dense",)

    def resolve(self, budget: int | None) -> "Exact":
        """Return these options with every field set."""
        return self

    def with_budget(self, budget: int) -> "Exact":
        """Return these options, which no budget changes."""
        return self

    @property
    def budget(self) -> int | None:
        """Keys evaluated per query: all of them."""
        return None


@dataclass(frozen=True)
class SortLSH:
    """Options of ``method="sortlsh"``: KDEformer's Algorithm 3 (Zandieh, Han, Daliri, Karbasi, ICML 2023).

    Each field left at None follows from ``budget``: a third of it goes into the block, the rest into samples (the
    released code's proportion).

    Attributes
    ----------
    block_size
        Keys of the block's own stretch of the hash order, evaluated exactly, and queries in a block; 0 for none (only
        sampling).
    num_samples
        Keys sampled from all others, per block, with probability proportional to 1 + ‖v‖ / mean ‖v‖; at least 1,
        without which keys outside the block would never be seen.
    num_hashes
        Random hyperplanes of the sign hash, at most 30.
    """

    name: ClassVar[str] = "sortlsh"
    kernels: ClassVar[tuple[str, ...]] = (
        "row_norms",
        "hash_codes",
        "bucket_order",
        "bucket_windows",
        "draw_uniform",
        "draw_indices",
        "attend_blocks",
    )

    block_size: int | None = None
    num_samples: int | None = None
    num_hashes: int | None = None

    def __post_init__(self) -> None:
        set_integers(self, block_size=0, num_samples=1, num_hashes=1)
        if self.num_hashes is not None and self.num_hashes > MAX_HASHES:
            raise OptionError(f"num_hashes must be at most {MAX_HASHES}, got {self.num_hashes}")

    def resolve(self, budget: int | None) -> Self:
        """Return these options with every field set, block_size + num_samples being the budget."""
        block, samples = self.block_size, self.num_samples
        if block is not None and samples is not None:
            if budget not in (None, block + samples):
                raise OptionError(f"budget must be None or block_size + num_samples = {block + samples}, got {budget}")
        else:
            total = DEFAULT_BUDGET if budget is None else budget
            if block is None:
                block = total // 3 if samples is None else total - samples
            samples = total - block
            if block < 0 or samples < 1:
                raise OptionError(f"budget must exceed what {self} asks for, got {total}")
        return replace(self, block_size=block, num_samples=samples, num_hashes=self.num_hashes or DEFAULT_HASHES)

    def with_budget(self, budget: int) -> Self:
        """Return resolved options for another budget, shared out in the same proportion."""
        if self.block_size is None or self.num_samples is None:
            return self.resolve(budget)
        samples = max(1, round(budget * self.num_samples / (self.block_size + self.num_samples)))
        return replace(self, block_size=budget - samples, num_samples=samples)

    @property
    def rows(self) -> int:
        """Queries in a block: about as many as its own keys, so that in self-attention a block meets its own positions.

        Rounded down to a multiple of 16, the queries that the kernels work on together.
        """
        rows = self.block_size or SAMPLED_ROWS
        return rows if rows < 16 else rows // 16 * 16

    @property
    def budget(self) -> int | None:
        """Keys evaluated per query; None where not resolved."""
        if self.block_size is None or self.num_samples is None:
            return None
        return self.block_size + self.num_samples


@dataclass(frozen=True)
class Hyper(SortLSH):
    """Options of ``method="hyper"``: HyperAttention (Han et al. 2023), sortlsh with uniform sampling of the other keys."""

    name: ClassVar[str] = "hyper"
    kernels: ClassVar[tuple[str, ...]] = (
        "hash_codes",
        "bucket_order",
        "bucket_windows",
        "draw_uniform",
        "draw_indices",
        "attend_blocks",
    )


@dataclass(frozen=True)
class KDEformer:
    """Options of ``method="kdeformer"``: KDEformer's Algorithm 1, whose keys are sampled by kernel density estimates.

    Attributes
    ----------
    num_samples
        Keys drawn, with repetition; the budget if None, unless ``eps`` is given without a budget.
    eps
        Relative accuracy of the denominators, in (0, 1), 0.2 if None. Given without budget and num_samples, the number of
        keys follows from it: C ε⁻² log(n) (sr(A) + sr(V)), the paper's bound with the measured constant C = `CONSTANT`.
    probabilities
        ``"mixture"``, ½ (‖aⱼ‖²/‖A‖²_F + ‖vⱼ‖²/‖V‖²_F), which needs no operator norm; or ``"paper"``,
        ∝ ‖aⱼ‖² + (‖A‖²/‖V‖²) ‖vⱼ‖².
    normaliser
        ``"kde"``, dividing by the denominators that were estimated for all keys; or ``"sampled"``, by the sum of the sampled
        weights.
    primitive
        Density estimator, as in `kdecore.kde.log_weighted_exponential_kde`.
    """

    name: ClassVar[str] = "kdeformer"
    kernels: ClassVar[tuple[str, ...]] = ("row_norms", "attend_blocks", "attend_dense")
    CONSTANT: ClassVar[float] = 0.4

    num_samples: int | None = None
    eps: float | None = None
    probabilities: str = "mixture"
    normaliser: str = "kde"
    primitive: str = "auto"

    def __post_init__(self) -> None:
        set_integers(self, num_samples=1)
        if self.eps is not None and not 0.0 < to_float(self.eps) < 1.0:
            raise OptionError(f"eps must lie strictly between 0 and 1, got {self.eps!r}")
        if self.eps is not None:
            object.__setattr__(self, "eps", float(self.eps))
        for name, known in (
            ("probabilities", ("mixture", "paper")),
            ("normaliser", ("kde", "sampled")),
            ("primitive", ("auto", "exact", "uniform", "hbe", "neighbours")),
        ):
            one_of(known, name, getattr(self, name))

    def resolve(self, budget: int | None) -> Self:
        """Return these options with num_samples set, unless it is to follow from eps."""
        if budget is not None and self.num_samples not in (None, budget):
            raise OptionError(f"budget must be None or num_samples = {self.num_samples}, got {budget}")
        samples = self.num_samples or budget or (None if self.eps is not None else DEFAULT_BUDGET)
        return replace(self, num_samples=samples)

    def with_budget(self, budget: int) -> Self:
        """Return resolved options for another budget; where the number of keys follows from eps, these."""
        return self if self.num_samples is None else replace(self, num_samples=budget)

    @property
    def budget(self) -> int | None:
        """Keys evaluated per query; None where they follow from eps."""
        return self.num_samples

    @property
    def accuracy(self) -> float:
        """Relative accuracy of the denominators."""
        return 0.2 if self.eps is None else float(self.eps)

    @property
    def needs_operator_norm(self) -> bool:
        """Whether ‖A‖ has to be estimated."""
        return self.num_samples is None or self.probabilities == "paper"


@dataclass(frozen=True)
class Treecode:
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
        of codes, which errs more and is for GPUs (docs/treecode.md); ``"auto"``, by one sort on accelerators and by a tree
        on the CPU.
    """

    name: ClassVar[str] = "treecode"
    DIRECTIONS: ClassVar[int] = 16
    """Coordinates by which rows are ordered and nodes opened."""
    LEAF_SIZE: ClassVar[int] = 4
    """Keys that are listed together, or not at all."""

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
            "row_norms",
            *(("rank_codes", "bucket_order") if self.ordering == "sort" else ("tree_order",)),
            "node_summaries",
            "pick_threshold",
            "open_tree",
            *(("gap_moments", "attend_tree") if self.far_field == "mean" else ("draw_uniform",)),
            "attend_blocks",
        )

    def __post_init__(self) -> None:
        set_integers(self, num_slots=1, block_size=1)
        for name, known in (("far_field", ("mean", "sample")), ("ordering", ("auto", "sort", "tree"))):
            one_of(known, name, getattr(self, name))

    @property
    def rows(self) -> int:
        """Queries of a block, of options that nothing is left open in."""
        assert self.block_size is not None
        return self.block_size

    @property
    def apart(self) -> bool:
        """Whether a block's queries differ so much that each one's own half variances count (`BlockQueries.apart`)."""
        return self.ordering == "sort"

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


Options = Exact | SortLSH | Hyper | KDEformer | Treecode
METHODS: dict[str, type[Exact] | type[SortLSH] | type[Hyper] | type[KDEformer] | type[Treecode]] = {
    cls.name: cls for cls in (Exact, SortLSH, Hyper, KDEformer, Treecode)
}
METHOD_NAMES = ("auto", *METHODS)
