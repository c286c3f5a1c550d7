"""Methods by name, and their options as frozen objects for those who want control over a method's parts."""

import operator
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from kdecore.errors import OptionError

DEFAULT_BUDGET = 512
"""Keys evaluated per query when neither ``budget`` nor options say otherwise."""
DEFAULT_HASHES = 12
"""Hyperplanes: 4,096 buckets, several times the number of blocks up to n = 131,072 (more splits no bucket usefully)."""
MAX_HASHES = 30
SAMPLED_ROWS = 64
"""Queries in a block that has no keys of its own."""


def integer_at_least(minimum: int, name: str, value: object) -> int:
    """Return ``value`` as an int of at least ``minimum``, or raise `OptionError` naming it."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise OptionError(f"{name} must be an integer of at least {minimum}, got {value!r}") from None
    if number < minimum:
        raise OptionError(f"{name} must be an integer of at least {minimum}, got {number}")
    return number


@dataclass(frozen=True)
class Exact:
    """Every query attends to every key; no options."""

    name: ClassVar[str] = "exact"
    kernels: ClassVar[tuple[str, ...]] = ("attend_dense",)

    def resolve(self, budget: int | None) -> "Exact":
        """Return these options with every field set."""
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
    kernels: ClassVar[tuple[str, ...]] = ("row_norms", "hash_codes", "bucket_order", "draw_indices", "attend_blocks")

    block_size: int | None = None
    num_samples: int | None = None
    num_hashes: int | None = None

    def __post_init__(self) -> None:
        for name, minimum in (("block_size", 0), ("num_samples", 1), ("num_hashes", 1)):
            if getattr(self, name) is not None:
                integer_at_least(minimum, name, getattr(self, name))
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

    @property
    def rows(self) -> int:
        """Queries in a block: as many as its own keys, so that in self-attention a block meets its own positions."""
        return self.block_size or SAMPLED_ROWS

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
    kernels: ClassVar[tuple[str, ...]] = ("hash_codes", "bucket_order", "draw_indices", "attend_blocks")


Options = Exact | SortLSH | Hyper
METHODS: dict[str, type[Exact] | type[SortLSH] | type[Hyper]] = {cls.name: cls for cls in (Exact, SortLSH, Hyper)}
