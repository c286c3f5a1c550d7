"""Switch a PyTorch model's attention over, see what was estimated, and what it costs in accuracy.

The model is PyTorch's own encoder with random weights, its input 6,000 word vectors: two samples, one of them padded.
"""

import torch
from torch import nn

from kdecore.compare.cases import glove_case
from kdecore_adapters.torch_adapter import collect_reports
from kdecore_adapters.torch_modules import replace_attention

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(100, nhead=4, dim_feedforward=200, batch_first=True)
model = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False).eval()
words = torch.from_numpy(glove_case(6000).q).reshape(2, 3000, 100)
padding = torch.arange(3000) >= torch.tensor([[3000], [2200]])

with torch.no_grad():
    exact = model(words, src_key_padding_mask=padding)
    replacement = replace_attention(model, method="treecode", budget=256, layers={"layers.0*": {"budget": 384}})
    with collect_reports() as reports:
        found = model(words, src_key_padding_mask=padding)
    short = model(words[:, :200])
    replacement.restore()

print(replacement)
for report in reports:
    print(f"{report.method}, {report.keys_per_query:.0f} keys a query, error {report.certificate.frobenius:.3f}")
seen = ~padding
print(f"states of the last layer are within {(found - exact)[seen].norm() / exact[seen].norm():.4f} of exact ones")
