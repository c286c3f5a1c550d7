"""Numba CUDA kernels in Numba's simulator: in a process of their own, since the simulator is chosen when Numba is imported.

`tests/test_cuda.py` starts it. A simulated thread takes a fraction of a millisecond: thread blocks are tiny here, and rows
few.
"""

import importlib
from pathlib import Path

import array_api_compat.numpy
import array_api_compat.torch
import numpy as np
import pytest
from numba import config

from kdecore import kernels
from tests.poison import poisoned

assert config.ENABLE_CUDASIM, "these tests are for NUMBA_ENABLE_CUDASIM=1"

THREADS = 8


def pytest_collection_modifyitems(items):
    for item in items:
        # NumPy warns where a device doesn't.
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


@pytest.fixture(autouse=True)
def tiny_blocks(monkeypatch):
    """Make the thread blocks of every kernel tiny, so that few rows need several."""
    for path in sorted(Path(kernels.__path__[0]).glob("*/cuda.py")):
        module = importlib.import_module(f"kdecore.kernels.{path.parent.name}.cuda")
        for name, value in getattr(module, "TINY", {"THREADS": THREADS}).items():
            assert getattr(module, name) > value
            monkeypatch.setattr(module, name, value)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Let empty arrays of NumPy and PyTorch be poisoned."""
    for xp in (array_api_compat.numpy, array_api_compat.torch):
        monkeypatch.setattr(xp, "empty", poisoned(xp.empty))


@pytest.fixture
def rng():
    return np.random.default_rng(20230702)
