"""``attn_implementation="kdecore"``: as ``"sdpa"`` at a full budget, with masks as small as they can be."""

import os
from functools import cache, partial
from itertools import pairwise

import pytest
import torch

from kdecore import OptionError
from kdecore_adapters.torch_adapter import collect_reports
from kdecore_adapters.torch_encoder import POSITION_BIAS
from kdecore_adapters.torch_modules import reroute

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
masks = pytest.importorskip("transformers.masking_utils")
adapter = pytest.importorskip("kdecore_adapters.transformers_adapter")
register = adapter.register

FULL = {"method": "treecode", "budget": 1000, "min_keys": 1}
N = 60
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 400,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5_SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 100, "dropout_rate": 0.0}
BUILD = {
    "bert": lambda t, **o: t.BertModel(t.BertConfig(**SIZES, **o)),
    "llama": lambda t, **o: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, num_key_value_heads=2, **o)),
    "mistral": lambda t, **o: t.MistralForCausalLM(t.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=16, **o)),
    "gpt2": lambda t, **o: t.GPT2LMHeadModel(
        t.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=200, vocab_size=100, bos_token_id=1, eos_token_id=2, **o)
    ),
    "modernbert": lambda t, **o: t.ModernBertModel(
        t.ModernBertConfig(**SIZES, global_attn_every_n_layers=2, local_attention=16, cls_token_id=1, sep_token_id=2, **o)
    ),
    "layoutlm": lambda t, **o: t.LayoutLMModel(t.LayoutLMConfig(**SIZES, **o)),
    "doge": lambda t, **o: t.DogeForCausalLM(t.DogeConfig(**SIZES, num_key_value_heads=2, **o)),
    "t5": lambda t, **o: t.T5Model(t.T5Config(**T5_SIZES, **o)),
    "vit": lambda t, **o: t.ViTModel(
        t.ViTConfig(**{name: SIZES[name] for name in list(SIZES)[:4]}, image_size=48, patch_size=6, **o)
    ),
}
IDS = torch.randint(3, 100, (2, N), generator=torch.Generator().manual_seed(0))
RIGHT = (torch.arange(N) < torch.tensor([N, 40])[:, None]).long()
PADDINGS = {"none": None, "right": RIGHT, "left": RIGHT.flip(1)}
CHECK = {"rtol": 0, "atol": 1e-10}


@cache
def built(name, **options):
    torch.manual_seed(0)
    found = BUILD[name](transformers, **options).double()
    # So that attention is far from uniform, and counts.
    for part, parameter in found.named_parameters():
        if "proj" in part or "attention" in part:
            parameter.data *= 10
    return found


def model(name, implementation="sdpa", **options):
    found = built(name, **options).eval()
    found.zero_grad()
    found.set_attn_implementation(implementation)
    return found


def both(name, **inputs):
    """Return what the model says with kdecore, and with PyTorch's attention."""
    outs = []
    for implementation in ("kdecore", "sdpa"):
        with torch.no_grad():
            outs.append(model(name, implementation)(**inputs)[0])
    return outs


def padded(padding):
    return {} if padding is None else {"attention_mask": padding}


def seen(out, padding):
    return out if padding is None else out[padding.bool()]


# Models, at a full budget


@pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)
@pytest.mark.parametrize("name", ["bert", "llama", "mistral", "gpt2", "modernbert"])
def test_models_say_what_they_say_with_sdpa(name, padding):
    calls = register(**FULL)
    out, expected = both(name, input_ids=IDS, **padded(padding))
    torch.testing.assert_close(seen(out, padding), seen(expected, padding), **CHECK)
    assert calls.counts == {("layer 0", "exact"): 1, ("layer 1", "exact"): 1}


@pytest.mark.parametrize("padding", [RIGHT, RIGHT.flip(1)], ids=["right", "left"])
@pytest.mark.parametrize("name", ["layoutlm", "doge"])
def test_models_with_masks_of_their_own(name, padding):
    """LayoutLM makes small ones, and its layers don't say whether they are causal."""
    register(**FULL)
    out, expected = both(name, input_ids=IDS, attention_mask=padding)
    torch.testing.assert_close(seen(out, padding), seen(expected, padding), **CHECK)


@pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)
def test_encoders_and_decoders_with_a_bias_of_positions(padding):
    """Which PyTorch adds, to the whole mask of a causal decoder too."""
    calls = register(**FULL)
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :50]}
    if padding is not None:
        inputs |= {"attention_mask": padding, "decoder_attention_mask": padding[:, -50:]}
    out, expected = both("t5", **inputs)
    visible = None if padding is None else padding[:, -50:]
    torch.testing.assert_close(seen(out, visible), seen(expected, visible), **CHECK)
    assert {outcome for _, outcome in calls.counts} == {POSITION_BIAS}


def test_a_bias_of_positions_is_left_to_pytorch_in_a_block_too():
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :50]}
    found = model("t5", "sdpa")
    with torch.no_grad():
        expected = found(**inputs)[0]
        with reroute(method="treecode", budget=20, min_keys=1) as met:
            out = found(**inputs)[0]
    assert {outcome for _, outcome in met.counts} == {POSITION_BIAS}
    assert torch.equal(out, expected)


def test_a_vision_transformer():
    calls = register(**FULL)
    out, expected = both("vit", pixel_values=torch.randn(2, 3, 48, 48, dtype=torch.float64))
    torch.testing.assert_close(out, expected, **CHECK)
    assert calls.counts.total() == 2


@pytest.mark.parametrize("kind", [None, "static"])
@pytest.mark.parametrize("padding", [None, PADDINGS["left"]], ids=["none", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_generation_gives_the_same_tokens(name, padding, kind):
    call = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "cache_implementation": kind}
    calls, tokens, scores = register(**FULL), [], []
    for implementation in ("kdecore", "sdpa"):
        found = model(name, implementation).generate(
            IDS, **padded(padding), **call, output_scores=True, return_dict_in_generate=True
        )
        tokens.append(found.sequences)
        scores.append(torch.stack(found.scores))
    assert torch.equal(*tokens)
    torch.testing.assert_close(*scores, **CHECK)
    assert calls.counts[("layer 0", "exact")] == 1
    assert calls.counts[("layer 0", "fewer than 32 queries")] == 7


@pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)
@pytest.mark.parametrize("cuts", [(0, 20, N), (0, 40, 55, N)])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_a_prefill_in_chunks(name, padding, cuts):
    """The last query of a chunk is aligned to its last key, whether it is estimated or too short to be."""
    calls, logits = register(**FULL), []
    for implementation in ("kdecore", "sdpa"):
        found, cached, parts = model(name, implementation), transformers.DynamicCache(config=model(name).config), []
        found.set_attn_implementation(implementation)
        for first, end in pairwise(cuts):
            inputs = padded(None if padding is None else padding[:, :end])
            with torch.no_grad():
                parts.append(found(input_ids=IDS[:, first:end], cache=cached, **inputs).logits)
        logits.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(*(seen(each, padding) for each in logits), **CHECK)
    assert calls.counts[("layer 1", "exact")] == 1


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences(name):
    calls = register(**FULL)
    positions = torch.cat([torch.arange(25), torch.arange(N - 25)])[None]
    out, expected = both(name, input_ids=IDS[:1], position_ids=positions, use_cache=False)
    torch.testing.assert_close(out, expected, **CHECK)
    apart, _ = both(name, input_ids=IDS[:1, 25:])
    torch.testing.assert_close(out[:, 25:], apart, **CHECK)
    assert calls.counts.total() == 4


@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, N, N),
        (2, 4, N, N),
        (2, 1, 1, N),
    ],
    ids=str,
)
def test_masks_of_four_dimensions_are_all_that_hides(shape):
    register(**FULL)
    visible = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
    for name in ("bert", "llama"):
        out, expected = both(name, input_ids=IDS, attention_mask=visible)
        torch.testing.assert_close(out, expected, **CHECK)


def test_what_the_caller_says_of_causality_counts():
    register(**FULL)
    for padding in PADDINGS.values():
        out, expected = both("llama", input_ids=IDS, is_causal=False, **padded(padding))
        torch.testing.assert_close(seen(out, padding), seen(expected, padding), **CHECK)
        causal, _ = both("llama", input_ids=IDS, **padded(padding))
        assert not torch.allclose(seen(out, padding), seen(causal, padding), rtol=0.1)


