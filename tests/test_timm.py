"""timm: its vision transformers by `replace_attention`, as they are at a full budget, and nearly so at a part of it."""

import enum
import importlib
import sys
from functools import cache
from types import ModuleType

import pytest
import torch
from torch import nn

from kdecore_adapters.torch_calls import Count
from kdecore_adapters.torch_encoder import POSITION_BIAS
from kdecore_adapters.torch_modules import replace_attention

SIDE, TOKENS = 256, 1025
"""Of a picture; patches of 8 × 8 pixels, and one token for the whole."""
SIZES = {"img_size": SIDE, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
LAYERS = ["blocks.0.attn", "blocks.1.attn"]
NAMES = {
    "vit": "vit_tiny_patch16_224",
    "deit": "deit3_small_patch16_224",
    "eva02": "eva02_tiny_patch14_224",
    "beit": "beit_base_patch16_224",
}
models = pytest.mark.parametrize("name", ["vit", "deit", "eva02"])

InterpolationMode = enum.Enum("InterpolationMode", "NEAREST BILINEAR BICUBIC BOX HAMMING LANCZOS")
STAND_INS = {
    "torchvision": {},
    "torchvision.datasets": dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "ImageFolder", "KMNIST", "MNIST")),
    "torchvision.ops": {},
    "torchvision.ops.misc": {"FrozenBatchNorm2d": nn.Module},
    "torchvision.transforms": {"ToTensor": nn.Module},
    "torchvision.transforms.functional": {"InterpolationMode": InterpolationMode},
}
"""Names that timm 1.0 looks up while it is imported, and that none of these models use."""


@cache
def imported():
    """Return timm, imported beside torchvision or, where that can't be, beside names of it.

    A build of torchvision fits one build of PyTorch, and any other raises when it is imported: there may be none for the one
    that the tests run on. timm needs it for data sets, transforms and one norm, none of them met here.
    """
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        for name, found in STAND_INS.items():
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(found, __path__=[])
            if (parent := name.rpartition(".")[0]) in STAND_INS:
                setattr(sys.modules[parent], name.rpartition(".")[2], sys.modules[name])
        try:
            return pytest.importorskip("timm", reason="timm is not installed")
        finally:
            # Others look whether torchvision is there.
            for name in STAND_INS:
                del sys.modules[name]
    return pytest.importorskip("timm", reason="timm is not installed")


@cache
def built(name):
    """Return a model, a picture of waves, and the tokens' last states."""
    torch.manual_seed(0)
    model = imported().create_model(NAMES[name], **SIZES).eval().requires_grad_(False)
    for part, parameter in model.named_parameters():
        # So that softmax is far from uniform, and that what it says counts.
        if part.endswith(("attn.qkv.weight", "attn.q_proj.weight", "attn.k_proj.weight")):
            parameter.mul_(10)
        elif part.endswith("gamma"):
            parameter.fill_(1)
    y, x = torch.meshgrid(torch.linspace(0, 6, SIDE), torch.linspace(0, 9, SIDE), indexing="ij")
    picture = torch.stack([torch.cos(x + y), torch.cos(2 * x - y), torch.cos(x * y)])[None]
    return model, picture, model.forward_features(picture)


def replaced(name, **options):
    """Return the last states of a replaced model over those of its own, as an error, and its counts."""
    model, picture, expected = built(name)
    assert expected.shape == (1, TOKENS, 32)
    replacement = replace_attention(model, **options)
    try:
        out = model.forward_features(picture)
    finally:
        replacement.restore()
    assert torch.equal(model.forward_features(picture), expected)
    return float((out - expected).norm() / expected.norm()), replacement.calls


@models
def test_at_a_full_budget_models_say_the_same(name):
    error, calls = replaced(name, method="treecode", budget=TOKENS)
    assert error < 1e-6
    assert calls.counts == dict.fromkeys([Count(layer, "exact") for layer in LAYERS], 1)


@models
def test_at_a_part_of_it_they_say_nearly_the_same(name):
    error, calls = replaced(name, method="treecode", budget=256, layers={"blocks.1.*": {"budget": 128}})
    assert 1e-4 < error < 0.02
    first, second = (calls.tallies[Count(layer, "treecode")].keys for layer in LAYERS)
    assert 64 < second < 192 < first < 384


def test_position_biases_are_left_to_pytorch():
    error, calls = replaced("beit", method="treecode", budget=256)
    assert error == 0
    assert calls.counts == dict.fromkeys([Count(layer, POSITION_BIAS) for layer in LAYERS], 1)


def test_nothing_stands_in_for_torchvision_afterwards():
    imported()
    assert "torchvision" not in sys.modules or hasattr(sys.modules["torchvision"], "__version__")
