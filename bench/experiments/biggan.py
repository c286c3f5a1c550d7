"""BigGAN-deep-512 with its attention replaced (KDEformer's image generation): images, operations, FID and Inception score.

Needs the generator's weights; scores need an Inception network and the moments of real images, and none is printed without.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bench.experiments.scores import (
    Inception,
    Moments,
    frechet_distance,
    inception_score,
    load_scores,
    moments_of,
)
from bench.experiments.standin import (
    Results,
    add_shared_arguments,
    aligned,
    check_budgets,
    chosen,
    measure_standin,
    refuse,
    refusing,
    standin_table,
)
from bench.model_methods import Method, methods, multiply_accumulates, published_multiply_accumulates, route, shown
from bench.models_biggan import BigGAN, load, to_bytes, truncated_noise
from kdecore.compare.cases import load_case

BLOCK, SAMPLES = 64, 128
"""b and m of the paper."""
COUNTED_BATCH = 8
"""Images that the paper counts operations for."""
MEASURED_BATCHES = 4
"""Batches whose attention is compared with exact attention."""
PUBLISHED = {"exact": (32.17, 58.38, 10.738), "KDEformer": (31.41, 58.16, 2.596)}
"""FID, Inception score and 10⁹ multiply-accumulates of the paper."""
NEEDED = (
    "biggan needs --weights FOLDER: config.json and pytorch_model.bin of BigGAN-deep-512, as the authors of the package "
    "pytorch-pretrained-biggan published them; or --standin FILE with q, k, v and scale for errors alone"
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the experiment's arguments to a parser."""
    add_shared_arguments(
        parser,
        "folder with config.json and pytorch_model.bin of BigGAN-deep-512",
        (BLOCK + SAMPLES,),
        "keys a query, the first with a model, each with --standin; the paper's by default",
    )
    parser.add_argument("--inception", type=Path, help="TorchScript file: uint8 images → features and logits")
    parser.add_argument("--moments", type=Path, help=".npz file: mu and sigma of those features of real images")
    parser.add_argument("--count", type=int, default=5000, help="images to generate, their classes in turn")
    parser.add_argument("--batch", type=int, default=8, help="images at a time")
    parser.add_argument("--truncation", type=float, default=0.4, help="of the noise, in (0, 1]")
    parser.add_argument("--images", type=Path, help="folder for PNG files, in a folder for each method; none by default")


def run(arguments: Namespace, show: Callable[[str], None]) -> Results:
    """Run the experiment.

    Parameters
    ----------
    arguments
        What `add_arguments` asks for.
    show
        Called with what is being done.

    Returns
    -------
    dict
        What JSON can hold: that of `measure_standin`, or the images' settings and ``"rows"``, for each method its budget,
        attention's relative Frobenius error, multiply-accumulates for 8 images, and where they could be measured
        ``"fid"`` and ``"inception_score"``.

    Raises
    ------
    SystemExit
        With status 2, after one line: neither weights nor a stand-in were given, or files or arguments are wrong.
    """
    with refusing():
        some = chosen(arguments.methods, methods(BLOCK))
        check_budgets(arguments.budgets)
        if arguments.standin is not None:
            case = load_case([arguments.standin])
        elif arguments.weights is None:
            refuse(NEEDED)
        else:
            check(arguments)
            show("reading the weights")
            model, scored = load(arguments.weights, arguments.device), None
            if arguments.inception is not None:
                scored = load_scores(arguments.inception, arguments.moments, model.config.output_dim, arguments.device)
    if arguments.standin is not None:
        return measure_standin(case, some, arguments.budgets, arguments.seed)
    return measure(model, some, arguments, scored, show)


def check(arguments: Namespace) -> None:
    """Raise `ValueError` that names an argument of the model's which is out of range."""
    if (arguments.inception is None) != (arguments.moments is None):
        raise ValueError("--inception and --moments must be given together")
    if len(arguments.budgets) != 1:
        raise ValueError(f"--budgets must be one number with a model, got {len(arguments.budgets)}")
    if arguments.count < 2 or arguments.batch < 1:
        raise ValueError(f"--count must be at least 2 and --batch 1, got {arguments.count} and {arguments.batch}")
    if not 0 < arguments.truncation <= 1:
        raise ValueError(f"--truncation must lie in (0, 1], got {arguments.truncation}")


