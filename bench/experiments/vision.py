"""A vision transformer, ViT-S/14, with every method in all twelve layers: relative errors of its features and saliency map.

Photographs of scikit-image, one a seed, at 896 px (4,097 tokens) or 1,540 px (12,101); `bench.vit` says how to install what
it needs.
"""

import argparse
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from bench import vit
from bench.baselines import Attend
from bench.experiments import operations, summary
from bench.experiments.methods import add_shared_arguments, methods, runs
from bench.experiments.networks import PARTS, PHOTOGRAPHS, Layer, beside_exact, nothing_yet
from bench.experiments.rows import Results, Row, Show, attempted, collect

TINY, SMALL, LARGE = 112, 896, 1540
"""Pixels on a side."""
QUANTITIES = {"features": "relative error of features", "saliency": "relative error of the saliency map"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the experiment's arguments to a parser."""
    add_shared_arguments(parser, f"n/N keys for each query; {', '.join(map(str, PARTS))} by default")
    parser.add_argument("--large", action="store_true", help=f"{LARGE:,} px instead of {SMALL}")


def run(arguments: argparse.Namespace, show: Show) -> Results:
    """Run on a photograph for each seed, with every method and budget."""
    vit.load()
    size = TINY if arguments.tiny else LARGE if arguments.large else SMALL
    known = methods(arguments.methods, diagonal=0)
    chosen = list(runs(known, arguments.budgets or PARTS))
    plan = {
        f"{size} px, seed {seed}, {name}" + f", n/{part}" * (part is not None): partial(
            measure, name, known[name], size, part, seed
        )
        for seed in range(arguments.seeds or (1 if arguments.tiny else len(PHOTOGRAPHS)))
        for name, part in chosen
    }
    path = arguments.out / "vision.json"
    collect(path, plan, show)
    plain = methods(arguments.methods, diagonal=0, kernels="array-api")
    work = {
        f"{size} px, {name}" + f", n/{part}" * (part is not None): partial(count, name, plain[name], size, part)
        for name, part in chosen
    }
    return collect(path, work, show, "operations")


@lru_cache(maxsize=1)
def scene(size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the photograph of a seed, and its features and saliency map with exact attention."""
    pixels = vit.photograph(size, PHOTOGRAPHS[seed % len(PHOTOGRAPHS)])
    features, _ = vit.load()(pixels)
    return pixels, features, vit.load().saliency(features, (size, size))


def measure(name: str, attend: Attend, size: int, part: int | None, seed: int) -> Row:
    """Return one row: relative errors in the Frobenius norm, and times of all attention."""
    model, (pixels, features, saliency) = vit.load(), scene(size, seed)

    def one() -> Row:
        seconds = nothing_yet()
        layer = beside_exact(attend, part, seed, seconds)
        found, _ = model(pixels, attend=lambda _, q, k, v: layer(q, k, v, q.shape[-1] ** -0.5))
        errors = relative(found, features), relative(model.saliency(found, (size, size)), saliency)
        return dict(zip(QUANTITIES, errors, strict=True)) | seconds

    return attempted({"size": f"{size} px", "method": name, "budget": part and 1 / part, "seed": seed}, one)


def count(name: str, attend: Attend, size: int, part: int | None) -> Row:
    """Return the operations of a method in all layers."""
    identity = {"size": f"{size} px", "method": name, "budget": part and 1 / part}
    return attempted(identity, lambda: operations.counted([attend], calls(size), part))


@lru_cache(maxsize=1)
def calls(size: int) -> list[list[operations.Call]]:
    """Return the attention of all layers, of the first seed with exact attention."""
    model, (pixels, _, _) = vit.load(), scene(size, 0)

    def run(layer: Layer) -> None:
        model(pixels, attend=lambda _, q, k, v: layer(q, k, v, q.shape[-1] ** -0.5))

    return operations.recorded(run)


def relative(found: Tensor, exact: Tensor) -> float:
    """Return ‖found − exact‖ / ‖exact‖, Frobenius."""
    return float(torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact))


def table(results: Results) -> str:
    """Return errors at equal budgets, and the least error of features at equal times and equal operations."""
    return f"{summary.table(results, 'keys / n', QUANTITIES)}\n\n{summary.within(results, 'features', min)}"


def figure(results: Results, path: Path) -> None:
    """Draw errors against the budget, and those of features against time and operations."""
    summary.figure(results, "keys evaluated for each query, over all keys", QUANTITIES, path)
