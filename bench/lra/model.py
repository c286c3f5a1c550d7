"""The network that Long Range Arena is compared with at equal size: two layers of width 64, two heads, and a mean."""

import torch
from torch import Tensor, nn

from bench.lra.attention import Attend

WIDTH, HIDDEN, HEADS, LAYERS = 64, 128, 2, 2
DROPOUT, SPREAD = 0.1, 0.02
"""Part of outputs that training leaves out, and the deviation of embeddings' first values."""


class Block(nn.Module):
    """Attention and two linear layers, each behind a norm and beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.joined = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(DROPOUT)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(HIDDEN, WIDTH), nn.Dropout(DROPOUT)
        )

    def forward(self, x: Tensor, lengths: Tensor, attend: Attend, seed: int) -> Tensor:
        """Return x, (batch, n, 64), with both added."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.dropout(self.joined(attend(q, k, v, lengths, seed).transpose(1, 2).flatten(2)))
        added: Tensor = self.mlp(self.norms[1](x))
        return x + added


class Classifier(nn.Module):
    """Tokens and learned positions, two blocks, and a head on the mean.

    Of pairs it gets both means, their product and their difference. The mean is over the padded length, padding being zero,
    as in the published program.
    """

    def __init__(self, vocabulary: int, length: int, classes: int, parts: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(length, WIDTH)
        for embedding in (self.words, self.positions):
            nn.init.normal_(embedding.weight, std=SPREAD)
        self.dropout = nn.Dropout(DROPOUT)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH)
        self.head = nn.Sequential(nn.Linear(WIDTH * parts**2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes))

    def forward(self, tokens: Tensor, lengths: Tensor, attend: Attend, seed: int) -> Tensor:
        """Classify.

        Parameters
        ----------
        tokens
            (batch, parts, length) uint8.
        lengths
            (batch, parts) int64.
        attend
            The attention of both layers.
        seed
            Of the first layer's random numbers; the second has the next.

        Returns
        -------
        Tensor
            Logits (batch, classes).
        """
        flat, counted = tokens.flatten(0, 1), lengths.flatten()
        # What all sequences are padded with changes nothing.
        flat = flat[:, : int(counted.max())]
        x = self.dropout(self.words(flat.long()) + self.positions.weight[: flat.shape[1]])
        for layer, block in enumerate(self.blocks):
            x = block(x, counted, attend, seed + layer)
        there = torch.arange(flat.shape[1], device=x.device) < counted[:, None]
        means = self.norm(x).masked_fill(~there[..., None], 0.0).sum(1) / tokens.shape[2]
        if tokens.shape[1] == 2:
            one, other = means.unflatten(0, (-1, 2)).unbind(1)
            means = torch.cat([one, other, one * other, one - other], dim=1)
        logits: Tensor = self.head(means)
        return logits
