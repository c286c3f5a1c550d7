"""PyTorch: the functions that every adapter has, and its exact attention."""

from typing import Any

import numpy as np
import torch


def version() -> str:
    """Return PyTorch's version."""
    return str(torch.__version__)


def unusable() -> str | None:
    """Return why no device can be used, or None where one can."""
    return None


def devices() -> list[str]:
    """Return the names of the devices that arrays can lie on."""
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return ["cpu", *(f"cuda:{index}" for index in cuda)]


def threads() -> int | None:
    """Return how many threads the library uses on the CPU; None where it doesn't tell."""
    return torch.get_num_threads()


def records_gradients(*tensors: Any) -> bool:
    """Return whether PyTorch is recording what is done with any of the tensors, for either mode of differentiation."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    unpack: Any = torch.autograd.forward_ad.unpack_dual
    return any(unpack(tensor).tangent is not None for tensor in tensors)


def to_numpy(array: Any) -> Any:
    """Return a NumPy array: a view of a tensor on the CPU, a copy of any other; bfloat16 becomes float32."""
    tensor = array.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.to(torch.float32)
    return tensor.cpu().numpy()


def from_numpy(array: Any, device: str | None = None) -> Any:
    """Return a NumPy array as a tensor, on the CPU without a copy where PyTorch can share the memory."""
    # PyTorch cannot share negative strides, and would let read-only memory be written to.
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array).to(device or "cpu")


def synchronize() -> None:
    """Wait until all work on the current device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def scaled_dot_product_attention(q: Any, k: Any, v: Any, scale: float) -> Any:
    """Return exact attention by PyTorch's fused kernels, what one would otherwise call; without gradients.

    Parameters
    ----------
    q, k, v
        (…, n_q, d), (…, n_k, d), (…, n_k, d_v): tensors, or NumPy arrays, which are shared and not copied.
    scale
        Factor on ⟨q, k⟩.

    Returns
    -------
    Array
        (…, n_q, d_v), a tensor for tensors and a NumPy array for NumPy arrays. O(n_q n_k (d + d_v)) time; no n_q × n_k
        array is made where PyTorch has a fused kernel for the dtype and device.
    """
    from_host = isinstance(q, np.ndarray)
    if from_host:
        q, k, v = from_numpy(q), from_numpy(k), from_numpy(v)
    lead, d, d_v = q.shape[:-2], q.shape[-1], v.shape[-1]

    # The fused kernels want (batch, heads, n, d) and d_v = d; zero columns change neither logits nor the other values.
    def fused_form(x: Any) -> Any:
        padded = torch.nn.functional.pad(x, (0, max(d, d_v) - x.shape[-1])) if d != d_v else x
        return padded.reshape(1, -1, *padded.shape[-2:])

    with torch.no_grad():
        out = torch.nn.functional.scaled_dot_product_attention(fused_form(q), fused_form(k), fused_form(v), scale=scale)
        out = out[..., :d_v].reshape(*lead, q.shape[-2], d_v)
    return to_numpy(out) if from_host else out
