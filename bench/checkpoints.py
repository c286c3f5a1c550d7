"""Weights of PyTorch models: named tensors read from a file without running what it holds, and held against shapes."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

NAMED = 3
"""Keys of each kind that an error names; it counts the others."""


def read(path: Path) -> dict[str, Any]:
    """Return the dictionary that `torch.save` wrote, on the CPU.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        It is no such file, or holds objects other than tensors, numbers, text and their containers, which are never loaded.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} must be a file of tensors that torch.save wrote, without other objects; got: {reason}"
        ) from None
    if not isinstance(held, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors, got {type(held).__name__}")
    return held


def checked(held: Mapping[str, Any], shapes: Shapes, name: str) -> Weights:
    """Return weights in float32, of exactly the keys and shapes that a model has.

    Parameters
    ----------
    held
        Key → tensor.
    shapes
        Key → shape, of the model.
    name
        What the weights are called in an error: their file.

    Raises
    ------
    ValueError
        Keys are missing, unknown or of another shape: each kind is named.
    """
    wrong = [
        f"{key} {found(held[key])} instead of {shape}"
        for key, shape in shapes.items()
        if key in held and found(held[key]) != shape
    ]
    kinds = {
        "missing": [key for key in shapes if key not in held],
        "unknown": [str(key) for key in held if key not in shapes],
        "of another shape": wrong,
    }
    if faults := [f"{len(keys)} {kind} ({listed(keys)})" for kind, keys in kinds.items() if keys]:
        raise ValueError(f"{name} must hold the model's {len(shapes)} keys; got {'; '.join(faults)}")
    return {key: held[key].float() for key in shapes}


def found(value: Any) -> tuple[int, ...] | str:
    """Return a tensor's shape, or what else a value is."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def listed(keys: list[str]) -> str:
    """Return the first keys of a list."""
    return ", ".join(keys[:NAMED]) + (", …" if len(keys) > NAMED else "")
