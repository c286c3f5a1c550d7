"""A small transformer trained from scratch on Fashion-MNIST, one token a pixel, with exact attention and with kdecore's.

`python -m bench.train [--data FOLDER] [--out FOLDER] [--seeds 3] [--steps 1500] [--threads 2]`. The data are the files of
the Debian package dataset-fashion-mnist; nothing is downloaded. Both kinds of run have the same seeds, initial weights and
recipe, and see the same images in the same order. The recipe was chosen with exact attention on training images held out for
it; the test images were looked at afterwards only. Each exact-trained network is also tested with kdecore's attention, as it
is, and the other way round. A third kind of run, whose attention gives zero, shows what attention is worth here.

Half an hour to an hour on two cores. On a shared machine ``--threads 1`` may lose less: with two, a product waits for the
slower thread. Every run is written as it ends; started again, the command goes on after the runs that its recipe has.
"""

import argparse
import gzip
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.figures import Figure, Figures
from bench.run import verdict
from kdecore.compare.machine import this_machine
from kdecore_adapters import torch_adapter

SIDE, CLASSES = 28, 10
TOKENS = SIDE * SIDE
MEAN, DEVIATION = 0.286, 0.353
"""Of the training images' pixels, of 0 … 1."""
DATA = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package puts its files."""
KINDS = ("exact", "kdecore", "none")
POINTS = 1.0
"""Percentage points of accuracy that kdecore may cost, in training and at inference."""
CHUNK = 100
"""Images in a batch of a test."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer, q, k, v → out, the four tensors (batch, heads, 784, d); the scale is 1/√d."""


@dataclass(frozen=True)
class Recipe:
    """All that a run depends on but its seed and its kind.

    Attributes
    ----------
    layers, heads, width
        Of the transformer; its feed-forward layers are twice as wide.
    steps, batch
        Steps of training, and images in each; no image is shown twice.
    rate, warm_up, decay, clip
        AdamW's highest learning rate, reached after so many steps, its weight decay, and the gradient's largest norm.
    spread
        Standard deviation of the position embedding's initial values.
    method, budget
        kdecore's settings.
    test_images, curve_images, curve_steps
        Test images of the last accuracy, and of those on the way, so many steps apart.
    """

    layers: int = 2
    heads: int = 2
    width: int = 64
    steps: int = 1500
    batch: int = 8
    rate: float = 3e-3
    warm_up: int = 100
    decay: float = 0.05
    clip: float = 1.0
    spread: float = 0.5
    method: str = "treecode"
    budget: int = 128
    test_images: int = 5000
    curve_images: int = 500
    curve_steps: int = 250


@dataclass(frozen=True)
class Images:
    """Pixels (n, 784) float32, normalised, and labels (n,) int64."""

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, index: slice | Tensor) -> "Images":
        return Images(self.pixels[index], self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)


class Block(nn.Module):
    """Attention and two linear layers, each behind a norm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.joined = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, layer: int, attend: Attend) -> Tensor:
        """Return x, (batch, n, width), with both added."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.joined(attend(layer, q, k, v).transpose(1, 2).flatten(2))
        added: Tensor = self.mlp(self.norms[1](x))
        return x + added


