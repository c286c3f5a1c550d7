"""The map from a weighted exponential kernel sum to a plain Gaussian one (KDEformer, Algorithm 2, step 1; derived)."""

import math

from kdecore.arrays.namespace import Array, Namespace, namespace_of
from kdecore.kde.problem import GaussianForm


def to_gaussian(xp: Namespace, x: Array, log_weights: Array) -> tuple[Array, Array]:
    """Append the coordinate that turns weights into distances.

    With Lᵢ = log wᵢ + ‖xᵢ‖²/2, N = max L and x'ᵢ = [xᵢ, √(2(N − Lᵢ))], y' = [y, 0]:
    wᵢ exp⟨xᵢ, y⟩ = exp(N + ‖y‖²/2) · exp(−‖x'ᵢ − y'‖²/2). Exact but for rounding. O(n d).

    Parameters
    ----------
    xp
        Array namespace.
    x
        (n, d) points.
    log_weights
        (n,) natural logs of the weights, finite.

    Returns
    -------
    lifted
        (n, d + 1).
    log_top
        0-d, N.
    """
    level = log_weights + 0.5 * xp.sum(x * x, axis=-1)
    log_top = xp.max(level)
    extra = xp.sqrt(2.0 * (log_top - level))
    return xp.concat([x, extra[:, None]], axis=1), log_top


def exponential_form(x: Array, y: Array, log_weights: Array | None) -> GaussianForm:
    """Return log Σᵢ wᵢ exp⟨xᵢ, yⱼ⟩ in Gaussian form, moved to where distances are short.

    ⟨x, y⟩ = ⟨(x − c)/a, a(y − s)⟩ + ⟨x − c, s⟩ + ⟨c, y⟩ for any vectors c, s and number a > 0: the second term joins the
    log-weights and the third the result, so c = mean x, s = mean y and a = √(rms x / rms y) cost nothing and raise
    the density (derived; the paper maps x and y as they come). O((n + m) d).

    Parameters
    ----------
    x, y
        (n, d) with n ≥ 1, (m, d).
    log_weights
        (n,), finite, or None for 0.
    """
    xp = namespace_of(x)
    centre = xp.mean(x, axis=0)
    shift = xp.mean(y, axis=0) if y.shape[0] else xp.zeros_like(centre)
    moved_x, moved_y = x - centre, y - shift
    spread_x, spread_y = (float(xp.sqrt(xp.mean(r * r))) if r.shape[0] else 0.0 for r in (moved_x, moved_y))
    ratio = math.sqrt(spread_x / spread_y) if spread_x > 0 and spread_y > 0 else 1.0
    # A power of two, so that the scaling itself rounds nothing.
    ratio = 2.0 ** round(math.log2(ratio)) if math.isfinite(ratio) and ratio > 0 else 1.0
    bias = moved_x @ shift
    if log_weights is not None:
        bias = bias + log_weights
    moved_x, moved_y = moved_x / ratio, moved_y * ratio
    level = bias + 0.5 * xp.sum(moved_x * moved_x, axis=-1)
    log_top = xp.max(level)
    offset = y @ centre + log_top + 0.5 * xp.sum(moved_y * moved_y, axis=-1)
    return GaussianForm(moved_x, level - log_top, moved_y, offset, log_weights, xp, x.device)


def gaussian_form(x: Array, y: Array, bandwidth: float) -> GaussianForm:
    """Return log (1/n) Σᵢ exp(−‖xᵢ − yⱼ‖²/(2 bandwidth²)), both moved by mean x to lose few digits. O((n + m) d)."""
    xp = namespace_of(x)
    centre = xp.mean(x, axis=0)
    offset = xp.full((y.shape[0],), -math.log(x.shape[0]), dtype=x.dtype, device=x.device)
    height = xp.zeros((x.shape[0],), dtype=x.dtype, device=x.device)
    return GaussianForm((x - centre) / bandwidth, height, (y - centre) / bandwidth, offset, None, xp, x.device)
