"""Errors and multiply-accumulates at the shapes and budgets of KDEformer's tables, on attention of LightGlue and ViT-S/14.

BigGAN's is 4,096 queries × 1,024 keys, d = 64, d_v = 256: LightGlue's cross attention in nine layers, its values four times
beside each other. T2T-ViT's first is 3,136 tokens of 64: ViT-S/14's twelve layers at 784 px, without the class token.
`python -m bench.paper_shapes` prints the table and writes paper_shapes.json to bench/results.
"""

import statistics
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import vit
from bench.baselines import BASELINES, Attend
from bench.baselines.counting import multiply_accumulates
from bench.experiments import biggan, matching, summary, t2t
from bench.experiments.methods import KDECORE, sdpa
from bench.experiments.operations import Call
from bench.experiments.rows import FAILURES, finite, write
from bench.experiments.unpadded import unpadded
from bench.experiments.vision import relative
from bench.model_methods import estimated, published
from kdecore.compare.machine import this_machine

OF_PAPER = ("reformer", "performer", "scatterbrain_window", "kdeformer_released")
PATH = Path("bench/results/paper_shapes.json")


class Place(NamedTuple):
    """A table of the paper: what it counts for, its budget and block, the diagonal, and what stands in for its attention."""

    name: str
    images: int
    budget: int
    block: int
    diagonal: int | None
    calls: list[Call]


def places() -> Iterator[Place]:
    """Yield BigGAN's and T2T-ViT's."""
    across = [call for call in matching.calls(matching.SMALL)[1] if call.q.shape[1] == matching.SMALL[0]]
    wide = [call._replace(v=call.v.repeat(1, 1, 4)) for call in across]
    yield Place("BigGAN", biggan.COUNTED_BATCH, biggan.BLOCK + biggan.SAMPLES, biggan.BLOCK, None, wide)
    scale = (vit.WIDTH // vit.HEADS) ** -0.5
    layers = [[torch.from_numpy(x[:, 1:].copy()) for x in found] for found in vit.qkv(784, range(vit.LAYERS)).values()]
    tokens = [Call(q, k, v, scale) for q, k, v in layers]
    yield Place("T2T-ViT, layer 1", t2t.COUNTED_BATCH, t2t.BLOCK + t2t.SAMPLES[0], t2t.BLOCK, 0, tokens)


def methods(place: Place, kernels: str) -> dict[str, Attend]:
    """Return the methods of the paper's table, and kdecore's."""
    known: dict[str, Attend] = {name: BASELINES[name] for name in OF_PAPER}
    known["Algorithm 3, the paper's block"] = partial(published, place.block, place.diagonal, kernels=kernels)
    return known | {name: partial(estimated, name, place.diagonal, kernels=kernels) for name in KDECORE}


def measure(place: Place, name: str) -> dict[str, Any]:
    """Return one row: mean error, and multiply-accumulates of the images that the paper counts, by the middle layer."""
    row: dict[str, Any] = {"place": place.name, "method": name, "budget": place.budget}
    attend, plain = (methods(place, kernels)[name] for kernels in ("auto", "array-api"))
    one = place.calls[len(place.calls) // 2]
    groups = len(one.q)
    try:
        with torch.inference_mode(), unpadded():
            count = multiply_accumulates(partial(plain, *one, place.budget, 0))
        row |= {"multiply_accumulates": count * place.images // groups, "exact": one.exact * place.images // groups}
        errors = [relative(attend(*call, place.budget, i), sdpa(*call)) for i, call in enumerate(place.calls)]
    except FAILURES as error:
        return row | {"failed": str(error)}
    return row | {"error": finite(statistics.mean(errors))}


def main() -> None:
    """Measure, print and write."""
    rows = []
    for place in places():
        for name in methods(place, "auto"):
            rows.append(measure(place, name))
            write(PATH, {"machine": asdict(this_machine()), "rows": rows})
    lines = [
        [row["place"], row["method"], str(row["budget"]), row["failed"], "", ""]
        if "failed" in row
        else [
            row["place"],
            row["method"],
            str(row["budget"]),
            "–" if row["error"] is None else f"{row['error']:.3g}",
            f"{row['multiply_accumulates'] / 1e9:.3f}",
            f"{row['exact'] / row['multiply_accumulates']:.2f}",
        ]
        for row in rows
    ]
    print(summary.markdown(["table", "method", "budget", "error", "G multiply-accumulates", "exact's over it"], lines))


if __name__ == "__main__":
    main()
