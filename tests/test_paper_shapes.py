"""`bench.paper_shapes` on small attention."""

import torch

from bench import paper_shapes
from bench.experiments.operations import Call


def place(n_k, diagonal):
    rng = torch.Generator().manual_seed(0)
    shapes = (128, 16), (n_k, 16), (n_k, 32)
    calls = [Call(*(torch.randn(2, *shape, generator=rng) for shape in shapes), 0.25) for _ in range(3)]
    return paper_shapes.Place("table", images=8, budget=24, block=8, diagonal=diagonal, calls=calls)


def test_exact_attention_errs_by_rounding_and_counts_all():
    row = paper_shapes.measure(place(64, None), "exact")
    assert 0 <= row["error"] < 1e-5
    assert row["multiply_accumulates"] == row["exact"] == 8 * 128 * 64 * 48


def test_every_method_of_the_paper_has_its_row(monkeypatch):
    monkeypatch.delenv("KDEFORMER_REPO", raising=False)
    rectangle, square = place(64, None), place(128, 0)
    rows = {name: paper_shapes.measure(rectangle, name) for name in paper_shapes.methods(rectangle, "auto")}
    assert set(paper_shapes.OF_PAPER) | {"exact", "treecode", "kdeformer"} < set(rows)
    assert "q must have as many rows as v" in rows["reformer"]["failed"]
    assert "KDEFORMER_REPO" in rows["kdeformer_released"]["failed"]
    assert paper_shapes.measure(square, "reformer")["error"] > 0
    for name in ("treecode", "sortlsh", "performer", "scatterbrain_window", "Algorithm 3, the paper's block"):
        assert 0 < rows[name]["error"] < 2
        # A budget of 24 keys or features of 64, and what choosing them takes, which is most here.
        assert 24 / 64 <= rows[name]["multiply_accumulates"] / rows[name]["exact"] < 8
