"""A measure of attention inside a video diffusion transformer of diffusers, of Wan's shape with random weights."""

import importlib
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bench import vit
from bench.figures import Figure, Figures
from kdecore_adapters.torch_modules import Replacement, replace_attention

RTOL, SPEEDUP = 0.05, 4.0
HEADS, DIMENSION, LAYERS, CHANNELS, WORDS = 4, 64, 2, 16, 64
PIXELS, PAN = 8, 16
"""Pixels on a side of a place of the latents, as Wan's autoencoder has it, and how far the picture moves in a frame."""
ROUNDS = 3


class Looks(TorchFunctionMode):
    """Notes of each long attention in a block how many keys a query sees: 1/Σp², the median of 256 queries a head."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at a call of a function of PyTorch's."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and kwargs["key"].shape[-2] > WORDS:
            query, key = kwargs["query"], kwargs["key"]
            some = query[..., :: max(1, query.shape[-2] // 256), :]
            weights = (some @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
            self.keys.append(float((1 / weights.square().sum(-1)).median()))
        return func(*args, **kwargs)


def diffusion(side: int = 64, frames: int = 4) -> Figures:
    """Wan's transformer, 2 layers of 4 heads, d = 64, random weights, 16,384 tokens of a moving picture: `rtol` 0.05.

    The model's own norm gives queries and keys a mean square of one in each coordinate, so that logits differ by about one.
    Beside the picture, one with as much noise as a sampler sees half-way. Needs diffusers and scikit-image. ``side`` tokens
    on a side of each of ``frames``.
    """
    torch.manual_seed(0)
    model = transformer(side)
    clean = latents(side, frames)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    figures = {"tokens": Figure(side * side * frames, "")}
    for name, inputs, bar in (("image", clean, SPEEDUP), ("half noise", (clean + noise) / 2, None)):
        figures |= {f"{name}: {label}": figure for label, figure in speed_and_error(model, inputs, bar).items()}
    return figures


def transformer(side: int) -> Any:
    """Return the model, with random weights."""
    return (
        importlib.import_module("diffusers")
        .WanTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=DIMENSION,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=HEADS * DIMENSION,
            ffn_dim=4 * HEADS * DIMENSION,
            num_layers=LAYERS,
            rope_max_seq_len=max(1024, side),
        )
        .eval()
        .requires_grad_(False)
    )


def latents(side: int, frames: int) -> Tensor:
    """Return what stands for an autoencoder's latents: principal components of 8 × 8 pixels, of unit variance each.

    The picture is skimage.data's portrait of astronaut Eileen Collins (NASA, public domain), moving by 16 pixels a frame.

    Returns
    -------
    Tensor
        (1, 16, frames, 2 side, 2 side) float32; the model makes one token of 2 × 2 places.
    """
    pixels = 2 * side * PIXELS
    picture = vit.square(pixels + PAN * (frames - 1), "astronaut")
    crops = torch.cat([picture[..., PAN * i : PAN * i + pixels, PAN * i : PAN * i + pixels] for i in range(frames)])
    patches = functional.pixel_unshuffle(crops, PIXELS).permute(0, 2, 3, 1)
    patches = patches - patches.mean((0, 1, 2))
    _, _, directions = torch.linalg.svd(patches.flatten(0, 2), full_matrices=False)
    found = patches @ directions[:CHANNELS].T
    scaled: Tensor = found / found.std((0, 1, 2))
    return scaled.permute(3, 0, 1, 2)[None]


def speed_and_error(model: Any, inputs: Tensor, bar: float | None) -> Figures:
    """Return times of long attentions and of the whole model, its own and estimated, and how far its output is off."""
    words = torch.randn(1, WORDS, HEADS * DIMENSION, generator=torch.Generator().manual_seed(2))

    def forward() -> Tensor:
        out: Tensor = model(inputs, torch.tensor([500]), words, return_dict=False)[0]
        return out

    with Looks() as looks:
        forward()
    options: dict[str, dict[str, Any]] = {"own": {"min_keys": 2**31}, f"rtol {RTOL}": {"rtol": RTOL}}
    attention: dict[str, list[float]] = {name: [] for name in options}
    whole: dict[str, list[float]] = {name: [] for name in options}
    outs: dict[str, Tensor] = {}
    calls: dict[str, Replacement] = {}
    # The first round compiles kernels.
    for turn in range(ROUNDS + 1):
        for name, more in options.items():
            calls[name] = replace_attention(model, **more)
            started = time.perf_counter()
            outs[name] = forward()
            seconds = time.perf_counter() - started
            calls[name].restore()
            if turn:
                whole[name].append(seconds)
                attention[name].append(long_attention(calls[name]))
    own, estimated = options
    off = (outs[estimated] - outs[own]).norm() / outs[own].norm()
    certified = [tally.error for tally in calls[estimated].calls.tallies.values() if tally.error is not None]
    figures = {"keys that a query sees, 1/Σp²": Figure(median(looks.keys), "")}
    for label, seconds_of, least in (("attention", attention, bar), ("forward", whole, None)):
        took = {name: median(found) for name, found in seconds_of.items()}
        figures |= {f"{label}, {name}": Figure(1e3 * seconds, "ms") for name, seconds in took.items()}
        figures[f"{label}, speed-up"] = Figure(took[own] / took[estimated], "×", at_least=least)
    figures["output, relative error"] = Figure(float(off), "", at_most=RTOL)
    figures["attention, largest certified error"] = Figure(max(certified, default=0.0), "", at_most=RTOL)
    figures["keys per query, mean of layers"] = Figure(keys_per_query(calls[estimated]), "")
    return figures


def long_attention(replacement: Replacement) -> float:
    """Return what attention of the image to itself took, in seconds."""
    tallies = replacement.calls.tallies.items()
    return sum(tally.seconds or 0.0 for count, tally in tallies if count.layer.endswith("attn1"))


def keys_per_query(replacement: Replacement) -> float:
    """Return how many keys were evaluated, in the mean of the attentions of the image to itself."""
    found = [tally.keys for tally in replacement.calls.tallies.values() if tally.keys is not None]
    return sum(found) / max(1, len(found))