# Masks


def asked(make, padding, **call):
    """Return the mask that transformers makes, with kdecore and with PyTorch's attention."""
    config, found = transformers.LlamaConfig(**SIZES, sliding_window=16), []
    for implementation in ("kdecore", "sdpa"):
        config._attn_implementation = implementation
        found.append(make(config, torch.zeros(2, N, 32), padding, cache=None, **call))
    return found


@pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)
@pytest.mark.parametrize("make", [masks.create_causal_mask, masks.create_bidirectional_mask])
def test_masks_of_padded_batches_are_small(make, padding):
    register(**FULL)
    found, _ = asked(make, padding)
    if padding is None:
        assert found is None
        found, _ = asked(make, torch.ones(2, N, dtype=torch.int64))
        assert found is None
    else:
        assert torch.equal(found, padding.bool()[:, None, None, :])


@pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)
def test_other_masks_are_those_for_sdpa(padding):
    register(**FULL)
    sliding = asked(masks.create_sliding_window_causal_mask, padding)
    positions = torch.cat([torch.arange(25), torch.arange(N - 25)]).expand(2, N)
    packed = asked(masks.create_causal_mask, None, position_ids=positions)
    union = asked(masks.create_causal_mask, padding, or_mask_function=lambda batch, head, q, k: k < 5)
    for ours, theirs in (sliding, packed, union):
        assert ours.shape == (2, 1, N, N)
        assert torch.equal(ours, theirs)


def test_a_mask_that_must_be_made_is_made():
    """Models that ask for it add something of their own to it."""
    ours, theirs = asked(masks.create_causal_mask, RIGHT, allow_is_causal_skip=False)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("padding", [RIGHT, RIGHT.flip(1), torch.ones_like(RIGHT)], ids=["right", "left", "all"])
def test_masks_of_chunks_are_small_and_those_of_steps_and_what_is_not_aligned_whole(padding):
    visible = padding.bool()
    call = {"batch_size": 2, "kv_length": N, "attention_mask": visible}
    found = adapter.mask(q_length=35, q_offset=N - 35, **call)
    assert torch.equal(found, visible[:, None, None, :])
    for q_length, q_offset in ((1, N - 1), (35, 0), (35, torch.tensor(N - 35))):
        ours, theirs = (make(q_length=q_length, q_offset=q_offset, **call) for make in (adapter.mask, masks.sdpa_mask))
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


def test_a_mask_of_fewer_keys_than_there_are_is_filled_up_as_for_sdpa():
    call = {"batch_size": 2, "q_length": 35, "kv_length": N + 5, "q_offset": N - 30, "attention_mask": RIGHT.bool()}
    assert torch.equal(adapter.mask(**call), masks.sdpa_mask(**call))


def test_keys_that_a_cache_has_forgotten_are_left_out_of_the_mask():
    visible = RIGHT.flip(1).bool()
    found = adapter.mask(batch_size=2, q_length=35, kv_length=50, q_offset=N - 35, kv_offset=N - 50, attention_mask=visible)
    assert torch.equal(found, visible[:, None, None, N - 50 :])


# Options


def test_layers_have_options_of_their_own():
    calls = register(layers={1: {"method": "sortlsh", "seed": 3}}, method="treecode", budget=40, min_keys=1)
    with collect_reports() as reports:
        both("bert", input_ids=IDS)
    assert [(report.method, report.budget) for report in reports] == [("treecode", 40), ("sortlsh", 40)]
    assert calls.counts == {("layer 0", "treecode"): 1, ("layer 1", "sortlsh"): 1}


def test_layers_that_a_model_has_not_are_refused():
    register(layers={0: {"method": "exact"}}, **FULL)
    with pytest.raises(OptionError, match=r"layers must be None for ViT\w*Attention, which has no layer_idx .* got \[0\]"):
        both("vit", pixel_values=torch.randn(2, 3, 48, 48, dtype=torch.float64))
    register(layers={1: {}, 7: {}}, **FULL)
    for name in ("bert", "llama", "gpt2"):
        with pytest.raises(OptionError, match=r"layers must be numbered below 2 for \w+, got \[1, 7\]"):
            both(name, input_ids=IDS)


