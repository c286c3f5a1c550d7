"""BigGAN-deep's generator (Brock, Donahue, Simonyan, ICLR 2019) in PyTorch, its one attention replaceable.

Weights are those of the package pytorch-pretrained-biggan: a folder with config.json and pytorch_model.bin. That package is
neither imported nor needed, and nothing is downloaded. Written from the architecture and the names of its weights.
"""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from bench.checkpoints import Shapes, Weights, checked, read
from bench.model_methods import Attend, exact_attention

Block = tuple[bool, int, int]
"""Whether the resolution is doubled; channels in and out, in units of the width."""

FIRST_SIDE, FIRST_CHANNELS = 4, 16
"""Of what the linear layer makes: pixels on a side, and channels in units of the width."""
COLOURS = 3
REDUCTION = 4
"""A block's inner channels are so many times fewer."""
ITERATIONS = 20
"""Power iterations that random weights need: with fewer, spectral norms are too small, and activations overflow."""
BUFFERS = ("weight_u", "weight_v", "running_means", "running_vars")
"""Ends of the names of tensors that are no parameters."""
DEEP_512: tuple[Block, ...] = (
    (False, 16, 16),
    (True, 16, 16),
    (False, 16, 16),
    (True, 16, 8),
    (False, 8, 8),
    (True, 8, 8),
    (False, 8, 8),
    (True, 8, 4),
    (False, 4, 4),
    (True, 4, 2),
    (False, 2, 2),
    (True, 2, 1),
    (False, 1, 1),
    (True, 1, 1),
)


