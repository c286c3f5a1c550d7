"""`kdecore warmup`: calls that compile the kernels, so that no later call on this machine waits for them."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from kdecore.api.attention import attention
from kdecore.arrays.backend import backend_named, unusable
from kdecore.arrays.scalars import one_of
from kdecore.compare.cases import glove_case
from kdecore.compare.comparison import Progress
from kdecore.kernels.runtime.jit import FOLDERS
from kdecore.methods import METHODS

DTYPES = ("float32", "float64")
WORDS, BUDGET = 4096, 256
"""Long enough that no method falls back on exact attention."""


def check_dtypes(dtypes: Sequence[str]) -> None:
    """Raise `OptionError` for a dtype that kernels don't compute in."""
    for dtype in dtypes:
        one_of(DTYPES, "dtypes", dtype)


def warm_up(dtypes: Sequence[str], progress: Progress) -> Iterator[str]:
    """Compile the kernels of all methods in each dtype, and yield a line when a step is done.

    Raises
    ------
    OptionError
        A dtype that kernels don't compute in, before anything is compiled.
    """
    check_dtypes(dtypes)
    steps = [(f"{name}, {dtype}", call) for dtype in dtypes for name, call in _calls(dtype).items()]
    for done, (label, call) in enumerate(steps):
        progress(done, len(steps), label)
        started = time.perf_counter()
        call()
        yield f"{label}: {time.perf_counter() - started:.1f} s"
    progress(len(steps), len(steps), "done")


def kept_in() -> str:
    """Return a sentence that says where compiled kernels are kept, and until when."""
    if not FOLDERS:
        return "No folder can be written: each process compiles anew. NUMBA_CACHE_DIR names another folder."
    return (
        f"Kept in {os.path.commonpath(FOLDERS)}, for every process, until kdecore, Numba or the processor changes. "
        "NUMBA_CACHE_DIR names another folder."
    )


def _calls(dtype: str) -> dict[str, Callable[[], object]]:
    """Return what to call, by its name; PyTorch's tensors take NumPy's kernels, and more only for gradients."""
    words = glove_case(WORDS)
    arrays = [x.astype(dtype) for x in (words.q, words.k, words.v)]
    attend = partial(attention, *arrays, scale=words.scale, diagonal=0)
    calls: dict[str, Callable[[], object]] = {
        name: partial(_both, partial(attend, method=name, **({} if name == "exact" else {"budget": BUDGET})))
        for name in METHODS
        if name != "auto"
    }
    calls["rtol=0.05"] = partial(attend, rtol=0.05)
    if unusable("torch") is None:
        calls["a training step in PyTorch"] = partial(_train, arrays, words.scale)
    return calls


def _both(attend: Callable[..., object]) -> None:
    """Attend to all keys, and to those before."""
    attend(return_report=True)
    attend(causal=True)


def _train(arrays: Sequence[Any], scale: float | None) -> None:
    pytorch = backend_named("torch")
    tensors = [pytorch.from_numpy(x).requires_grad_() for x in arrays]
    attention(*tensors, scale=scale, method="treecode", budget=BUDGET).sum().backward()
