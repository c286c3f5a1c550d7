"""diffusers: its transformers and pipelines by `replace_attention`, as their own processors have it, and what isn't met."""

import copy
import os
import pickle
from functools import cache
from math import prod
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kdecore import OptionError
from kdecore_adapters.torch_calls import Count
from kdecore_adapters.torch_modules import NothingReplaced, replace_attention, restore_attention

os.environ["HF_HUB_OFFLINE"] = "1"
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

SMALL = {"method": "treecode", "budget": 256}
TEXT, WIDTH = 24, 32
SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4}
SHORT = "fewer than 1024 keys"
LONG, SHOWN = 1000, 200
MASK = (torch.arange(LONG) < torch.tensor([LONG, SHOWN])[:, None]).long()


def waves(channels, *sides):
    """Return latents with structure, (1, channels, *sides): each channel one wave over the picture."""
    axes = torch.meshgrid(*(torch.linspace(0, 1, side) for side in sides), indexing="ij")
    return torch.stack([sum(torch.cos((3 + 2 * c + a) * x + c) for a, x in enumerate(axes)) for c in range(channels)])[None]


def words(batch=1, n=TEXT):
    return torch.randn(batch, n, WIDTH, generator=torch.Generator().manual_seed(1))


def flux(side=64):
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8), **SIZES,
    )  # fmt: skip
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(1.0 * side), torch.arange(1.0 * side))
    return model, {
        "hidden_states": waves(4, side, side).flatten(2).transpose(1, 2),
        "encoder_hidden_states": words(),
        "pooled_projections": words()[:, 0],
        "timestep": torch.tensor([0.5]),
        "img_ids": places,
        "txt_ids": torch.zeros(TEXT, 3),
    }


def sd3(side=64):
    model = diffusers.SD3Transformer2DModel(
        sample_size=side, patch_size=1, num_layers=2, joint_attention_dim=WIDTH, caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH, out_channels=4, pos_embed_max_size=side, dual_attention_layers=(0,), qk_norm="rms_norm",
        **SIZES,
    )  # fmt: skip
    return model, {
        "hidden_states": waves(4, side, side),
        "encoder_hidden_states": words(),
        "pooled_projections": words()[:, 0],
        "timestep": torch.tensor([500]),
    }


def wan(side=32):
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 1, 1), out_channels=4, text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=64,
        **SIZES,
    )  # fmt: skip
    return model, {
        "hidden_states": waves(4, 4, side, side),
        "encoder_hidden_states": words(),
        "timestep": torch.tensor([500]),
    }


def hunyuan(side=32):
    """Two videos, the text of the second shorter: its attention has a mask."""
    model = diffusers.HunyuanVideoTransformer3DModel(
        patch_size=1, patch_size_t=1, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1,
        text_embed_dim=WIDTH, pooled_projection_dim=WIDTH, rope_axes_dim=(4, 4, 8), **SIZES,
    )  # fmt: skip
    return model, {
        "hidden_states": waves(4, 4, side, side).repeat(2, 1, 1, 1, 1),
        "encoder_hidden_states": words(2, LONG),
        "encoder_attention_mask": MASK,
        "pooled_projections": words(2)[:, 0],
        "timestep": torch.tensor([500, 500]),
        "guidance": torch.tensor([6.0, 6.0]),
    }


LAYERS = {
    flux: ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"],
    sd3: ["transformer_blocks.0.attn", "transformer_blocks.0.attn2", "transformer_blocks.1.attn"],
    wan: ["blocks.0.attn1", "blocks.1.attn1"],
    hunyuan: ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"],
}
"""Layers of 4,096 tokens and more."""
LEFT = {
    flux: [],
    sd3: [],
    wan: ["blocks.0.attn2", "blocks.1.attn2"],
    hunyuan: ["context_embedder.token_refiner.refiner_blocks.0.attn"],
}
"""Layers that see the text alone."""
models = pytest.mark.parametrize("make", LAYERS, ids=lambda make: make.__name__)


@cache
def built(make):
    """Return a model of 4,096 tokens and more, its inputs, what it says, and what its attentions say."""
    torch.manual_seed(0)
    model, inputs = make()
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        # So that softmax is far from uniform.
        if name.endswith(("norm_q.weight", "norm_k.weight")):
            parameter.mul_(1.5)
    return model, inputs, *said(model, inputs, LAYERS[make])


