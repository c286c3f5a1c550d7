"""T2T-ViT-t-24 with its two token attentions replaced (KDEformer's ImageNet experiment): top-1, agreement, operations.

Needs the authors' checkpoint and images; top-1 needs their labels, and none is printed without.
"""

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

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
from bench.model_methods import Method, exact_attention, methods, multiply_accumulates, route, shown
from bench.models_t2t import Config, TokensToToken, load
from bench.vit import DEVIATION, MEAN
from kdecore.compare.cases import load_case

BLOCK, SAMPLES = 32, (98, 24)
"""b of the paper, and its m of each layer."""
COUNTED_BATCH = 128
"""Images that the paper counts operations for."""
MEASURED_BATCHES = 4
"""Batches whose attention is compared with exact attention."""
CROP = 0.9
"""Part of the shorter side that the model sees."""
PUBLISHED = {"exact": (82.55, 161.10), "KDEformer": (82.08, 8.80)}
"""Top-1 in per cent, and 10⁹ multiply-accumulates of the first layer, of the paper."""
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
NEEDED = (
    "t2t needs --weights FILE and --images FOLDER: the checkpoint of T2T-ViT-t-24 that its authors published beside their "
    "code (82.6 % top-1), and photographs, such as ImageNet's validation set from its own site; or --standin FILE with q, "
    "k, v and scale for errors alone"
)
Labelled = list[tuple[Path, int | None]]


def add_arguments(parser: ArgumentParser) -> None:
    """Add the experiment's arguments to a parser."""
    add_shared_arguments(
        parser,
        "checkpoint of T2T-ViT-t-24",
        [BLOCK + samples for samples in SAMPLES],
        "keys a query in each of the two layers, each number with --standin; the paper's by default",
    )
    parser.add_argument("--images", type=Path, help="folder of JPEG, PNG or WebP files, or of a folder for each class")
    parser.add_argument(
        "--labels",
        choices=tuple(LABELLED),
        default="none",
        help="folders: of the images' folders, numbers or all classes in order; names: last number of files' names",
    )
    parser.add_argument("--batch", type=int, default=16, help="images at a time")


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
        What JSON can hold: that of `measure_standin`, or the number of images and ``"rows"``, for each method its budgets,
        both layers' relative Frobenius errors and multiply-accumulates for 128 images, the part of images that get
        exact attention's class (``"agreement"``), and with labels ``"top_1"``.

    Raises
    ------
    SystemExit
        With status 2, after one line: neither weights and images nor a stand-in were given, or files or arguments are wrong.
    """
    with refusing():
        check_budgets(arguments.budgets)
        if arguments.standin is not None:
            # A file doesn't say that queries and keys are of the same tokens.
            some, case = chosen(arguments.methods, methods(BLOCK)), load_case([arguments.standin])
        elif arguments.weights is None or arguments.images is None:
            refuse(NEEDED)
        else:
            check(arguments)
            some, config = chosen(arguments.methods, methods(BLOCK, diagonal=0)), Config()
            images = LABELLED[arguments.labels](arguments.images, config.classes)
            show("reading the weights")
            model = load(arguments.weights, config, arguments.device)
    if arguments.standin is not None:
        return measure_standin(case, some, arguments.budgets, arguments.seed)
    return measure(model, images, some, arguments, show)


def check(arguments: Namespace) -> None:
    """Raise `ValueError` that names an argument of the model's which is out of range."""
    if len(arguments.budgets) != len(SAMPLES):
        raise ValueError(f"--budgets must be {len(SAMPLES)} numbers, one a layer, got {len(arguments.budgets)}")
    if arguments.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {arguments.batch}")


def measure(
    model: TokensToToken,
    images: Labelled,
    some: dict[str, Method],
    arguments: Namespace,
    show: Callable[[str], None],
) -> Results:
    """Classify the same images with every method, and with exact attention."""
    found: dict[str, list[int]] = {name: [] for name in some}
    errors: dict[str, list[list[float]]] = {name: [[], []] for name in some}
    exact: list[int] = []
    for batch, first in enumerate(range(0, len(images), arguments.batch)):
        part = [path for path, _ in images[first : first + arguments.batch]]
        pixels = torch.stack([pixels_of(path, model.config.image) for path in part]).to(arguments.device)
        exact += model(pixels, exact_attention).argmax(1).tolist()
        for name, method in some.items():
            show(f"image {first + 1} of {len(images)}, {name}")
            own = errors[name] if batch < MEASURED_BATCHES else None
            attend = route(method, arguments.budgets, arguments.seed + batch, own)
            found[name] += model(pixels, attend).argmax(1).tolist()
    rows = []
    for name, classes in found.items():
        keys = [n if name == "exact" else min(n, b) for n, b in zip(model.config.tokens, arguments.budgets, strict=True)]
        row: dict[str, Any] = {"method": name, "budgets": keys, "errors": shown(errors[name])}
        row["multiply_accumulates"] = counted(model.config, keys)
        row["agreement"] = share(classes, exact)
        if arguments.labels != "none":
            row["top_1"] = share(classes, [label for _, label in images])
        rows.append(row)
    return {"images": len(images), "labels": arguments.labels, "seed": arguments.seed, "rows": rows}