class Transformer(nn.Module):
    """Each pixel a token: a linear map of its 3 × 3 neighbourhood plus a learned position. Their mean tells the class."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, recipe.width, 3, padding=1)
        self.positions = nn.Parameter(torch.randn(TOKENS, recipe.width) * recipe.spread)
        self.blocks = nn.ModuleList(Block(recipe.width, recipe.heads) for _ in range(recipe.layers))
        self.norm, self.head = nn.LayerNorm(recipe.width), nn.Linear(recipe.width, CLASSES)

    def forward(self, pixels: Tensor, attend: Attend) -> Tensor:
        """Return logits, (batch, 10), of pixels, (batch, 784)."""
        x = self.embed(pixels.view(-1, 1, SIDE, SIDE)).flatten(2).transpose(1, 2) + self.positions
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, attend)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def attention_of(kind: str, recipe: Recipe, step: int = 0) -> Attend:
    """Return a kind's attention: torch's exact one, kdecore's with its own seed in each step and layer, or zero."""

    def exact(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v)

    def estimated(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seed = step * recipe.layers + layer
        out: Tensor = torch_adapter.scaled_dot_product_attention(
            q, k, v, method=recipe.method, budget=recipe.budget, diagonal=0, seed=seed, threads=torch.get_num_threads()
        )
        return out

    def none(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.zeros_like(v)

    return {"exact": exact, "kdecore": estimated, "none": none}[kind]


def load(folder: Path) -> tuple[Images, Images]:
    """Return 60,000 images for training and 10,000 for the test.

    Raises
    ------
    FileNotFoundError
        A file is missing; the message says what to install.
    """
    train, test = (load_part(folder, part) for part in ("train", "t10k"))
    return train, test


def load_part(folder: Path, part: str) -> Images:
    """Return the images of one part, ``"train"`` or ``"t10k"``, in the files' order."""
    pixels = torch.from_numpy(read(folder, f"{part}-images-idx3-ubyte", 16)).view(-1, TOKENS)
    labels = torch.from_numpy(read(folder, f"{part}-labels-idx1-ubyte", 8))
    return Images((pixels / 255 - MEAN) / DEVIATION, labels.long())


def read(folder: Path, name: str, header: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the bytes of an idx file, compressed or not, after its header."""
    for path, opener in ((folder / f"{name}.gz", gzip.open), (folder / name, open)):
        if path.is_file():
            with opener(path, "rb") as file:
                return np.frombuffer(bytearray(file.read()), dtype=np.uint8, offset=header)
    raise FileNotFoundError(
        f"no {name}.gz in {folder}: install the Debian package dataset-fashion-mnist (apt-get install "
        f"dataset-fashion-mnist), or pass --data the folder that holds Fashion-MNIST's four idx files"
    )


def train(kind: str, seed: int, recipe: Recipe, images: Images, test: Images) -> dict[str, Any]:
    """Train once and test.

    Returns
    -------
    dict
        The loss of every step; the accuracies of the curve and, for each attention it is tested with, at the end; seconds;
        and, for a run that attends, each layer's figures from `probe`.
    """
    started = time.perf_counter()
    # Both draw from it: one seed gives all kinds the same weights and the same images.
    torch.manual_seed(seed)
    model, order = Transformer(recipe), torch.randperm(len(images))
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=recipe.decay, betas=(0.9, 0.98))
    losses, seconds, curve = [], [], []
    for step, chosen in enumerate(order[: recipe.steps * recipe.batch].view(recipe.steps, recipe.batch)):
        begun = time.perf_counter()
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate * schedule(step, recipe)
        batch = images[chosen]
        loss = functional.cross_entropy(model(batch.pixels, attention_of(kind, recipe, step)), batch.labels)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimiser.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begun)
        if (step + 1) % recipe.curve_steps == 0:
            curve.append(accuracy(model, test[: recipe.curve_images], attention_of(kind, recipe)))
            recent = statistics.fmean(losses[-recipe.curve_steps :])
            print(f"{kind}, seed {seed}, step {step + 1}: loss {recent:.3f}, accuracy {curve[-1]:.1%}", flush=True)
    tested = ("none",) if kind == "none" else ("exact", "kdecore")
    return {
        "kind": kind,
        "seed": seed,
        "accuracy": {name: accuracy(model, test, attention_of(name, recipe)) for name in tested},
        "layers": [] if kind == "none" else probe(model, test[:CHUNK].pixels, recipe),
        "seconds_a_step": statistics.median(seconds),
        "seconds": time.perf_counter() - started,
        "curve": curve,
        "loss": [round(value, 4) for value in losses],
    }


def schedule(step: int, recipe: Recipe) -> float:
    """Return the learning rate's part of its highest: a linear rise, then half a cosine down to zero."""
    if step < recipe.warm_up:
        return (step + 1) / recipe.warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - recipe.warm_up) / max(1, recipe.steps - recipe.warm_up))


@torch.no_grad()
def accuracy(model: Transformer, images: Images, attend: Attend) -> float:
    """Return the part of the images that the model classifies rightly."""
    chunks = (images[start : start + CHUNK] for start in range(0, len(images), CHUNK))
    return sum(int((model(one.pixels, attend).argmax(1) == one.labels).sum()) for one in chunks) / len(images)


@torch.no_grad()
def probe(model: Transformer, pixels: Tensor, recipe: Recipe) -> list[dict[str, float]]:
    """Return, for each layer of a trained network, what its attention is like and how far kdecore is from it.

    Returns
    -------
    list of dict
        ``"effective_keys"``, the exponential of a query's entropy over the keys, in the mean: 784 if all count alike; and
        ``"error"``, kdecore's relative Frobenius error on the same q, k and v.
    """
    exact, estimated = (attention_of(kind, recipe) for kind in ("exact", "kdecore"))
    found = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = exact(layer, q, k, v)
        error = torch.linalg.norm(estimated(layer, q, k, v) - out) / torch.linalg.norm(out)
        log_weights = (q @ k.mT / q.shape[-1] ** 0.5).log_softmax(-1)
        entropy = -(log_weights.exp() * log_weights).sum(-1)
        found.append({"effective_keys": float(entropy.exp().mean()), "error": float(error)})
        return out

    model(pixels[: CHUNK // 4], attend)
    return found


def figures_of(runs: list[dict[str, Any]]) -> Figures:
    """Return means over the seeds: accuracies, what kdecore costs of them with its bar, losses and times."""
    of = {kind: [run for run in runs if run["kind"] == kind] for kind in KINDS}

    def percent(trained: str, tested: str) -> float:
        return 100 * statistics.fmean(run["accuracy"][tested] for run in of[trained])

    figures = {}
    for kind, some in of.items():
        if some:
            figures[f"accuracy, trained and tested: {kind}"] = Figure(percent(kind, kind), "%")
            figures[f"training loss, last 100 steps: {kind}"] = Figure(statistics.fmean(map(last_loss, some)), "")
            took = statistics.fmean(run["seconds_a_step"] for run in some)
            figures[f"time of a step: {kind}"] = Figure(1e3 * took, "ms")
    if of["exact"]:
        figures["accuracy, trained exact, tested kdecore"] = Figure(percent("exact", "kdecore"), "%")
        lost = percent("exact", "exact") - percent("exact", "kdecore")
        figures["lost by testing with kdecore"] = Figure(lost, "pp", at_most=POINTS)
    if of["kdecore"]:
        figures["accuracy, trained kdecore, tested exact"] = Figure(percent("kdecore", "exact"), "%")
    if of["exact"] and of["kdecore"]:
        lost = percent("exact", "exact") - percent("kdecore", "kdecore")
        figures["lost by training and testing with kdecore"] = Figure(lost, "pp", at_most=POINTS)
        own = [{run["seed"]: 100 * run["accuracy"][kind] for run in of[kind]} for kind in ("exact", "kdecore")]
        worst = max(own[0][seed] - own[1][seed] for seed in own[0].keys() & own[1].keys())
        figures["… the same, most of any seed"] = Figure(worst, "pp")
    return figures


def last_loss(run: dict[str, Any]) -> float:
    """Return a run's training loss, the mean of its last 100 steps."""
    return statistics.fmean(run["loss"][-100:])


def table(runs: list[dict[str, Any]], figures: Figures) -> str:
    """Return a line for every run, then one for every figure."""
    heads = ("trained", "seed", *(f"tested {kind}" for kind in KINDS), "last loss", "ms a step")
    lines = ["".join(f"{head:>16}" for head in heads) + "   effective keys (error) by layer"]
    for run in sorted(runs, key=lambda run: (KINDS.index(run["kind"]), run["seed"])):
        tested = (f"{100 * run['accuracy'][kind]:.2f} %" if kind in run["accuracy"] else "" for kind in KINDS)
        cells = (run["kind"], run["seed"], *tested, f"{last_loss(run):.3f}", f"{1e3 * run['seconds_a_step']:.0f}")
        layers = ", ".join(f"{one['effective_keys']:.0f} ({one['error']:.3f})" for one in run["layers"])
        lines.append("".join(f"{cell:>16}" for cell in cells) + f"   {layers}")
    lines += [f"  {label:<52} {found.value:>10.4g} {found.unit:<4} {verdict(found)}" for label, found in figures.items()]
    return "\n".join(lines)


def plot(recipe: Recipe, runs: list[dict[str, Any]], path: Path) -> None:
    """Draw training loss and test accuracy against steps, a line for every run."""
    figure = matplotlib.figure.Figure(figsize=(11, 4.8), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    looks = {"exact": ("#222222", "-", "o"), "kdecore": ("#0072B2", "--", "s"), "none": ("#D55E00", ":", "^")}
    labels = {
        "exact": "exact attention",
        "kdecore": f"kdecore, {recipe.method}, {recipe.budget} of {TOKENS} keys",
        "none": "no attention",
    }
    window = min(50, recipe.steps)
    for kind, (colour, dash, marker) in looks.items():
        some = [run for run in runs if run["kind"] == kind]
        for run in some:
            line: dict[str, Any] = {"color": colour, "linestyle": dash, "lw": 1.3, "alpha": 0.8}
            smooth = np.convolve(run["loss"], np.ones(window) / window, "valid")
            left.plot(np.arange(window, len(run["loss"]) + 1), smooth, **line)
            steps = recipe.curve_steps * np.arange(1, len(run["curve"]) + 1)
            label = labels[kind] if run is some[0] else None
            right.plot(steps, [100 * value for value in run["curve"]], marker=marker, ms=4, label=label, **line)
    left.set_ylabel(f"training loss, mean of {window} steps")
    right.set_ylabel(f"test accuracy, {recipe.curve_images:,} images, %")
    right.legend(frameon=False, title=f"{len({run['seed'] for run in runs})} seeds each", loc="lower right")
    for axes in (left, right):
        axes.set_xlabel(f"step of {recipe.batch} images")
        axes.grid(color="#dddddd", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Fashion-MNIST, {TOKENS} tokens, from scratch: {recipe.layers} layers of width {recipe.width}")
    figure.savefig(path)


def known_runs(path: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the runs that a file holds, none where there is no file.

    Raises
    ------
    FileExistsError
        They are of another recipe, and would be lost.
    """
    if not path.is_file():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["recipe"] != asdict(recipe):
        raise FileExistsError(f"{path} holds runs of another recipe: pass another folder as --out, or move it away")
    runs: list[dict[str, Any]] = record["runs"]
    return runs


def readable(record: dict[str, Any]) -> str:
    """Return JSON with lists of numbers on one line each."""
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    return re.sub(r"\[[-\d.,e\s]+\]", lambda found: " ".join(found.group().split()), text)


def main() -> int:
    """Run the command line; return 1 where a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of Fashion-MNIST's four idx files")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the JSON and the picture")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="steps of a run")
    parser.add_argument("--method", default=Recipe.method, help="kdecore's method")
    parser.add_argument("--budget", type=int, default=Recipe.budget, help="kdecore's keys per query")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and of kdecore")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(steps=arguments.steps, method=arguments.method, budget=arguments.budget)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "training.json"
    try:
        images, test = load(arguments.data)
        runs = known_runs(path, recipe)
    except (FileNotFoundError, FileExistsError) as error:
        parser.error(str(error))
    if recipe.steps * recipe.batch > len(images):
        parser.error(f"--steps may be {len(images) // recipe.batch} at most: no image is shown twice")
    figures = figures_of(runs)
    # Without attention last: it is what the comparison can spare.
    for kinds in (KINDS[:2], KINDS[2:]):
        for seed, kind in product(range(arguments.seeds), kinds):
            if any((run["seed"], run["kind"]) == (seed, kind) for run in runs):
                continue
            runs.append(train(kind, seed, recipe, images, test[: recipe.test_images]))
            figures = figures_of(runs)
            record = {
                "text": __doc__,
                "machine": asdict(this_machine()),
                "recipe": asdict(recipe),
                "figures": {label: asdict(figure) for label, figure in figures.items()},
                "runs": runs,
            }
            path.write_text(readable(record), encoding="utf-8")
    plot(recipe, runs, path.with_suffix(".png"))
    print(table(runs, figures))
    return 1 if any(figure.met is False for figure in figures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
