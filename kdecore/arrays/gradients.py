"""Automatic differentiation, of libraries that have it: whether it goes on, what is cut off from it, what it must see."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import array_api_compat

from kdecore.arrays.backend import backend_of
from kdecore.arrays.errors import OptionError
from kdecore.arrays.namespace import Array, namespace_of


def check_not_traced(array: Array, kernels: str) -> None:
    """Raise `OptionError` where PyTorch traces operations, and kernels are others, whose results a trace would keep."""
    if kernels != "array-api" and array_api_compat.is_torch_array(array) and backend_of(array).operations_traced():
        raise OptionError(
            f'kernels must be "array-api" where torch.compile or torch.jit traces operations, got {kernels!r}; '
            "the adapter's scaled_dot_product_attention is an operation itself, with any kernels"
        )


def without_gradient(array: Array) -> Array:
    """Return the array cut off from automatic differentiation, where its library has it."""
    return array.detach() if hasattr(array, "detach") else array


def gradient_mode(*arrays: Array) -> str:
    """Return ``"reverse"`` or ``"forward"`` where the library differentiates what is done with the arrays, else ""."""
    return backend_of(arrays[0]).gradient_mode(*arrays)


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Make arrays that are kept for later calls: what PyTorch makes in inference mode could not be recorded in these.

    Gradients are recorded in this context where they were outside of it.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def recording() -> Iterator[None]:
    """Record what is made of PyTorch tensors whose gradients are recorded, also where a caller records nothing."""
    torch = sys.modules.get("torch")
    with nullcontext() if torch is None else torch.enable_grad():
        yield


def recorded(result: Array, *inputs: Array | None) -> Array:
    """Return a result that records gradients where an input does: they are 0 where it depends on none of them."""
    some = [x for x in inputs if x is not None and gradient_mode(x)]
    if not some or gradient_mode(result):
        return result
    xp = namespace_of(result)
    # Sums of no numbers are 0 whatever the inputs hold.
    return result + sum(xp.sum(x[..., :0]) for x in some)