def test_names_stand_for_options_and_may_be_given_again():
    model("llama")
    first, second = register("kdecore", **FULL), register("kdecore-other", **FULL)
    found = model("llama", "kdecore-other")
    found(input_ids=IDS)
    assert (first.counts.total(), second.counts.total()) == (0, 2)
    third = register("kdecore-other", **FULL)
    found(input_ids=IDS)
    assert (second.counts.total(), third.counts.total()) == (2, 2)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"min_keys": "x"}, "min_keys must be an integer of at least 0, got 'x'"),
        ({"min_keys": -1}, "min_keys must be an integer of at least 0, got -1"),
        ({"min_keys": True}, "min_keys must be an integer of at least 0, got True"),
        ({"layers": {True: {}}}, "layers must be numbered from 0, got True"),
        ({"layers": {-1: {}}}, "layers must be numbered from 0, got -1"),
        ({"layers": {"0": {}}}, "layers must be numbered from 0, got '0'"),
    ],
)
def test_numbers_are_those_that_other_ways_take(wrong, said):
    with pytest.raises(OptionError, match=said):
        register("kdecore-numbers", **wrong)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
def test_names_that_transformers_has_are_refused(name):
    with pytest.raises(OptionError, match="name must not be one that transformers has"):
        register(name, **FULL)


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("small", [False, True])
def test_the_scale_and_the_causality_of_a_layer(scaling, causal, small):
    register(**FULL)
    q, k, v = torch.randn(3, 2, 4, N, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    layer, visible = torch.nn.Module(), RIGHT.bool()[:, None, None, :]
    layer.is_causal = causal
    whole = visible & torch.ones(N, N, dtype=torch.bool).tril() if causal else visible
    little = visible.to(adapter.CAUSAL_TOO) if causal else visible
    for ours, theirs in ((little, whole), (None, None)) if small else ((whole.expand(2, 1, N, N),) * 2,):
        out, expected = (
            transformers.AttentionInterface()[name](layer, q, k, v, hides, scaling=scaling)[0]
            for name, hides in (("kdecore", ours), ("sdpa", theirs))
        )
        torch.testing.assert_close(out, expected, **CHECK)


LITTLE = RIGHT.bool()[:, None, None, :]
DIAGONALS = {
    # Aligned to the first key, as PyTorch has it.
    "causal": (N, True, None, 0, "first query stands at the first key"),
    # Aligned to the last key: a chunk of a prefill, or a whole one.
    "causal, padded": (N, True, LITTLE.to(adapter.CAUSAL_TOO), 0, "last query stands at the last key"),
    "chunk, padded": (35, True, LITTLE.to(adapter.CAUSAL_TOO), N - 35, "last query stands at the last key"),
    "all seen": (N, False, None, None, ""),
    "padded": (N, False, LITTLE, None, ""),
}


@pytest.mark.parametrize("case", DIAGONALS.values(), ids=DIAGONALS)
@pytest.mark.parametrize("diagonal", [None, 0, 3, N - 35])
def test_a_diagonal_holds_or_is_refused(diagonal, case):
    """What a causal model sees is the model's, whatever is asked for."""
    n_q, causal, hides, own, said = case
    register(diagonal=diagonal, **FULL)
    q, k, v = torch.randn(3, 2, 4, N, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    layer = torch.nn.Module()
    layer.is_causal = causal
    call = transformers.AttentionInterface()["kdecore"]
    if said and diagonal not in (None, own):
        with pytest.raises(OptionError, match=f"diagonal must be None where the {said}, got {diagonal}"):
            call(layer, q[:, :, :n_q], k, v, hides)
        return
    with collect_reports() as reports:
        out, _ = call(layer, q[:, :, :n_q], k, v, hides)
    assert [report.diagonal for report in reports] == [own if said else diagonal]
    seen_keys = torch.ones(n_q, N, dtype=torch.bool)
    seen_keys = seen_keys.tril(N - n_q) if causal else seen_keys
    whole = seen_keys if hides is None else seen_keys & LITTLE
    expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, :n_q], k, v, whole).transpose(1, 2)
    torch.testing.assert_close(out, expected, **CHECK)


