"""Whether results are what they were, bit by bit: `python -m bench.unchanged [FILE]`, before and after the code is moved.

Calls of every method with every feature in the table of docs/features.md, on NumPy, PyTorch and array-api-strict, and of all
else that users call. FILE has a digest of each result; it is written where there is none yet. Bits depend on the processor's
vectors and on the versions of libraries: digests of another machine say nothing.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import array_api_strict
import numpy as np
import torch

import kdecore
from kdecore.compare.machine import this_machine
from kdecore.kde import log_weighted_exponential_kde
from kdecore.kde.wexpkde import PRIMITIVES
from kdecore.methods.treecode import Treecode
from kdecore.testing import AttentionProblem
from kdecore_adapters.torch_adapter import scaled_dot_product_attention
from tests import features

METHODS = features.METHODS
Call = Callable[[], Any]
LIBRARIES: dict[str, Callable[[Any], Any]] = {
    "numpy": np.asarray,
    "torch": torch.from_numpy,
    "array_api_strict": array_api_strict.asarray,
}
STORED = Path(__file__).parent / "results" / "unchanged.json"


def digest(*arrays: Any) -> str:
    """Return what stands for the bits, shapes and dtypes of arrays."""
    found = sha256()
    for array in arrays:
        host = array.detach() if isinstance(array, torch.Tensor) else array
        host = np.asarray(host.float() if getattr(host, "dtype", None) == torch.bfloat16 else host)
        found.update(f"{host.dtype} {host.shape}".encode())
        found.update(np.ascontiguousarray(host).tobytes())
    return found.hexdigest()[:16]


def arrays_of(example: AttentionProblem, convert: Callable[[Any], Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return an example's rows and options in a library."""
    options = {name: convert(x) if isinstance(x, np.ndarray) else x for name, x in example.options.items()}
    return [convert(x) for x in (example.q, example.k, example.v)], options


def of_features() -> Iterator[tuple[str, Call]]:
    """Yield every method, feature and library, and the call."""
    examples: dict[str, Callable[..., AttentionProblem]] = features.FEATURES
    for feature, make in examples.items():
        example = make(np.random.default_rng(7))
        for library, convert in LIBRARIES.items():
            rows, options = arrays_of(example, convert)
            for method in METHODS:
                settings = {**options, "method": method, "budget": 40, "seed": 3, "return_lse": True}
                yield f"{method}, {feature}, {library}", partial(kdecore.attention, *rows, **settings)


def of_sizes() -> Iterator[tuple[str, Call]]:
    """Yield calls at sizes and dtypes, and with settings, that take other ways through the code."""
    rng = np.random.default_rng(11)
    rows: Any = rng.standard_normal((3, 2, 3000, 32)).astype(np.float32)
    settings: dict[str, dict[str, Any]] = {
        "budget 200": {"budget": 200},
        "causal": {"budget": 200, "causal": True},
        "rtol": {"rtol": 0.3},
        "own keys": {"budget": 200, "diagonal": 0},
    }
    for method in (*(name for name in METHODS if name != "kdeformer"), "auto"):
        for name, options in settings.items():
            yield f"{method}, 3,000 rows, {name}", partial(kdecore.attention, *rows, method=method, **options)
        for dtype in (torch.bfloat16, torch.float16):
            tensors: Any = [torch.from_numpy(x).to(dtype) for x in rows]
            yield f"{method}, 3,000 rows, {dtype}", partial(kdecore.attention, *tensors, method=method, budget=200)
    for treecode in (Treecode(far_field="sample"), Treecode(ordering="sort"), Treecode(block_size=16)):
        yield f"{treecode}", partial(kdecore.attention, *rows, method=treecode, budget=200)
    starts = np.array([0, 1000, 1700, 3000])
    pack: Any = kdecore.packed_attention
    yield "packed", partial(pack, *rows, starts, starts, method="treecode", budget=100, causal=True)


def of_others() -> Iterator[tuple[str, Call]]:
    """Yield calls of an index, of densities, of the operator in models, and gradients."""
    rng = np.random.default_rng(13)
    q, k, v = rng.standard_normal((3, 2, 2500, 16))
    index = kdecore.KeyIndex(k, v, budget=100)
    yield "KeyIndex, a step", partial(index.attend, q[:, :1])
    yield "KeyIndex, a batch", partial(index.attend, q[:, :70], return_lse=True)
    yield "KeyIndex, appended", partial(index.attend_and_append, q[:, :300], k[:, :300], v[:, :300])
    for primitive in PRIMITIVES:
        yield f"densities, {primitive}", partial(log_weighted_exponential_kde, q[0], k[0], primitive=primitive)
    for method in METHODS:
        for causal in (False, True):
            yield f"gradients, {method}, causal={causal}", partial(gradients, q, k, v, method, causal=causal)


def gradients(q: Any, k: Any, v: Any, method: str, *, causal: bool) -> tuple[Any, ...]:
    """Return the gradients of an operator's result in all of its inputs."""
    tensors = [torch.from_numpy(x[:, :700]).requires_grad_() for x in (q, k, v)]
    attend: Any = scaled_dot_product_attention
    out = attend(*(x[None] for x in tensors), method=method, budget=100, is_causal=causal)
    return torch.autograd.grad(out.square().sum(), tensors)


def digests() -> dict[str, str]:
    """Return each call's digest by its name."""
    found = {}
    for name, call in (*of_features(), *of_sizes(), *of_others()):
        result = call()
        found[name] = digest(*(result if isinstance(result, tuple) else (result,)))
    return found


def main() -> int:
    """Compare digests with those of a file, or write it."""
    parser = argparse.ArgumentParser(description="Compare results with stored ones, bit by bit.")
    parser.add_argument("file", nargs="?", type=Path, default=STORED)
    path: Path = parser.parse_args().file
    found: dict[str, Any] = {"machine": this_machine().cpu, "calls": digests()}
    if not path.exists():
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{path}: {len(found['calls'])} results written")
        return 0
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if before["machine"] != found["machine"]:
        print(f"{path} is of {before['machine']}, this is {found['machine']}")
        return 2
    changed = [name for name in before["calls"] | found["calls"] if before["calls"].get(name) != found["calls"].get(name)]
    print("\n".join(changed), f"{len(changed)} of {len(before['calls'])} results changed", sep="\n" if changed else "")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
