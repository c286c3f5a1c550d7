"""Independent float64 NumPy definitions for `kdecore.kde`; imports nothing of kdecore."""

import numpy as np


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """Return log Σ exp over the last axis; −∞ where it is empty or all −∞."""
    if logits.shape[-1] == 0:
        return np.full(logits.shape[:-1], -np.inf)
    top = logits.max(axis=-1)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return safe + np.log(np.exp(logits - safe[..., None]).sum(axis=-1))


def log_weighted_exponential(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return log Σᵢ wᵢ exp⟨xᵢ, yⱼ⟩."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    with np.errstate(divide="ignore"):
        logs = np.zeros(x.shape[:-1]) if weights is None else np.log(weights.astype(np.float64))
    return log_sum_exp(np.einsum("...id,...jd->...ji", x, y) + logs[..., None, :])


def log_gaussian(x: np.ndarray, y: np.ndarray, bandwidth: float = 1.0) -> np.ndarray:
    """Return log (1/n) Σᵢ exp(−‖xᵢ − yⱼ‖²/(2 bandwidth²))."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    square = ((x[..., None, :, :] - y[..., :, None, :]) ** 2).sum(axis=-1)
    return log_sum_exp(-square / (2.0 * bandwidth**2)) - np.log(x.shape[-2])


def collisions(generator: np.random.Generator, ratio: float, projections: int, trials: int) -> float:
    """Return the share of trials in which two points at distance ratio · w share all cells, by simulation."""
    first = generator.uniform(size=(trials, projections))
    step = ratio * generator.standard_normal((trials, projections))
    return float(np.mean(np.all(np.floor(first + step) == 0, axis=1)))
