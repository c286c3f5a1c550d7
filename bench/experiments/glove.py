"""The paper's error curve on word vectors: relative spectral error against the budget F, K = Q, n = 8,192.

F is the paper's: KDEformer takes blocks of F/2 keys and F samples, 3F/2 keys a query, which is the budget of all here.
"""

import argparse
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.baselines import Attend
from bench.experiments import summary
from bench.experiments.methods import add_shared_arguments, methods, runs, sdpa
from bench.experiments.rows import Results, Row, Show, attempted, collect
from bench.timing import interleaved
from kdecore.accuracy.metrics import errors
from kdecore.arrays import files
from kdecore.arrays.namespace import host
from kdecore.compare.cases import GLOVE, GLOVE_SCALE

WORDS, BUDGETS, SEEDS = 8192, (64, 128, 256, 512, 1024, 2048, 4096), 10
TINY_WORDS, TINY_BUDGETS, TINY_SEEDS = 512, (32, 64), 2
QUANTITIES = {"spectral": "relative spectral error", "frobenius": "relative Frobenius error"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the experiment's arguments to a parser."""
    add_shared_arguments(parser, f"F of the paper; {', '.join(map(str, BUDGETS))} by default")


def run(arguments: argparse.Namespace, show: Show) -> Results:
    """Measure every method with every budget, on words and random numbers of every seed."""
    tiny = arguments.tiny
    count = TINY_WORDS if tiny else WORDS
    budgets = arguments.budgets or (TINY_BUDGETS if tiny else BUDGETS)
    known = methods(arguments.methods, diagonal=0)
    plan = {
        f"n = {count:,}, seed {seed}, {name}" + f", F = {budget}" * (budget is not None): partial(
            measure, name, known[name], count, budget, seed
        )
        for seed in range(arguments.seeds or (TINY_SEEDS if tiny else SEEDS))
        for name, budget in runs(known, budgets)
    }
    return collect(arguments.out / "glove.json", plan, show)


@lru_cache(maxsize=1)
def words(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw words of the bundled sample: queries, which are the keys, values, and exact attention; each (1, count, 100)."""
    (vectors,) = files.load(GLOVE, ("vectors",))
    drawn = vectors[np.random.default_rng(seed).permutation(len(vectors))[: 2 * count]].astype(np.float64)
    q, v = torch.from_numpy(drawn[None, :count]), torch.from_numpy(drawn[None, count:])
    return q, v, sdpa(q, q, v, GLOVE_SCALE)


def measure(name: str, attend: Attend, count: int, budget: int | None, seed: int) -> Row:
    """Return one row: errors of one method, and its time beside that of PyTorch's exact attention."""
    q, v, exact = words(seed, count)

    def one() -> Row:
        call = partial(attend, q, q, v, GLOVE_SCALE, count if budget is None else 3 * budget // 2, seed)
        found = errors(host, call().numpy(), exact.numpy())
        calls = {"seconds": call, "exact_seconds": partial(sdpa, q, q, v, GLOVE_SCALE)}
        return {"spectral": found.spectral, "frobenius": found.frobenius} | interleaved(calls, repeats=1, rounds=1)

    return attempted({"size": f"n = {count:,}", "method": name, "budget": budget, "seed": seed}, one)


def table(results: Results) -> str:
    """Return mean and deviation of errors over seeds, and times over exact attention's."""
    return summary.table(results, "F", QUANTITIES)


def figure(results: Results, path: Path) -> None:
    """Draw errors against F, and spectral errors against time."""
    summary.figure(results, "F (3F/2 keys for each query)", QUANTITIES, path)