@dataclass(frozen=True)
class Config:
    """What config.json says; the defaults are those of BigGAN-deep-512.

    Attributes
    ----------
    output_dim
        Pixels on a side.
    z_dim, class_embed_dim
        Of the noise, and of a class's embedding behind it.
    channel_width
        Channels of the last block.
    num_classes
        Classes.
    layers
        Blocks, in order.
    attention_layer_position
        Attention stands before the block of this number, and has its number as a layer.
    eps
        Added to variances.
    n_stats
        Truncations, evenly from 0 to 1, that batch norms have statistics of.
    """

    output_dim: int = 512
    z_dim: int = 128
    class_embed_dim: int = 128
    channel_width: int = 128
    num_classes: int = 1000
    layers: tuple[Block, ...] = DEEP_512
    attention_layer_position: int = 8
    eps: float = 1e-4
    n_stats: int = 51

    @property
    def condition(self) -> int:
        """Length of noise and embedding together."""
        return self.z_dim + self.class_embed_dim

    @property
    def parts(self) -> list[Block | None]:
        """The generator's layers: blocks, and None for attention."""
        place = self.attention_layer_position
        return [*self.layers[:place], None, *self.layers[place:]]

    @property
    def attention_channels(self) -> int:
        """Channels of what attends."""
        return self.channel_width * self.layers[self.attention_layer_position][1]

    @property
    def attention_shape(self) -> tuple[int, int, int, int]:
        """n_q, n_k, d and d_v of attention: 4096, 1024, 64 and 256."""
        side = FIRST_SIDE * 2 ** sum(doubled for doubled, _, _ in self.layers[: self.attention_layer_position])
        return side**2, (side // 2) ** 2, self.attention_channels // 8, self.attention_channels // 2


def read_config(path: Path) -> Config:
    """Read a config.json.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        It is no JSON object with exactly the fields of `Config`.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON; got: {error}") from None
    known = {field.name for field in fields(Config)}
    if not isinstance(held, dict) or set(held) != known:
        got = ", ".join(sorted(held)) if isinstance(held, dict) else type(held).__name__
        raise ValueError(f"{path} must hold {', '.join(sorted(known))}; got {got}")
    blocks = tuple((bool(doubled), int(inside), int(outside)) for doubled, inside, outside in held["layers"])
    return Config(**(held | {"layers": blocks}))


def shapes(config: Config) -> Shapes:
    """Return key → shape of all weights: 698 keys for BigGAN-deep-512."""
    width, condition = config.channel_width, config.condition
    first = FIRST_SIDE**2 * FIRST_CHANNELS * width
    found: Shapes = {"embeddings.weight": (config.class_embed_dim, config.num_classes)}
    found |= normed_shapes("generator.gen_z", (first, condition), bias=True)
    for number, part in enumerate(config.parts):
        layer = f"generator.layers.{number}"
        if part is None:
            found |= attention_shapes(layer, config.attention_channels)
            continue
        inside, outside = part[1] * width, part[2] * width
        middle = inside // REDUCTION
        kernels = (
            (middle, inside, 1, 1),
            (middle, middle, 3, 3),
            (middle, middle, 3, 3),
            (outside, middle, 1, 1),
        )
        for step, kernel in enumerate(kernels):
            norm, channels = f"{layer}.bn_{step}", kernel[1]
            found |= statistics_shapes(norm, config.n_stats, channels)
            found |= normed_shapes(f"{norm}.scale", (channels, condition))
            found |= normed_shapes(f"{norm}.offset", (channels, condition))
            found |= normed_shapes(f"{layer}.conv_{step}", kernel, bias=True)
    found |= statistics_shapes("generator.bn", config.n_stats, width)
    found |= {"generator.bn.weight": (width,), "generator.bn.bias": (width,)}
    return found | normed_shapes("generator.conv_to_rgb", (width, width, 3, 3), bias=True)


def normed_shapes(name: str, shape: tuple[int, ...], *, bias: bool = False) -> Shapes:
    """Return the shapes of a weight with its spectral norm's vectors, and of its bias."""
    ends = {"weight_orig": shape, "weight_u": shape[:1], "weight_v": (math.prod(shape[1:]),)}
    return {f"{name}.{end}": size for end, size in (ends | ({"bias": shape[:1]} if bias else {})).items()}


def statistics_shapes(name: str, n_stats: int, channels: int) -> Shapes:
    """Return the shapes of a batch norm's statistics."""
    return {f"{name}.running_means": (n_stats, channels), f"{name}.running_vars": (n_stats, channels)}


def attention_shapes(layer: str, channels: int) -> Shapes:
    """Return the shapes of attention's weights."""
    found: Shapes = {f"{layer}.gamma": (1,)}
    sizes = {"theta": (channels // 8, channels), "phi": (channels // 8, channels), "g": (channels // 2, channels)}
    for name, size in (sizes | {"o_conv": (channels, channels // 2)}).items():
        found |= normed_shapes(f"{layer}.snconv1x1_{name}", (*size, 1, 1))
    return found


def parameters(config: Config) -> int:
    """Return how many numbers are parameters: 56.2 million for BigGAN-deep-512."""
    return sum(math.prod(shape) for key, shape in shapes(config).items() if not key.endswith(BUFFERS))


def random_weights(config: Config, seed: int = 0, iterations: int = ITERATIONS) -> Weights:
    """Return standard normal weights of the right shapes, in place of trained ones: variances 1, γ = 1.

    Parameters
    ----------
    config
        The model's.
    seed
        Of the numbers.
    iterations
        Power iterations from random vectors to those of the spectral norms.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {key: torch.randn(shape, generator=generator) for key, shape in shapes(config).items()}
    weights |= {key: torch.ones_like(x) for key, x in weights.items() if key.endswith(("running_vars", "gamma"))}
    for key in [key for key in weights if key.endswith(".weight_orig")]:
        name, matrix = key.removesuffix("orig"), weights[key].flatten(1)
        left, right = (functional.normalize(weights[name + end], dim=0) for end in "uv")
        for _ in range(iterations):
            right = functional.normalize(matrix.mT @ left, dim=0)
            left = functional.normalize(matrix @ right, dim=0)
        weights |= {name + "u": left, name + "v": right}
    return weights


def normalised(weights: Weights) -> Weights:
    """Return weights divided by their spectral norms, as uᵀWv has them, and the others as they are.

    Raises
    ------
    ValueError
        A norm isn't positive: its vectors were not found by power iterations.
    """
    found: Weights = {}
    for key, x in weights.items():
        if key.endswith(("weight_u", "weight_v")):
            continue
        if not key.endswith(".weight_orig"):
            found[key] = x
            continue
        name = key.removesuffix("_orig")
        norm = weights[name + "_u"] @ x.flatten(1) @ weights[name + "_v"]
        # Tensors without numbers show shapes.
        if not norm.is_meta and not 0 < float(norm) < math.inf:
            raise ValueError(f"the spectral norm uᵀWv of {key} must be positive and finite, got {float(norm)}")
        found[name] = x / norm
    return found


@dataclass(frozen=True)
class BigGAN:
    """The generator.

    Attributes
    ----------
    config
        Its sizes.
    weights
        Key → tensor, float32, from `normalised`.
    """

    config: Config
    weights: Weights

    def __call__(self, noise: Tensor, labels: Tensor, truncation: float, attend: Attend = exact_attention) -> Tensor:
        """Generate images.

        Parameters
        ----------
        noise
            (batch, z_dim) float32, from `truncated_noise`.
        labels
            (batch,) int64.
        truncation
            In (0, 1]: which statistics batch norms take.
        attend
            Called once, with layer 0, q, k and v of `Config.attention_shape`, an image a group, and scale 1.

        Returns
        -------
        Tensor
            (batch, 3, side, side) in −1 … 1.
        """
        if not 0 < truncation <= 1:
            raise ValueError(f"truncation must lie in (0, 1], got {truncation}")
        w = self.weights
        with torch.inference_mode():
            condition = torch.cat([noise, w["embeddings.weight"].T[labels]], dim=1)
            x = self._linear(condition, "generator.gen_z")
            x = x.reshape(len(x), FIRST_SIDE, FIRST_SIDE, -1).permute(0, 3, 1, 2)
            for number, part in enumerate(self.config.parts):
                layer = f"generator.layers.{number}"
                x = self._attention(x, layer, attend) if part is None else self._block(x, layer, part, condition, truncation)
            mean, variance = self._statistics("generator.bn", truncation)
            gain, bias = w["generator.bn.weight"], w["generator.bn.bias"]
            x = functional.relu(functional.batch_norm(x, mean, variance, gain, bias, eps=self.config.eps))
            # The weights have as many channels as come in, of which the first three are colours.
            return self._convolution(x, "generator.conv_to_rgb")[:, :COLOURS].tanh()

    def _attention(self, x: Tensor, layer: str, attend: Attend) -> Tensor:
        q, k, v = (self._convolution(x, f"{layer}.snconv1x1_{name}") for name in ("theta", "phi", "g"))
        k, v = (functional.max_pool2d(part, 2) for part in (k, v))
        q, k, v = (part.flatten(2).mT.contiguous() for part in (q, k, v))
        out = attend(0, q, k, v, 1.0).mT.reshape(len(x), -1, *x.shape[2:])
        return x + self.weights[f"{layer}.gamma"] * self._convolution(out, f"{layer}.snconv1x1_o_conv")

    def _block(self, x: Tensor, layer: str, block: Block, condition: Tensor, truncation: float) -> Tensor:
        doubled, _, outside = block
        beside = x[:, : outside * self.config.channel_width]
        for step in range(4):
            x = functional.relu(self._norm(x, f"{layer}.bn_{step}", condition, truncation))
            if doubled and step == 1:
                x = functional.interpolate(x, scale_factor=2.0)
            x = self._convolution(x, f"{layer}.conv_{step}")
        return x + (functional.interpolate(beside, scale_factor=2.0) if doubled else beside)

    def _norm(self, x: Tensor, name: str, condition: Tensor, truncation: float) -> Tensor:
        mean, variance = self._statistics(name, truncation)
        gain, offset = (self._linear(condition, f"{name}.{part}")[:, :, None, None] for part in ("scale", "offset"))
        return functional.batch_norm(x, mean, variance, eps=self.config.eps) * (1 + gain) + offset

    def _statistics(self, name: str, truncation: float) -> tuple[Tensor, Tensor]:
        """Mean and variance (channels,) at a truncation, linear between those that are stored."""
        last = self.config.n_stats - 1
        place = truncation * last
        below = min(int(place), last)
        above, part = min(below + 1, last), place - below
        tables = (self.weights[f"{name}.running_{kind}"] for kind in ("means", "vars"))
        mean, variance = (torch.lerp(table[below], table[above], part) for table in tables)
        return mean, variance

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _convolution(self, x: Tensor, name: str) -> Tensor:
        kernel = self.weights[f"{name}.weight"]
        return functional.conv2d(x, kernel, self.weights.get(f"{name}.bias"), padding=kernel.shape[-1] // 2)


def load(folder: Path, device: str = "cpu") -> BigGAN:
    """Read a generator's folder, with config.json and pytorch_model.bin.

    Raises
    ------
    OSError
        A file is missing or cannot be read.
    ValueError
        A file is of another kind; keys are missing, unknown or of another shape; a spectral norm isn't positive.
    """
    config, path = read_config(folder / "config.json"), folder / "pytorch_model.bin"
    weights = normalised(checked(read(path), shapes(config), str(path)))
    return BigGAN(config, {key: x.to(device) for key, x in weights.items()})


def truncated_noise(count: int, z_dim: int, truncation: float, seed: int) -> Tensor:
    """Return (count, z_dim) float32: normal numbers that lie in −2 … 2, times the truncation."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.special.ndtr(torch.tensor([-2.0, 2.0], dtype=torch.float64))
    uniform = torch.rand(count, z_dim, dtype=torch.float64, generator=generator)
    normal: Tensor = torch.special.ndtri(torch.lerp(limits[0], limits[1], uniform))
    return (truncation * normal).float()


def to_bytes(images: Tensor) -> Tensor:
    """Return images in −1 … 1 as uint8 of the same shape."""
    return ((images + 1) / 2 * 256).clamp(0, 255).to(torch.uint8)