def test_unknown_options_are_refused_and_nothing_is_registered():
    for call in ({"bugdet": 3}, {"layers": {0: {"bugdet": 3}}}):
        with pytest.raises(OptionError, match="got 'bugdet'"):
            register("kdecore-refused", **call)
    assert "kdecore-refused" not in transformers.AttentionInterface().valid_keys()


@pytest.mark.parametrize("argument", ["softcap", "s_aux", "head_mask"])
def test_arguments_that_would_change_the_result_are_refused(argument):
    register(**FULL)
    q = torch.randn(1, 2, N, 8)
    call = transformers.AttentionInterface()["kdecore"]
    with pytest.raises(OptionError, match=f"{argument} must be None"):
        call(torch.nn.Module(), q, q, q, None, **{argument: torch.ones(2)})
    out, weights = call(torch.nn.Module(), q, q, q, None, **{argument: None})
    assert (out.shape, weights) == ((1, N, 2, 8), None)


# Small budgets


def relative_error(name, padding, ids, **options):
    register(**options)
    found = [seen(out, padding) for out in both(name, input_ids=ids, **padded(padding))]
    return ((found[0] - found[1]).norm() / found[1].norm()).item()


@pytest.mark.parametrize("lengths", [None, [300, 220]], ids=["none", "right"])
@pytest.mark.parametrize(("method", "bound"), [("sortlsh", 0.6), ("treecode", 0.25)])
def test_at_a_small_budget_models_say_nearly_the_same(method, bound, lengths):
    """Uniform attention errs by 1.1, attention that forgets to be causal by 0.8."""
    ids = torch.randint(3, 100, (2, 300), generator=torch.Generator().manual_seed(0))
    padding = None if lengths is None else (torch.arange(300) < torch.tensor(lengths)[:, None]).long()
    options = {"method": method, "budget": 128}
    error = relative_error("llama", padding, ids, min_keys=300, **options)
    assert 1e-3 < error < bound
    assert relative_error("llama", padding, ids, min_keys=301, **options) == 0.0


def test_short_inputs_are_left_to_sdpa_bit_for_bit():
    calls = register(method="sortlsh", budget=20, min_keys=N + 1)
    for name in ("bert", "llama", "mistral", "gpt2"):
        for padding in PADDINGS.values():
            assert torch.equal(*(seen(out, padding) for out in both(name, input_ids=IDS, **padded(padding))))
    assert {outcome for _, outcome in calls.counts} == {f"fewer than {N + 1} keys"}


# Training


def trained(implementation, padding=None, name="llama", **options):
    found = model(name, implementation, **options).train()
    torch.manual_seed(3)
    labels = IDS if padding is None else IDS.masked_fill(padding == 0, -100)
    loss = found(input_ids=IDS, labels=labels, **padded(padding)).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in found.parameters()]


@pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)
def test_gradients_at_a_full_budget_are_those_of_sdpa(padding):
    calls = register(**FULL)
    ours, theirs = (trained(implementation, padding) for implementation in ("kdecore", "sdpa"))
    for found, expected in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert calls.counts == {("layer 0", "exact"): 1, ("layer 1", "exact"): 1}


def test_gradients_flow_at_a_small_budget_and_through_activations_made_again():
    calls = register(method="sortlsh", budget=20, min_keys=1)
    _, plain = trained("kdecore", RIGHT)
    _, exact = trained("sdpa", RIGHT)
    found = model("llama")
    found.activation_checkpointing_enable()
    try:
        _, again = trained("kdecore", RIGHT)
    finally:
        found.activation_checkpointing_disable()
    assert calls.counts[("layer 0", "sortlsh")] == 3
    for ours, same, theirs in zip(again, plain, exact, strict=True):
        torch.testing.assert_close(ours, same, rtol=1e-10, atol=1e-12)
        assert 0 < (same - theirs).norm() < 2 * theirs.norm()


