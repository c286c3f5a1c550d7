"""The paper's BigGAN and T2T-ViT experiments, on random weights of small sizes; the real ones in shapes and counts alone."""

import json
import math
from argparse import ArgumentParser

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from bench import model_methods, models_biggan, models_t2t
from bench.checkpoints import checked
from bench.experiments import biggan, scores, standin, t2t
from bench.model_methods import exact_attention, methods, multiply_accumulates, published_multiply_accumulates, route
from bench.models_biggan import BigGAN
from bench.models_t2t import TokensToToken
from kdecore.compare.cases import Case
from tests.model_references import ClassifierReference, GeneratorReference

SMALL_GAN = models_biggan.Config(
    output_dim=64,
    z_dim=8,
    class_embed_dim=8,
    channel_width=8,
    num_classes=10,
    layers=((True, 16, 8), (True, 8, 4), (True, 4, 4), (True, 4, 2), (False, 2, 1)),
    attention_layer_position=3,
    n_stats=5,
)
"""1024 queries, 256 keys, d = 4, d_v = 16."""
SMALL_T2T = models_t2t.Config(image=64, token=8, width=16, depth=2, heads=2, hidden=32, classes=10)
"""256 and 64 tokens, d = d_v = 8."""
NAMES = ("exact", "sortlsh", "hyper", "kdeformer", "treecode", "published")


@pytest.fixture(scope="module")
def gan_weights():
    weights = models_biggan.random_weights(SMALL_GAN)
    generator = torch.Generator().manual_seed(1)
    for key in weights:
        if key.endswith("running_vars"):
            weights[key] = 0.5 + torch.rand(weights[key].shape, generator=generator)
    # Logits of some ±10, as trained ones have.
    name = "generator.layers.3.snconv1x1_theta.weight_"
    return weights | {f"{name}u": weights[f"{name}u"] / 4}


@pytest.fixture(scope="module")
def gan(gan_weights):
    return BigGAN(SMALL_GAN, models_biggan.normalised(gan_weights))


@pytest.fixture(scope="module")
def t2t_weights():
    """With queries inflated until logits reach some ±10."""
    weights = models_t2t.random_weights(SMALL_T2T)
    for number in (1, 2):
        weights[f"tokens_to_token.attention{number}.attn.qkv.weight"][: SMALL_T2T.token] *= 12
    return weights


@pytest.fixture(scope="module")
def classifier(t2t_weights):
    return TokensToToken(SMALL_T2T, t2t_weights)


NOISE = models_biggan.truncated_noise(2, SMALL_GAN.z_dim, 0.5, seed=3)
CLASSES = torch.tensor([4, 7])
PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))


def relative(found, expected):
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))


def wrongly_scaled(layer, q, k, v, scale):
    """Scaled by the width of heads, as attention mostly is."""
    return exact_attention(layer, q, k, v, q.shape[-1] ** -0.5)


def test_published_sizes():
    gan, vit = models_biggan.Config(), models_t2t.Config()
    assert len(models_biggan.shapes(gan)) == 698
    assert round(models_biggan.parameters(gan) / 1e6, 1) == 56.2
    assert gan.attention_shape == (4096, 1024, 64, 256)
    assert models_biggan.shapes(gan)["generator.layers.8.snconv1x1_theta.weight_orig"] == (64, 512, 1, 1)
    assert len(models_t2t.shapes(vit)) == 294
    assert round(models_t2t.parameters(vit) / 1e6, 2) == 64.10
    assert models_t2t.shapes(vit)["tokens_to_token.attention1.attn.qkv.weight"] == (192, 147)
    assert models_t2t.shapes(vit)["tokens_to_token.attention2.attn.qkv.weight"] == (192, 576)
    assert vit.tokens == (3136, 784)
    assert vit.scales == pytest.approx((0.08248, 0.04167), rel=1e-4)


@pytest.mark.parametrize(
    ("module", "reference", "config"),
    [
        (models_biggan, GeneratorReference, models_biggan.Config()),
        (models_biggan, GeneratorReference, SMALL_GAN),
        (models_t2t, ClassifierReference, models_t2t.Config()),
        (models_t2t, ClassifierReference, SMALL_T2T),
    ],
)
def test_keys_and_shapes_are_those_of_modules(module, reference, config):
    with torch.device("meta"):
        model = reference(config)
    assert {key: tuple(x.shape) for key, x in model.state_dict().items()} == module.shapes(config)
    assert sum(x.numel() for x in model.parameters()) == module.parameters(config)


