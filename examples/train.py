"""Train with estimated attention: something to look up among 1,024 tokens.

Each of four marks has a random value, and every token shows a mark with its value; the last one asks for the value of one
mark. Only attention can carry it there.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdecore_adapters.torch_encoder import KDEAttention

TOKENS, WIDTH, MARKS, VALUES, STEPS = 1024, 64, 4, 4, 50


class Finder(nn.Module):
    """Embeddings, one layer of attention, and a classifier of the last token's state."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.embed = nn.Embedding(MARKS * VALUES + MARKS, WIDTH)
        self.attention = KDEAttention(WIDTH, num_heads=2, batch_first=True, **options)
        self.classify = nn.Linear(WIDTH, VALUES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, (batch, VALUES), of tokens, (batch, TOKENS)."""
        x = self.embed(tokens)
        y, _ = self.attention(x, x, x)
        return self.classify((x + y)[:, -1])


def batch(generator: torch.Generator, size: int = 8) -> tuple[Tensor, Tensor]:
    """Return tokens and the values asked for: token mark · VALUES + value, and MARKS · VALUES + mark to ask."""
    values = torch.randint(VALUES, (size, MARKS), generator=generator)
    marks = torch.randint(MARKS, (size, TOKENS), generator=generator)
    tokens = marks * VALUES + values.gather(1, marks)
    asked = torch.randint(MARKS, (size, 1), generator=generator)
    tokens[:, -1:] = MARKS * VALUES + asked
    return tokens, values.gather(1, asked)[:, 0]


def main() -> None:
    """Train, and test with estimated and exact attention."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Finder(method="treecode", budget=64)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        tokens, wanted = batch(generator)
        loss = functional.cross_entropy(model(tokens), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 10 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss.item():.3f}")
    exact = Finder(method="exact")
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        tokens, wanted = batch(generator, 64)
        for name, one in (("estimated", model), ("exact", exact)):
            print(f"{name} attention finds {(one(tokens).argmax(1) == wanted).float().mean():.0%}")


if __name__ == "__main__":
    main()
