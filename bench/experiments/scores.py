"""Scores of generated images: Fréchet distance (Heusel et al., 2017) and Inception score (Salimans et al., 2016)."""

import warnings
from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

Inception = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images (batch, 3, height, width) uint8 → features (batch, F) and logits (batch, classes)."""
Moments = tuple[Tensor, Tensor]
"""Mean (F,) and covariance (F, F), float64."""

SPLITS = 10
"""Parts that the Inception score is averaged over, as is usual."""


def load_inception(path: Path, device: str = "cpu") -> Inception:
    """Read an Inception network from a TorchScript file.

    Parameters
    ----------
    path
        What `torch.jit.save` wrote of a module that takes images (batch, 3, height, width) uint8, resizes and normalises
        them itself, and returns features (batch, F) and logits (batch, classes).
    device
        Where it runs.

    Raises
    ------
    ValueError
        The file cannot be read as such. What the module returns is checked in every call.
    """
    try:
        with warnings.catch_warnings():
            # PyTorch advises another format, in which such networks aren't to be had.
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} must be a TorchScript file; got: {str(error).partition(chr(10))[0]}") from None

    def inception(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            found = module(images.to(device))
        if not (
            isinstance(found, tuple | list)
            and len(found) == 2
            and all(isinstance(x, Tensor) and x.ndim == 2 and len(x) == len(images) for x in found)
        ):
            raise ValueError(f"{path} must return features (batch, F) and logits (batch, classes), got {described(found)}")
        features, logits = (x.double().cpu() for x in found)
        return features, logits

    return inception


def load_scores(inception: Path, moments: Path, side: int, device: str = "cpu") -> tuple[Inception, Moments]:
    """Read a network and moments of its features, and try both on black images of that side.

    Raises
    ------
    OSError, ValueError
        What `load_inception` and `read_moments` raise; or the features are not as many as the moments'.
    """
    network, real = load_inception(inception, device), read_moments(moments)
    features, _ = network(torch.zeros((2, 3, side, side), dtype=torch.uint8))
    if features.shape[1] != len(real[0]):
        raise ValueError(f"{moments} must be of {features.shape[1]} features, as {inception} makes; got {len(real[0])}")
    return network, real


def described(found: object) -> str:
    """Say what a network returned."""
    if isinstance(found, tuple | list):
        return f"{type(found).__name__} of {', '.join(map(described, found))}"
    return f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__


def read_moments(path: Path) -> Moments:
    """Read moments of real images' features from a .npz file with arrays mu (F,) and sigma (F, F).

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        It has no such arrays.
    """
    try:
        # NumPy leaves a file open that it cannot read.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files if name in ("mu", "sigma")}
    except (ValueError, EOFError, AttributeError, BadZipFile) as error:
        raise ValueError(f"{path} must be a .npz file of arrays; got: {error}") from None
    sizes = {name: array.shape for name, array in held.items()}
    if len(held) < 2 or held["mu"].ndim != 1 or held["sigma"].shape != 2 * held["mu"].shape:
        raise ValueError(f"{path} must hold mu (F,) and sigma (F, F), got {sizes or 'neither'}")
    return torch.tensor(held["mu"], dtype=torch.float64), torch.tensor(held["sigma"], dtype=torch.float64)


def moments_of(features: Tensor) -> Moments:
    """Return mean and covariance of features (n, F), n ≥ 2; O(n F²)."""
    if len(features) < 2:
        raise ValueError(f"features must be of at least 2 images, got {len(features)}")
    features = features.double()
    return features.mean(0), torch.cov(features.T).reshape(2 * features.shape[1:])


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a^½ Σ_b Σ_a^½)^½), the FID where features are Inception's; O(F³).

    The last root's trace is the sum of Σ_a^½ Σ_b^½'s singular values, which loses no digits where covariances are singular.
    """
    (mean_a, covariance_a), (mean_b, covariance_b) = a, b
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"moments must be of as many features, got {len(mean_a)} and {len(mean_b)}")
    joint = torch.linalg.matrix_norm(root(covariance_a) @ root(covariance_b), ord="nuc")
    traces = torch.trace(covariance_a) + torch.trace(covariance_b)
    return float((mean_a - mean_b).square().sum() + traces - 2 * joint)


def root(covariance: Tensor) -> Tensor:
    """Return the root of a positive semidefinite matrix; eigenvalues below 0 are rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    found: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    return found


def inception_score(logits: Tensor, splits: int = SPLITS) -> float:
    """Return exp(mean KL(p(y | x) ‖ p(y))), the mean over parts of the images in their order.

    Parameters
    ----------
    logits
        (n, classes), n ≥ 1.
    splits
        Parts, at most n of them.

    Returns
    -------
    float
        From 1, all images alike, to the number of classes, or of images in a part where that is less.
    """
    scores = []
    for part in logits.double().tensor_split(min(splits, len(logits))):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - np.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())