def test_dropout_while_training_is_left_to_pytorch():
    calls = register(**FULL)
    options = {"attention_dropout": 0.2}
    ours, theirs = (trained(implementation, RIGHT, **options) for implementation in ("kdecore", "sdpa"))
    torch.testing.assert_close(ours[0], theirs[0], **CHECK)
    assert calls.counts == {("layer 0", "dropout"): 1, ("layer 1", "dropout"): 1}
    assert ours[0] != model("llama", "sdpa", **options)(input_ids=IDS, labels=IDS, attention_mask=RIGHT).loss


# torch.compile, saving


@pytest.mark.parametrize(
    "padding",
    [
        None,
        RIGHT,
    ],
    ids=["none", "right"],
)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_models_compile_to_one_graph(name, padding):
    register(**FULL)
    torch.compiler.reset()
    expected = model(name)(input_ids=IDS, **padded(padding))[0]
    graph = torch.compile(model(name, "kdecore"), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(seen(graph(input_ids=IDS, **padded(padding))[0], padding), seen(expected, padding), **CHECK)


def test_a_model_that_is_called_again_is_not_compiled_again():
    register(**FULL)
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    graph = torch.compile(model("bert", "kdecore"), backend=backend, fullgraph=True)
    for _ in range(3):
        graph(input_ids=IDS)
    assert len(graphs) == 1


def test_saved_models_know_nothing_of_it(tmp_path):
    register(**FULL)
    found = model("llama", "kdecore")
    expected = found(input_ids=IDS)[0]
    found.save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        assert b"kdecore" not in file.read_bytes()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    torch.testing.assert_close(loaded.eval()(input_ids=IDS)[0], expected, **CHECK)
    calls = register(**FULL)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="kdecore")
    torch.testing.assert_close(again.eval()(input_ids=IDS)[0], expected, **CHECK)
    assert calls.counts.total() == 2


# Without a mask, as where a sequence is sharded (tests/ranks.py): the model's window, and positions, say what a mask would


def asked_alone(*arrays, **said):
    module = torch.nn.Module()
    return transformers.AttentionInterface()["kdecore"](module, *arrays, None, **said)[0].transpose(1, 2)


