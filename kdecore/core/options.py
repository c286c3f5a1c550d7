"""`Options`, which those of every method derive from, and `Exact`, what all methods fall back on."""

from dataclasses import dataclass
from typing import ClassVar, Self

from kdecore.arrays.scalars import integer_at_least

DEFAULT_BUDGET = 512
"""Keys evaluated per query when neither ``budget`` nor options say otherwise."""


def set_integers(options: object, **minima: int) -> None:
    """Make those fields of a frozen options object that aren't None Python integers of at least so much each."""
    for name, minimum in minima.items():
        value = getattr(options, name)
        if value is not None:
            object.__setattr__(options, name, integer_at_least(minimum, name, value))


@dataclass(frozen=True)
class Options:
    """Options of a method: a frozen dataclass derived from this, whose fields may be left open as None.

    Attributes
    ----------
    name
        The method's.
    """

    name: ClassVar[str]

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels that the method needs, in the order that they are chosen in."""
        return ("attend_blocks",)

    @property
    def budget(self) -> int | None:
        """Keys evaluated per query; None where not resolved, or where all are."""
        raise NotImplementedError

    def resolve(self, budget: int | None) -> Self:
        """Return these options with every field set, as a call's ``budget`` says; or raise `OptionError`."""
        raise NotImplementedError

    def with_budget(self, budget: int) -> Self:
        """Return resolved options for another budget."""
        raise NotImplementedError


@dataclass(frozen=True)
class Exact(Options):
    """Every query attends to every key; no options."""

    name: ClassVar[str] = "exact"

    @property
    def kernels(self) -> tuple[str, ...]:
        """Kernels that exact attention needs."""
        return ("attend_dense",)

    @property
    def budget(self) -> int | None:
        """Keys evaluated per query: all of them."""
        return None

    def resolve(self, budget: int | None) -> Self:
        """Return these options with every field set."""
        return self

    def with_budget(self, budget: int) -> Self:
        """Return these options, which no budget changes."""
        return self
