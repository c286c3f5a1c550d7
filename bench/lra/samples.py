"""What tasks hand to training: tokens, how many of them count, and labels; and the folder that they are kept in."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Token sequences with labels.

    Attributes
    ----------
    tokens
        (n, parts, length) uint8, 0 for padding at the end; two parts where pairs are compared, else one.
    lengths
        (n, parts) int64: tokens that count, 1 or more.
    labels
        (n,) int64.
    """

    tokens: Tensor
    lengths: Tensor
    labels: Tensor

    def __getitem__(self, index: slice | Tensor) -> "Samples":
        return Samples(self.tokens[index], self.lengths[index], self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Splits:
    """Examples to train with, to choose a checkpoint with, and to test with; none is in two of them."""

    train: Samples
    dev: Samples
    test: Samples


def packed(sequences: list[list[bytes]], labels: list[int], length: int) -> Samples:
    """Return sequences, as many to an example as its list has, cut or padded to a length."""
    tokens = np.zeros((len(sequences), len(sequences[0]), length), dtype=np.uint8)
    for i, parts in enumerate(sequences):
        for j, part in enumerate(parts):
            tokens[i, j, : len(part)] = np.frombuffer(part[:length], dtype=np.uint8)
    lengths = [[min(len(part), length) for part in parts] for parts in sequences]
    return Samples(torch.from_numpy(tokens), torch.tensor(lengths), torch.tensor(labels))


def split(examples: Samples, counts: tuple[int, int, int]) -> Splits:
    """Return the first so many, the next, and the next.

    Raises
    ------
    ValueError
        There are fewer examples.
    """
    if len(examples) < sum(counts):
        raise ValueError(f"examples must be {len(examples)} at most in all, got {' + '.join(map(str, counts))}")
    first, second, third = np.cumsum(counts).tolist()
    return Splits(examples[:first], examples[first:second], examples[second:third])


def cache_folder() -> Path:
    """Return where data, packages and checkpoints are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kdecore" / "lra"


def kept(path: Path, make: Callable[[], Samples]) -> Samples:
    """Return a file's examples; where there is none, make them and write it."""
    if not path.exists():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez_compressed(part, tokens=made.tokens, lengths=made.lengths, labels=made.labels)
        part.replace(path)
    with np.load(path) as file:
        return Samples(*(torch.from_numpy(file[name]) for name in ("tokens", "lengths", "labels")))
