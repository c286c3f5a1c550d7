"""`CallOptions`: what a call asks for besides its arrays, checked by itself: adapters do so before there are any."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from kdecore.accuracy.certificate import check_share
from kdecore.accuracy.search import candidate, check_tolerance
from kdecore.arrays.namespace import Array
from kdecore.arrays.scalars import check_boolean, integer, one_of
from kdecore.core.options import Options, set_integers
from kdecore.methods.plan import check_method, check_settings


class IndexOptions(TypedDict, total=False):
    """Arguments by name of `KeyIndex.attend`, but those that say what is returned: what its overloads have in common."""

    budget: int | None
    rtol: float | None
    rtol_norm: str
    certificate: float


class PackedOptions(IndexOptions, total=False):
    """Those of `kdecore.packed_attention`."""

    method: str | Options
    causal: bool
    window: int | None
    diagonal: int | None
    scale: float | None
    seed: int
    kernels: str
    threads: int | None
    check_finite: bool
    max_memory: int | None


class AttentionOptions(PackedOptions, total=False):
    """Those of `kdecore.attention`."""

    key_lengths: Any
    mask: Array | None


@dataclass(frozen=True)
class CallOptions:
    """Options of `kdecore.attention` that mean the same whatever the arrays are; attributes as its parameters.

    Raises
    ------
    OptionError
        One is out of its range, or two contradict each other; the message names it.
    """

    method: str | Options = "auto"
    budget: int | None = None
    rtol: float | None = None
    rtol_norm: str = "frobenius"
    causal: bool = False
    window: int | None = None
    diagonal: int | None = None
    seed: int = 0
    kernels: str = "auto"
    threads: int | None = None
    certificate: float = 0.1
    check_finite: bool = False
    max_memory: int | None = None

    def __post_init__(self) -> None:
        set_integers(self, budget=1, window=1, threads=1, max_memory=1)
        if self.diagonal is not None:
            object.__setattr__(self, "diagonal", integer("diagonal", self.diagonal))
        check_method(self.method, self.budget)
        check_tolerance(self.rtol, self.rtol_norm)
        if self.rtol is not None:
            candidate(self.method, self.budget)
        check_boolean("causal", self.causal)
        check_boolean("check_finite", self.check_finite)
        check_settings(self.seed, self.kernels, self.threads)
        check_share(self.certificate)

    @property
    def settings(self) -> dict[str, Any]:
        """What all plans of the call share: seed, kernels and threads."""
        return check_settings(self.seed, self.kernels, self.threads)

    @property
    def budget_asked(self) -> int | None:
        """Keys per query that the call or its options object asks for; None where neither does."""
        return self.method.budget if self.budget is None and isinstance(self.method, Options) else self.budget

    @property
    def limit(self) -> float:
        """Bytes that temporaries may take."""
        return math.inf if self.max_memory is None else float(self.max_memory)


NAMES = tuple(field.name for field in fields(CallOptions))


def call_options(options: Mapping[str, Any], *others: str) -> CallOptions:
    """Return options given by name, or raise `OptionError` for a name that is neither one of them nor among ``others``."""
    for name in options:
        one_of((*NAMES, *others), "options", name)
    return CallOptions(**{name: value for name, value in options.items() if name not in others})