def said(model, inputs, layers):
    """Return what a model says, and what each of these layers says of the image."""
    found = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, given, out, name=name: found.update({name: out[0] if isinstance(out, tuple) else out})
        )
        for name in layers
    ]
    out = model(**inputs, return_dict=False)[0]
    for handle in handles:
        handle.remove()
    return out, found


def error(found, truth):
    return float((found - truth).norm() / truth.norm())


# Transformers, each with its own processors


@models
def test_exact_is_what_the_model_says_and_restored_bit_for_bit(make):
    model, inputs, expected, _ = built(make)
    assert prod(inputs["hidden_states"].shape) >= 4096 * 4
    replacement = replace_attention(model, method="exact")
    try:
        out, _ = said(model, inputs, LAYERS[make])
    finally:
        replacement.restore()
    assert error(out, expected) < 1e-6
    assert replacement.counts == {
        **{Count(name, "exact"): 1 for name in LAYERS[make]},
        **{Count(name, SHORT): 1 for name in LEFT[make]},
    }
    assert torch.equal(said(model, inputs, [])[0], expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@models
def test_estimates_of_what_has_structure_err_little(make):
    model, inputs, expected, attentions = built(make)
    replacement = replace_attention(model, **SMALL)
    try:
        out, found = said(model, inputs, LAYERS[make])
    finally:
        replacement.restore()
    assert 0 < error(out, expected) < 0.01
    for name in LAYERS[make]:
        assert 0 < error(found[name], attentions[name]) < 0.1, name
        tally = replacement.calls.tallies[Count(name, "treecode")]
        assert 128 < tally.keys < 512


def test_layers_have_options_of_their_own():
    model, inputs, _, attentions = built(flux)
    first, second = LAYERS[flux]
    replacement = replace_attention(model, layers={"transformer_blocks.0.*": {"method": "exact"}}, **SMALL)
    try:
        _, found = said(model, inputs, LAYERS[flux])
    finally:
        replacement.restore()
    assert replacement.counts == {Count(first, "exact"): 1, Count(second, "treecode"): 1}
    assert error(found[first], attentions[first]) < 1e-6 < error(found[second], attentions[second])


def test_a_mask_of_the_text_is_honoured():
    """Hidden words reach nothing; without the mask they would."""
    model, inputs, expected, _ = built(hunyuan)
    others = inputs["encoder_hidden_states"].clone()
    others[1, SHOWN:] = 7.0
    inputs = inputs | {"encoder_hidden_states": others}
    unmasked, _ = said(model, inputs | {"encoder_attention_mask": torch.ones_like(MASK)}, [])
    replacement = replace_attention(model, **SMALL)
    try:
        out, _ = said(model, inputs, [])
    finally:
        replacement.restore()
    assert error(out[1], expected[1]) < 0.25 * error(unmasked[1], expected[1])


def test_a_model_compiles_to_one_graph():
    torch.compiler.reset()
    torch.manual_seed(0)
    model, inputs = wan(side=6)
    del model.eval().requires_grad_(False).blocks[1:]
    replacement = replace_attention(model, min_keys=1, method="sortlsh", budget=32)
    expected = model(**inputs, return_dict=False)[0]
    out = torch.compile(model, backend="eager", fullgraph=True)(**inputs, return_dict=False)[0]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert replacement.calls.compiled
    torch.compiler.reset()


# Pipelines


def flux_pipeline():
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8), **SIZES | {"in_channels": 16},
    )  # fmt: skip
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, **blocks)
    pipeline = diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer.requires_grad_(False)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def two_steps(pipeline, side=80):
    """Return latents of two steps, of 1,600 tokens beside 24 of text."""
    return pipeline(
        prompt_embeds=words(), pooled_prompt_embeds=words()[:, 0], height=side, width=side, num_inference_steps=2,
        output_type="latent", generator=torch.manual_seed(0),
    ).images  # fmt: skip


def test_a_pipeline_in_one_line():
    pipeline = flux_pipeline()
    expected = two_steps(pipeline)
    replacement = replace_attention(pipeline, layers={"transformer.single*": {"method": "exact"}}, **SMALL)
    assert 0 < error(two_steps(pipeline), expected) < 0.01
    assert replacement.counts == {
        ("transformer.transformer_blocks.0.attn", "treecode"): 2,
        ("transformer.single_transformer_blocks.0.attn", "exact"): 2,
    }
    # The autoencoder has attention of diffusers too, and is left alone.
    assert pipeline.vae.attn_processors
    assert not any(module._forward_hooks for module in pipeline.vae.modules())
    restore_attention(pipeline)
    assert torch.equal(two_steps(pipeline), expected)


