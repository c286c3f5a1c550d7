"""T2T-ViT-t (Yuan et al., ICCV 2021) in PyTorch: its two attentions over tokens of the image can be replaced.

Weights are the authors' checkpoints. Their code is neither imported nor needed, and nothing is downloaded. Written from the
architecture and the names of its weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.checkpoints import Shapes, Weights, checked, read
from bench.model_methods import Attend, exact_attention

SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
"""Side, stride and padding of the windows that become tokens: before each of the two attentions, and after them."""
WRAPPERS = ("state_dict_ema", "state_dict")
"""Where a training checkpoint keeps weights; averaged ones come first."""
COLOURS = 3


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults are those of T2T-ViT-t-24.

    Attributes
    ----------
    image
        Pixels on a side, divisible by 16.
    token
        Width of the two token attentions, which have one head.
    width, depth, heads, hidden
        Of the transformer behind them; hidden of its two linear layers.
    classes
        Classes.
    """

    image: int = 224
    token: int = 64
    width: int = 512
    depth: int = 24
    heads: int = 8
    hidden: int = 1536
    classes: int = 1000

    @property
    def inputs(self) -> tuple[int, int]:
        """Widths of what the two token attentions read: 147 and 576."""
        return COLOURS * SPLITS[0][0] ** 2, self.token * SPLITS[1][0] ** 2

    @property
    def scales(self) -> tuple[float, float]:
        """Scales of the two token attentions: by the width of their inputs, not of their heads."""
        first, second = (width**-0.5 for width in self.inputs)
        return first, second

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens of the two token attentions: 3136 and 784."""
        return (self.image // 4) ** 2, (self.image // 8) ** 2


def shapes(config: Config) -> Shapes:
    """Return key → shape of all weights: 294 keys for T2T-ViT-t-24."""
    width, token = config.width, config.token
    found: Shapes = {"cls_token": (1, 1, width), "pos_embed": (1, (config.image // 16) ** 2 + 1, width)}
    for number, inside in enumerate(config.inputs, start=1):
        found |= block_shapes(f"tokens_to_token.attention{number}", inside, token, token)
    found |= linear_shapes("tokens_to_token.project", (width, token * SPLITS[2][0] ** 2))
    for number in range(config.depth):
        found |= block_shapes(f"blocks.{number}", width, width, config.hidden)
    return found | norm_shapes("norm", width) | linear_shapes("head", (config.classes, width))


def block_shapes(name: str, inside: int, width: int, hidden: int) -> Shapes:
    """Return the shapes of attention and two linear layers, each behind a norm."""
    found = norm_shapes(f"{name}.norm1", inside) | {f"{name}.attn.qkv.weight": (3 * width, inside)}
    found |= linear_shapes(f"{name}.attn.proj", (width, width)) | norm_shapes(f"{name}.norm2", width)
    return found | linear_shapes(f"{name}.mlp.fc1", (hidden, width)) | linear_shapes(f"{name}.mlp.fc2", (width, hidden))


def linear_shapes(name: str, shape: tuple[int, int]) -> Shapes:
    """Return the shapes of a linear layer."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def norm_shapes(name: str, width: int) -> Shapes:
    """Return the shapes of a norm."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def parameters(config: Config) -> int:
    """Return how many numbers the weights are: 64.10 million for T2T-ViT-t-24, fixed position embedding and all."""
    return sum(map(math.prod, shapes(config).values()))


def random_weights(config: Config, seed: int = 0) -> Weights:
    """Return normal weights that keep activations' size, in place of trained ones; norms are 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    found: Weights = {}
    for key, shape in shapes(config).items():
        if "norm" in key:
            found[key] = torch.full(shape, float(key.endswith("weight")))
        else:
            found[key] = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    return found


@dataclass(frozen=True)
class TokensToToken:
    """The classifier.

    Attributes
    ----------
    config
        Its sizes.
    weights
        Key → tensor, float32.
    """

    config: Config
    weights: Weights

    def __call__(self, pixels: Tensor, attend: Attend = exact_attention) -> Tensor:
        """Classify images.

        Parameters
        ----------
        pixels
            (batch, 3, side, side) float32, normalised.
        attend
            The two token attentions: called in order with layer 0 and 1, q, k and v, each (batch, n, 64), and the scale;
            n is 3136 and 784 for 224 pixels.

        Returns
        -------
        Tensor
            Logits (batch, classes).
        """
        w = self.weights
        with torch.inference_mode():
            x = pixels
            for layer, split in enumerate(SPLITS[:2]):
                y = self._tokens(tokens_of(x, split), layer, attend)
                side = math.isqrt(y.shape[1])
                x = y.mT.reshape(len(y), -1, side, side)
            x = self._linear(tokens_of(x, SPLITS[2]), "tokens_to_token.project")
            x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1) + w["pos_embed"]
            for number in range(self.config.depth):
                name = f"blocks.{number}"
                x = x + self._attention(self._norm(x, f"{name}.norm1"), f"{name}.attn")
                x = x + self._mlp(x, name)
            return self._linear(self._norm(x, "norm")[:, 0], "head")

    def _tokens(self, x: Tensor, layer: int, attend: Attend) -> Tensor:
        name = f"tokens_to_token.attention{layer + 1}"
        q, k, v = self._linear(self._norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, dim=-1)
        q, k, v = (part.contiguous() for part in (q, k, v))
        # What is read has another width than what is made: values, not inputs, stand beside attention.
        y = v + self._linear(attend(layer, q, k, v, self.config.scales[layer]), f"{name}.attn.proj")
        return y + self._mlp(y, name)

    def _attention(self, x: Tensor, name: str) -> Tensor:
        q, k, v = self._linear(x, f"{name}.qkv").reshape(*x.shape[:2], 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(q, k, v)
        return self._linear(out.transpose(1, 2).flatten(2), f"{name}.proj")

    def _mlp(self, x: Tensor, name: str) -> Tensor:
        y = functional.gelu(self._linear(self._norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        return self._linear(y, f"{name}.mlp.fc2")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))


def tokens_of(x: Tensor, split: tuple[int, int, int]) -> Tensor:
    """Return the overlapping windows of maps (batch, channels, side, side) as tokens (batch, n, channels · window²)."""
    side, stride, padding = split
    return functional.unfold(x, side, stride=stride, padding=padding).mT


def unwrapped(held: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a checkpoint's weights: themselves, or under one of `WRAPPERS`; without the prefix of a parallel module."""
    inside = next((held[name] for name in WRAPPERS if isinstance(held.get(name), Mapping)), held)
    return {key.removeprefix("module."): value for key, value in inside.items()}


def load(path: Path, config: Config, device: str = "cpu") -> TokensToToken:
    """Read a checkpoint of the authors'.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        It is of another kind; keys are missing, unknown or of another shape.
    """
    weights = checked(unwrapped(read(path)), shapes(config), str(path))
    return TokensToToken(config, {key: x.to(device) for key, x in weights.items()})