@dataclass
class Collected:
    """What is kept of one method's images."""

    errors: list[float] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


def measure(
    model: BigGAN,
    some: dict[str, Method],
    arguments: Namespace,
    scored: tuple[Inception, Moments] | None,
    show: Callable[[str], None],
) -> Results:
    """Generate the same images with every method, and score them where an Inception network and moments are given."""
    config, budget = model.config, arguments.budgets[0]
    noise = truncated_noise(arguments.count, config.z_dim, arguments.truncation, arguments.seed)
    labels = torch.arange(arguments.count) % config.num_classes
    collected = {name: Collected() for name in some}
    for batch, first in enumerate(range(0, arguments.count, arguments.batch)):
        part = slice(first, first + arguments.batch)
        inputs = noise[part].to(arguments.device), labels[part].to(arguments.device)
        for name, own in collected.items():
            show(f"image {first + 1} of {arguments.count}, {name}")
            errors = [own.errors] if batch < MEASURED_BATCHES else None
            attend = route(some[name], (budget,), arguments.seed + batch, errors)
            images = to_bytes(model(*inputs, arguments.truncation, attend))
            if arguments.images is not None:
                write(images, arguments.images / name, first)
            if scored is not None:
                features, logits = scored[0](images)
                own.features.append(features)
                own.logits.append(logits)
    n_q, n_k, d, d_v = config.attention_shape
    rows = []
    for name, own in collected.items():
        keys = n_k if name == "exact" else min(budget, n_k)
        row: dict[str, Any] = {"method": name, "budget": keys, "error": shown([own.errors])[0]}
        row["multiply_accumulates"] = multiply_accumulates(COUNTED_BATCH, n_q, keys, d, d_v)
        if scored is not None:
            row["fid"] = frechet_distance(moments_of(torch.cat(own.features)), scored[1])
            row["inception_score"] = inception_score(torch.cat(own.logits))
        rows.append(row)
    settings = {name: getattr(arguments, name) for name in ("count", "batch", "truncation", "seed")}
    return settings | {"shape": [n_q, n_k, d, d_v], "rows": rows}


def write(images: Tensor, folder: Path, first: int) -> None:
    """Write images (batch, 3, height, width) uint8 as PNG files, numbered from ``first``."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy(), start=first):
        Image.fromarray(image).save(folder / f"{number:05d}.png")


def table(results: Results) -> str:
    """Return the results as a table; FID and Inception score are columns only where they were measured."""
    if "standin" in results:
        return standin_table(results)
    n_q, n_k, d, d_v = results["shape"]
    has_scores = "fid" in results["rows"][0]
    head = ("method", "keys a query", "error", f"G multiply-accumulates, {COUNTED_BATCH} images")
    rows = []
    for row in results["rows"]:
        count = f"{row['multiply_accumulates'] / 1e9:.3f}"
        scores = (f"{row['fid']:.2f}", f"{row['inception_score']:.2f}") if has_scores else ()
        rows.append((row["method"], row["budget"], f"{row['error']:.4f}", count, *scores))
    text = f"{results['count']} images, truncation {results['truncation']:g}; "
    text += f"attention {n_q} × {n_k}, d = {d}, d_v = {d_v}\n"
    text += aligned((*head, *(("FID", "IS") if has_scores else ())), rows)
    released = published_multiply_accumulates(COUNTED_BATCH, n_q, n_k, d, d_v, block=BLOCK, samples=SAMPLES)
    text += f"\nthe released KDEformer, with what chooses keys: {released / 1e9:.3f} G"
    if not has_scores:
        return f"{text}\nno FID and no IS: they need --inception and --moments"
    said = (f"{name} FID {fid}, IS {score}, {count} G" for name, (fid, score, count) in PUBLISHED.items())
    return f"{text}\npublished (5,000 images): {'; '.join(said)}"
