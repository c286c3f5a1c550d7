"""Ask for kdecore in a Hugging Face model: a causal decoder with grouped heads, a padded batch, and a cache.

The model has random weights, so that nothing is downloaded; with ``from_pretrained`` the one line is
``attn_implementation="kdecore"``.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdecore_adapters.transformers_adapter import register

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 500}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=4096)).eval()
tokens = torch.randint(500, (2, 2000))
seen = torch.arange(2000) >= torch.tensor([[0], [500]])  # the second sample is padded on the left

calls = register("kdecore", method="treecode", budget=256, layers={0: {"budget": 512}})
states = {}
for name in ("sdpa", "kdecore"):
    model.set_attn_implementation(name)
    with torch.no_grad():
        states[name] = model.model(tokens, attention_mask=seen.long()).last_hidden_state[seen]
error = (states["kdecore"] - states["sdpa"]).norm() / states["sdpa"].norm()
print(f"states of the last layer are within {error:.4f} of exact ones")

model.generate(tokens, attention_mask=seen.long(), max_new_tokens=5, do_sample=False, pad_token_id=0)
print(calls)