def test_a_pipeline_of_two_models():
    """Wan 2.2 denoises first by one, then by the other."""
    first, inputs = wan(side=8)
    pipeline = diffusers.WanPipeline(
        None, None, None, diffusers.FlowMatchEulerDiscreteScheduler(), first, wan(side=8)[0], boundary_ratio=0.5
    )
    replacement = replace_attention(pipeline, min_keys=1, layers={"transformer_2.*": {"method": "exact"}}, **SMALL)
    for model in (pipeline.transformer, pipeline.transformer_2):
        model(**inputs)
    names = [f"blocks.{i}.attn{j}" for i in (0, 1) for j in (1, 2)]
    assert list(replacement.counts) == [
        # No more keys than the budget: exact too.
        *(Count(f"transformer.{name}", "exact") for name in names),
        *(Count(f"transformer_2.{name}", "exact") for name in names),
    ]


@pytest.mark.parametrize("pattern", ["transformer_blocks.7.*", "transformer_blocks.0.*", 0])
def test_layers_that_a_pipeline_has_not_are_refused(pattern):
    pipeline = flux_pipeline()
    with pytest.raises(OptionError, match=r"layers must name modules of the model, got .*; it has 'transformer\."):
        replace_attention(pipeline, layers={pattern: {}})
    with pytest.raises(OptionError, match=r"layers must name modules of the model, got 'transformer.x'; it has 'pos_embed'"):
        replace_attention(pipeline.transformer, layers={"transformer.x": {}})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipeline.transformer.modules())


@pytest.mark.parametrize(
    "wrong", [None, {"transformer": nn.Linear(3, 3)}, SimpleNamespace(components={"vae": nn.Linear(3, 3)})]
)
def test_what_is_neither_a_module_nor_a_pipeline_is_refused(wrong):
    for call in (replace_attention, restore_attention):
        with pytest.raises(
            OptionError, match="model must be a PyTorch module, or a pipeline of diffusers that has one, got"
        ):
            call(wrong)


# Attention that isn't PyTorch's


@pytest.fixture
def short_flux():
    torch.manual_seed(0)
    model, inputs = flux(side=6)
    return model.eval().requires_grad_(False), inputs


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_another_backend_is_said(short_flux):
    model, inputs = short_flux
    model.transformer_blocks[0].attn.set_attention_backend("flex")
    replacement = replace_attention(model, min_keys=1, method="exact")
    model(**inputs)
    missed = Count("transformer_blocks.0.attn", "none met: FluxAttnProcessor, backend flex")
    assert replacement.counts == {missed: 1, Count("single_transformer_blocks.0.attn", "exact"): 1}
    assert str(replacement).splitlines()[-1].split("  ")[-1] == missed.outcome
    # It is looked at in every call.
    model.transformer_blocks[0].attn.set_attention_backend("native")
    model(**inputs)
    assert replacement.counts[missed] == 1
    assert replacement.counts["transformer_blocks.0.attn", "exact"] == 1
    for copied in (copy.deepcopy(replacement.calls), pickle.loads(pickle.dumps(replacement.calls))):
        assert copied.counts == replacement.counts
    replacement.restore()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_another_backend_everywhere_warns(short_flux):
    model, inputs = short_flux
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        blocks[0].attn.set_attention_backend("flex")
    replacement = replace_attention(model, min_keys=1)
    with pytest.warns(NothingReplaced, match="nor another library's attention"):
        model(**inputs)
    assert sorted(count.layer for count in replacement.counts) == sorted(LAYERS[flux])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_options_that_would_not_hold_with_another_backend_are_refused(short_flux):
    model, inputs = short_flux
    model.single_transformer_blocks[0].attn.set_attention_backend("flex")
    replacement = replace_attention(model, layers={"single*": {"window": 5}})
    with pytest.raises(OptionError, match=r"window must not be given .*, got 5: single_transformer_blocks.0.attn asks Flux"):
        model(**inputs)
    replacement.restore()
    model(**inputs)


def test_a_processor_with_a_softmax_of_its_own_is_said():
    processors = diffusers.models.attention_processor
    attention = processors.Attention(16, heads=2, dim_head=8, processor=processors.AttnProcessor())
    model = nn.Sequential(attention, processors.Attention(16, heads=2, dim_head=8, processor=processors.AttnProcessor2_0()))
    replacement = replace_attention(model, min_keys=1, method="exact")
    model(torch.zeros(1, 40, 16))
    assert replacement.counts == {Count("0", "none met: AttnProcessor"): 1, Count("1", "exact"): 1}
