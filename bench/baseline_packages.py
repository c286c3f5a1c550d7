"""Errors of baselines beside those of other people's packages: `python -m bench.baseline_packages [--out FOLDER]`.

The packages are run as they are, on the same inputs, and draw their own random numbers. They are not among the development
extras: see `INSTALL`.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench.baselines import Attend, nystromformer, performer, reformer
from bench.study import run_study

PACKAGES = {"performer-pytorch": "1.1.4", "reformer-pytorch": "1.4.4", "nystrom-attention": "0.0.14"}
NEEDED = (
    "einops",
    "axial-positional-embedding",
    "local-attention",
    "product-key-memory",
    "colt5-attention",
    "hyper-connections",
)
INSTALL = f"pip install --no-deps {' '.join(f'{name}=={version}' for name, version in PACKAGES.items())} {' '.join(NEEDED)}"
N, D, SCALE = 1024, 64, 1 / 8
DEVIATIONS = (0.5, 2.0)
"""Of the logits."""
BUDGETS = (64, 128, 256, 512)
ROUNDS = 4
BAR = 1.1
"""Ours may err as much as this times the package."""

Package = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""q, k, v (1, N, D) and the budget → (1, N, D); PyTorch's own random state is the seed."""


class Pair(NamedTuple):
    """A package, and the baseline that computes the same."""

    name: str
    package: Package
    ours: Attend
    seeds: int = 20
    shared: bool = False


def performer_package(q: Tensor, k: Tensor, v: Tensor, budget: int, *, eps: float) -> Tensor:
    """Attend by performer-pytorch, whose scale is D^-½."""
    package = import_module("performer_pytorch.performer_pytorch")
    rows = package.gaussian_orthogonal_random_matrix(budget, D)
    phi_q, phi_k = (
        package.softmax_kernel(x[None], projection_matrix=rows, is_query=is_query, eps=eps)
        for x, is_query in ((q, True), (k, False))
    )
    out: Tensor = package.linear_attention(phi_q, phi_k, v[None])[0]
    return out


def reformer_package(q: Tensor, k: Tensor, v: Tensor, budget: int) -> Tensor:
    """Attend by reformer-pytorch as it is by default: pairs that meet in several rounds weigh more."""
    package = import_module("reformer_pytorch.reformer_pytorch")
    out: Tensor = package.LSHAttention(bucket_size=budget // (2 * ROUNDS), n_hashes=ROUNDS)(q, v)[0]
    return out


def reformer_package_counted(q: Tensor, k: Tensor, v: Tensor, budget: int) -> Tensor:
    """Attend by reformer-pytorch with log N taken, N at least 1: it counts 0 for pairs of two rounds' chunks."""
    package = import_module("reformer_pytorch.reformer_pytorch")
    counted = package.chunked_sum
    layer = package.LSHAttention(bucket_size=budget // (2 * ROUNDS), n_hashes=ROUNDS, allow_duplicate_attention=False)
    with mock.patch.object(package, "chunked_sum", lambda *args, **options: counted(*args, **options).clamp_min(1)):
        out: Tensor = layer(q, v)[0]
    return out


def nystrom_package(q: Tensor, k: Tensor, v: Tensor, budget: int) -> Tensor:
    """Attend by nystrom-attention, its projections the identity and its convolution left out."""
    layer = import_module("nystrom_attention").NystromAttention(
        3 * D, dim_head=D, heads=1, num_landmarks=budget, residual=False
    )
    layer.to_qkv.weight.copy_(torch.eye(3 * D))
    layer.to_out[0].weight.copy_(torch.eye(3 * D, D))
    layer.to_out[0].bias.zero_()
    out: Tensor = layer(torch.cat([q, k, v], dim=2))[..., :D]
    return out


MANY = 400
"""Seeds for features, whose errors deviate by a third from one to the next."""
PAIRS = (
    Pair("performer-pytorch, eps 0", partial(performer_package, eps=0.0), performer.attend, MANY),
    Pair("performer-pytorch", partial(performer_package, eps=1e-4), performer.attend_with_eps, MANY),
    Pair("reformer-pytorch, pairs counted", reformer_package_counted, reformer.attend, shared=True),
    Pair("reformer-pytorch", reformer_package, reformer.attend, shared=True),
    Pair("nystrom-attention", nystrom_package, nystromformer.attend),
)


def check_installed() -> None:
    """Leave with a message that names what is missing, unless everything is installed."""
    missing = [name for name in (*PACKAGES, *NEEDED) if not list(metadata.distributions(name=name))]
    if missing:
        raise SystemExit(f"bench.baseline_packages: not installed: {', '.join(missing)}; {INSTALL}")


def inputs(seed: int, deviation: float, *, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return normal q, k and v (1, N, D) whose logits deviate by ``deviation``, those of q with q/‖q‖ where shared."""
    q, k, v = torch.randn(3, 1, N, D, generator=torch.Generator().manual_seed(1000 + seed))
    if shared:
        return deviation / SCALE * q, k, v
    size = (deviation / SCALE / D**0.5) ** 0.5
    return size * q, size * k, v


@torch.no_grad()
def errors(pair: Pair, deviation: float, budget: int) -> tuple[float, float]:
    """Return the mean relative Frobenius errors of the package and of ours."""
    of_package, of_ours = [], []
    for seed in range(pair.seeds):
        q, k, v = inputs(seed, deviation, shared=pair.shared)
        exact = reformer.exact_shared(q, v, SCALE) if pair.shared else (SCALE * q @ k.mT).softmax(dim=2) @ v
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found = pair.package(q, k, v, budget)
        of_package.append(float((found - exact).norm() / exact.norm()))
        of_ours.append(float((pair.ours(q, k, v, SCALE, budget, seed) - exact).norm() / exact.norm()))
    return sum(of_package) / pair.seeds, sum(of_ours) / pair.seeds


def measure() -> dict[str, Any]:
    """Return the packages' versions, and one row for each pair, deviation of logits, and budget."""
    check_installed()
    rows = []
    for pair in PAIRS:
        for deviation in DEVIATIONS:
            for budget in BUDGETS:
                package, ours = errors(pair, deviation, budget)
                figures = {"package": package, "ours": ours, "ratio": ours / package}
                rows.append({"pair": pair.name, "deviation": deviation, "budget": budget, "seeds": pair.seeds} | figures)
                reached = "reached" if ours <= BAR * package else "MISSED"
                print(
                    f"{pair.name:<32}{deviation:<4} {budget:>4}",
                    *(f"{x:.4f}" for x in figures.values()),
                    reached,
                    flush=True,
                )
    return {"packages": {name: metadata.version(name) for name in PACKAGES}, "rows": rows}


if __name__ == "__main__":
    run_study("baseline_packages", __doc__, measure)