def rows():
    return torch.randn(3, 2, 4, N, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()


def ascending(*lengths):
    return torch.cat([torch.arange(n) for n in lengths])


PACKED = {
    "each its own": [ascending(20, 40), ascending(60)],
    "one row for all": [ascending(5, 30, 25)],
    "of one token": [ascending(1, 1, 57, 1)],
    "gaps begin none": [torch.cat([3 * torch.arange(20), torch.tensor([0, 7]), 9 + torch.arange(38)])],
    "begin anywhere": [torch.cat([40 + torch.arange(30), 7 + torch.arange(30)])],
}
STARTS = {"each its own": ([20], []), "one row for all": ([5, 35],), "of one token": ([1, 2, 59],)}
STARTS |= {"gaps begin none": ([20],), "begin anywhere": ([30],)}


@pytest.mark.parametrize("case", PACKED)
def test_positions_that_start_anew_are_other_samples_where_that_is_said(case):
    register(packed=True, **FULL)
    q, k, v = rows()
    positions = torch.stack(PACKED[case])
    sample = torch.stack([(torch.arange(N)[:, None] >= torch.tensor(one, dtype=torch.long)).sum(1) for one in STARTS[case]])
    seen = (sample[:, :, None] == sample[:, None, :]).tril()[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
    torch.testing.assert_close(asked_alone(q, k, v, is_causal=True, position_ids=positions), expected, **CHECK)
    whole = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(asked_alone(q, k, v, is_causal=False, position_ids=positions), whole, **CHECK)


@pytest.mark.parametrize("case", PACKED)
def test_positions_hide_nothing_where_nobody_says_so(case, monkeypatch):
    """Nor are they looked at, which would wait for a device."""
    register(**FULL)
    q, k, v = rows()
    monkeypatch.setattr(adapter, "samples_of", None)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    found = asked_alone(q, k, v, is_causal=True, position_ids=torch.stack(PACKED[case]))
    torch.testing.assert_close(found, expected, **CHECK)


@pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("positions", [3 * torch.arange(N), torch.arange(N) + 9, torch.arange(N).clamp(max=30)], ids=str)
def test_models_with_positions_of_their_own(positions, use_cache, padding):
    register(**FULL)
    inputs = {"input_ids": IDS, "position_ids": positions.expand(2, N), "use_cache": use_cache, **padded(padding)}
    out, expected = both("llama", **inputs)
    torch.testing.assert_close(seen(out, padding), seen(expected, padding), **CHECK)


def test_what_can_not_be_told_apart_is_refused():
    register(packed=True, **FULL)
    q, k, v = rows()
    positions, said = (
        torch.arange(N)[None],
        r"position_ids of Module must be \(2, 60\) or \(1, 60\) beside {} queries, got {}",
    )
    for shape, wrong in (("None", None), (r"\(60,\)", positions[0]), (r"\(3, 60\)", positions.expand(3, N))):
        with pytest.raises(OptionError, match=f"^packed must be False .*{said.format(60, shape)}"):
            asked_alone(q, k, v, is_causal=True, position_ids=wrong)
    with pytest.raises(OptionError, match=said.format(35, r"\(1, 35\)")):
        asked_alone(q[:, :, :35], k, v, is_causal=True, position_ids=positions[:, :35])
    with pytest.raises(OptionError, match="packed must be False for Module, whose attention has a position bias"):
        asked_alone(q, k, v, is_causal=True, position_ids=positions, position_bias=torch.zeros(1, 4, N, N))
    with pytest.raises(OptionError, match="packed must be True or False, got 1"):
        register(packed=1, **FULL)


def test_compiled_code_tells_samples_apart_beside_its_graph():
    register(packed=True, **FULL)
    q, k, v = rows()
    positions = ascending(25, N - 25)[None]

    def call(q, positions):
        return 2 * asked_alone(q, k, v, is_causal=True, position_ids=positions)

    torch.compiler.reset()
    compiled = torch.compile(call, backend="aot_eager")
    for one in (positions, ascending(40, N - 40)[None], torch.arange(N)[None]):
        torch.testing.assert_close(compiled(q, one), call(q, one), **CHECK)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="packed=True looks at the values of position_ids"):
        torch.compile(call, backend="aot_eager", fullgraph=True)(q, positions)


def test_a_tolerance_of_a_layer_takes_the_place_of_a_budget_and_a_budget_of_one():
    for given, own in (({"budget": 40}, {"rtol": 0.3}), ({"rtol": 0.3}, {"budget": 40})):
        register(layers={1: own}, method="treecode", min_keys=1, **given)
        with collect_reports() as reports:
            both("llama", input_ids=IDS)
        assert [report.budget == 40 for report in reports] == ["budget" in given, "budget" in own]
    with pytest.raises(OptionError, match=r"layers must give each a mapping of options, got 40 for 1"):
        register("kdecore-numbers", layers={1: 40})


@pytest.mark.parametrize("hides", [None, "CAUSAL_TOO"])
def test_a_diagonal_holds_or_is_refused_in_calls_that_are_left_to_pytorch_too(hides):
    """What an exact result is of is the model's, whoever evaluates it."""
    q, k, v = rows()
    hides = None if hides is None else RIGHT.to(adapter.CAUSAL_TOO)[:, None, None, :]
    for diagonal in (None, 0, 3):
        register(diagonal=diagonal)
        call = partial(transformers.AttentionInterface()["kdecore"], torch.nn.Module(), q, k, v, hides)
        if diagonal == 3:
            with pytest.raises(OptionError, match=r"diagonal must be None where the .*, got 3"):
                call()
        else:
            assert call()[0].shape == (2, N, 4, 8)


@pytest.mark.parametrize("own", [None, 11, 40])
def test_the_models_window_holds_without_a_mask(own):
    register(**FULL, **({} if own is None else {"window": own}))
    q, k, v = torch.randn(3, 2, 4, N, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = torch.ones(N, N, dtype=torch.bool).tril()
    seen &= ~seen.tril(-min(16, own or 16))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
    torch.testing.assert_close(asked_alone(q, k, v, is_causal=True, sliding_window=16), expected, **CHECK)
