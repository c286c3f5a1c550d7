"""Rows of every dtype that kernels read, for the simulator; bfloat16 as PyTorch has it."""

import array_api_compat.numpy
import array_api_compat.torch
import numpy as np
import torch

DTYPES = ("float16", "bfloat16", "float32", "float64")


def stored(rows, dtype):
    """Return a namespace, rows in it of a dtype, and the same numbers in float64."""
    if dtype == "bfloat16":
        found = torch.tensor(np.asarray(rows, dtype=np.float32)).to(torch.bfloat16)
        return array_api_compat.torch, found, found.to(torch.float64).numpy()
    found = np.asarray(rows, dtype=dtype)
    return array_api_compat.numpy, found, found.astype(np.float64)
