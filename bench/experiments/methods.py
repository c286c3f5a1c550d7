"""What the experiments that measure rows compare: kdecore's methods and bench.baselines, as one kind of function."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from bench.baselines import BASELINES, Attend
from bench.model_methods import estimated, exact_attention
from kdecore.compare.baselines import WITHOUT_BUDGET
from kdecore.methods import METHODS

KDECORE = tuple(name for name in METHODS if name != "auto")
sdpa = partial(exact_attention, 0)
"""(q, k, v, scale) → exact attention by PyTorch's own function, which errors and times are relative to."""


def add_shared_arguments(parser: argparse.ArgumentParser, budgets: str) -> None:
    """Add what all experiments that measure rows are asked for; ``budgets`` says what the numbers are."""
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="kdecore's and bench/baselines'; all by default")
    parser.add_argument("--budgets", nargs="+", type=int, metavar="N", help=budgets)
    parser.add_argument("--seeds", type=int, metavar="N", help="how many, from 0 on")
    parser.add_argument("--tiny", action="store_true", help="a size that takes seconds, to see that it runs")


def methods(names: Sequence[str] | None = None, diagonal: int | None = None, kernels: str = "auto") -> dict[str, Attend]:
    """Return name → function: kdecore's, then baselines of other names.

    Parameters
    ----------
    names
        Which; all if None.
    diagonal, kernels
        Where queries stand among the keys, and what computes, as `kdecore.attention` takes them; baselines don't know.

    Raises
    ------
    ValueError
        An unknown name.
    """
    known: dict[str, Attend] = {name: partial(estimated, name, diagonal, kernels=kernels) for name in KDECORE}
    known |= {name: one for name, one in BASELINES.items() if name not in known}
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"methods must be of {', '.join(known)}, got {', '.join(unknown)}")
    return {name: attend for name, attend in known.items() if names is None or name in names}


def runs(names: Iterable[str], budgets: Sequence[int]) -> Iterator[tuple[str, int | None]]:
    """Yield each method with each budget, or with None where no budget changes anything."""
    for name in names:
        for budget in (None,) if name in WITHOUT_BUDGET else budgets:
            yield name, budget