def counted(config: Config, keys: Sequence[int]) -> list[int]:
    """Count multiply-accumulates of the two token attentions for 128 images, with so many keys a query in each."""
    width = config.token
    return [multiply_accumulates(COUNTED_BATCH, n, k, width, width) for n, k in zip(config.tokens, keys, strict=True)]


def share(classes: Sequence[int], expected: Sequence[int | None]) -> float:
    """Return the part of the classes that are as expected."""
    return sum(one == other for one, other in zip(classes, expected, strict=True)) / len(classes)


def pixels_of(path: Path, side: int) -> Tensor:
    """Read an image as the model was tested: its shorter side to side/0.9, bicubic, the central square, normalised.

    Returns
    -------
    Tensor
        (3, side, side) float32.
    """
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    shorter = min(image.size)
    width, height = (int(int(side / CROP) * length / shorter) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in image.size)
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + side, top + side)), dtype=np.float32)) / 255
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(2, 0, 1)


def files_in(folder: Path, pattern: str = "*") -> list[Path]:
    """Return a folder's images in order, or raise `ValueError` if there is none."""
    found = sorted(path for path in folder.glob(pattern) if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{folder} must hold images ({', '.join(SUFFIXES)}), got none that match {pattern}")
    return found


def unlabelled(folder: Path, classes: int) -> Labelled:
    """Return a folder's images, or those of its folders, without labels."""
    return [(path, None) for path in files_in(folder, "**/*")]


def labelled_by_folder(folder: Path, classes: int) -> Labelled:
    """Return the images of a folder's folders, whose names are labels, or which are all classes in order.

    Raises
    ------
    ValueError
        Names are no numbers below ``classes``, and there are not as many folders as classes.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if all(name.isdecimal() and int(name) < classes for name in names):
        labels = {name: int(name) for name in names}
    elif len(names) == classes:
        labels = {name: number for number, name in enumerate(names)}
    else:
        raise ValueError(f"{folder} must hold {classes} folders, or folders named by numbers below that; got {len(names)}")
    return [(path, labels[path.parent.name]) for path in files_in(folder, "*/*")]


def labelled_by_name(folder: Path, classes: int) -> Labelled:
    """Return a folder's images, whose names' last number is the label, as in photo_07_243.jpg.

    Raises
    ------
    ValueError
        A name has no number, or one that is not below ``classes``.
    """
    found: Labelled = []
    for path in files_in(folder):
        numbers = re.findall(r"\d+", path.stem)
        if not numbers or int(numbers[-1]) >= classes:
            raise ValueError(f"{path} must end in a label below {classes}, got {numbers[-1] if numbers else 'no number'}")
        found.append((path, int(numbers[-1])))
    return found


LABELLED: dict[str, Callable[[Path, int], Labelled]] = {
    "none": unlabelled,
    "folders": labelled_by_folder,
    "names": labelled_by_name,
}
"""Where labels are → how images are found with them."""


def table(results: Results) -> str:
    """Return the results as a table; top-1 is a column only where labels were given."""
    if "standin" in results:
        return standin_table(results)
    has_labels = "top_1" in results["rows"][0]
    head = ("method", "keys a query", "errors", f"G multiply-accumulates, {COUNTED_BATCH} images", "as exact")
    rows = []
    for row in results["rows"]:
        counts = (f"{count / 1e9:.2f}" for count in row["multiply_accumulates"])
        pairs = map(", ".join, (map(str, row["budgets"]), (f"{error:.4f}" for error in row["errors"]), counts))
        parts = ("agreement", "top_1") if has_labels else ("agreement",)
        rows.append((row["method"], *pairs, *(f"{row[part]:.2%}" for part in parts)))
    text = f"{results['images']} images; of the two token attentions keys, errors and operations\n"
    text += aligned((*head, *(("top-1",) if has_labels else ())), rows)
    if not has_labels:
        return f"{text}\nno top-1: it needs --labels"
    said = (f"{name} top-1 {top_1} %, {count:.2f} G in the first layer" for name, (top_1, count) in PUBLISHED.items())
    return f"{text}\npublished (ImageNet's 50,000 validation images): {'; '.join(said)}"
