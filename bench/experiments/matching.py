"""Photographs matched to homographies of themselves by LightGlue, with every method in all its attention.

Nine layers, in each the self-attention of both images' keypoints and cross attention both ways, four heads of 64. Recall is
of pairs of keypoints within 3 px of each other, each the other's nearest; a match within 3 px is right. It needs
`python -m bench.lightglue` once, and scikit-image.
"""

import argparse
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from bench import lightglue
from bench.baselines import Attend
from bench.experiments import operations, summary
from bench.experiments.methods import add_shared_arguments, methods, runs
from bench.experiments.networks import PARTS, PHOTOGRAPHS, Layer, beside_exact, nothing_yet
from bench.experiments.rows import Results, Row, Show, attempted, collect

Counts = tuple[int, int]
TINY, SMALL, LARGE = (64, 32), (4096, 1024), (8192, 8192)
"""Keypoints of the two images."""
SIDES = {TINY: 128, SMALL: 1024, LARGE: 1536}
"""Pixels on a side, by the keypoints."""
PIXELS = 3.0
QUANTITIES = {"recall": "recall of matches within 3 px", "precision": "precision"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the experiment's arguments to a parser."""
    add_shared_arguments(parser, f"n_k/N keys for each query; {', '.join(map(str, PARTS))} by default")
    parser.add_argument("--large", action="store_true", help="8,192 × 8,192 keypoints instead of 4,096 × 1,024")


def run(arguments: argparse.Namespace, show: Show) -> Results:
    """Match a photograph and a homography for each seed, with every method and budget."""
    lightglue.load()
    counts = TINY if arguments.tiny else LARGE if arguments.large else SMALL
    within, across = methods(arguments.methods, diagonal=0), methods(arguments.methods)
    chosen = list(runs(within, arguments.budgets or PARTS))
    plan = {
        f"{counts[0]:,} × {counts[1]:,}, seed {seed}, {name}" + f", n_k/{part}" * (part is not None): partial(
            measure, name, (within[name], across[name]), counts, part, seed
        )
        for seed in range(arguments.seeds or (1 if arguments.tiny else len(PHOTOGRAPHS)))
        for name, part in chosen
    }
    path = arguments.out / "matching.json"
    collect(path, plan, show)
    kinds = [methods(arguments.methods, diagonal, kernels="array-api") for diagonal in (0, None)]
    work = {
        f"{counts[0]:,} × {counts[1]:,}, {name}" + f", n_k/{part}" * (part is not None): partial(
            count, name, [kind[name] for kind in kinds], counts, part
        )
        for name, part in chosen
    }
    return collect(path, work, show, "operations")


@lru_cache(maxsize=1)
def scene(seed: int, counts: Counts) -> tuple[lightglue.Pair, Tensor]:
    """Return the pair of a seed, and the `distances` of its keypoints."""
    pair = lightglue.pair(PHOTOGRAPHS[seed % len(PHOTOGRAPHS)], seed, SIDES[counts], counts)
    return pair, distances(pair)


def distances(pair: lightglue.Pair) -> Tensor:
    """Return pixels between where keypoints of the first image are taken and those of the second, (n, m) float64."""
    return torch.cdist(lightglue.projected(pair.first.keypoints, pair.homography), pair.second.keypoints.double())


def correspond(apart: Tensor) -> Tensor:
    """Return which keypoints of the first image have one of the second within 3 px, each the other's nearest: (n,)."""
    nearest, back = apart.min(dim=1), apart.min(dim=0).indices
    return (nearest.values < PIXELS) & (back[nearest.indices] == torch.arange(len(apart)))


def score(found: Tensor, apart: Tensor) -> Row:
    """Return recall and precision of matches.

    Parameters
    ----------
    found
        (n,) int64: keypoints of the second image, or -1.
    apart
        (n, m): `distances`.
    """
    wanted, matched = correspond(apart), found >= 0
    right = matched & (apart.gather(1, found.clamp(min=0)[:, None])[:, 0] < PIXELS)
    return {
        "recall": float((right & wanted).sum() / wanted.sum()),
        "precision": float(right.sum() / matched.sum()),
        "matches": int(matched.sum()),
        "correspondences": int(wanted.sum()),
    }


def measure(name: str, attends: Iterable[Attend], counts: Counts, part: int | None, seed: int) -> Row:
    """Return one row: the score of the matches, and times of all attention."""
    model, (pair, apart) = lightglue.load(), scene(seed, counts)

    def one() -> Row:
        seconds = nothing_yet()
        within, across = (beside_exact(attend, part, seed, seconds) for attend in attends)
        with lightglue.attention_replaced(model, within, across):
            return score(lightglue.matches(model, pair), apart) | seconds

    return attempted({"size": size_of(counts), "method": name, "budget": part and 1 / part, "seed": seed}, one)


def size_of(counts: Counts) -> str:
    """Return what rows call a size."""
    return "{:,} × {:,} keypoints".format(*counts)


def count(name: str, attends: Iterable[Attend], counts: Counts, part: int | None) -> Row:
    """Return the operations of a method within images and across them."""
    identity = {"size": size_of(counts), "method": name, "budget": part and 1 / part}
    return attempted(identity, lambda: operations.counted(attends, calls(counts), part))


@lru_cache(maxsize=1)
def calls(counts: Counts) -> list[list[operations.Call]]:
    """Return the attention within images, and across them, of the first seed with exact attention."""
    model, (pair, _) = lightglue.load(), scene(0, counts)

    def run(within: Layer, across: Layer) -> None:
        with lightglue.attention_replaced(model, within, across):
            lightglue.matches(model, pair)

    return operations.recorded(run, kinds=2)


def table(results: Results) -> str:
    """Return recall and precision at equal budgets, and the best recall at equal times and equal operations."""
    return f"{summary.table(results, 'keys / n_k', QUANTITIES)}\n\n{summary.within(results, 'recall', max)}"


def figure(results: Results, path: Path) -> None:
    """Draw recall and precision against the budget, and recall against time and operations."""
    summary.figure(results, "keys evaluated for each query, over all keys", QUANTITIES, path, scale="linear")