def test_full_sizes_run_and_cost_what_was_published():
    """On tensors without numbers."""
    seen = []

    def attend(layer, q, k, v, scale):
        counter = FlopCounterMode(display=False)
        with counter:
            out = (q @ k.mT).softmax(-1) @ v
        # PyTorch counts multiplications and additions apart.
        seen.append((layer, tuple(q.shape), tuple(k.shape), tuple(v.shape), scale, counter.get_total_flops() // 2))
        return out

    config = models_biggan.Config()
    weights = {key: torch.empty(shape, device="meta") for key, shape in models_biggan.shapes(config).items()}
    model = BigGAN(config, models_biggan.normalised(weights))
    inputs = torch.empty(8, 128, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")
    assert model(*inputs, 0.4, attend).shape == (8, 3, 512, 512)
    gan = multiply_accumulates(8, 4096, 1024, 64, 256)
    assert seen == [(0, (8, 4096, 64), (8, 1024, 64), (8, 1024, 256), 1.0, gan)]
    assert round(gan / 1e9, 3) == 10.737

    seen.clear()
    vit = models_t2t.Config()
    weights = {key: torch.empty(shape, device="meta") for key, shape in models_t2t.shapes(vit).items()}
    assert TokensToToken(vit, weights)(torch.empty(2, 3, 224, 224, device="meta"), attend).shape == (2, 1000)
    assert [(layer, q, scale) for layer, q, _, _, scale, _ in seen] == [
        (0, (2, 3136, 64), 147**-0.5),
        (1, (2, 784, 64), 576**-0.5),
    ]
    counts = t2t.counted(vit, vit.tokens)
    assert [128 * count / 2 for *_, count in seen] == counts
    assert [round(count / 1e9, 2) for count in counts] == [161.13, 10.07]


def test_published_operations_of_kdeformer():
    gan = published_multiply_accumulates(8, 4096, 1024, 64, 256, block=64, samples=128)
    assert round(gan / 1e9, 3) == 2.596
    assert round(multiply_accumulates(8, 4096, 1024, 64, 256) / gan, 2) == 4.14
    vit = published_multiply_accumulates(128, 3136, 3136, 64, 64, block=32, samples=98)
    assert round(vit / 1e9, 2) == 8.80
    assert round(multiply_accumulates(128, 3136, 3136, 64, 64) / vit, 2) == 18.30


def test_generator_is_the_plain_model(gan, gan_weights):
    reference = GeneratorReference(SMALL_GAN).eval()
    reference.load_state_dict(gan_weights, strict=True)
    with torch.inference_mode():
        expected = reference.double()(NOISE.double(), CLASSES, 0.5)
    assert expected.std() > 0.1
    assert relative(gan(NOISE, CLASSES, 0.5), expected) < 2e-5
    kdecores = route(methods(64)["exact"], (192,), 0)
    assert relative(gan(NOISE, CLASSES, 0.5, kdecores), expected) < 2e-5
    assert relative(gan(NOISE, CLASSES, 0.5, wrongly_scaled), expected) > 1e-2


def test_classifier_is_the_plain_model(classifier, t2t_weights):
    reference = ClassifierReference(SMALL_T2T)
    reference.load_state_dict(t2t_weights, strict=True)
    with torch.inference_mode():
        expected = reference.double()(PIXELS.double())
    assert relative(classifier(PIXELS), expected) < 2e-5
    kdecores = route(methods(32, diagonal=0)["exact"], (130, 56), 0)
    assert relative(classifier(PIXELS, kdecores), expected) < 2e-5
    assert relative(classifier(PIXELS, wrongly_scaled), expected) > 1e-2


def test_logits_reach_ten(gan, classifier):
    """Without which a wrong scale would hide."""
    reached = []

    def attend(layer, q, k, v, scale):
        reached.append(float((q @ k.mT * scale).abs().max()))
        return exact_attention(layer, q, k, v, scale)

    gan(NOISE, CLASSES, 0.5, attend)
    classifier(PIXELS, attend)
    assert len(reached) == 3
    assert min(reached) > 10


def test_statistics_between_truncations(gan):
    between = dict(gan.weights)
    for key, table in gan.weights.items():
        if key.endswith(("running_means", "running_vars")):
            between[key] = table.clone()
            between[key][2] = (table[2] + table[3]) / 2
    expected = BigGAN(SMALL_GAN, between)(NOISE, CLASSES, 0.5)
    assert relative(gan(NOISE, CLASSES, 0.625), expected) < 1e-5
    assert relative(gan(NOISE, CLASSES, 0.5), expected) > 1e-2
    assert torch.isfinite(gan(NOISE, CLASSES, 1.0)).all()
    with pytest.raises(ValueError, match=r"truncation must lie in \(0, 1\], got 1\.5"):
        gan(NOISE, CLASSES, 1.5)


def test_spectral_norms_need_power_iterations():
    weights = models_biggan.random_weights(SMALL_GAN)
    normed = models_biggan.normalised(weights)
    names = [key.removesuffix("_orig") for key in weights if key.endswith("_orig")]
    assert len(names) == 1 + 5 * 4 * 3 + 4 + 1
    for name in names:
        assert 0.99 < torch.linalg.matrix_norm(normed[name].flatten(1), ord=2) < 1.1, name
    with pytest.raises(ValueError, match=r"spectral norm uᵀWv of .*weight_orig must be positive and finite, got -"):
        models_biggan.normalised(models_biggan.random_weights(SMALL_GAN, iterations=0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", ["gan", "classifier"])
def test_every_method_runs_in_the_route(name, model, gan, classifier):
    assert tuple(methods(32)) == NAMES
    errors = {}
    for part in (8, 2, 1):
        layers = [[], []]
        if model == "gan":
            gan(NOISE, CLASSES, 0.5, route(methods(64)[name], (256 // part,), 0, layers))
            assert [len(layer) for layer in layers] == [1, 0]
        else:
            classifier(PIXELS, route(methods(32, diagonal=0)[name], (256 // part, 64 // part), 0, layers))
            assert [len(layer) for layer in layers] == [1, 1]
        errors[part] = [layer[0] for layer in layers if layer]
    print(errors)
    assert max(errors[1]) < 1e-5
    if name == "exact":
        assert max(errors[8]) < 1e-5
    else:
        assert all(few > half > 1e-4 for few, half in zip(errors[8], errors[2], strict=True))


def test_layers_have_their_own_budgets(classifier):
    seen = []

    def method(q, k, v, scale, budget, seed):
        seen.append((q.shape, budget, seed))
        return exact_attention(0, q, k, v, scale)

    assert torch.equal(classifier(PIXELS, route(method, (130, 56), 9)), classifier(PIXELS))
    assert seen == [((2, 256, 8), 130, 9), ((2, 64, 8), 56, 9)]


def test_published_settings(monkeypatch):
    asked = []
    monkeypatch.setattr(model_methods, "estimated", lambda options, *_, **__: asked.append(options))
    for budget in (192, 20, 1):
        methods(64)["published"](None, None, None, 1.0, budget, 0)
    assert [(one.block_size, one.num_samples, one.num_hashes) for one in asked] == [(64, 128, 7), (10, 10, 7), (0, 1, 7)]


def faulty(weights):
    key = list(weights)[3]
    lacking, extra, wrong = ({**weights} for _ in range(3))
    del lacking[key]
    extra["head.oddment"] = torch.zeros(1)
    wrong[key] = torch.zeros(5, 7)
    return key, lacking, extra, wrong


@pytest.mark.parametrize("module", ["biggan", "t2t"])
def test_loading_is_strict(module, tmp_path, gan_weights, t2t_weights):
    def load(held):
        if module == "biggan":
            write_generator(tmp_path, held)
            return models_biggan.load(tmp_path)
        torch.save(held, tmp_path / "checkpoint.pth.tar")
        return models_t2t.load(tmp_path / "checkpoint.pth.tar", SMALL_T2T)

    weights = gan_weights if module == "biggan" else t2t_weights
    key, lacking, extra, wrong = faulty(weights)
    assert load(weights).weights.keys() <= {name.removesuffix("_orig") for name in weights}
    with pytest.raises(ValueError, match=rf"{len(weights)} keys; got 1 missing \({key}\)$"):
        load(lacking)
    with pytest.raises(ValueError, match=r"got 1 unknown \(head\.oddment\)$"):
        load(extra)
    with pytest.raises(ValueError, match=rf"got 1 of another shape \({key} \(5, 7\) instead of \("):
        load(wrong)
    with pytest.raises(ValueError, match=r"1 missing.*1 unknown"):
        load({**lacking, "head.oddment": 3})
    with pytest.raises(ValueError, match=rf"{key} int instead of"):
        load({**weights, key: 3})
    with pytest.raises(ValueError, match=r"must hold a dictionary of tensors, got Tensor"):
        load(torch.zeros(3))
    with pytest.raises(ValueError, match="without other objects"):
        load({**weights, "optimiser": Case})


def test_many_faults_are_counted():
    with pytest.raises(ValueError, match=r"5 keys; got 5 missing \(0, 1, 2, …\)"):
        checked({}, {str(number): (1,) for number in range(5)}, "file")


def write_generator(folder, weights, config=SMALL_GAN):
    text = json.dumps({name: getattr(config, name) for name in models_biggan.Config.__dataclass_fields__})
    (folder / "config.json").write_text(text, encoding="utf-8")
    torch.save(weights, folder / "pytorch_model.bin")


def test_config_is_read_strictly(tmp_path):
    path = tmp_path / "config.json"
    write_generator(tmp_path, {})
    assert models_biggan.read_config(path) == SMALL_GAN
    held = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**held, "extra": 1}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"must hold attention_layer_position, .*got .*extra"):
        models_biggan.read_config(path)
    path.write_text("layers", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json must be JSON; got: Expecting value"):
        models_biggan.read_config(path)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "state_dict_ema"])
def test_checkpoints_of_every_kind(prefix, wrapper, tmp_path, t2t_weights, classifier):
    held = {prefix + key: x for key, x in t2t_weights.items()}
    if wrapper is not None:
        held = {"epoch": 3, "arch": "t2t", wrapper: held}
    if wrapper == "state_dict_ema":
        held["state_dict"] = {key: torch.zeros_like(x) for key, x in t2t_weights.items()}
    torch.save(held, tmp_path / "weights.pth.tar")
    found = models_t2t.load(tmp_path / "weights.pth.tar", SMALL_T2T)
    assert torch.equal(found(PIXELS), classifier(PIXELS))


def test_noise_is_truncated():
    noise = models_biggan.truncated_noise(2000, 128, 0.4, seed=0)
    assert noise.shape == (2000, 128)
    assert noise.abs().max() <= 0.8
    # The deviation of normal numbers within ±2.
    assert float(noise.std()) == pytest.approx(0.4 * 0.8796, rel=0.01)
    assert abs(float(noise.mean())) < 0.005
    assert torch.equal(noise[:5], models_biggan.truncated_noise(2000, 128, 0.4, seed=0)[:5])


def test_images_are_bytes():
    values = torch.tensor([-1.0, -0.999, 0.0, 0.5, 1.0, 2.0])
    expected = np.uint8(np.clip((values.numpy() + 1) / 2 * 256, 0, 255))
    assert models_biggan.to_bytes(values).tolist() == expected.tolist() == [0, 0, 128, 192, 255, 255]


def random_covariance(rng, size, rank):
    x = rng.standard_normal((size, rank))
    return torch.from_numpy(x @ x.T)


@pytest.mark.parametrize("rank", [3, 12])
def test_distance_of_equal_moments_is_zero(rng, rank):
    covariance = random_covariance(rng, 12, rank)
    moments = torch.from_numpy(rng.standard_normal(12)), covariance
    assert abs(scores.frechet_distance(moments, moments)) < 1e-12 * float(torch.trace(covariance))


def test_distance_of_two_normal_distributions(rng):
    """With a common basis, ‖μ_a − μ_b‖² + Σ (σ_a − σ_b)²; else by a root of the product, in complex numbers."""
    means = [torch.from_numpy(rng.standard_normal(6)) for _ in range(2)]
    deviations = [torch.from_numpy(rng.uniform(0.1, 3, 6)) for _ in range(2)]
    basis = torch.linalg.qr(torch.from_numpy(rng.standard_normal((6, 6))))[0]
    a, b = ((mean, basis * sigma**2 @ basis.T) for mean, sigma in zip(means, deviations, strict=True))
    expected = float((means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum())
    assert scores.frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)

    a, b = ((mean, random_covariance(rng, 6, 9)) for mean in means)
    roots = np.sqrt(np.linalg.eigvals((a[1] @ b[1]).numpy()).astype(complex)).real.sum()
    expected = float((a[0] - b[0]).square().sum() + torch.trace(a[1]) + torch.trace(b[1])) - 2 * roots
    assert scores.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="as many features, got 6 and 5"):
        scores.frechet_distance(a, (b[0][:5], b[1]))


def test_moments(rng):
    features = rng.standard_normal((40, 5)).astype(np.float32)
    mean, covariance = scores.moments_of(torch.from_numpy(features))
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(0))
    np.testing.assert_allclose(covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-10)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        scores.moments_of(torch.zeros(1, 5))


def test_inception_score_lies_between_its_bounds(rng):
    alike = torch.from_numpy(rng.standard_normal((1, 7))).expand(60, 7)
    assert scores.inception_score(alike) == pytest.approx(1, abs=1e-12)
    certain = 1e3 * functional.one_hot(torch.arange(70) % 7, 7)
    assert scores.inception_score(certain) == pytest.approx(7, rel=1e-12)
    assert scores.inception_score(certain[:4]) == 1
    assert scores.inception_score(certain[:4], splits=1) == pytest.approx(4, rel=1e-12)
    logits = torch.from_numpy(rng.standard_normal((60, 7)))
    p = logits.softmax(1).numpy()
    expected = [np.exp((x * np.log(x / x.mean(0))).sum(1).mean()) for x in np.split(p, 10)]
    assert 1 < np.mean(expected) < 6
    assert scores.inception_score(logits) == pytest.approx(np.mean(expected), rel=1e-12)


class Network(torch.nn.Module):
    """Means of 4 × 4 parts of an image as features, and as logits."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)
        return features, features[:, :10] / 10


@pytest.fixture
def inception(tmp_path):
    path = tmp_path / "inception.pt"
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.trace(Network(), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).save(path)
    return path


@pytest.fixture
def moments(tmp_path, rng):
    path = tmp_path / "moments.npz"
    np.savez(path, mu=rng.uniform(100, 150, 48), sigma=random_covariance(rng, 48, 60))
    return path


def test_inception_and_moments_are_checked(inception, moments, tmp_path):
    network, (mean, covariance) = scores.load_scores(inception, moments, 64)
    features, logits = network(torch.full((3, 3, 16, 16), 7, dtype=torch.uint8))
    assert (features.shape, logits.shape, mean.shape, covariance.shape) == ((3, 48), (3, 10), (48,), (48, 48))
    assert features.dtype == mean.dtype == torch.float64
    assert (features == 7).all()

    np.savez(tmp_path / "few.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ValueError, match=r"few\.npz must be of 48 features, as .*inception\.pt makes; got 5"):
        scores.load_scores(inception, tmp_path / "few.npz", 64)
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(5), sigma=np.eye(4))
    with pytest.raises(ValueError, match=r"wrong\.npz must hold mu \(F,\) and sigma \(F, F\), got .*\(4, 4\)"):
        scores.read_moments(tmp_path / "wrong.npz")
    for content in (b"", b"text", b"PK\x03\x04text"):
        (tmp_path / "text").write_bytes(content)
        with pytest.raises(ValueError, match=r"must be a \.npz file of arrays"):
            scores.read_moments(tmp_path / "text")
        with pytest.raises(ValueError, match="must be a TorchScript file"):
            scores.load_inception(tmp_path / "text")

    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.trace(torch.nn.Identity(), torch.zeros(1)).save(tmp_path / "identity.pt")
    with pytest.raises(ValueError, match=r"must return features .* and logits .*, got shape \(2, 3, 64, 64\)"):
        scores.load_scores(tmp_path / "identity.pt", moments, 64)


def arguments_of(experiment, *given):
    parser = ArgumentParser()
    experiment.add_arguments(parser)
    return parser.parse_args([str(one) for one in given])


def run(experiment, *given):
    said = []
    results = experiment.run(arguments_of(experiment, *given), said.append)
    # What JSON can hold.
    assert json.loads(json.dumps(results)) == results
    return results, experiment.table(results), said


def refused(experiment, capsys, *given):
    with pytest.raises(SystemExit) as stopped:
        experiment.run(arguments_of(experiment, *given), print)
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_biggan_experiment(tmp_path, gan, gan_weights, inception, moments):
    write_generator(tmp_path, gan_weights)
    given = ("--weights", tmp_path, "--count", 5, "--batch", 2, "--budgets", 96, "--truncation", 0.5)
    names = ("--methods", "exact", "sortlsh", "--images", tmp_path / "images")
    results, text, said = run(biggan, *given, *names)
    exact, estimated = results["rows"]
    assert (exact["method"], exact["budget"], estimated["method"], estimated["budget"]) == ("exact", 256, "sortlsh", 96)
    assert exact["error"] < 1e-5 < 1e-3 < estimated["error"] < 1
    assert exact["multiply_accumulates"] == 8 * 1024 * 256 * 20
    assert estimated["multiply_accumulates"] == 8 * 1024 * 96 * 20
    assert "no FID and no IS" in text
    assert "58.38" not in text
    assert "fid" not in exact
    assert said[-1] == "image 5 of 5, sortlsh"

    noise = models_biggan.truncated_noise(5, 8, 0.5, 0)
    expected = models_biggan.to_bytes(gan(noise[2:4], torch.tensor([2, 3]), 0.5)).int()
    for number in range(2):
        with Image.open(tmp_path / "images" / "exact" / f"{2 + number:05d}.png") as image:
            written = torch.from_numpy(np.array(image)).permute(2, 0, 1).int()
        assert (written - expected[number]).abs().max() <= 1
    assert len(list((tmp_path / "images" / "sortlsh").iterdir())) == 5

    results, text, _ = run(biggan, *given, "--methods", "exact", "--inception", inception, "--moments", moments)
    images = torch.cat([gan(noise[i : i + 2], torch.arange(5)[i : i + 2], 0.5) for i in (0, 2, 4)])
    features, logits = Network()(models_biggan.to_bytes(images))
    distance = scores.frechet_distance(scores.moments_of(features), scores.read_moments(moments))
    assert results["rows"][0]["fid"] == pytest.approx(distance, rel=1e-3)
    assert results["rows"][0]["inception_score"] == pytest.approx(scores.inception_score(logits), rel=1e-3)
    assert f"{results['rows'][0]['fid']:.2f}" in text
    assert "published (5,000 images): exact FID 32.17, IS 58.38, 10.738 G; KDEformer FID 31.41" in text


def test_biggan_is_refused(tmp_path, capsys, gan_weights, inception):
    assert "needs --weights FOLDER: config.json and pytorch_model.bin of BigGAN-deep-512" in refused(biggan, capsys)
    assert "No such file" in refused(biggan, capsys, "--weights", tmp_path)
    write_generator(tmp_path, dict(list(gan_weights.items())[1:]))
    given = ("--weights", tmp_path)
    assert "1 missing (embeddings.weight)" in refused(biggan, capsys, *given)
    assert "given together" in refused(biggan, capsys, *given, "--inception", inception)
    assert "one number with a model, got 2" in refused(biggan, capsys, *given, "--budgets", 3, 4)
    assert "must be at least 1, got 0" in refused(biggan, capsys, *given, "--budgets", 0)
    assert "--count must be at least 2 and --batch 1, got 1 and 8" in refused(biggan, capsys, *given, "--count", 1)
    assert "--truncation must lie in (0, 1], got 0.0" in refused(biggan, capsys, *given, "--truncation", 0)
    assert "did you mean 'sortlsh'?" in refused(biggan, capsys, "--methods", "sortlhs")


def save_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photographs(tmp_path, rng):
    for number, label in enumerate((3, 0, 7, 3)):
        save_image(tmp_path / "photographs" / f"photo_{number:02d}_{label}.png", rng.integers(0, 255, (70, 90, 3), np.uint8))
    return tmp_path / "photographs"


def test_t2t_experiment(tmp_path, monkeypatch, photographs, t2t_weights, classifier):
    monkeypatch.setattr(t2t, "Config", lambda: SMALL_T2T)
    torch.save({"state_dict": t2t_weights}, tmp_path / "weights.pth.tar")
    given = ("--weights", tmp_path / "weights.pth.tar", "--images", photographs, "--batch", 3)
    results, text, said = run(t2t, *given, "--methods", "exact", "published", "--labels", "names")
    exact, estimated = results["rows"]
    pixels = torch.stack([t2t.pixels_of(path, 64) for path in sorted(photographs.iterdir())])
    classes = classifier(pixels).argmax(1).tolist()
    assert results["images"] == 4
    assert exact["agreement"] == 1
    assert exact["top_1"] == sum(map(int.__eq__, classes, (3, 0, 7, 3))) / 4
    assert (exact["budgets"], estimated["budgets"]) == ([256, 64], [130, 56])
    assert exact["multiply_accumulates"] == [128 * 256 * 256 * 16, 128 * 64 * 64 * 16]
    assert estimated["multiply_accumulates"] == [128 * 256 * 130 * 16, 128 * 64 * 56 * 16]
    assert max(exact["errors"]) < 1e-5
    assert all(1e-4 < error < 1 for error in estimated["errors"])
    assert "published (ImageNet's 50,000 validation images): exact top-1 82.55 %, 161.10 G" in text
    assert said[-1] == "image 4 of 4, published"

    # Queries and keys are of the same tokens, which the treecode makes use of; a batch, a seed.
    expected = [[], []]
    for seed, batch in enumerate((pixels[:3], pixels[3:])):
        classifier(batch, route(methods(32, diagonal=0)["treecode"], (130, 56), seed, expected))
    results, _, _ = run(t2t, *given, "--methods", "treecode")
    assert results["rows"][0]["errors"] == pytest.approx([sum(layer) / 2 for layer in expected], rel=1e-3)

    results, text, _ = run(t2t, *given, "--methods", "exact")
    assert "top_1" not in results["rows"][0]
    assert "no top-1: it needs --labels" in text
    assert "82.55" not in text


def test_t2t_is_refused(tmp_path, capsys, photographs):
    assert "needs --weights FILE and --images FOLDER" in refused(t2t, capsys)
    given = ("--weights", tmp_path / "none", "--images", photographs)
    assert "No such file" in refused(t2t, capsys, *given)
    assert "2 numbers, one a layer, got 1" in refused(t2t, capsys, *given, "--budgets", 5)
    assert "--batch must be at least 1, got 0" in refused(t2t, capsys, *given, "--batch", 0)
    assert "must hold images" in refused(t2t, capsys, "--weights", tmp_path, "--images", tmp_path / "empty")


def test_pixels_are_resized_and_cut(tmp_path):
    """Against PyTorch's own bicubic filter, within two of 256 grey levels."""
    rows, columns = np.mgrid[0:300, 0:431] / 60
    pixels = np.stack([128 + 100 * np.sin(rows + c) * np.cos(columns * (c + 1)) for c in range(3)], axis=-1).astype(np.uint8)
    save_image(tmp_path / "image.png", pixels)
    found = t2t.pixels_of(tmp_path / "image.png", 224)
    assert found.shape == (3, 224, 224)
    whole = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    resized = functional.interpolate(whole, size=(248, int(248 * 431 / 300)), mode="bicubic", antialias=True)[0]
    left = (resized.shape[2] - 224) // 2
    expected = resized[:, 12:236, left : left + 224] / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert ((found.permute(1, 2, 0) * deviation + mean) - expected.permute(1, 2, 0)).abs().max() < 2 / 255


def test_grey_and_upright_images_are_read(tmp_path):
    save_image(tmp_path / "grey.png", np.full((260, 100), 51, dtype=np.uint8))
    found = t2t.pixels_of(tmp_path / "grey.png", 64)
    expected = (0.2 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(found, expected[:, None, None].expand(3, 64, 64))


def test_labels(tmp_path, photographs):
    grey = np.zeros((8, 8), dtype=np.uint8)
    found = t2t.labelled_by_name(photographs, 10)
    assert [(path.name, label) for path, label in found] == [
        ("photo_00_3.png", 3),
        ("photo_01_0.png", 0),
        ("photo_02_7.png", 7),
        ("photo_03_3.png", 3),
    ]
    assert [label for _, label in t2t.unlabelled(photographs, 10)] == [None] * 4
    with pytest.raises(ValueError, match=r"photo_02_7\.png must end in a label below 7, got 7"):
        t2t.labelled_by_name(photographs, 7)
    save_image(photographs / "odd.png", grey)
    with pytest.raises(ValueError, match=r"odd\.png must end in a label below 10, got no number"):
        t2t.labelled_by_name(photographs, 10)

    for folder in ("7", "3"):
        save_image(tmp_path / "numbers" / folder / f"of{folder}.jpeg", grey)
    assert [(path.name, label) for path, label in t2t.labelled_by_folder(tmp_path / "numbers", 10)] == [
        ("of3.jpeg", 3),
        ("of7.jpeg", 7),
    ]
    with pytest.raises(ValueError, match="must hold 5 folders, or folders named by numbers below that; got 2"):
        t2t.labelled_by_folder(tmp_path / "numbers", 5)
    for folder in ("n02", "n01", "n03"):
        save_image(tmp_path / "classes" / folder / f"of{folder}.png", grey)
    assert [label for _, label in t2t.labelled_by_folder(tmp_path / "classes", 3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="must hold 1000 folders"):
        t2t.labelled_by_folder(tmp_path / "classes", 1000)
    assert len(t2t.unlabelled(tmp_path / "classes", 3)) == 3


@pytest.fixture
def arrays(tmp_path, rng):
    """BigGAN's shape, an eighth of its rows."""
    q, k, v = (rng.standard_normal(size).astype(np.float32) for size in ((512, 64), (128, 64), (128, 256)))
    np.savez(tmp_path / "arrays.npz", q=q, k=k, v=v, scale=0.3)
    return tmp_path / "arrays.npz"


@pytest.mark.parametrize("experiment", [biggan, t2t])
def test_standin(experiment, arrays, capsys):
    results, text, _ = run(experiment, "--standin", arrays, "--budgets", 16, 64, 128)
    assert (results["standin"], results["shape"], results["scale"]) == ("arrays.npz", [1, 512, 128, 64, 256], 0.3)
    rows = {(row["method"], row["budget"]): row for row in results["rows"]}
    assert len(rows) == len(results["rows"]) == 1 + 3 * (len(NAMES) - 1)
    assert rows["exact", 128]["frobenius"] < 1e-5
    for name in NAMES[1:]:
        few, half, whole = (rows[name, budget] for budget in (16, 64, 128))
        for kind in ("spectral", "frobenius"):
            assert few[kind] > half[kind] > 1e-3 > 1e-5 > whole[kind], name
        assert few["multiply_accumulates"] == 512 * 16 * 320
    assert "512 queries, 128 keys, d = 64, d_v = 256, scale 0.3" in text
    assert "no model, so no score" in text
    assert "FID" not in text
    assert "top-1" not in text
    assert "it is a folder" in refused(experiment, capsys, "--standin", arrays.parent)


def test_standin_compares_with_exact_attention(rng):
    """By an oracle of its own, with several groups and the default scale."""
    q, k, v = (rng.standard_normal((2, 3, n, d)) for n, d in ((20, 4), (9, 4), (9, 5)))

    def means(q, k, v, scale, budget, seed):
        assert (scale, budget, seed) == (0.5, 7, 5)
        return v.mean(1, keepdim=True).expand(-1, q.shape[1], -1)

    results = standin.measure_standin(Case("case", q, k, v, None), {"means": means}, (7, 7), seed=5)
    weights = np.exp(q @ np.swapaxes(k, -1, -2) / 2)
    exact = weights / weights.sum(-1, keepdims=True) @ v
    off = np.linalg.norm(v.mean(-2, keepdims=True) - exact, axis=(-2, -1)) / np.linalg.norm(exact, axis=(-2, -1))
    (row,) = results["rows"]
    assert row["frobenius"] == pytest.approx(off.mean(), rel=1e-12)
    assert results["shape"] == [6, 20, 9, 4, 5]
    assert row["multiply_accumulates"] == 6 * 20 * 7 * 9
    assert math.isfinite(row["worst_row"])
