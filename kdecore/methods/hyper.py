"""HyperAttention (Han, Jayaram, Karbasi, Mirrokni, Woodruff, Zandieh 2023): sortlsh with uniform sampling."""

from dataclasses import dataclass, replace
from typing import ClassVar

from kdecore.core.chunks import Features
from kdecore.core.problem import Problem
from kdecore.core.selection import Selection
from kdecore.methods import sortlsh
from kdecore.methods.base import Chunked, Plan, Stages
from kdecore.methods.sortlsh import SortedHashes, SortLSH, block_and_sample, hashed, select_chunk, sort_described


@dataclass(frozen=True)
class Hyper(SortLSH):
    """Options of ``method="hyper"``: HyperAttention (Han et al. 2023), sortlsh with uniform sampling of the other keys."""

    name: ClassVar[str] = "hyper"

    @property
    def kernels(self) -> tuple[str, ...]:
        """Kernels that the method needs."""
        return tuple(name for name in super().kernels if name != "row_norms")


def select(problem: Problem, plan: Plan) -> Selection:
    """Select each block's own stretch of keys, and a uniform sample of the others."""
    return block_and_sample(problem, plan, prepare(problem, plan))


def prepare(problem: Problem, plan: Plan) -> SortedHashes:
    """Hash and sort."""
    return sort_described(problem, plan, 0, describe(problem, plan))


def describe(problem: Problem, plan: Plan) -> Features:
    """Hash, and weigh all keys alike."""
    return hashed(problem, plan, None)


METHOD = replace(
    sortlsh.METHOD,
    options=Hyper,
    select=select,
    stages=Stages(prepare, block_and_sample),
    chunked=Chunked(describe, sort_described, select_chunk, False),
)
